"""A sweep's file: a base config, axes, seeds, and what the axes derive. `configs/sweep/README.md` shows each key."""

import difflib
import math
import re
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, model_validator

from engram.config import Config, Count, Name, Positive, Seed, Settings
from engram.config_file import UserError, explain, read_mapping
from engram.config_identity import matters

# Axes that mean more than one setting: the experts' share of the sparse parameters, rows per head of every table, and
# training FLOPs, from which the number of steps follows.
DERIVED_AXES = ("rho", "rows", "flops")
View = Literal["allocation", "scaling", "bars", "lines"]
_PAPERS_VIEWS = {"allocation": "allocation", "memory_scaling": "scaling", "ablations": "bars", "layers": "lines"}


class SweepError(UserError):
    """A sweep that cannot be read, planned or run as it stands."""


def _whole_axis(values: Any) -> Any:
    """Said in our words: pydantic would name each kind of axis that it tried."""
    if not isinstance(values, list | dict) or not values:
        given = "empty" if values is None else repr(values)
        raise ValueError(f"is {given}, but must be a list of one value or more, or a mapping of names to settings")
    if isinstance(values, dict):
        for name, settings in values.items():
            if not isinstance(name, str):
                raise ValueError(f"names a value {name!r}, but names are text: put it in quotes")
            if not isinstance(settings, dict) or not all(isinstance(key, str) for key in settings):
                raise ValueError(f"sets {name!r} to {settings!r}, but must name settings, such as {{optim.lr: 0.1}}")
    return values


# An axis lists the values of one setting, or names sets of settings.
Axis = Annotated[list[Any] | dict[str, dict[str, Any]], BeforeValidator(_whole_axis)]


class Part(Settings):
    """One grid of runs, all combinations of its axes and seeds."""

    # The training config that all runs start from.
    base: Path
    axes: dict[Name, Axis] = {}
    # `allocation`: axis `rho` moves parameters between experts and tables; `memory`: axis `rows` lets the tables grow.
    derive: Literal["allocation", "memory"] | None = None
    # False: the paper's accounting, which leaves the memory's dense projections as extra.
    compensate: bool = True
    # How an axis `flops` counts: 6 x activated parameters x tokens, or every matrix product.
    flops: Literal["6nd", "counted"] = "6nd"
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] = (0,)
    # Dotted settings, laid over the base before the axes.
    overrides: dict[str, Any] = {}
    # How `report` shows the part; null: by its axis rho or rows, else as bars.
    view: View | None = None
    # The paper's figure whose points stand beside the part's; that of its ablations by the variants' names.
    paper: Literal["allocation", "memory_scaling", "ablations", "layers"] | None = None
    # The point that others are compared with, by axis; `part` names another part that holds it. null: the first point.
    reference: dict[str, Any] | None = None

    @property
    def shown_as(self) -> View:
        return self.view or ("allocation" if "rho" in self.axes else "scaling" if "rows" in self.axes else "bars")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds {list(self.seeds)} repeat: give each seed once")
        self._check_keys("overrides", self.overrides)
        for name, values in self.axes.items():
            self._check_axis(name, values)
        for derive, axis in (("allocation", "rho"), ("memory", "rows")):
            if (axis in self._names()) != (self.derive == derive):
                raise ValueError(f"an axis {axis} and derive: {derive} belong together, but one of them is missing")
        needed = {"allocation": "rho", "scaling": "rows"}.get(self.shown_as)
        if needed and needed not in self.axes:
            raise ValueError(f"view {self.view} needs an axis {needed}: add it, or choose view bars or lines")
        if self.paper and self.shown_as != _PAPERS_VIEWS[self.paper]:
            raise ValueError(f"paper {self.paper} belongs beside view {_PAPERS_VIEWS[self.paper]}, not {self.shown_as}")
        return self

    def _names(self) -> set[str]:
        """Axes, and what the values of named axes set."""
        named = [settings for values in self.axes.values() if isinstance(values, dict) for settings in values.values()]
        return set(self.axes).union(*named)

    def _check_keys(self, where: str, keys: Iterable[str]) -> None:
        """Refuse what the sweep sets by itself."""
        for key in keys:
            if key in ("seed", "data.shuffle_seed"):
                raise ValueError(f"{where}.{key}: is set by `seeds`, which makes intervals of it: list the seeds there")
            if key == "run_dir":
                raise ValueError(f"{where}.run_dir: is <pool>/<run id> for every run: leave it out, or set `pool`")
            if key == "train.steps" and "flops" in self._names():
                raise ValueError(f"{where}.train.steps: the axis flops decides how many steps are taken: drop one")

    def _check_axis(self, name: str, values: list[Any] | dict[str, dict[str, Any]]) -> None:
        self._check_keys("axes", [name])
        if isinstance(values, dict):
            for value, settings in values.items():
                self._check_keys(f"axes.{name}.{value}", settings)
                for key in settings:
                    if key in DERIVED_AXES:
                        _check_number(f"axes.{name}.{value}.{key}", settings[key])
            return
        if not matters(name):
            raise ValueError(
                f"axes.{name}: changes nothing that a run is told apart by, so that all its values are one run: "
                "give one of them in overrides"
            )
        shown = [repr(value) for value in values]
        if len(set(shown)) != len(shown):
            raise ValueError(f"axes.{name}: {list(values)} repeats a value: give each value once")
        if name in DERIVED_AXES:
            for value in values:
                _check_number(f"axes.{name}", value)
        elif "." not in name and name not in Config.model_fields:
            near = difflib.get_close_matches(name, DERIVED_AXES, n=1, cutoff=0.4)
            hint = f" did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"axes.{name}: unknown axis;{hint} a list belongs to {', '.join(DERIVED_AXES)} or a dotted setting "
                "such as optim.lr; a mapping of names to settings may have any name"
            )


class SlurmConfig(Settings):
    """What `submit` asks of the cluster for one run."""

    partition: str | None = None
    account: str | None = None
    time_minutes: Count = 60
    cpus_per_task: Count = 8
    gpus_per_node: Annotated[int, Field(ge=0)] = 0
    mem_gb: Positive | None = None
    # How often a run that reaches its time limit is queued again, to go on from its checkpoint.
    max_requeues: Count = 100
    # Runs at a time.
    array_parallelism: Count = 256
    # Lines before a run, such as `module load`, and further #SBATCH settings.
    setup: tuple[str, ...] = ()
    additional: dict[str, str | int | float] = {}


def _folder_name(name: str) -> str:
    if not name or "/" in name or name in (".", ".."):
        raise ValueError(f"is {name!r}, but must be the name of a folder below results: give another")
    return name


class Sweep(Settings):
    """A sweep's file, with every part's defaults filled in from the top level."""

    name: Annotated[str, AfterValidator(_folder_name)]
    parts: Annotated[dict[Name, Part], Field(min_length=1)]
    # Run folders by run id, shared by all sweeps.
    pool: Path = Path("runs/pool")
    # Tables, fits, figures, page, and the small files of every finished run.
    out: Path
    slurm: SlurmConfig = SlurmConfig()


def load_sweep(path: str | Path) -> Sweep:
    """Read a sweep's file. Raises SweepError: names the key, its value and what is allowed."""
    path = Path(path)
    tree = read_mapping(path)
    known = [*Sweep.model_fields, *Part.model_fields]
    for key in tree:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"the keys here are {', '.join(known)}"
            raise SweepError(f"{path}: {key}: unknown key; {hint}")
    shared = {key: tree.pop(key) for key in list(tree) if key in Part.model_fields}
    tree.setdefault("name", path.stem)
    tree.setdefault("out", f"results/{tree['name']}")
    whole = None if "parts" in tree else str(tree["name"])
    parts = tree.get("parts", {whole: {}})
    if isinstance(parts, dict):
        tree["parts"] = {name: _filled(part, shared) for name, part in parts.items()}
    as_written = partial(_as_written, parts=parts, shared=shared, whole=whole)
    try:
        sweep = Sweep.model_validate(tree)
    except ValidationError as error:
        lines = map(as_written, explain(error, Sweep))
        raise SweepError("\n".join(f"{path}: {line}" for line in dict.fromkeys(lines))) from None
    _check_file_names(f"{path}: {'parts' if whole is None else 'name'}", sweep.parts)
    for name, part in sweep.parts.items():
        for axis, values in part.axes.items():
            if isinstance(values, dict):
                where = as_written(f"parts.{name}: axes.{axis}:").removesuffix(":")
                _check_told_apart(f"{path}: {where}", values)
        if part.reference is not None:
            _check_reference(f"{path}: {as_written(f'parts.{name}.reference')}", name, part.reference, sweep)
    # Relative to the sweep's file; an absolute path stays as it is.
    return sweep.replace(parts={name: part.replace(base=path.parent / part.base) for name, part in sweep.parts.items()})


def file_name(*words: str) -> str:
    """Words of a part's name as a file's name, letters of all scripts kept."""
    return "_".join(filter(None, (re.sub(r"[\W_]+", "_", word).strip("_") for word in words)))


def _check_file_names(where: str, parts: Iterable[str]) -> None:
    """No part's figures overwrite those of another: there are two of each, the part's own and that of its runs."""
    taken: dict[str, str] = {}
    for part in parts:
        for name in (file_name(part), file_name(part, "runs")):
            if not file_name(part):
                raise SweepError(f"{where}: {part!r} names no file, as it has no letter and no digit: rename it")
            if name in taken:
                raise SweepError(f"{where}: {taken[name]} and {part} would both write a figure {name}: rename one")
        taken |= {file_name(part): part, file_name(part, "runs"): part}


def _check_told_apart(where: str, values: dict[str, dict[str, Any]]) -> None:
    """Two names for the same settings would be two points of one run."""
    seen: dict[str, str] = {}
    for value, settings in values.items():
        # Written with their types: 1 is not "1".
        identity = repr(sorted((key, setting) for key, setting in settings.items() if matters(key)))
        if identity in seen:
            free = [key for key in {**values[seen[identity]], **settings} if not matters(key)]
            why = f"{', '.join(free)}, which tells no runs apart" if free else "nothing"
            raise SweepError(f"{where}: {seen[identity]} and {value} differ in {why}: drop one")
        seen[identity] = value


def _check_reference(where: str, name: str, reference: dict[str, Any], sweep: Sweep) -> None:
    """The point that it names is in the grid, for every point of part `name`; else only `fit` would find out."""
    wanted = dict(reference)
    place = wanted.pop("part", name)
    _check_known(f"{where}.part", place, sweep.parts)
    own, held = sweep.parts[name].axes, sweep.parts[place].axes
    for axis, value in wanted.items():
        _check_known(where, axis, held)
        _check_known(f"{where}.{axis}", value, held[axis])
    # On the axes that it leaves out, each point is compared with its own value.
    for axis in own.keys() & held.keys() - wanted.keys():
        for value in own[axis]:
            _check_known(f"{where}: axis {axis} of part {place}", value, held[axis])


def _check_known(where: str, value: Any, known: Iterable[Any]) -> None:
    if any(value == name or str(value) == str(name) for name in known):
        return
    names = [str(name) for name in known]
    near = difflib.get_close_matches(str(value), names, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(names) or 'none'}"
    raise SweepError(f"{where}: has no {str(value)!r}; {hint}")


def other_folder(sweep: Sweep, path: Path) -> Path | None:
    """The project of the sweep's file `path`, if pool or out lie there, and neither in the current folder."""
    project = next((folder for folder in path.resolve().parents if (folder / "pyproject.toml").exists()), None)
    relative = [place for place in (sweep.pool, sweep.out) if not place.is_absolute()]
    if project is None or any(place.exists() for place in relative):
        return None
    return project if any((project / place).exists() for place in relative) else None


def _check_number(where: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        # What YAML takes for text, such as 2e20.
        hint = " (YAML reads an exponent only as in 2.0e+20)" if isinstance(value, str) else ""
        raise ValueError(f"{where}: holds {value!r}, but must hold a number{hint}")


def _as_written(line: str, parts: Any, shared: dict[str, Any], whole: str | None) -> str:
    """A line that opens with a key of a part, with that key where the user wrote it.

    That is the top level for the keys in `shared` which the part leaves out, and for all keys of the part `whole`,
    which stands for a file without parts.
    """
    if whole is not None:
        return line.removeprefix(f"parts.{whole}.").removeprefix(f"parts.{whole}: ")
    for name, part in parts.items() if isinstance(parts, dict) else ():
        for key in shared.keys() - (part if isinstance(part, dict) else {}):
            if re.match(rf"parts\.{re.escape(str(name))}(\.{key}\b|: {key}[.:])", line):
                return line[line.index(key, len(f"parts.{name}")) :]
    return line


def _filled(part: Any, shared: dict[str, Any]) -> Any:
    """A part over the file's top level: its settings replace those, its overrides add to them."""
    if part is None:
        return shared
    if not isinstance(part, dict):
        return part
    overrides = [tree.get("overrides") or {} for tree in (shared, part)]
    if not all(isinstance(override, dict) for override in overrides):
        return {**shared, **part}
    return {**shared, **part, "overrides": {**overrides[0], **overrides[1]}}
