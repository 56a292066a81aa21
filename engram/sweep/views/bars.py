"""Differences of each point from a reference, paired by seed."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engram.sweep import paper
from engram.sweep.paired import Difference
from engram.sweep.spec import Part
from engram.sweep.views.points import Points
from engram.sweep.views.reference import difference_from, reference_point
from engram.sweep.views.words import interval, signed


@dataclass(frozen=True)
class Bar:
    """One point minus its reference; None where no seed has both."""

    label: str
    reference: str
    difference: Difference | None
    # The paper's difference for a change of that name, at its scale.
    paper: float | None


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
        if not self.measured:
            return "no finished run beside its reference yet"
        if all(difference.n < 2 for _, difference in self.measured):
            return f"one seed: no difference from {self.reference} is resolved"
        resolved = [(bar, difference) for bar, difference in self.measured if difference.resolved]
        if not resolved:
            return f"none of {len(self.measured)} differences from {self.reference} is resolved"
        bar, largest = max(resolved, key=lambda pair: abs(pair[1].mean))
        return (
            f"{len(resolved)} of {len(self.measured)} differences from {self.reference} are resolved; the largest: "
            f"{bar.label}, {interval(largest)}"
        )

    @property
    def findings(self) -> list[str]:
        return [self.says]

    def as_dict(self) -> dict[str, Any]:
        return {
            "view": "bars",
            "runs": self.points.finished,
            "of": self.points.loss.size,
            "findings": self.findings,
            "bars": [
                {
                    "label": bar.label,
                    "reference": bar.reference,
                    "difference": bar.difference.as_dict() if bar.difference else None,
                    "paper": bar.paper,
                }
                for bar in self.bars
            ],
        }

    def table(self) -> tuple[list[str], list[list[str]]]:
        """A row for each bar."""
        rows = [
            [
                bar.label,
                interval(found) if found else "–",
                str(found.n) if found else "0",
                ("yes" if found.resolved else "no") if found else "–",
                signed(bar.paper) if bar.paper is not None else "–",
            ]
            for bar, found in ((bar, bar.difference) for bar in self.bars)
        ]
        return ["", f"difference from {self.reference}", "seeds", "resolved", "paper"], rows

    def warnings(self) -> list[str]:
        few = sorted({difference.n for _, difference in self.measured if difference.n < 3})
        notes = [f"differences of {few[0]} seed{'s' if few[0] > 1 else ''}"] if few else []
        return [*notes, *([self.points.count] if self.points.finished < self.points.loss.size else [])]


def bars_view(name: str, part: Part, everything: Mapping[str, Points]) -> Bars:
    """A bar for each point but the references themselves, in the order of the file."""
    points = everything[name]
    bars = []
    for index in range(len(points.rows)):
        held = reference_point(part, name, index, everything)
        if held is None or (held[0] is points and held[1] == index):
            continue
        label = points.label(index)
        bars.append(
            Bar(label, held[0].label(held[1]), difference_from(points, index, *held), paper.ablations().get(label))
        )
    return Bars(name, points, tuple(bars))
