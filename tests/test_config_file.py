"""Every mistake that a settings file can hold is told in plain words, whichever file it is."""

import datetime
import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from pydantic import BaseModel, ValidationError

from engram.config import Config
from engram.config_file import explain
from engram.sweep.spec import Sweep
from eval.benchmarks.manifest import Manifest
from eval.suites.settings import Suite

# Everything that YAML can give: kinds, signs, sizes, and containers, empty and not.
VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2.5, 10**30, -(10**30), float("nan"), float("inf"), "", "x", "a/b", "9" * 5000),
    *(b"\xff", datetime.date(2001, 1, 1), datetime.datetime(2001, 1, 1)),
    *([], [None], [[]], [{}], [1], ["x"], [True], [1] * 9, {}, {"x": 1}, {1: 2}, {"": {}}, {"x": {"y": {1: 2}}}, {1}),
]
TREES: list[tuple[type[BaseModel], str]] = [
    (
        Config,
        """
        model:
          num_layers: 3
          hidden_size: 16
          vocab_size: 40
          attention: {num_heads: 2, kv_lora_rank: 8, qk_nope_head_dim: 4, qk_rope_head_dim: 4, v_head_dim: 6,
            yarn: {factor: 2, original_max_position: 8}}
          moe: {num_experts: 4, top_k: 2, expert_dim: 8}
          hyper_connection: {}
          memory: {layer_ids: [1], num_heads: 2, head_dim: 3, rows_per_head: 50, conv: {}}
          over_encoding: {num_heads: 2, head_dim: 3, rows_per_head: 50}
        data: {path: data/small, sequence_length: 8, tokenizer: {}, sources: [{world: {}}]}
        train: {steps: 5, batch_size: 6, tables: {tier: file, cache_rows: 9}, wandb: {}}
        optim: {muon: {}, table: {}, schedule: {}}
        eval: {}
        distributed: {}
        """,
    ),
    (Sweep, "{name: a, out: x, parts: {p: {base: b, axes: {optim.lr: [1]}}}, slurm: {additional: {x: 1}}}"),
    (Suite, "tasks: [{task: ruler}]"),
    (Manifest, f"{{files: {{a: {{sha256: '{64 * '0'}', split: test}}}}, licence: x, source: y}}"),
]


def sections(node: Any) -> Iterator[dict[str, Any]]:
    """Every dictionary within the tree, itself included."""
    if isinstance(node, dict):
        yield node
    for inner in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from sections(inner)


def complaints(root: type[BaseModel], tree: dict[str, Any]) -> list[str]:
    try:
        root.model_validate(tree)
    except ValidationError as error:
        return explain(error, root)
    return []


@pytest.mark.parametrize(("root", "text"), TREES, ids=[root.__name__ for root, _ in TREES])
def test_every_setting_refuses_every_value_in_plain_words(root: type[BaseModel], text: str) -> None:
    """Of pydantic's own words, names of validators among them, none is left: a new kind of mistake needs a wording."""
    # With all defaults written out.
    tree = root.model_validate(yaml.safe_load(text)).model_dump(mode="json")
    refused = 0
    for section in sections(tree):
        for key, before in list(section.items()):
            for value in VALUES:
                section[key] = value
                for line in complaints(root, tree):
                    refused += 1
                    assert re.match(r"[\w.]+: ", line), line
                    assert not re.search(
                        r"nput |hould |must be valid \(|function-|literal\[|list\[|dict\[|\[key\]", line
                    ), line
            section[key] = before
    assert refused > 10 * len(list(sections(tree)))


@pytest.mark.parametrize(("root", "text"), TREES, ids=[root.__name__ for root, _ in TREES])
def test_every_missing_setting_says_what_to_write(root: type[BaseModel], text: str) -> None:
    tree = root.model_validate(yaml.safe_load(text)).model_dump(mode="json")
    missing = set()
    for section in sections(tree):
        for key in list(section):
            left = section.pop(key)
            missing |= {line for line in complaints(root, tree) if "missing" in line}
            section[key] = left
    assert all(re.fullmatch(r"[\w.]+: is required and missing: give (a|text|'host').*", line) for line in missing)
    expected = {
        Config: "train.tables.tier: is required and missing: give 'host' or 'file'",
        Sweep: "parts.p.base: is required and missing: give a path",
        Suite: "tasks: is required and missing: give a list",
        Manifest: "files.a.sha256: is required and missing: give text",
    }
    assert expected[root] in missing


@pytest.mark.parametrize(
    ("root", "tree", "line"),
    [
        (Suite, {"tasks": [{"task": "ruler", "data": 3}]}, "tasks.0.data: is 3, but must be a path: put it in quotes"),
        (Manifest, {"files": {}}, "files: is {}, but must be a section of 1 or more entries"),
        (
            Manifest,
            {"files": {"a": {"sha256": "zz", "split": "test"}}},
            "files.a.sha256: is 'zz', but must be text of the form ^[0-9a-f]{64}$",
        ),
        (Sweep, {"slurm": {"additional": {"x": []}}}, "slurm.additional.x: is [], but must be text or a whole number"),
        (Sweep, {"slurm": {"additional": {3: 3}}}, "slurm.additional: has a key 3, but keys must be text: put it in"),
    ],
)
def test_what_is_said(root: type[BaseModel], tree: dict[str, Any], line: str) -> None:
    assert any(said.startswith(line) for said in complaints(root, tree))
