"""On a GPU every study measures what it measures on the CPU."""

import csv
import json
from pathlib import Path

import pytest

from eval.__main__ import main

ROOT = Path(__file__).parents[2]
MODEL, BASELINE = "tests/fixtures/runs/engram", "tests/fixtures/runs/moe"
PAIR = ("--baseline", BASELINE, "--tokens", "1500")
STUDIES = {
    "logit_lens": (*PAIR, "--tuned", "4"),
    "cka": (*PAIR, "--positions", "all"),
    "depth": PAIR,
    "gates": ("--documents", "6"),
    "sensitivity": ("--tokens", "1500"),
    "facts": ("--baseline", BASELINE, "--sets", "local_fact,copy"),
    "ruler": ("--baseline", BASELINE, "--lengths", "256", "--samples", "3"),
    "long_ppl": ("--baseline", BASELINE, "--evaluator", f"{BASELINE}/step_000080", "--tokens", "1500"),
    "configs/eval/tiny.yaml": (),
}

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("study", STUDIES)
def test_tables_are_those_of_the_cpu(study: str, tmp_path: Path) -> None:
    for device in ("cpu", "cuda"):
        arguments = ["--checkpoint", MODEL, *STUDIES[study], "--device", device, "--out", str(tmp_path / device)]
        assert main([study, *arguments]) == 0
    paths = sorted(path.relative_to(tmp_path / "cpu") for path in (tmp_path / "cpu").rglob("*.csv"))
    assert paths
    for path in paths:
        ours, theirs = (_cells(tmp_path / device / path) for device in ("cuda", "cpu"))
        assert ours.keys() == theirs.keys()
        for place, cell in theirs.items():
            wanted = _number(cell)
            if wanted is None:
                assert ours[place] == cell, f"{path}, {place}"
            else:
                near = pytest.approx(wanted, abs=2e-3, rel=2e-3, nan_ok=True)
                assert _number(ours[place]) == near, f"{path}, {place}"


def test_losses_in_bfloat16_are_near(capsys: pytest.CaptureFixture[str]) -> None:
    found = []
    for device, dtype in (("cpu", "float32"), ("cuda", "float32"), ("cuda", "bfloat16")):
        assert main(["perplexity", "--checkpoint", MODEL, "--device", device, "--dtype", dtype, "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out)["loss"])
    assert found[1] == pytest.approx(found[0], abs=1e-4) and found[2] == pytest.approx(found[0], abs=0.02)


def _cells(path: Path) -> dict[tuple[int, str], str]:
    with open(path, newline="", encoding="utf-8") as file:
        return {(number, name): cell for number, row in enumerate(csv.DictReader(file)) for name, cell in row.items()}


def _number(cell: str) -> float | None:
    try:
        return float(cell) if cell else None
    except ValueError:
        return None
