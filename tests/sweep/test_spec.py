"""A sweep's file: what it fills in, and one clear line for each mistake."""

from pathlib import Path
from typing import Any

import pytest

from engram.sweep.spec import SweepError, load_sweep, other_folder
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
        (dict(axes={"rhoo": [1]}), "axes.rhoo: unknown axis; did you mean 'rho'? a list belongs to"),
        (dict(axes={"rho": [1, 0.5]}), "an axis rho and derive: allocation belong together"),
        (dict(derive="memory"), "an axis rows and derive: memory belong together"),
        (dict(axes={"seed": [1, 2]}), "axes.seed: is set by `seeds`"),
        (dict(overrides={"data.shuffle_seed": 1}), "overrides.data.shuffle_seed: is set by `seeds`"),
        (dict(axes={"x": {"y": {"seed": 1}}}), "axes.x.y.seed: is set by `seeds`"),
        (dict(axes={"run_dir": ["a", "b"]}), "axes.run_dir: is <pool>/<run id> for every run: leave it out, or set"),
        (dict(overrides={"run_dir": "a"}), "overrides.run_dir: is <pool>/<run id> for every run"),
        (
            dict(axes={"train.device": ["cpu", "cuda"]}),
            "axes.train.device: changes nothing that a run is told apart",
        ),
        (dict(axes={"eval.batch_size": [1, 2]}), "axes.eval.batch_size: changes nothing"),
        (
            dict(axes={"x": {"a": {"optim.lr": 1, "train.threads": 1}, "b": {"optim.lr": 1, "train.threads": 2}}}),
            "axes.x: a and b differ in train.threads, which tells no runs apart: drop one",
        ),
        (dict(axes={"x": {"a": {}, "b": {}}}), "axes.x: a and b differ in nothing: drop one"),
        (
            dict(axes={"flops": [1e11]}, overrides={"train.steps": 3}),
            "overrides.train.steps: the axis flops decides how many steps are taken: drop one",
        ),
        (
            dict(axes={"x": {"y": {"flops": 1e11}}, "train.steps": [3, 4]}),
            "axes.train.steps: the axis flops decides how many steps are taken: drop one",
        ),
        (dict(axes={"rho": []}), "axes.rho: is [], but must be a list of one value or more, or a mapping"),
        (dict(axes={"x": {}}), "axes.x: is {}, but must be a list of one value or more, or a mapping"),
        (dict(axes={"x": None}), "axes.x: is empty, but must be a list of one value or more"),
        (dict(axes={"x": {1: {}}}), "axes.x: names a value 1, but names are text: put it in quotes"),
        (dict(axes={"x": {"a": 1}}), "axes.x: sets 'a' to 1, but must name settings"),
        (dict(axes={"optim.lr": [1, 1]}), "axes.optim.lr: [1, 1] repeats a value"),
        (dict(derive="allocation", axes={"rho": ["half"]}), "axes.rho: holds 'half', but must hold a number"),
        (dict(axes={"flops": ["2e20"]}), "axes.flops: holds '2e20', but must hold a number (YAML reads an exponent"),
        (dict(derive="allocation", axes={"x": {"y": {"rho": "1"}}}), "axes.x.y.rho: holds '1', but must"),
        (dict(derive="allocation", axes={"rho": [float("nan")]}), "axes.rho: holds nan, but must hold a number"),
        (dict(seeds=[1, 1]), "seeds [1, 1] repeat"),
        (dict(seeds=[]), "seeds: is [], but must be a list of 1 or more"),
        (dict(axes={"x": {"a": {1: 2}}}), "axes.x: sets 'a' to {1: 2}, but must name settings"),
        (dict(axes={3: [1]}), "axes: has a key 3, but keys must be text: put it in quotes"),
        (dict(pool=3), "pool: is 3, but must be a path: put it in quotes"),
        (dict(name="?"), "name: '?' names no file"),
        (dict(reference={"part": "y"}), "reference.part: has no 'y'; there are sweep"),
        (dict(parts={}), "parts: is {}, but must be a section of 1 or more entries"),
        (dict(parts=None), "parts: is empty, but must be a section of settings"),
        (dict(parts={"a": 3}), "parts.a: is 3, but must be a section of settings"),
        # Of several parts: what stands at the top, once, and what stands in one of them.
        (dict(parts={"a": {"seeds": []}, "b": {}}), "parts.a.seeds: is [], but must be"),
        (dict(parts={"a": {"overrides": {"seed": 1}}}), "parts.a: overrides.seed: is set by `seeds`"),
        (dict(parts={"a": {"axes": {"x": {"b": {}, "c": {}}}}}), "parts.a: axes.x: b and c differ in nothing"),
        (dict(axes={"x": {"b": {}, "c": {}}}, parts={"a": {}}), "axes.x: b and c differ in nothing"),
        (dict(axes={"rhoo": [1]}, parts={"a": {}, "b": {}}), "axes.rhoo: unknown axis"),
        (dict(reference={"y": 1}, parts={"a": {}, "b": {}}), "reference: has no 'y'; there are none"),
        (dict(parts={"a b": {}, "a_b": {}}), "parts: a b and a_b would both write a figure a_b: rename one"),
        (dict(parts={"a": {}, "a_runs": {}}), "parts: a and a_runs would both write a figure a_runs: rename one"),
        (dict(parts={"?": {}}), "parts: '?' names no file"),
        (dict(name=".."), "name: is '..', but must be the name of a folder"),
        (dict(name="a/b"), "name: is 'a/b', but must be the name of a folder"),
        (dict(parts=[1]), "parts: is [1], but must be a section of settings"),
        (dict(view="scaling"), "view scaling needs an axis rows: add it, or choose view bars or lines"),
        (dict(view="pie"), "view: is 'pie', but must be"),
        (dict(slurm={"partitions": "x"}), "slurm.partitions: unknown key (value 'x'); did you mean 'partition'?"),
    ],
)
def test_mistakes(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    assert complaint(tmp_path, **settings).startswith(message)


def test_a_mistake_that_all_parts_share_is_told_once(tmp_path: Path) -> None:
    parts = {"a": None, "b": {"seeds": [True]}, "c": {"view": "lines"}}
    lines = complaint(tmp_path, seeds=[], compensate="maybe", parts=parts).splitlines()
    assert lines == [
        "compensate: is 'maybe', but must be true or false",
        "seeds: is [], but must be a list of 1 or more entries",
        "parts.b.seeds.0: is true, but must be a number",
    ]


PARTS: dict[str, Any] = {
    "rates": {"axes": {"optim.lr": [1, 0.5], "size": {"small": {}, "large": {"train.batch_size": 8}}}},
    "changes": {"axes": {"variant": {"full": {}, "no conv": {"model.memory.conv": None}}}},
}


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ({"part": "rate"}, "parts.own.reference.part: has no 'rate'; did you mean 'rates'?"),
        ({"part": "changes", "variants": "full"}, "parts.own.reference: has no 'variants'; did you mean 'variant'?"),
        ({"part": "changes", "variant": "ful"}, "parts.own.reference.variant: has no 'ful'; did you mean 'full'?"),
        ({"part": "changes", "variant": "huge"}, "parts.own.reference.variant: has no 'huge'; there are full, no conv"),
        ({"part": "changes", "optim.lr": 1}, "parts.own.reference: has no 'optim.lr'; there are variant"),
        ({"layer": "2"}, "parts.own.reference.layer: has no '2'; there are 0, 1"),
        # Its own sizes, which it does not name, must be there too.
        ({"part": "rates", "optim.lr": 1}, "parts.own.reference: axis size of part rates: has no 'huge'; there are"),
        ({"part": "rates", "optim.lr": 1.0, "size": "small"}, ""),
        ({"part": "changes", "variant": "full"}, ""),
        ({"layer": 1}, ""),
    ],
)
def test_a_reference_is_a_point_of_the_study(tmp_path: Path, reference: dict[str, Any], message: str) -> None:
    own: dict[str, Any] = {
        "layer": {"0": {}, "1": {"model.memory.layer_ids": [2]}},
        "size": {"small": {}, "huge": {"train.batch_size": 16}},
    }
    parts = {**PARTS, "own": {"axes": own, "reference": reference}}
    if message:
        assert complaint(tmp_path, parts=parts).startswith(message)
    else:
        assert make_sweep(tmp_path, parts=parts).parts["own"].reference == reference


def test_settings_that_all_runs_share_may_be_any(tmp_path: Path) -> None:
    axes = {"x": {"a": {"train.device": "cpu"}, "b": {"train.device": "cpu", "optim.lr": 1}}, "eval.tokens": [64, 128]}
    sweep = make_sweep(tmp_path, overrides={"train.threads": 1, "train.steps": 3}, axes=axes)
    assert list(sweep.parts["sweep"].axes) == ["x", "eval.tokens"]


def test_a_command_from_another_folder_than_the_projects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project, away = tmp_path / "project", tmp_path / "away"
    configs = project / "configs" / "sweep"
    for folder in (configs, away):
        folder.mkdir(parents=True)
    path = write_sweep(configs, pool="runs/pool", out="results/study")
    sweep = load_sweep(path)
    monkeypatch.chdir(away)
    (project / "results" / "study").mkdir(parents=True)
    # No project, no telling.
    assert other_folder(sweep, path) is None
    (project / "pyproject.toml").touch()
    assert other_folder(sweep, path) == project
    monkeypatch.chdir(project)
    assert other_folder(sweep, path) is None
    # Whoever has a pool here means it.
    monkeypatch.chdir(away)
    (away / "runs" / "pool").mkdir(parents=True)
    assert other_folder(sweep, path) is None
    absolute = sweep.replace(pool=away / "pool", out=away / "out")
    assert other_folder(absolute, path) is None


def test_a_file_without_base(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("seeds: [1]\n")
    with pytest.raises(SweepError, match="x.yaml: base: is required and missing"):
        load_sweep(tmp_path / "x.yaml")
