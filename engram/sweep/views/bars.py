"""Differences of each point from a reference, paired by seed, with intervals for all of them at once."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engram.sweep import paper
from engram.sweep.paired import Difference
from engram.sweep.spec import Part
from engram.sweep.views.head import NONE, divergence, head, lost_runs, summaries
from engram.sweep.views.points import Points
from engram.sweep.views.reference import differences_from, is_same, reference_point
from engram.sweep.words import interval, signed


@dataclass(frozen=True)
class Bar:
    """One point minus its reference; None where no seed has both."""

    label: str
    reference: str
    difference: Difference | None
    # The paper's difference for the variant of that name, at its scale, where the part asks for it.
    paper: float | None
    # Runs of the point and of its reference.
    diverged: int
    reference_diverged: int

    @property
    def resolved(self) -> bool:
        """A point whose runs diverged is not better than others, whatever its other seeds did."""
        found = self.difference
        if found is None or not found.resolved:
            return False
        return not (self.diverged if found.mean < 0 else self.reference_diverged)


@dataclass(frozen=True)
class Bars:
    """What a part with `view: bars` says."""

    name: str
    points: Points
    bars: tuple[Bar, ...]

    @property
    def measured(self) -> list[tuple[Bar, Difference]]:
        return [(bar, bar.difference) for bar in self.bars if bar.difference]

    @property
    def reference(self) -> str:
        names = list(dict.fromkeys(bar.reference for bar in self.bars))
        return names[0] if len(names) == 1 else "its reference"

    @property
    def says(self) -> str:
        if len(self.points.rows) == 1 and not self.bars:
            return f"{self.points.label(0)}: nothing to compare it with"
        if not self.measured:
            return "no finished run beside its reference yet"
        if all(difference.n < 2 for _, difference in self.measured):
            return f"one seed: no difference from {self.reference} is resolved"
        resolved = [(bar, difference) for bar, difference in self.measured if bar.resolved]
        if not resolved:
            return f"none of {len(self.measured)} differences from {self.reference} is resolved"
        bar, largest = max(resolved, key=lambda pair: abs(pair[1].mean))
        return (
            f"{len(resolved)} of {len(self.measured)} differences from {self.reference} are resolved; the largest: "
            f"{bar.label}, {interval(largest)}"
        )

    @property
    def findings(self) -> list[str]:
        return [self.says, *divergence(self.points)]

    def as_dict(self) -> dict[str, Any]:
        return {
            **head("bars", self.points, self.findings),
            "bars": [
                {
                    "label": bar.label,
                    "reference": bar.reference,
                    "difference": bar.difference.as_dict() if bar.difference else None,
                    "resolved": bar.resolved,
                    "diverged": bar.diverged,
                    "paper": bar.paper,
                }
                for bar in self.bars
            ],
        }

    def table(self) -> tuple[list[str], list[list[str]]]:
        """A row for each bar; its own losses, and its difference over the seeds that its reference has as well."""
        by_label = {summary.label: summary for summary in summaries(self.points)}
        papers = any(bar.paper is not None for bar in self.bars)
        rows = [
            [
                bar.label,
                summary.says,
                interval(found) if found else NONE,
                str(found.n) if found else "0",
                ("yes" if bar.resolved else "no") if found else NONE,
                *([signed(bar.paper) if bar.paper is not None else NONE] if papers else []),
            ]
            for bar, found, summary in ((bar, bar.difference, by_label[bar.label]) for bar in self.bars)
        ]
        header = ["", "mean ± sd (seeds)", f"difference from {self.reference}", "pairs", "resolved"]
        return [*header, *(["paper"] if papers else [])], rows

    def warnings(self) -> list[str]:
        few = sorted({difference.n for _, difference in self.measured if difference.n < 3})
        notes = [f"differences of {few[0]} seed{'s' if few[0] > 1 else ''}"] if few else []
        return [
            *lost_runs(self.points),
            *notes,
            *([self.points.count] if self.points.finished < self.points.loss.size else []),
        ]


def bars_view(name: str, part: Part, everything: Mapping[str, Points]) -> Bars:
    """A bar for each point but the references themselves, in the order of the file."""
    points, reported = everything[name], paper.ablations() if part.paper else {}
    references = ((index, reference_point(part, name, index, everything)) for index in range(len(points.rows)))
    held = {index: found for index, found in references if found and not is_same(points, index, *found)}
    found = differences_from(points, held)
    bars = [
        Bar(
            label=points.label(index),
            reference=other.label(at),
            difference=found[index],
            paper=reported.get(points.label(index)),
            diverged=points.diverged[index],
            reference_diverged=other.diverged[at],
        )
        for index, (other, at) in held.items()
    ]
    return Bars(name, points, tuple(bars))
