"""Tables beyond the device in one process: the very course of a run that holds them whole."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engram.config import Config, ConfigError, UserError
from engram.config_file import merge
from engram.data.loader import Batch, Loader
from engram.model.transformer import Transformer
from engram.training import tensor_files
from engram.training.checkpoint import load_model, model_of, open_checkpoint
from engram.training.metrics import read_metrics
from engram.training.trainer import Exit, Trainer

MakeConfig = Callable[..., Config]

# The two tables have some 3,700 rows each, in 6 heads; a step of 128 tokens reads 768 of each at most.
CACHE = 768


def settings(tier: str | None, kind: str = "row_adam", dtype: str = "float32", **train: Any) -> dict[str, Any]:
    return {
        "model": {"memory": {"table_dtype": dtype, "rows_per_head": 611, "layer_ids": [0, 1]}},
        "optim": {"table": {"kind": kind}, "clip_norm": 0.5},
        "train": {"tables": tier and {"tier": tier, "cache_rows": CACHE}, **train},
        "eval": {"batch_size": 3},
    }


def course(config: Config) -> list[dict[str, Any]]:
    lines = copy.deepcopy(read_metrics(Path(config.run_dir) / "metrics.jsonl"))
    return [{key: line.get(key) for key in ("step", "loss", "grad_norm", "val_loss")} for line in lines]


def assert_same_state(one: Config, other: Config) -> None:
    for kind in ("model", "optim"):
        ours, theirs = (open_checkpoint(each.run_dir).tensors(kind) for each in (one, other))
        assert ours.shapes() == theirs.shapes()
        assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


@pytest.mark.parametrize("tier", ["host", "file"])
@pytest.mark.parametrize(("kind", "dtype"), [("row_adam", "float32"), ("rowwise_adagrad", "bfloat16")])
def test_a_cached_table_trains_as_a_whole_one(make_config: MakeConfig, tier: str, kind: str, dtype: str) -> None:
    # Micro-batches read parts of what a step staged; evaluations of three rows stage other rows in between.
    whole, cached = (
        make_config(name, **settings(which, kind, dtype, micro_batch_size=2, eval_every=2))
        for name, which in (("whole", None), ("cached", tier))
    )
    for config in (whole, cached):
        assert Trainer(config).fit() is Exit.DONE
    assert course(whole) == course(cached)
    assert_same_state(whole, cached)
    rates = [line["tables/hit_rate"] for line in read_metrics(Path(cached.run_dir) / "metrics.jsonl")]
    # Nothing is there at first; later, some rows of earlier steps still are.
    assert rates[0] == 0 and 0.05 < min(rates[1:]) < max(rates) < 1


def test_an_evaluation_does_not_count_as_a_step(make_config: MakeConfig) -> None:
    rates = []
    for name, often in (("seldom", 9), ("often", 2)):
        config = make_config(name, **settings("host", eval_every=often, stop_after=3, log_every=1))
        assert Trainer(config).fit() is Exit.DONE
        rates.append([line["tables/hit_rate"] for line in read_metrics(Path(config.run_dir) / "metrics.jsonl")])
    # The evaluation after the second step leaves the third step another cache.
    assert rates[0][:2] == rates[1][:2]


def test_a_run_goes_on_in_another_tier(make_config: MakeConfig) -> None:
    whole = make_config("whole", **settings(None))
    assert Trainer(whole).fit() is Exit.DONE
    for tier, stop in (("host", 3), (None, 6), ("file", None)):
        moving = make_config("moving", **settings(tier, stop_after=stop))
        assert Trainer(moving).fit() is Exit.DONE
    assert course(whole) == course(moving)
    assert_same_state(whole, moving)


def test_batches_are_hashed_once(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed, hash_ids = [], Transformer.hash_ids

    def counted(model: Transformer, tokens: torch.Tensor, *others: Any) -> Any:
        hashed.append(tokens)
        return hash_ids(model, tokens, *others)

    monkeypatch.setattr(Transformer, "hash_ids", counted)
    counts = []
    for tier in (None, "host"):
        hashed.clear()
        Trainer(make_config(str(tier), **settings(tier, stop_after=4, eval_every=9))).fit()
        counts.append(len(hashed))
    # Of its own the model hashes as often; beside that, each batch once, one of them for a step that never comes.
    assert counts[1] - counts[0] == 5


def test_a_bad_token_of_the_next_batch_is_told_as_one_of_this(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its rows are asked for a step ahead."""

    def peek(loader: Loader) -> Batch:
        batch = honest(loader)
        if loader.state_dict()["batch"] == 2:
            batch.tokens[0, 0] = 384
        return batch

    honest = Loader.peek
    monkeypatch.setattr(Loader, "peek", peek)
    with pytest.raises(UserError, match="a shard holds token 384, but model.vocab_size is 384"):
        Trainer(make_config(**settings("host"))).fit()


def test_state_of_another_shape_is_refused(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Trainer(make_config(**settings("host", stop_after=3))).fit() is Exit.DONE
    shapes = tensor_files.TensorFiles.shapes

    def cut(self: tensor_files.TensorFiles) -> dict[str, tuple[int, ...]]:
        return {
            name: (shape[0] - 1, *shape[1:]) if "embed.weight/" in name else shape
            for name, shape in shapes(self).items()
        }

    monkeypatch.setattr(tensor_files.TensorFiles, "shapes", cut)
    with pytest.raises(UserError, match=r"the saved blocks\.0\.memory\.embed\.weight/.* but this model needs"):
        Trainer(make_config(**settings("host"))).fit()


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"train": {"tables": {"cache_rows": 700}}}, r"cache_rows is 700, but a step of 128 tokens may read 768 rows"),
        ({"train": {"tables": {"tier": "file"}, "async_checkpoints": True}}, "copies all rows .* into host memory"),
        ({"eval": {"batch_size": 7}}, r"a batch of an evaluation of 224 tokens may read 1344 rows .* eval.batch_size"),
    ],
)
def test_a_cache_that_a_step_may_overflow(make_config: MakeConfig, changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        Trainer(make_config(**merge(settings("host"), changes))).fit()


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        (settings("host", "sinkhorn"), "optim.table.kind sinkhorn moves all rows in every step: use row_adam"),
        (settings("file", "dense_adam"), "optim.table.kind dense_adam moves all rows"),
        (
            settings("host") | {"model": {"memory": None}},
            "the model has no tables .model.memory is null.: set train.tables to null",
        ),
    ],
)
def test_settings_that_do_not_go_together(make_config: MakeConfig, changes: dict[str, Any], complaint: str) -> None:
    config = make_config(**changes)
    with pytest.raises(ConfigError, match=complaint):
        Trainer(config).fit()
    assert not list(Path(config.run_dir).glob("step_*"))


def test_files_leave_nothing_behind(make_config: MakeConfig, tmp_path: Path) -> None:
    changes = settings("file", stop_after=2)
    changes["train"]["tables"]["folder"] = str(tmp_path / "rows")
    assert Trainer(make_config(**changes)).fit() is Exit.DONE
    assert [path for path in (tmp_path / "rows").rglob("*") if path.is_file()] == []


def test_a_folder_that_cannot_be_written(make_config: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "rows").write_text(json.dumps("mine"))
    changes = settings("file")
    changes["train"]["tables"]["folder"] = str(tmp_path / "rows")
    with pytest.raises(UserError, match=r"train.tables: .*rows cannot hold [1-9][0-9,]* bytes .*choose another"):
        Trainer(make_config(**changes)).fit()


@pytest.mark.parametrize("tier", [None, "file"])
def test_a_model_that_leaves_its_tables_in_the_checkpoint(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, tier: str | None
) -> None:
    # Pieces of 32 rows each, and files of a few of them.
    monkeypatch.setattr(tensor_files, "SLICE_BYTES", 1024)
    monkeypatch.setattr(tensor_files, "FILE_BYTES", 40_000)
    config = make_config(**settings(tier, stop_after=3))
    assert Trainer(config).fit() is Exit.DONE
    checkpoint = open_checkpoint(config.run_dir)
    assert (len(list(checkpoint.folder.glob("model-*.safetensors"))) > 3) == (tier == "file")
    left, loaded = model_of(checkpoint, "file"), load_model(config.run_dir)
    names = {name for name, _ in loaded.named_parameters()} - {name for name, _ in left.named_parameters()}
    assert names == {"blocks.0.memory.embed.weight", "blocks.1.memory.embed.weight"}
    tokens = torch.randint(0, config.model.vocab_size, (3, 30))
    documents = torch.arange(30).div(7, rounding_mode="floor").expand(3, 30)
    with torch.no_grad():
        assert torch.equal(left(tokens), loaded(tokens))
        assert torch.equal(left(tokens, documents), loaded(tokens, documents))
