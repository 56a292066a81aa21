"""Settings as people write them: YAML, one level of `base:`, `a.b=c` overrides, and one line for each mistake.

Knows no setting: `engram/config.py` does.
"""

import datetime
import difflib
import math
import re
from collections.abc import Hashable
from functools import reduce
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError


class UserError(ValueError):
    """Something the user gave cannot be used: the message names it, the limit, and what to change. Exit status 2."""

    # Of several ranks: whether it befell another one, and all the others raise it too.
    of_another_rank = False


class ConfigError(UserError):
    """A setting that does not exist, has the wrong type, or cannot be combined with another."""


def read_tree(path: Path, base_allowed: bool = True) -> dict[str, Any]:
    """The nested dictionary of a YAML file, laid over that of its `base:`. Raises ConfigError."""
    tree = read_mapping(path)
    base = tree.pop("base", None)
    if base is None:
        return tree
    if not base_allowed:
        raise ConfigError(f"{path}: is a base and names a base itself ({base}): only one level is allowed")
    return merge(read_tree(path.parent / str(base), base_allowed=False), tree)


def read_mapping(path: Path) -> dict[str, Any]:
    """The nested dictionary of a YAML file as it stands. Raises ConfigError."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    tree = _parse(text, path, "is not valid YAML")
    if not isinstance(tree, dict):
        held = "is empty" if tree is None else f"holds {_shown(tree)}"
        raise ConfigError(f"{path}: {held}, but must hold settings, one on a line, as `key: value`")
    return tree


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Set one `a.b=c` in place, making sections on the way. Raises ConfigError."""
    dotted, equals, text = override.partition("=")
    if not equals or not all(dotted.strip().split(".")):
        raise ConfigError(f"override {override!r} is not of the form a.b=value")
    value = _parse(text, f"override {override!r}", "the value is not valid YAML")
    set_value(tree, dotted.strip(), value, origin=f"override {override!r}")


def set_value(tree: dict[str, Any], dotted: str, value: Any, origin: str) -> None:
    """Set the setting `a.b` in place, making sections on the way. Raises ConfigError, opening by `origin`."""
    keys = dotted.split(".")
    for depth, key in enumerate(keys[:-1], start=1):
        below, here, rest = tree.get(key), ".".join(keys[:depth]), keys[depth:]
        if isinstance(below, list) or (below is None and rest[0].isdecimal()):
            entry = reduce(lambda inner, name: {name: inner}, reversed(rest[1:]), value)
            whole = yaml.safe_dump([entry], default_flow_style=True, allow_unicode=True, width=math.inf).strip()
            raise ConfigError(
                f"{origin}: {here} is a list, whose entries cannot be set one by one: give the whole "
                f"list, for example '{here}={whole}'"
            )
        if below is not None and not isinstance(below, dict):
            raise ConfigError(f"{origin}: {here} is {_shown(below)}, not a section")
        tree[key] = dict(below or {})
        tree = tree[key]
    tree[keys[-1]] = value


def explain(error: ValidationError, root: type[BaseModel]) -> list[str]:
    """One line for each setting of `root` that pydantic refused: its path and value, and what it must be."""
    mistakes = error.errors()
    # A list that lost its only item to a mistake inside it is then too short as well: only the mistake counts.
    inside = {mistake["loc"][:-depth] for mistake in mistakes for depth in range(1, len(mistake["loc"]))}
    mistakes = [mistake for mistake in mistakes if mistake["type"] != "too_short" or mistake["loc"] not in inside]
    # Of a setting that may be of several kinds, pydantic reports one mistake for each kind.
    places: dict[tuple[Any, ...], list[Any]] = {}
    for mistake in mistakes:
        places.setdefault(_place(mistake), []).append(mistake)
    return list(dict.fromkeys(_explain(place, found, root) for place, found in places.items()))


class _Loader(yaml.SafeLoader):
    """Refuses a key that is written twice, of which YAML would silently drop the first."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} stands twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _parse(text: str, source: Path | str, complaint: str) -> Any:
    """Raises ConfigError; within a file (not an override) it names line and column."""
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f":{mark.line + 1}:{mark.column + 1}" if mark and isinstance(source, Path) else ""
        problem = ": ".join(part for part in (error.context, error.problem) if part)
        raise ConfigError(f"{source}{place}: {complaint}: {problem}") from None
    # Besides its own errors the loader lets through those of Python's constructors, as for the date 2001-99-99.
    except (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{source}: {complaint}: {' '.join(str(error).split())}") from None


def merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """`above` laid over `below`, section by section, into a new dictionary."""
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged


# What pydantic's kinds of mistakes ask for, as the end of "is VALUE, but must be ...".
_WANTED = {
    "number_type": "a number",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing_size": "a whole number of fewer digits",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "greater_than": "above {gt}",
    "greater_than_equal": "{ge} or more",
    "less_than": "below {lt}",
    "less_than_equal": "{le} or less",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text",
    "string_too_short": "text of {min_length} or more characters",
    "string_pattern_mismatch": "text of the form {pattern}",
    "string_unicode": "valid Unicode text",
    "path_type": "a path",
    "literal_error": "{expected}",
    "list_type": "a list",
    "tuple_type": "a list",
    "too_short": "{whole} of {min_length} or more entries",
    "too_long": "{whole} of {max_length} or fewer entries",
    "dict_type": "a section of settings",
    "model_type": "a section of settings",
    "model_attributes_type": "a section of settings",
    "none_required": "null",
    "invalid_key": "text, as all names of settings are",
}


# Parts of a location that name no setting: pydantic's validators, and the kinds that it tried one after another.
_VALIDATORS = re.compile(r"(function-\w+|literal|list|dict)\[")
_SCALARS = ("str", "int", "float")


def _place(mistake: Any) -> tuple[Any, ...]:
    """Keys and indices from the root to the mistake."""
    location, kind = mistake["loc"], mistake["type"]
    place = [part for part in location[:-1] if not _VALIDATORS.match(str(part))]
    # An unknown key is the user's own word, whatever it looks like.
    if kind == "extra_forbidden" or not any(_VALIDATORS.match(str(part)) for part in location[-1:]):
        place += location[-1:]
    tried = place and place[-1] in _SCALARS and kind.startswith(("string_", "int_", "float_", "finite_"))
    return tuple(place[:-1] if tried else place)


def _explain(place: tuple[Any, ...], mistakes: list[Any], root: type[BaseModel]) -> str:
    """The line of one place, where several mistakes are those of the kinds that were tried."""
    kind, given = mistakes[0]["type"], mistakes[0]["input"]
    where, value = ".".join(str(part) for part in place), _shown(given)
    if kind == "extra_forbidden":
        names = list(_section_at(place[:-1], root).model_fields)
        near = difflib.get_close_matches(str(place[-1]), names, n=1, cutoff=0.6)
        hint = f"did you mean {near[0]!r}?" if near else f"the keys here are {', '.join(names)}"
        return f"{where}: unknown key (value {value}); {hint}"
    if kind == "missing":
        return f"{where}: is required and missing: {_missing(place, root)}"
    if kind == "value_error":
        message = mistakes[0]["msg"].removeprefix("Value error, ")
        return f"{where}: {message}" if where else message
    wanted = _wanted(mistakes)
    if kind in ("string_type", "path_type") and isinstance(given, int | float | datetime.date):
        wanted += ": put it in quotes"
    if place[-1:] == ("[key]",):
        return f"{'.'.join(str(part) for part in place[:-2])}: has a key {value}, but keys must be {wanted}"
    return f"{where}: is {'empty' if given is None else value}, but must be {wanted}"


def _wanted(mistakes: list[Any]) -> str:
    """What a setting must be, as the end of "but must be ..."."""
    found = []
    for mistake in mistakes:
        whole = "a section" if isinstance(mistake["input"], dict) else "a list"
        wording = _WANTED.get(mistake["type"])
        known = wording and wording.format(whole=whole, **mistake.get("ctx", {}))
        found.append(known or f"valid ({mistake['msg']})")
    return " or ".join(dict.fromkeys(found))


def _missing(place: tuple[Any, ...], root: type[BaseModel]) -> str:
    """What to write in the place of nothing."""
    section, name = _section_at(place[:-1], root), place[-1]
    if name not in section.model_fields:
        return "the list has too few entries"
    try:
        # What pydantic wants of a setting it says of one that is empty.
        section.model_validate({name: None})
    except ValidationError as error:
        return f"give {_wanted([mistake for mistake in error.errors() if mistake['loc'][0] == name])}"
    raise AssertionError(f"{name} is required, but may be empty")


def _shown(value: Any) -> str:
    # null, booleans and dates as YAML writes them.
    text = str(value).lower() if isinstance(value, bool) else "null" if value is None else repr(value)
    text = str(value) if isinstance(value, datetime.date) else text
    return text if len(text) <= 100 else f"{text[:97]}..."


def _section_at(place: tuple[Any, ...], root: type[BaseModel]) -> type[BaseModel]:
    """The section of settings at `place`."""
    section = root
    for key in place:
        field = section.model_fields.get(str(key))
        if field is None:
            continue
        candidates = [*get_args(field.annotation), field.annotation]
        candidates += [inner for outer in candidates for inner in get_args(outer)]
        section = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), section)
    return section
