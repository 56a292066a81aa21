"""Which optimizer moves which parameter: one explicit, ordered table.

The first rule whose pattern matches a parameter's full name decides. There is no catch-all: a parameter that no rule
covers is an error, and so is a rule that matches nothing although its part of the model is there. Both mean that a name
has changed, and that a parameter would otherwise train under the wrong rule without a word.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Literal

import torch
from torch import nn

from engram.config import OptimConfig, UserError
from engram.kernels.table_update.part import TablePart

RoleName = Literal["muon", "adamw", "table"]


class RoleError(UserError):
    """Parameters and rules do not cover each other."""


@dataclass(frozen=True)
class Rule:
    """One line of the table; in a pattern, `*` stands for any characters, dots included."""

    pattern: str
    role: RoleName
    # Whether `optim.weight_decay` applies; tables have their own, `optim.table.weight_decay`.
    decays: bool
    # Once any parameter matches this, the rule must match one too. None: never required.
    part: str | None
    # The parameter is several matrices, one below the other, each with as many rows as this parameter has columns.
    rows_as: str | None = None


_BLOCKS, _MEMORY, _OVER_ENCODING = "blocks.*", "blocks.*.memory.*", "over_encoding.*"

RULES: tuple[Rule, ...] = (
    # N-gram tables and the module around them.
    Rule("blocks.*.memory.embed.weight", "table", False, _MEMORY),
    Rule("over_encoding.embed.weight", "table", False, _OVER_ENCODING),
    # A key for each stream, then the value. They are stored as one matrix for the sake of one product, but feed
    # different computations, and their gradients differ in size: orthogonalised together, the larger would set the
    # directions for all. (Qwen3.8 has them apart; DeepSeek-V4.1 fuses them, and does not say what its Muon sees.)
    Rule("blocks.*.memory.wkv.weight", "muon", True, _MEMORY, rows_as="embed.weight"),
    Rule("over_encoding.proj.weight", "muon", True, _OVER_ENCODING),
    Rule("blocks.*.memory.wkv.bias", "adamw", False, None),
    Rule("blocks.*.memory.[qk]_weight", "adamw", False, _MEMORY),
    Rule("blocks.*.memory.conv.weight", "adamw", False, "blocks.*.memory.conv_norm"),
    Rule("blocks.*.memory.conv_norm", "adamw", False, "blocks.*.memory.conv.weight"),
    # Vocabulary.
    Rule("embed.weight", "adamw", True, _BLOCKS),
    Rule("head.weight", "adamw", True, _BLOCKS),
    # Coefficients that mix the streams of hyper-connections.
    Rule("readout.*", "adamw", False, "blocks.*_connection.*"),
    Rule("blocks.*_connection.*", "adamw", False, "readout.*"),
    # Gains.
    Rule("norm.weight", "adamw", False, _BLOCKS),
    Rule("blocks.*_norm.weight", "adamw", False, _BLOCKS),
    # Attention, experts and dense feed-forward layers.
    Rule("blocks.*.attn.*_proj.weight", "muon", True, _BLOCKS),
    Rule("blocks.*.ffn.router.weight", "adamw", False, "blocks.*.ffn.experts.*"),
    Rule("blocks.*.ffn.experts.gate_up", "muon", True, "blocks.*.ffn.router.*"),
    Rule("blocks.*.ffn.experts.down", "muon", True, "blocks.*.ffn.router.*"),
    Rule("blocks.*.ffn.shared.gate_up.weight", "muon", True, "blocks.*.ffn.shared.*"),
    Rule("blocks.*.ffn.shared.down.weight", "muon", True, "blocks.*.ffn.shared.*"),
    Rule("blocks.*.ffn.gate_up.weight", "muon", True, "blocks.*.ffn.down.weight"),
    Rule("blocks.*.ffn.down.weight", "muon", True, "blocks.*.ffn.gate_up.weight"),
)


@dataclass(frozen=True, eq=False)
class Assignment:
    """A parameter with its role, the factor on the learning rate, and its decoupled weight decay."""

    name: str
    parameter: nn.Parameter = field(repr=False)
    role: RoleName
    lr_multiplier: float
    weight_decay: float
    # Matrices that the parameter's rows are divided into, besides those that leading dimensions count.
    matrices: int = 1
    # What a table's parameter holds of it, if not the whole.
    part: TablePart | None = None

    @property
    def shape(self) -> torch.Size:
        return self.parameter.shape

    @property
    def numel(self) -> int:
        return self.parameter.numel()

    @property
    def whole_shape(self) -> torch.Size:
        """Of all rows, where the parameter holds some."""
        return torch.Size((self.part.num_rows, *self.shape[1:])) if self.part else self.shape


def assign_roles(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    optim: OptimConfig,
    rules: Sequence[Rule] = RULES,
    parts: Mapping[str, TablePart] | None = None,
) -> list[Assignment]:
    """Give every parameter exactly one role, in the order of the parameters; `parts` are those of tables by name.

    Without `optim.muon`, hidden matrices go to AdamW and keep their weight decay.

    Raises RoleError: an uncovered parameter, a rule without a match, a parameter under two names.
    """
    parameters = list(named_parameters)
    _check_names(parameters)
    chosen = {name: _first_match(name, rules) for name, _ in parameters}
    _check_rules(chosen, rules)
    widths = {name: parameter.shape[-1] for name, parameter in parameters if parameter.ndim}
    assigned = [_assign(name, parameter, chosen[name], optim, widths) for name, parameter in parameters]
    return (
        [replace(each, part=parts[each.name]) if each.name in parts else each for each in assigned]
        if parts
        else assigned
    )


def _assign(
    name: str, parameter: nn.Parameter, rule: Rule, optim: OptimConfig, widths: Mapping[str, int]
) -> Assignment:
    if rule.role == "table":
        return Assignment(name, parameter, "table", optim.table.lr_multiplier, optim.table.weight_decay)
    role: RoleName = "adamw" if optim.muon is None else rule.role
    if role == "muon" and parameter.ndim < 2:
        raise RoleError(f"{name} has shape {list(parameter.shape)}, but Muon needs matrices: give it the role adamw")
    matrices = _matrices(name, parameter, rule, widths) if role == "muon" else 1
    return Assignment(name, parameter, role, 1.0, optim.weight_decay if rule.decays else 0.0, matrices)


def _matrices(name: str, parameter: nn.Parameter, rule: Rule, widths: Mapping[str, int]) -> int:
    if rule.rows_as is None:
        return 1
    rows, each = parameter.shape[0], widths.get(rule.rows_as)
    if each is None or rows % each:
        found = "is not there" if each is None else f"has {each}"
        raise RoleError(
            f"{name} has {rows} rows, in matrices of as many as {rule.rows_as} has columns, but that {found}: correct "
            "the rule in engram/optim/groups.py"
        )
    return rows // each


def _first_match(name: str, rules: Sequence[Rule]) -> Rule:
    for rule in rules:
        if fnmatchcase(name, rule.pattern):
            return rule
    raise RoleError(f"parameter {name} has no optimizer role: add a rule for it to RULES in engram/optim/groups.py")


def _check_names(parameters: Sequence[tuple[str, nn.Parameter]]) -> None:
    seen: dict[int, str] = {}
    for name, parameter in parameters:
        if id(parameter) in seen:
            raise RoleError(f"{name} is the same parameter as {seen[id(parameter)]}: name it once")
        seen[id(parameter)] = name
    for name, count in Counter(name for name, _ in parameters).items():
        if count > 1:
            raise RoleError(f"{count} parameters are called {name}: names must be unique")


def _check_rules(chosen: dict[str, Rule], rules: Sequence[Rule]) -> None:
    used = set(chosen.values())
    for rule in rules:
        if rule.part is None or rule in used:
            continue
        witness = next((name for name in chosen if fnmatchcase(name, rule.part)), None)
        if witness is not None:
            raise RoleError(
                f"optimizer rule {rule.pattern!r} ({rule.role}) matches no parameter, although there is {witness}: "
                "correct the rule in engram/optim/groups.py"
            )


# ------------------------------------------------------------------------------------------------------------- printing

_HEADER = ("parameter", "shape", "count", "elements", "role", "lr x", "decay")


def roles_table(assignments: Sequence[Assignment]) -> str:
    """An aligned text table: equal parameters of several blocks share a line, the totals by role follow."""
    families: dict[tuple[str, ...], list[Assignment]] = {}
    for assignment in assignments:
        family = re.sub(r"^blocks\.\d+\.", "blocks.*.", assignment.name)
        settings = (assignment.role, f"{assignment.lr_multiplier:g}", f"{assignment.weight_decay:g}")
        shape = _shape(assignment)
        families.setdefault((family, shape, *settings), []).append(assignment)
    lines = [_HEADER] + [
        (
            _family_name(family, members),
            shape,
            str(len(members)),
            f"{sum(row.whole_shape.numel() for row in members):,}",
            *settings,
        )
        for (family, shape, *settings), members in families.items()
    ]
    widths = [max(len(line[column]) for line in lines) for column in range(len(_HEADER))]
    right_aligned = {"count", "elements", "lr x", "decay"}
    text = [
        "  ".join(
            cell.rjust(width) if title in right_aligned else cell.ljust(width)
            for cell, width, title in zip(line, widths, _HEADER, strict=True)
        ).rstrip()
        for line in lines
    ]
    totals: Counter[str] = Counter()
    for row in assignments:
        totals[row.role] += row.whole_shape.numel()
    summary = ", ".join(f"{role} {count:,}" for role, count in totals.items())
    return "\n".join([text[0], "-" * max(map(len, text)), *text[1:], f"elements by role: {summary}"])


def _shape(assignment: Assignment) -> str:
    """`5 * 2560 x 1280` for five matrices below one another."""
    sizes = list(assignment.whole_shape)
    if assignment.matrices == 1:
        return " x ".join(map(str, sizes))
    return f"{assignment.matrices} * " + " x ".join(map(str, (sizes[0] // assignment.matrices, *sizes[1:])))


def _family_name(family: str, members: Sequence[Assignment]) -> str:
    """`blocks.{0-2,5}.attn.o_proj.weight` for the blocks 0, 1, 2 and 5."""
    if not family.startswith("blocks.*."):
        return family
    blocks = sorted(int(row.name.split(".")[1]) for row in members)
    starts = [block for block in blocks if block - 1 not in blocks]
    ends = [block for block in blocks if block + 1 not in blocks]
    spans = [str(start) if start == end else f"{start}-{end}" for start, end in zip(starts, ends, strict=True)]
    return family.replace("*", spans[0] if len(blocks) == 1 else "{" + ",".join(spans) + "}", 1)
