"""What came out of a contest: a table, the verdict on its targets, and rows to save."""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.contest import Checked, Contest
from benchmarks.targets import Target


@dataclass(frozen=True)
class Outcome:
    """`seconds` of every step, the largest `errors` of the check, and why the `failed` have no seconds.

    `implementations`: what ran for each of our operations that a contender calls, by the operation's name.
    """

    op: str
    title: str
    targets: Sequence[Target]
    ideal_bytes: dict[str, int]
    seconds: dict[str, list[float]]
    errors: dict[str, float]
    failed: dict[str, str]
    implementations: dict[str, dict[str, str]] = field(default_factory=dict)

    @classmethod
    def of(cls, contest: Contest, seconds: dict[str, list[float]], checked: Checked) -> "Outcome":
        ideal_bytes = {each.name: each.ideal_bytes for each in contest.contenders if each.ideal_bytes is not None}
        found = (checked.errors, checked.failed, checked.implementations)
        return cls(contest.op, contest.title, contest.targets, ideal_bytes, seconds, *found)

    @property
    def medians(self) -> dict[str, float]:
        return {name: statistics.median(times) for name, times in self.seconds.items()}

    def verdicts(self) -> Iterator[tuple[Target, float | None, str]]:
        """Each target, what was measured, and yes, no or not measured."""
        for target in self.targets:
            measured = target.measured(self.medians, self.ideal_bytes)
            met = "not measured" if measured is None else "yes" if target.is_met(measured) else "no"
            yield target, measured, met

    def rows(self) -> Iterator[dict[str, Any]]:
        contest = {"op": self.op, "contest": self.title}
        for name, times in self.seconds.items():
            row: dict[str, Any] = {
                **contest,
                "contender": name,
                "median_ms": round(1e3 * statistics.median(times), 4),
                "min_ms": round(1e3 * min(times), 4),
                "max_ms": round(1e3 * max(times), 4),
                "repeats": len(times),
            }
            # Peers have none, and measurements from before this was recorded.
            if name in self.implementations:
                row["implementations"] = self.implementations[name]
            if name in self.ideal_bytes:
                row["ideal_gigabytes_per_second"] = round(self.ideal_bytes[name] / statistics.median(times) / 1e9, 2)
            if name in self.errors:
                row["largest_error"] = float(f"{self.errors[name]:.3g}")
            yield row
        for name, reason in self.failed.items():
            yield {**contest, "contender": name, "did_not_run": reason}
        for target, measured, met in self.verdicts():
            value = None if measured is None else round(measured, 4)
            shown = "-" if measured is None else target.show(measured)
            verdict = {"target": target.claim, "measured": value, "shown": shown, "limit": target.limit, "met": met}
            yield {**contest, **verdict}


def print_outcome(outcome: Outcome, console: Console) -> None:
    console.print(f"\n{outcome.title}", style="bold", markup=False, soft_wrap=True)
    table = Table()
    names = ("contender", "implementation")
    numbers = ("ms, median (min to max)", "ideal GB/s", "time against ours", "largest error")
    for column in (*names, *numbers):
        table.add_column(column, justify="left" if column in names else "right")
    medians = outcome.medians
    best = min((median for name, median in medians.items() if name.startswith("ours")), default=None)
    for name, median in medians.items():
        times, moved, error = outcome.seconds[name], outcome.ideal_bytes.get(name), outcome.errors.get(name)
        table.add_row(
            name,
            short_implementation(outcome.implementations.get(name, {})),
            f"{1e3 * median:.3g} ({1e3 * min(times):.3g} to {1e3 * max(times):.3g})",
            "-" if moved is None else f"{moved / median / 1e9:.1f}",
            "-" if best is None else f"{median / best:.2f}",
            "-" if error is None else f"{error:.1g}",
        )
    console.print(table)
    for name, reason in outcome.failed.items():
        console.print(f"{name}: did not run: {reason}", style="yellow", markup=False)


def short_implementation(implementations: dict[str, str]) -> str:
    """Which implementations ran, whatever for: "native"; a dash for peers."""
    return ", ".join(sorted(set(implementations.values()))) or "-"


def print_verdicts(outcomes: Sequence[Outcome], console: Console) -> None:
    table = Table()
    for column in ("contest", "target", "measured", "met"):
        table.add_column(column, justify="right" if column == "measured" else "left")
    colours = {"yes": "green", "no": "red", "not measured": "yellow"}
    for outcome in outcomes:
        for target, measured, met in outcome.verdicts():
            value = "-" if measured is None else target.show(measured)
            table.add_row(outcome.title.partition(":")[0], target.claim, value, f"[{colours[met]}]{met}")
    if table.row_count:
        console.print("\ntargets", style="bold")
        console.print(table)
