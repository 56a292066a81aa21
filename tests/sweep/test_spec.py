"""A sweep's file: what it fills in, and one clear line for each mistake."""

from pathlib import Path
from typing import Any

import pytest

from engram.sweep.spec import SweepError, load_sweep
from tests.sweep.build import make_sweep, write_sweep


def complaint(folder: Path, **settings: Any) -> str:
    path = write_sweep(folder, **settings)
    with pytest.raises(SweepError) as caught:
        load_sweep(path)
    return str(caught.value).replace(f"{path}: ", "")


def test_a_file_without_parts_is_one_part(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path, derive="allocation", axes={"rho": [1, 0.5]}, seeds=[3, 4])
    assert sweep.name == "sweep" and list(sweep.parts) == ["sweep"]
    assert sweep.parts["sweep"].seeds == (3, 4) and sweep.parts["sweep"].shown_as == "allocation"
    assert sweep.parts["sweep"].base == tmp_path / "base.yaml"


def test_parts_take_what_they_leave_out_from_the_top(tmp_path: Path) -> None:
    sweep = make_sweep(
        tmp_path,
        seeds=[0, 1],
        overrides={"train.steps": 5, "optim.lr": 0.1},
        parts={
            "a": {"derive": "memory", "axes": {"rows": [0, 10]}, "seeds": [7]},
            "b": {"axes": {"optim.lr": [1, 2]}, "overrides": {"optim.lr": 0.2}, "view": "lines"},
        },
    )
    a, b = sweep.parts["a"], sweep.parts["b"]
    assert (a.seeds, b.seeds) == ((7,), (0, 1))
    assert a.overrides == {"train.steps": 5, "optim.lr": 0.1} and b.overrides == {"train.steps": 5, "optim.lr": 0.2}
    assert (a.shown_as, b.shown_as) == ("scaling", "lines")


def test_a_part_may_have_no_axis_and_no_settings(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path, parts={"only": None})
    assert sweep.parts["only"].axes == {} and sweep.parts["only"].shown_as == "bars"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(axis={}), "axis: unknown key; did you mean 'axes'?"),
        (dict(parts={"a": {"seed": [1]}}), "parts.a.seed: unknown key (value [1]); did you mean 'seeds'?"),
        (dict(axes={"rhoo": [1]}), "parts.sweep: axes.rhoo: unknown axis; did you mean 'rho'? A list belongs to"),
        (dict(axes={"rho": [1, 0.5]}), "parts.sweep: an axis rho and derive: allocation belong together"),
        (dict(derive="memory"), "parts.sweep: an axis rows and derive: memory belong together"),
        (dict(axes={"seed": [1, 2]}), "parts.sweep: axes.seed: is set by `seeds`"),
        (dict(axes={"optim.lr": [1, 1]}), "parts.sweep: axes.optim.lr: [1, 1] repeats a value"),
        (dict(derive="allocation", axes={"rho": ["half"]}), "axes.rho: holds 'half', but must hold a number"),
        (dict(axes={"flops": ["2e20"]}), "axes.flops: holds '2e20', but must hold a number (YAML reads an exponent"),
        (dict(derive="allocation", axes={"x": {"y": {"rho": "1"}}}), "axes.x.y.rho: holds '1', but must"),
        (dict(derive="allocation", axes={"rho": [float("nan")]}), "axes.rho: holds nan, but must hold a number"),
        (dict(seeds=[1, 1]), "parts.sweep: seeds [1, 1] repeat"),
        (dict(seeds=[]), "parts.sweep.seeds: is [], but must be a list of 1 or more"),
        (dict(parts={}), "parts: is {}, but must be"),
        (dict(parts=[1]), "parts: is [1], but must be a section of settings"),
        (dict(view="scaling"), "parts.sweep: view scaling needs an axis rows: add it, or choose view bars or lines"),
        (dict(view="pie"), "parts.sweep.view: is 'pie', but must be"),
        (dict(slurm={"partitions": "x"}), "slurm.partitions: unknown key (value 'x'); did you mean 'partition'?"),
    ],
)
def test_mistakes(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    assert message in complaint(tmp_path, **settings)


def test_a_file_without_base(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("seeds: [1]\n")
    with pytest.raises(SweepError, match="parts.x.base: is required and missing"):
        load_sweep(tmp_path / "x.yaml")
