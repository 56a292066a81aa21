"""What the benchmarks' command lines refuse."""

import sys

import pytest
import torch

from benchmarks import kernels, training


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--repeats", "0"], "argument --repeats: is 0, but must be at least 1"),
        (["--repeats", "many"], "argument --repeats: invalid int value: 'many'"),
        (["--seconds", "-5"], "argument --seconds: is -5, but must be at least 1"),
        (["--threads", "0"], "argument --threads: is 0, but must be at least 1"),
        (["--only", "nonsense"], "argument --only: invalid choice: 'nonsense'"),
        (["--device", "cuda"], "--device cuda: torch sees no CUDA device here"),
    ],
)
def test_kernels(
    given: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["kernels", *given])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as raised:
        kernels.main()
    assert raised.value.code == 2 and message in capsys.readouterr().err


def test_training(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["training", "--steps", "0"])
    with pytest.raises(SystemExit) as raised:
        training.main()
    assert raised.value.code == 2 and "argument --steps: is 0, but must be at least 1" in capsys.readouterr().err
