"""The paper's points, against what its text says."""

from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest

from engram.sweep import paper
from engram.sweep.spec import SweepError
from tests.sweep.build import make_sweep


def test_the_texts_own_numbers() -> None:
    """Text: 1.7248 at 100 %, 1.7109 near 80 %; about 40 % ties with experts only; 1.808 falls to 1.768 with memory."""
    rho, loss = paper.allocation()["6e20"]
    assert loss[rho == 1] == [1.7248] and loss[np.argmin(np.abs(rho - 0.8))] == 1.7109
    assert abs(loss[0] - loss[-1]) < 0.0002 and rho[0] == pytest.approx(0.4, abs=0.003)
    assert paper.ablations()["no memory"] == pytest.approx(1.808 - 1.768, abs=3e-4)


@pytest.mark.parametrize(("budget", "experts"), [("2e20", (46, 106)), ("6e20", (43, 99))])
def test_rho_is_the_share_of_inactive_experts(budget: str, experts: tuple[int, int]) -> None:
    """(E - 6) / (E at rho = 1 - 6), six experts being active."""
    rho, loss = paper.allocation()[budget]
    assert len(rho) == len(loss) == 10 and (np.diff(rho) > 0).all()
    assert rho[0] == pytest.approx((experts[0] - 6) / (experts[1] - 6), abs=5e-4)
    counts = rho * (experts[1] - 6)
    assert np.abs(counts - counts.round()).max() < 0.05


def test_slots_are_multiples_of_the_vocabulary() -> None:
    data = paper.memory_scaling()
    assert (data["engram"][0] / 129_280).tolist() == [2, 5, 10, 15, 20, 30, 50, 80]
    assert (data["over_encoding"][0] / 129_280).tolist() == [10, 20, 40, 100]
    assert data["baseline"] == 1.8082 and data["engram"][1].max() < data["baseline"]


def test_ablations_are_differences_from_the_full_model() -> None:
    text = (files("engram.sweep") / "paper_data" / "ablations.csv").read_text()
    rows = [line.split(",") for line in text.splitlines() if not line.startswith("#")][1:]
    reference = float(rows[0][1])
    assert rows[0][0] == "full" and reference == paper.memory_scaling()["engram"][1][2]
    for variant, loss, delta in rows:
        assert float(loss) - reference == pytest.approx(float(delta), abs=1e-9)
        assert paper.ablations()[variant] == float(delta)


def test_layers_count_from_zero() -> None:
    layer, loss = paper.layers()
    assert layer.tolist() == list(range(12))
    assert loss.argmin() == 1 and loss[1] == 1.7705 and loss.argmax() == 10


@pytest.mark.parametrize("name", ["allocation", "memory_scaling", "ablations", "layers"])
def test_every_file_opens_with_its_source(name: str) -> None:
    first, second = (files("engram.sweep") / "paper_data" / f"{name}.csv").read_text().splitlines()[:2]
    assert first.startswith("#") and second.startswith("#")
    assert "Figure" in first + second and "igitised" in first + second


@pytest.mark.parametrize(
    ("figure", "shown"),
    [("allocation", "allocation"), ("memory_scaling", "scaling"), ("ablations", "bars"), ("layers", "lines")],
)
def test_a_part_may_ask_for_the_figure_that_its_view_repeats(tmp_path: Path, figure: str, shown: str) -> None:
    axes = {"allocation": {"rho": [1, 0.5]}, "scaling": {"rows": [0, 10]}}.get(shown, {"optim.lr": [0.1, 0.2]})
    derive = {"allocation": "allocation", "scaling": "memory"}.get(shown)
    part = {"axes": axes, "derive": derive, "view": shown}
    assert make_sweep(tmp_path, parts={"p": part}).parts["p"].paper is None
    assert make_sweep(tmp_path, parts={"p": {**part, "paper": figure}}).parts["p"].paper == figure
    other = "layers" if shown != "lines" else "ablations"
    with pytest.raises(SweepError, match=f"paper {other} belongs beside view .*, not {shown}"):
        make_sweep(tmp_path, parts={"p": {**part, "paper": other}})
