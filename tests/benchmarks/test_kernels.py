"""The kernel benchmark at tiny sizes: its checks, its turns, and what it says about targets and missing peers."""

import dataclasses
import io
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from benchmarks.contest import Contender, Contest, Run, check, cpu_timer, largest_error, measure
from benchmarks.kernel_inputs import CPU, Sizes, tiled_rows, zipf_ids
from benchmarks.kernel_report import Outcome, print_outcome, print_verdicts, short_implementation
from benchmarks.kernels import CONTESTS, run_contests
from benchmarks.passes import BACKWARD, BOTH, FORWARD
from benchmarks.targets import Bandwidth, Overhead, Speedup, Target
from engram.kernels.engram_lookup import gather_rows

TINY = dataclasses.replace(
    CPU,
    hash_tokens=(2, 16),
    rows_per_head=50,
    gather_ids=64,
    gather_rows=100,
    update_ids=64,
    update_rows=80,
    update_dim=16,
    module_tokens=(1, 24),
    module_hidden=32,
    model_tokens=(2, 16),
    attention_tokens=(2, 16),
    loss_tokens=32,
    block_tokens=(1, 16),
    copy_bytes=2**10,
    passes=(FORWARD, BACKWARD, BOTH),
)
# What runs for our operations on CPU, where it is not native; on processors without AVX-512, torch's own.
RUNS = {"head_loss": {"reference"}, "experts": {"native", "grouped"}, "attention": {"native", "torch"}}
RUNS["block"] = RUNS["experts"] | RUNS["attention"]
OURS = re.compile("ours|hash, then index_select|with(out)? memory")
RESULT = torch.tensor([1.0, 2.0])
# Installed for the benchmark alone.
OPTIONAL = {"numba, %", "FBGEMM, its forward untimed"}


@pytest.mark.parametrize("op", CONTESTS)
def test_every_contender_is_right_and_measured(op: str) -> None:
    text = io.StringIO()
    with torch.compiler.set_stance("force_eager"):
        outcomes = run_contests(
            [op], TINY, "cpu", cpu_timer, repeats=1, limit=60, console=Console(file=text, width=200)
        )
    assert len(outcomes) == (3 if op in ("gate_conv", "mhc") else 2 if op in ("gather", "table_update") else 1)
    for outcome in outcomes:
        assert outcome.op == op and outcome.title in text.getvalue()
        for name, reason in outcome.failed.items():
            assert name in OPTIONAL and reason.startswith("ModuleNotFoundError"), f"{name}: {reason}"
        assert all(len(times) == 1 and times[0] > 0 for times in outcome.seconds.values())
        assert set(outcome.implementations) == {name for name in outcome.seconds if OURS.match(name)}
        for row in outcome.rows():
            json.dumps(row)
            if OURS.match(row.get("contender", "")):
                assert set(row["implementations"].values()) <= RUNS.get(op, {"native"}), row
                assert short_implementation(row["implementations"]) in text.getvalue()
            else:
                assert "implementations" not in row
        # An absent contender of ours would leave a target unmeasured.
        for target, measured, _ in outcome.verdicts():
            assert measured is not None or OPTIONAL & outcome.failed.keys(), target.claim


def test_a_missing_peer_is_reported_with_its_reason() -> None:
    outcome, text = _outcome(
        {"peer": _raises(ModuleNotFoundError("No module named 'peer'"))}, Speedup("ours", ["peer"], 2)
    )
    assert outcome.failed == {"peer": "ModuleNotFoundError: No module named 'peer'"}
    assert "peer: did not run: ModuleNotFoundError: No module named 'peer'" in text and "not measured" in text
    rows = list(outcome.rows())
    assert {"did_not_run": outcome.failed["peer"], "contender": "peer", "op": "op", "contest": "title"} in rows
    assert [(row["measured"], row["met"]) for row in rows if "target" in row] == [(None, "not measured")]


def test_a_wrong_contender_is_reported_and_not_timed() -> None:
    outcome, text = _outcome({"wrong": lambda: Run(lambda: [torch.tensor([1.0, 2.5])])})
    assert outcome.failed["wrong"].startswith("WrongResult: off by") and "wrong" not in outcome.seconds
    assert "wrong: did not run: WrongResult" in text
    assert "expected 1" in _outcome({"wrong": lambda: Run(lambda: [])})[0].failed["wrong"]


def test_a_contender_that_fails_later_leaves_no_times() -> None:
    steps = iter([[torch.tensor([1.0, 2.0])]] * 4)
    outcome, _ = _outcome({"tired": lambda: Run(lambda: next(steps))})
    assert outcome.failed["tired"].startswith("StopIteration") and set(outcome.seconds) == {"ours"}


def test_without_a_reference_nobody_is_timed() -> None:
    contest = Contest("op", "title", _raises(MemoryError("too large")), [Contender("ours", _raises(ValueError()), 0)])
    checked = check(contest)
    assert checked.failed == {"reference": "MemoryError: too large", "ours": "the reference failed"}
    assert not checked.errors
    assert measure(contest, checked.failed, cpu_timer, repeats=1, limit=60) == {}


def test_inputs_that_do_not_fit_are_reported_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def contests(sizes: Sizes, device: str) -> Iterator[Contest]:
        raise MemoryError("too large")
        yield

    monkeypatch.setitem(CONTESTS, "gather", contests)
    console = Console(file=io.StringIO(), width=200)
    outcomes = run_contests(["gather", "hash"], TINY, "cpu", cpu_timer, repeats=1, limit=60, console=console)
    assert [outcome.op for outcome in outcomes] == ["gather", "hash"] and outcomes[1].seconds
    assert "its inputs could not be made: MemoryError: too large" in outcomes[0].failed["reference"]


def test_contenders_take_turns_and_preparation_is_not_timed() -> None:
    calls: list[str] = []

    def contender(name: str) -> Contender:
        def step() -> list[Tensor]:
            calls.append(name)
            return []

        return Contender(name, lambda: Run(step, prepare=lambda: calls.append("-")), None)

    contest = Contest("op", "title", lambda: [], [contender(name) for name in "ab"])

    def timer(step: Callable[[], Sequence[Tensor]]) -> float:
        assert calls[-1] == "-"
        step()
        return float(len(calls))

    seconds = measure(contest, {}, timer, repeats=2, limit=60)
    assert "".join(calls) == "-a-b-b-a-a-b-b-a"[: len(calls)] and len(calls) == 16
    assert {name: len(times) for name, times in seconds.items()} == {"a": 2, "b": 2}
    # Out of time at once: three rounds are counted all the same.
    assert len(measure(contest, {}, timer, repeats=9, limit=0)["a"]) == 3


def test_the_implementation_that_was_measured_is_named() -> None:
    """Also of compiled code that was traced for another contender; measurements may lack it."""
    compiled = torch.compile(lambda: gather_rows(torch.ones(2, 16), torch.tensor([[1]])), backend="eager")

    def build() -> Run:
        return Run(lambda: [compiled().new_tensor([1.0, 2.0])])

    outcome, text = _outcome({"ours, first": build, "ours, second": build, "peer": lambda: Run(lambda: [RESULT])})
    expected = {"gather_rows": "native"}
    assert outcome.implementations == {"ours, first": expected, "ours, second": expected}
    rows = {row["contender"]: row for row in outcome.rows()}
    assert rows["ours, second"]["implementations"] == expected and "implementations" not in rows["peer"]
    assert re.search(r"ours, second +│ native +│", text) and re.search(r"peer +│ - +│", text)
    text = io.StringIO()
    print_outcome(dataclasses.replace(outcome, implementations={}), Console(file=text, width=200))
    assert "native" not in text.getvalue() and "ours, second" in text.getvalue()
    assert short_implementation({"a": "triton", "b": "reference", "c": "triton"}) == "reference, triton"


@pytest.mark.parametrize(
    ("target", "measured", "met"),
    [
        (Speedup("ours", ["slow", "fast"], 2), 2.0, "yes"),
        (Speedup("ours", ["fast", "absent"], 2.1), 2.0, "no"),
        (Speedup("ours", ["absent"], 2), None, "not measured"),
        (Speedup("absent", ["fast"], 2), None, "not measured"),
        (Bandwidth("ours", "copy", 0.75), 0.75, "yes"),
        (Bandwidth("ours", "copy", 0.76), 0.75, "no"),
        (Bandwidth("ours", "absent", 0.5), None, "not measured"),
        (Overhead("slow", "fast", 0.5), 0.5, "yes"),
        (Overhead("slow", "fast", 0.4), 0.5, "no"),
        (Overhead("slow", "fast", 0.06, share=0.1), 0.05, "yes"),
        (Overhead("slow", "absent", 0.5), None, "not measured"),
    ],
)
def test_verdicts(target: Target, measured: float | None, met: str) -> None:
    seconds = {"ours": [1.0, 9.0, 0.9], "fast": [2.0], "slow": [3.0], "copy": [1.0]}
    outcome = Outcome("op", "title", [target], {"ours": 75, "copy": 100}, seconds, {}, {})
    ((_, value, verdict),) = outcome.verdicts()
    assert verdict == met and value == (None if measured is None else pytest.approx(measured))
    assert f"{target.limit:g}" in target.claim or "%" in target.claim


def test_largest_error() -> None:
    expected = torch.tensor([0.0, 3.0, -4.0])
    assert largest_error(expected, expected) == largest_error(torch.zeros(2), torch.zeros(2)) == 0
    rms = math.sqrt(25 / 3)
    assert largest_error(torch.tensor([0.5, 3.0, -4.0]), expected) == pytest.approx(0.5 / rms)
    assert largest_error(torch.tensor([0.0, math.nan, 0.0]), expected) == math.inf
    assert largest_error(torch.zeros(2), expected) == math.inf
    ids = torch.tensor([1, 2])
    assert largest_error(ids, ids) == 0 and largest_error(ids + 1, ids) == math.inf


@pytest.mark.parametrize("share", [0.3, 0.6, 0.8])
def test_zipf_ids_have_the_share_of_distinct_ids_that_was_asked_for(share: float) -> None:
    ids = zipf_ids(20_000, 100_000, share, torch.Generator().manual_seed(0))
    assert ids.min() >= 0 and ids.max() < 100_000
    assert len(ids.unique()) / len(ids) == pytest.approx(share, abs=0.03)


def test_tiled_rows_fill_the_whole_table() -> None:
    table = tiled_rows(70_000, 2, torch.bfloat16, torch.Generator().manual_seed(0))
    assert table.shape == (70_000, 2) and torch.equal(table[65_537:], table[: 70_000 - 65_537])


def _outcome(others: dict[str, Callable[[], Run]], *targets: Target) -> tuple[Outcome, str]:
    """Of ours, which is right, beside others."""
    builds = {"ours": lambda: Run(lambda: [RESULT]), **others}
    contenders = [Contender(name, build, 1e-6) for name, build in builds.items()]
    contest = Contest("op", "title", lambda: [RESULT], contenders, targets)
    checked = check(contest)
    seconds = measure(contest, checked.failed, cpu_timer, repeats=2, limit=60)
    outcome, text = Outcome.of(contest, seconds, checked), io.StringIO()
    console = Console(file=text, width=200)
    print_outcome(outcome, console)
    print_verdicts([outcome], console)
    return outcome, text.getvalue()


def _raises(error: Exception) -> Callable[[], Any]:
    def build() -> Any:
        raise error

    return build
