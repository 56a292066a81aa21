import logging

import pytest
import torch

from engram.kernels import choose as module
from engram.kernels.choose import (
    ImplementationUnavailable,
    MachineObstacle,
    check_devices,
    check_integers,
    choose,
    is_interpreted,
    triton_obstacle,
    watched_choices,
    width_obstacle,
)


@pytest.fixture(autouse=True)
def _warnings_forgotten() -> None:
    module._warn_once.cache_clear()


def _fine() -> None:
    return None


def _forbidden() -> str | None:
    raise AssertionError("an obstacle that does not matter was asked for")


@pytest.mark.parametrize(("device", "chosen"), [("cuda", "triton"), ("cpu", "native"), ("mps", "native")])
def test_auto_takes_what_is_fast_on_the_device(device: str, chosen: str, caplog: pytest.LogCaptureFixture) -> None:
    obstacles = {"triton": _forbidden, "native": _forbidden} | {chosen: _fine}
    assert choose("op", "auto", device, **obstacles) == chosen
    assert not caplog.records


def test_auto_without_a_fast_implementation_is_silent(caplog: pytest.LogCaptureFixture) -> None:
    assert choose("op", "auto", "cpu", triton=_forbidden) == "reference"
    assert choose("op", "auto", "cuda", native=_forbidden) == "reference"
    assert not caplog.records


def test_auto_says_once_why_it_is_slow(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        for op in ("op", "op", "other"):
            assert choose(op, "auto", "cpu", native=lambda: "no compiler was found") == "reference"
    assert [record.getMessage() for record in caplog.records] == [
        f"{op} runs on torch's own operations, which is slower, because its native kernel cannot run: "
        "no compiler was found"
        for op in ("op", "other")
    ]


def test_what_stops_all_kernels_is_said_once_for_all(caplog: pytest.LogCaptureFixture) -> None:
    reason = MachineObstacle("no compiler was found")
    for op in ("op", "op", "other"):
        assert choose(op, "auto", "cpu", native=lambda: reason) == "reference"
    assert [record.getMessage() for record in caplog.records] == [
        "everything runs on torch's own operations, which is slower, because no native kernel can run here: "
        "no compiler was found"
    ]
    for op in ("op", "other"):
        with pytest.raises(
            ImplementationUnavailable, match=f"^{op}: the native .* asked for, but no compiler was found$"
        ):
            choose(op, "native", "cpu", native=lambda: reason)


def test_a_name_is_taken_at_its_word() -> None:
    assert choose("op", "reference", "cuda", triton=_forbidden) == "reference"
    assert choose("op", "triton", "cpu", triton=_fine, native=_forbidden) == "triton"
    assert choose("op", "native", "cuda", triton=_forbidden, native=_fine) == "native"


def test_what_cannot_run_raises_with_the_reason() -> None:
    message = "^op: the native implementation was asked for, but no compiler was found$"
    with pytest.raises(ImplementationUnavailable, match=message):
        choose("op", "native", "cpu", native=lambda: "no compiler was found")


@pytest.mark.parametrize("impl", ["native", "cuda", ""])
def test_an_unknown_name_raises_with_the_known_ones(impl: str) -> None:
    message = f"^op has no implementation '{impl}': choose one of auto, reference, triton$"
    with pytest.raises(ValueError, match=message):
        choose("op", impl, "cpu", triton=_forbidden)


@pytest.mark.parametrize(("value", "interpreted"), [("1", True), ("0", False), (None, False)])
def test_the_interpreter_runs_triton_on_cpu(
    monkeypatch: pytest.MonkeyPatch, value: str | None, interpreted: bool
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if value is not None:
        monkeypatch.setenv("TRITON_INTERPRET", value)
    assert is_interpreted() is interpreted
    reason = triton_obstacle("cpu")
    assert reason is None if interpreted else reason is not None and reason.startswith("the tensors are on cpu: ")
    assert triton_obstacle("cuda") is None


def test_triton_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    for device in ("cpu", "cuda"):
        reason = triton_obstacle(device)
        assert isinstance(reason, MachineObstacle) and reason.startswith("triton is not installed")


def test_operands_on_different_devices_are_named() -> None:
    here, there = torch.empty(1), torch.empty(1, device="meta")
    check_devices("op", x=here, y=here, mask=None)
    with pytest.raises(ValueError, match="op needs its operands on one device: x on cpu, y on meta"):
        check_devices("op", x=here, y=there)


def test_a_number_that_is_no_integer_is_named() -> None:
    check_integers("op", steps=3, seed=0)
    with pytest.raises(TypeError, match="^op needs an integer for seed, not 2.0$"):
        check_integers("op", steps=3, seed=2.0)


@pytest.mark.parametrize(
    ("width", "most", "reason"),
    [
        (16, None, None),
        (1024, 1024, None),
        (1040, None, None),
        (1040, 1024, "rows are 1040 wide, and it takes widths that are multiples of 16 up to 1024"),
        (24, None, "rows are 24 wide, and it takes widths that are multiples of 16"),
        (0, None, "rows are 0 wide, and it takes widths that are multiples of 16"),
    ],
)
def test_widths(width: int, most: int | None, reason: str | None) -> None:
    assert width_obstacle("rows", width, most=most) == reason


def test_choices_are_watched() -> None:
    with watched_choices() as outer:
        choose("first", "auto", "cpu", native=_fine)
        with watched_choices() as inner:
            choose("second", "auto", "cpu", fallback="torch", native=lambda: "no compiler was found")
            choose("third", "reference", "cpu")
        choose("first", "triton", "cpu", triton=_fine)
    choose("fourth", "reference", "cpu")
    assert inner == {"second": "torch", "third": "reference"}
    assert outer == {"first": "triton", **inner}
