"""Runs whose tables are stored in bfloat16: through checkpoints to the bit, and back as the model that was saved."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from engram.config import Config
from engram.training.checkpoint import load_model, open_checkpoint
from engram.training.trainer import Exit, Trainer
from tests.training.conftest import assert_same_checkpoint, metrics_of

TABLES = ("blocks.1.memory.embed.weight", "over_encoding.embed.weight")
OVER_ENCODING = {"num_heads": 2, "head_dim": 8, "rows_per_head": 31, "table_dtype": "bfloat16"}


@pytest.mark.parametrize("kind", ["row_adam", "rowwise_adagrad", "sinkhorn"])
def test_run_resumes_and_loads_to_the_bit(make_config: Callable[..., Config], kind: str) -> None:
    model = {"memory": {"table_dtype": "bfloat16"}, "over_encoding": OVER_ENCODING}
    # Gradients of micro-batches are added up before the update.
    changes = {"model": model, "optim": {"table": {"kind": kind}}, "train": {"steps": 5, "micro_batch_size": 2}}
    whole, parts = make_config("whole", **changes), make_config("parts", **changes)
    assert Trainer(whole).fit() is Exit.DONE
    for stop_after in (2, None):
        assert Trainer(parts.replace(train=parts.train.replace(stop_after=stop_after))).fit() is Exit.DONE
    folder = Path(whole.run_dir) / "step_000005"
    assert_same_checkpoint(folder, Path(parts.run_dir) / "step_000005")
    assert metrics_of(parts.run_dir) == metrics_of(whole.run_dir)

    saved = load_file(folder / "model.safetensors")
    assert {name for name, tensor in saved.items() if tensor.dtype == torch.bfloat16} == set(TABLES)
    assert all(open_checkpoint(folder).state["optimizer"][f"{name}/step"] == 5 for name in TABLES)
    assert {tensor.dtype for tensor in load_file(folder / "optim.safetensors").values()} <= {torch.float32, torch.int32}
    loaded = load_model(folder).state_dict()
    assert all(loaded[name].dtype == torch.bfloat16 and torch.equal(loaded[name], saved[name]) for name in TABLES)


def test_dense_adam_is_refused_before_the_first_step(make_config: Callable[..., Config]) -> None:
    config = make_config(model={"memory": {"table_dtype": "bfloat16"}}, optim={"table": {"kind": "dense_adam"}})
    with pytest.raises(ValueError, match="dense_adam moves float32 tables only: choose another kind"):
        Trainer(config).fit()
