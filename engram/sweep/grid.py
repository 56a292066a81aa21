"""Sweep -> runs: every combination of axes and seeds, as a complete config with its id."""

import copy
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from engram.config import Config, ConfigError, ModelConfig, parse_config
from engram.config_file import read_tree, set_value
from engram.config_identity import run_id, semantic_settings
from engram.sweep.allocation import allocate
from engram.sweep.budget import steps_for
from engram.sweep.spec import DERIVED_AXES, Part, Sweep, SweepError

# Of one head: the largest published table has 384 million rows for its 24 heads together.
MOST_ROWS = 2**40


@dataclass(frozen=True)
class Run:
    """One training run that a part of a sweep asks for; several parts may ask for the same."""

    id: str
    part: str
    # Axis -> its value, or the value's name where the axis names sets of settings.
    point: dict[str, Any]
    seed: int
    # Complete, with `<pool>/<id>` as its run folder.
    config: Config

    @property
    def label(self) -> str:
        """`rho=0.8 seed=1`, for people."""
        return words({**self.point, "seed": self.seed})


def expand(sweep: Sweep, part: str | None = None) -> list[Run]:
    """Runs in the order of the file: parts, axes (the last one fastest), seeds. `part`: of this part alone.

    Raises SweepError: names part, point and mistake.
    """
    if part is not None and part not in sweep.parts:
        raise SweepError(f"{sweep.name} has no part {part!r}: its parts are {', '.join(sweep.parts)}")
    names = sweep.parts if part is None else [part]
    return [run for name in names for run in _expand_part(sweep, name)]


def unique(runs: list[Run]) -> list[Run]:
    """The first run of each id. Raises SweepError: two runs have one id and different settings."""
    first: dict[str, Run] = {}
    for run in runs:
        other = first.setdefault(run.id, run)
        if other.config is not run.config and semantic_settings(other.config) != semantic_settings(run.config):
            raise SweepError(
                f"run id {run.id} stands for two configs: {other.part} ({other.label}) and {run.part} ({run.label})"
            )
    return list(first.values())


def words(point: dict[str, Any]) -> str:
    """`rho=0.8 flops=3e9`."""
    return " ".join(f"{axis}={shown(value)}" for axis, value in point.items()) or "its only point"


def shown(value: Any) -> str:
    """A value of an axis; large floating-point numbers without a row of zeros: 3000000000.0 -> 3e9."""
    if not isinstance(value, float) or abs(value) < 1e6 or not math.isfinite(value):
        return str(value)
    mantissa, exponent = f"{value:.15e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def _expand_part(sweep: Sweep, name: str) -> Iterator[Run]:
    part = sweep.parts[name]
    # A file without parts is one part of its own name.
    where = sweep.name if list(sweep.parts) == [sweep.name] else f"{sweep.name}, part {name}"
    base = read_tree(part.base)
    taken: dict[str, dict[str, Any]] = {}
    for point in _points(part):
        try:
            config = _resolve(part, point, base)
        except ConfigError as error:
            raise SweepError(f"{where}, {words(point)}: {error}") from None
        for seed in part.seeds:
            seeded = config.replace(seed=seed, data=config.data.replace(shuffle_seed=seed))
            identity = run_id(seeded)
            # Two ratios that mean the same number of experts would count as two points of one curve.
            if "rho" in part.axes and identity in taken:
                both = f"{words(taken[identity])} and {words(point)}"
                raise SweepError(f"{where}: {both} are the same run: drop one")
            taken[identity] = point
            yield Run(identity, name, point, seed, seeded.replace(run_dir=str(sweep.pool / identity)))


def _points(part: Part) -> Iterator[dict[str, Any]]:
    for values in itertools.product(*part.axes.values()):
        yield dict(zip(part.axes, values, strict=True))


def _resolve(part: Part, point: dict[str, Any], base: dict[str, Any]) -> Config:
    """The config at a point, before its seed. Raises ConfigError."""
    tree = copy.deepcopy(base)
    settings = [("overrides", part.overrides)]
    for axis, value in point.items():
        values = part.axes[axis]
        named = isinstance(values, dict)
        settings.append((f"axes.{axis}.{value}", values[value]) if named else (f"axes.{axis}", {axis: value}))
    derived: dict[str, float] = {}
    for origin, changes in settings:
        for key, value in changes.items():
            if key in DERIVED_AXES:
                derived[key] = value
            else:
                set_value(tree, key, value, origin)
    return _derive(parse_config(tree), derived, part)


def _derive(config: Config, derived: dict[str, float], part: Part) -> Config:
    if "rows" in derived:
        config = config.replace(model=_with_rows(config.model, derived["rows"]))
    if "flops" in derived:
        # All ratios of one budget see the same tokens: those of the model without memory, whose counts they keep.
        model = config.model.replace(memory=None) if "rho" in derived else config.model
        steps = steps_for(config.replace(model=model), derived["flops"], part.flops)
        config = config.replace(train=config.train.replace(steps=steps))
    if "rho" in derived:
        config = config.replace(model=allocate(config.model, derived["rho"], part.compensate))
    return config


def _with_rows(model: ModelConfig, rows: float) -> ModelConfig:
    """`rows` rows per head in every n-gram table that the model has; 0 takes the tables away."""
    if rows != int(rows) or rows < 0 or rows == 1:
        raise ConfigError(f"rows is {rows}, but rows per head are a whole number of at least 2, or 0 for no table")
    if rows > MOST_ROWS:
        raise ConfigError(
            f"rows is {shown(rows)}, but no machine holds more than {MOST_ROWS:,} rows per head: lower it"
        )
    tables = {name: getattr(model, name) for name in ("memory", "over_encoding") if getattr(model, name)}
    if not tables:
        raise ConfigError(
            "rows is an axis, but the model has no n-gram table: give model.memory or model.over_encoding"
        )
    changes = {
        name: table.replace(rows_per_head=(int(rows),) * len(table.orders)) if rows else None
        for name, table in tables.items()
    }
    return model.replace(**changes)
