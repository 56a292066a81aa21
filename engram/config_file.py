"""Settings as people write them: YAML, one level of `base:`, `a.b=c` overrides, and one line for each mistake.

Knows no setting: `engram/config.py` does.
"""

import difflib
from collections.abc import Hashable
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
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    tree = _parse(text, path, "is not valid YAML")
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: holds {type(tree).__name__}, but a config is a mapping of sections")
    base = tree.pop("base", None)
    if base is None:
        return tree
    if not base_allowed:
        raise ConfigError(f"{path}: is a base and names a base itself ({base}): only one level is allowed")
    return _merge(read_tree(path.parent / str(base), base_allowed=False), tree)


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Set one `a.b=c` in place, making sections on the way. Raises ConfigError."""
    dotted, equals, text = override.partition("=")
    keys = dotted.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"override {override!r} is not of the form a.b=value")
    value = _parse(text, f"override {override!r}", "the value is not valid YAML")
    for depth, key in enumerate(keys[:-1]):
        below = tree.get(key)
        if below is not None and not isinstance(below, dict):
            raise ConfigError(f"override {override!r}: {'.'.join(keys[: depth + 1])} is {below!r}, not a section")
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


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _explain(mistake: Any, root: type[BaseModel]) -> str:
    location = [part for part in mistake["loc"] if not str(part).startswith("function-")]
    where = ".".join(str(part) for part in location)
    message, value = mistake["msg"].removeprefix("Value error, "), _shown(mistake["input"])
    if mistake["type"] == "extra_forbidden":
        names = _names_at(location[:-1], root)
        near = difflib.get_close_matches(str(location[-1]), names, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"the keys here are {', '.join(names)}"
        return f"{where}: unknown key (value {value}); {hint}"
    if mistake["type"] == "missing":
        return f"{where}: is required and missing"
    if mistake["type"] == "value_error":
        return f"{where}: {message}" if where else message
    message = f"{message[0].lower()}{message[1:]}"
    return f"{where}: is empty, but {message}" if mistake["input"] is None else f"{where}: {message}, got {value}"


def _shown(value: Any) -> str:
    text = repr(value)
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
