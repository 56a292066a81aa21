"""Loading: the very model that was saved, or a message that says what does not fit."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engram.config import Config, parse_config
from engram.data.tokenizer import load_tokenizer
from engram.model.transformer import Transformer
from engram.training.checkpoint import CheckpointError, hash_recipe, load_model, open_checkpoint
from engram.training.files import sha256
from engram.training.trainer import Trainer
from tests.training.conftest import config_tree

MakeConfig = Callable[..., Config]


@pytest.fixture(scope="module")
def trained(data: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of three steps."""
    run_dir = tmp_path_factory.mktemp("runs") / "trained"
    tree = config_tree(data, corpus, run_dir)
    tree["train"] |= {"steps": 3, "checkpoint_every": 2}
    Trainer(parse_config(tree)).fit()
    return run_dir


@pytest.fixture
def run_dir(trained: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(trained, tmp_path / "copy", symlinks=True))


def rewrite(folder: Path, name: str, change: Callable[[Path], None]) -> None:
    """Change a file and make its checksum right again."""
    change(folder / name)
    checksums = json.loads((folder / "checksums.json").read_text())
    checksums[name] = sha256(folder / name)
    (folder / "checksums.json").write_text(json.dumps(checksums))


def test_run_folder_pointer_and_step_folder_give_the_same_model(trained: Path) -> None:
    saved = load_file(trained / "step_000003" / "model.safetensors")
    for path in (trained, trained / "latest", str(trained / "step_000003")):
        model = load_model(path)
        state = model.state_dict()
        assert state.keys() == saved.keys()
        assert [name for name in saved if not torch.equal(state[name], saved[name])] == []
        assert not model.training and model.compute_dtype == torch.float32
    older = load_model(trained / "step_000002")
    assert not torch.equal(older.head.weight, model.head.weight)


def test_a_checkpoint_alone_predicts_as_the_trained_model(trained: Path, data: Path, tmp_path: Path) -> None:
    """Nothing but its folder is needed: config, vocabulary map and tokenizer are inside."""
    alone = Path(shutil.copytree(trained / "step_000003", tmp_path / "anywhere"))
    checkpoint, model = open_checkpoint(alone), load_model(alone)
    tokenizer = checkpoint.tokenizer()
    assert tokenizer.digest == load_tokenizer(data).digest
    assert checkpoint.vocabulary().digest == model.vocabulary.digest == hash_recipe(model)["vocabulary"]
    # The map is a real compression, not the identity that a model is built with by default.
    assert model.vocabulary.size < len(model.vocabulary.table)
    tokens = torch.tensor([tokenizer.encode("ba ke lo mi nu")])
    reference = Transformer(checkpoint.config.model, checkpoint.vocabulary()).eval()
    reference.load_state_dict(load_file(alone / "model.safetensors"))
    assert torch.equal(model(tokens), reference(tokens))


def test_paths_that_hold_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere: does not exist: give a run folder"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        load_model(tmp_path)


def test_another_hash_recipe_is_refused(run_dir: Path) -> None:
    """As if the multipliers were drawn otherwise than when the model was trained."""

    def drift(path: Path) -> None:
        state = json.loads(path.read_text())
        state["hash_recipe"]["memory"] = "0" * 64
        path.write_text(json.dumps(state))

    rewrite(run_dir / "latest", "state.json", drift)
    with pytest.raises(CheckpointError, match=r"state\.json: the hash recipe of memory was 0000.*other rows"):
        load_model(run_dir)


def test_another_vocabulary_map_is_refused(run_dir: Path) -> None:
    """As if a tokenizer had drifted: one token moves to another compressed id."""

    def drift(path: Path) -> None:
        tensors = load_file(path)
        tensors["token_map"][17] = tensors["token_map"][40]
        save_file(tensors, path)

    rewrite(run_dir / "latest", "model.safetensors", drift)
    with pytest.raises(CheckpointError, match="hash recipe of vocabulary"):
        load_model(run_dir)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("norm.weight"), "norm.weight: only in the model"),
        (lambda tensors: tensors.update(extra=torch.zeros(1)), "extra: only in the checkpoint"),
        (
            lambda tensors: tensors.update({"norm.weight": torch.zeros(31)}),
            r"norm.weight: \[31\] in the checkpoint, \[32\] in the model",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(run_dir: Path, change: Callable[[dict], object], message: str) -> None:
    def edit(path: Path) -> None:
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    rewrite(run_dir / "latest", "model.safetensors", edit)
    with pytest.raises(CheckpointError, match=rf"does not fit the model of its config:\n  {message}"):
        load_model(run_dir)


def test_a_config_of_other_code_is_refused(run_dir: Path) -> None:
    rewrite(run_dir / "latest", "config.yaml", lambda path: path.write_text(path.read_text() + "retired: 1\n"))
    with pytest.raises(CheckpointError, match="retired.*\n.*written by other code"):
        load_model(run_dir)


def test_another_format_is_refused(run_dir: Path) -> None:
    def older(path: Path) -> None:
        path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 0}))

    rewrite(run_dir / "latest", "state.json", older)
    with pytest.raises(CheckpointError, match="is of format 0, but this code reads format 1"):
        load_model(run_dir)


def test_a_file_that_is_no_safetensors_is_named(run_dir: Path) -> None:
    rewrite(run_dir / "latest", "model.safetensors", lambda path: path.write_bytes(b"not tensors"))
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be read .*go on from step_000002"):
        load_model(run_dir)


def test_models_without_tables_have_a_recipe_too(make_config: MakeConfig) -> None:
    config = make_config(model={"memory": None})
    assert hash_recipe(Transformer(config.model)).keys() == {"vocabulary"}
