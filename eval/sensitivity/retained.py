"""What tasks keep when the memory is switched off or changed: retained(task) = score off / score on.

Legend: R runs (seeds of one model), N items.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from engram.config import MemoryConfig, UserError
from eval.bootstrap import Interval
from eval.loading import Loaded
from eval.results import Item
from eval.sensitivity.interventions import MODES, Mode, Reference, check, intervened
from eval.sensitivity.memory_loss import ratio_over_runs

Floats = npt.NDArray[np.float64]
Kind = Literal["knowledge", "reading", "other"]
Part = Literal["layer", "order", "head"]


@dataclass(frozen=True)
class Suite:
    """Tasks that one function scores: `items(loaded)` gives the same ids for any model.

    Of each task in `chance` the items of `metric` are compared; `chance` is what guessing scores.
    """

    name: str
    items: Callable[[Loaded], list[Item]]
    metric: str
    chance: Mapping[str, float]
    kinds: Mapping[str, Kind]


@dataclass(frozen=True)
class Condition:
    """One change of the memory (`eval.sensitivity.interventions.intervened`); None: all layers, orders, heads."""

    mode: Mode
    layer: int | None = None
    order: int | None = None
    head: int | None = None

    @property
    def label(self) -> str:
        parts = {"layer": self.layer, "order": self.order, "head": self.head}
        return ", ".join([self.mode, *(f"{name} {number}" for name, number in parts.items() if number is not None)])

    def applied(self, loaded: Loaded, reference: Reference | None) -> AbstractContextManager[None]:
        """The context in which the loaded model is changed so."""
        layers, orders, heads = ([part] if part is not None else None for part in (self.layer, self.order, self.head))
        return intervened(loaded.model, self.mode, layers=layers, orders=orders, heads=heads, reference=reference)


@dataclass(frozen=True)
class Retained:
    """Scores of one task with memory as it is (`on`) and changed (`off`), means over items and runs.

    `ratio` = off / on and `adjusted` = (off - chance) / (on - chance), means over runs; intervals draw items, the same
    for both scores and all runs, and with several runs hold their spread too. None where `on` lies within two standard
    errors of chance or below it in any run: nothing to lose.
    """

    condition: Condition
    task: str
    kind: Kind
    on: float
    off: float
    chance: float
    ratio: Interval | None
    adjusted: Interval | None
    items: int
    runs: int


def conditions(config: MemoryConfig, modes: Sequence[str], per: Part | None = None) -> list[Condition]:
    """Each mode on the whole memory, or part by part. Raises UserError for none, and for a mode that cannot do it."""
    if not modes:
        raise UserError(f"no mode was named: choose among {', '.join(MODES)}")
    found: list[Condition] = []
    for mode in dict.fromkeys(modes):
        if per in ("order", "head"):
            check(config, mode, orders=config.orders)
        check(config, mode)
        whole = Condition(mode)  # type: ignore[arg-type]
        if per is None:
            found.append(whole)
        elif per == "layer":
            found += [replace(whole, layer=layer) for layer in config.layer_ids]
        else:
            of_orders = [replace(whole, order=order) for order in config.orders]
            heads = range(config.num_heads)
            found += of_orders if per == "order" else [replace(one, head=head) for one in of_orders for head in heads]
    return found


def retained(
    condition: Condition,
    suite: Suite,
    on: Sequence[Iterable[Item]],
    off: Sequence[Iterable[Item]],
    *,
    level: float = 0.9,
    seed: int = 0,
) -> list[Retained]:
    """What each task of the suite keeps; `on` and `off` hold the items of each run.

    Raises UserError where two of them did not answer the same questions.
    """
    scores = [_by_task(suite, items) for items in (*on, *off)]
    found = []
    for task, chance in suite.chance.items():
        ids = sorted(scores[0].get(task, {}))
        for other in scores:
            if sorted(other.get(task, {})) != ids or not ids:
                raise UserError(
                    f"{suite.name}: the runs did not answer the same items of {task}: give runs of one data set"
                )
        values_RN = np.array([[one[task][name] for name in ids] for one in scores])
        on_RN, off_RN = values_RN[: len(on)], values_RN[len(on) :]
        ratio, adjusted = compare(on_RN, off_RN, chance, level, seed)
        found.append(
            Retained(
                condition=condition,
                task=task,
                kind=suite.kinds.get(task, "other"),
                on=float(on_RN.mean()),
                off=float(off_RN.mean()),
                chance=chance,
                ratio=ratio,
                adjusted=adjusted,
                items=len(ids),
                runs=len(on),
            )
        )
    return found


def compare(
    on_RN: Floats, off_RN: Floats, chance: float, level: float = 0.9, seed: int = 0
) -> tuple[Interval | None, Interval | None]:
    """Ratio and chance-adjusted ratio of two scores of the same items; None where `on` is not above chance."""
    # In every run: a ratio to nearly nothing is anything, and decides their mean.
    for on_N in on_RN:
        stderr = on_N.std(ddof=1) / np.sqrt(len(on_N)) if len(on_N) > 1 else np.inf
        if not on_N.mean() - chance > 2 * stderr:
            return None, None
    plain = ratio_over_runs(list(off_RN), list(on_RN), level, seed)
    return plain, ratio_over_runs(list(off_RN - chance), list(on_RN - chance), level, seed)


def _by_task(suite: Suite, items: Iterable[Item]) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for item in items:
        if item.metric == suite.metric and item.task in suite.chance:
            found.setdefault(item.task, {})[item.id] = item.value
    return found
