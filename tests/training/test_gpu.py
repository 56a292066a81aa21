"""Whole runs on a GPU: the switches that long runs use, all at once, against the CPU and against themselves."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from engram.config import Config, UserError
from engram.training import engine
from engram.training.free_memory import free_memory
from engram.training.trainer import Exit, Trainer
from tests.training.conftest import assert_same_checkpoint, metrics_of

pytestmark = pytest.mark.gpu

MakeConfig = Callable[..., Config]
GPU = {
    "device": "cuda",
    "dtype": "bfloat16",
    "compile": True,
    "activation_checkpointing": True,
    "micro_batch_size": 2,
    "statistics_every": 3,
}


@pytest.fixture
def fixed_order() -> Iterator[None]:
    """The attention kernels of torch sum in the order that they come to, unless they are asked not to."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def losses(config: Config) -> list[float]:
    return [line["loss"] for line in metrics_of(config.run_dir)]


def test_a_run_with_every_switch_follows_the_plain_one_on_the_cpu(make_config: MakeConfig) -> None:
    plain, full = make_config("plain"), make_config("full", train=GPU)
    for config in (plain, full):
        assert Trainer(config).fit() is Exit.DONE
    assert losses(full) == pytest.approx(losses(plain), rel=2e-2)
    assert losses(full)[-1] < losses(full)[0] - 0.1
    state = json.loads((Path(full.run_dir) / "latest" / "state.json").read_text())
    assert state["environment"]["device"] == "cuda"
    assert state["environment"]["machine"] == torch.cuda.get_device_name()


def test_in_float32_the_losses_are_those_of_the_cpu(make_config: MakeConfig) -> None:
    """As far as rounding lets them: Muon's directions of small singular values drift apart first."""
    exact = {"muon": {"newton_schulz_dtype": "float32"}}
    plain = make_config("plain", optim=exact)
    there = make_config("there", train={"device": "cuda"}, optim=exact)
    for config in (plain, there):
        assert Trainer(config).fit() is Exit.DONE
    assert losses(there)[:3] == pytest.approx(losses(plain)[:3], rel=1e-4)
    assert losses(there) == pytest.approx(losses(plain), rel=1e-2)


@pytest.mark.parametrize("kind", ["row_adam", "rowwise_adagrad", "sinkhorn", "dense_adam"])
def test_resuming_is_exact_to_the_bit(make_config: MakeConfig, kind: str, fixed_order: None) -> None:
    changes = {"optim": {"table": {"kind": kind}}}
    whole = make_config("whole", train={**GPU, "steps": 6}, **changes)
    first = make_config("parts", train={**GPU, "steps": 6, "stop_after": 4}, **changes)
    second = make_config("parts", train={**GPU, "steps": 6}, **changes)
    for config in (whole, first, second):
        assert Trainer(config).fit() is Exit.DONE
    assert_same_checkpoint(Path(whole.run_dir) / "latest", Path(second.run_dir) / "latest")
    assert metrics_of(second.run_dir) == metrics_of(whole.run_dir)


def test_out_of_memory_is_one_message_and_a_run_that_goes_on(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, compute = make_config(train={**GPU, "compile": False}), engine.compute_gradient
    steps = iter(range(1, 100))

    def exhaust(*_: object) -> None:
        torch.zeros(2**50, dtype=torch.uint8, device="cuda")

    with monkeypatch.context() as patch:
        patch.setattr(engine, "compute_gradient", lambda *given: (exhaust if next(steps) == 5 else compute)(*given))
        with pytest.raises(UserError, match=r"the cuda ran out of memory .* 2 x 32 tokens: lower train"):
            Trainer(config).fit()
    assert (Path(config.run_dir) / "latest").resolve().name == "step_000003"
    assert Trainer(config).fit() is Exit.DONE


def test_free_memory_is_the_gpus() -> None:
    free = free_memory(torch.device("cuda"))
    assert free is not None and 0 < free <= torch.cuda.get_device_properties(0).total_memory
