"""Settings as people write them: YAML, one level of `base:`, `a.b=c` overrides, and one line for each mistake.

Knows no setting: `engram/config.py` does.
"""

import difflib
import math
from collections.abc import Hashable
from functools import reduce
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError


class UserError(ValueError):
    """Something the user gave cannot be used: the message names it, the limit, and what to change. Exit status 2."""


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
        raise ConfigError(f"{path}: holds {type(tree).__name__}, but a config is a mapping of sections")
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
    """One line for each mistake that pydantic found in the settings of `root`: path, mistake, value, valid names."""
    mistakes = error.errors()
    # A list that lost its only item to a mistake inside it is then too short as well: only the mistake counts.
    inside = {mistake["loc"][:-depth] for mistake in mistakes for depth in range(1, len(mistake["loc"]))}
    mistakes = [mistake for mistake in mistakes if mistake["type"] != "too_short" or mistake["loc"] not in inside]
    return list(dict.fromkeys(_explain(mistake, root) for mistake in mistakes))


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
    "string_too_short": "text that is not empty",
    "string_unicode": "valid Unicode text",
    "literal_error": "{expected}",
    "list_type": "a list",
    "tuple_type": "a list",
    "too_short": "a list of {min_length} or more",
    "too_long": "a list of {max_length} or fewer",
    "dict_type": "a section of settings",
    "model_type": "a section of settings",
    "model_attributes_type": "a section of settings",
    "none_required": "null",
    "invalid_key": "text, as all names of settings are",
}


def _explain(mistake: Any, root: type[BaseModel]) -> str:
    location = [part for part in mistake["loc"] if not str(part).startswith("function-")]
    where = ".".join(str(part) for part in location)
    kind, value = mistake["type"], _shown(mistake["input"])
    if kind == "extra_forbidden":
        names = _names_at(location[:-1], root)
        near = difflib.get_close_matches(str(location[-1]), names, n=1, cutoff=0.6)
        hint = f"did you mean {near[0]!r}?" if near else f"the keys here are {', '.join(names)}"
        return f"{where}: unknown key (value {value}); {hint}"
    if kind == "missing":
        return f"{where}: is required and missing"
    if kind == "value_error":
        message = mistake["msg"].removeprefix("Value error, ")
        return f"{where}: {message}" if where else message
    wanted = _WANTED[kind].format(**mistake.get("ctx", {})) if kind in _WANTED else f"valid ({mistake['msg']})"
    return f"{where}: is {'empty' if mistake['input'] is None else value}, but must be {wanted}"


def _shown(value: Any) -> str:
    # null and booleans as YAML writes them.
    text = str(value).lower() if isinstance(value, bool) else "null" if value is None else repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def _names_at(location: list[Any], root: type[BaseModel]) -> list[str]:
    """Names of the settings of the section at `location`."""
    section = root
    for key in location:
        field = section.model_fields.get(str(key))
        if field is None:
            continue
        candidates = [*get_args(field.annotation), field.annotation]
        candidates += [inner for outer in candidates for inner in get_args(outer)]
        section = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), section)
    return list(section.model_fields)
