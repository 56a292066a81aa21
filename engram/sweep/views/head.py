"""What all views have in common: their points over seeds, runs that diverged, and the head of what they say as JSON."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from engram.report.text import counted
from engram.sweep.views.points import Points

NONE = "–"


@dataclass(frozen=True)
class Summary:
    """One point over its seeds: nats per token; `sd` of single runs, which needs two of them."""

    label: str
    mean: float | None
    sd: float | None
    n: int
    diverged: int

    @property
    def says(self) -> str:
        """`4.1234 ± 0.0021 (3)`: mean, sd, number of seeds."""
        if self.mean is None:
            return f"{self.diverged} diverged" if self.diverged else NONE
        spread = "" if self.sd is None else f" ± {self.sd:.4f}"
        lost = f", {self.diverged} diverged" if self.diverged else ""
        return f"{self.mean:.4f}{spread} ({self.n}{lost})"


def summaries(points: Points) -> list[Summary]:
    """One for each point."""
    found = []
    for index, losses in enumerate(points.loss):
        finite = losses[np.isfinite(losses)]
        mean = float(finite.mean()) if len(finite) else None
        sd = float(finite.std(ddof=1)) if len(finite) > 1 else None
        found.append(Summary(points.label(index), mean, sd, len(finite), points.diverged[index]))
    return found


def divergence(points: Points) -> list[str]:
    """A sentence that names the points of which runs diverged; none if there are none."""
    where = [
        f"{count} of {len(points.seeds)} at {points.label(at)}" for at, count in enumerate(points.diverged) if count
    ]
    if not where:
        return []
    return [
        f"{counted(sum(points.diverged), 'run')} diverged ({', '.join(where)}): the other seeds of these points are "
        "those that went well, so that such a point is not taken as better than others"
    ]


def lost_runs(points: Points) -> list[str]:
    """The same as a short warning."""
    return [f"{counted(sum(points.diverged), 'run')} diverged"] if any(points.diverged) else []


def head(view: str, points: Points, findings: Sequence[str]) -> dict[str, Any]:
    return {
        "view": view,
        **_counts(points),
        "diverged": sum(points.diverged),
        "findings": list(findings),
        "points": [asdict(summary) for summary in summaries(points)],
    }


def curve_head(name: str, points: Points, says: str) -> dict[str, Any]:
    return {"name": name, **_counts(points), "says": says}


def _counts(points: Points) -> dict[str, int]:
    return {"runs": points.finished, "of": points.loss.size}


def named(name: str, text: str) -> str:
    """A curve that is alone has no name."""
    return f"{name}: {text}" if name else text


def side_by_side(columns: Mapping[str, Mapping[str, str]]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a table with a column for each curve, whose cells are named by their rows."""
    names = list(dict.fromkeys(row for cells in columns.values() for row in cells))
    rows = [[name, *(cells.get(name, NONE) for cells in columns.values())] for name in names]
    return ["", *(curve or "loss" for curve in columns)], rows
