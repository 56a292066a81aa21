"""Sweep -> runs: combinations, ids, derived axes."""

from pathlib import Path

import pytest

from engram.config_identity import run_id
from engram.model.accounting import count_parameters
from engram.sweep.grid import expand, shown, unique
from engram.sweep.spec import SweepError
from tests.sweep.build import make_sweep


def test_all_combinations_in_the_order_of_the_file(tmp_path: Path) -> None:
    sweep = make_sweep(
        tmp_path,
        seeds=[0, 1],
        overrides={"train.steps": 3},
        axes={"length": {"short": {}, "long": {"train.steps": 9, "optim.lr": 0.5}}, "model.memory.head_dim": [4, 8]},
    )
    runs = expand(sweep)
    assert [(run.point["length"], run.point["model.memory.head_dim"], run.seed) for run in runs] == [
        (length, width, seed) for length in ("short", "long") for width in (4, 8) for seed in (0, 1)
    ]
    last = runs[-1]
    assert (last.config.train.steps, last.config.optim.lr, last.config.model.memory.head_dim) == (9, 0.5, 8)
    assert runs[0].config.train.steps == 3 and runs[0].label == "length=short model.memory.head_dim=4 seed=0"


def test_a_seed_sets_weights_and_order_of_batches(tmp_path: Path) -> None:
    first, second = expand(make_sweep(tmp_path, seeds=[4, 5]))
    assert (first.config.seed, first.config.data.shuffle_seed) == (4, 4)
    assert (second.config.seed, second.config.data.shuffle_seed) == (5, 5)
    assert first.id != second.id


def test_ids_name_run_folders_and_are_shared_between_parts(tmp_path: Path) -> None:
    sweep = make_sweep(
        tmp_path,
        parts={
            "curve": {"derive": "allocation", "axes": {"rho": [1, 0.5]}},
            "bars": {"derive": "allocation", "axes": {"variant": {"full": {"rho": 0.5}, "none": {"rho": 1}}}},
        },
    )
    runs = expand(sweep)
    assert [run.id for run in runs[:2]] == [run.id for run in runs[:1:-1]]
    assert len(unique(runs)) == 2 and [run.part for run in unique(runs)] == ["curve", "curve"]
    for run in runs:
        assert run.id == run_id(run.config) and run.config.run_dir == str(tmp_path / "pool" / run.id)
    assert [run.part for run in expand(sweep, "bars")] == ["bars", "bars"]


def test_allocation_keeps_the_counts(tmp_path: Path) -> None:
    runs = expand(make_sweep(tmp_path, derive="allocation", axes={"rho": [1, 0.75, 0.5, 0.25]}))
    counts = [count_parameters(run.config.model) for run in runs]
    assert runs[0].config.model.memory is None
    assert [run.config.model.moe.num_experts for run in runs] == [18, 14, 10, 6]
    for count in counts[1:]:
        assert count.total == pytest.approx(counts[0].total, rel=5e-3)
        assert count.activated == pytest.approx(counts[0].activated, rel=1e-2)
        assert count.memory > 0


def test_memory_grows_beside_a_backbone_that_stays(tmp_path: Path) -> None:
    runs = expand(make_sweep(tmp_path, derive="memory", axes={"rows": [0, 10, 1000]}))
    assert runs[0].config.model.memory is None
    assert [run.config.model.memory.rows_per_head for run in runs[1:]] == [(10, 10), (1000, 1000)]
    backbone = [run.config.model.replace(memory=None) for run in runs]
    assert backbone[0] == backbone[1] == backbone[2]


def test_budgets_of_flops_set_the_steps_of_all_ratios_alike(tmp_path: Path) -> None:
    axes = {"flops": [1e11, 4e11], "rho": [1, 0.5]}
    runs = expand(make_sweep(tmp_path, derive="allocation", axes=axes))
    steps = [run.config.train.steps for run in runs]
    assert steps[0] == steps[1] and steps[2] == steps[3]
    activated = count_parameters(runs[0].config.model).activated
    tokens = steps[2] * runs[0].config.tokens_per_step
    assert 6 * activated * tokens == pytest.approx(4e11, rel=1 / steps[2])


@pytest.mark.parametrize(
    ("settings", "messages"),
    [
        (dict(derive="allocation", axes={"rho": [1, 1.5]}), ["sweep, rho=1.5: ", "1.5"]),
        (dict(axes={"optim.lrr": [1]}), ["sweep, optim.lrr=1: ", "optim.lrr: unknown key", "did you mean 'lr'?"]),
        (dict(axes={"optim.lr": [-1]}), ["optim.lr: is -1, but must be above 0"]),
        (dict(axes={"x": {"y": {"model.memory.heads": 3}}}), ["x=y", "did you mean 'num_heads'?"]),
        (dict(axes={"train": [3]}), ["train: is 3, but must be a section"]),
        (dict(derive="allocation", axes={"rho": [0.51, 0.5]}), ["rho=0.51 and rho=0.5 are the same run: drop one"]),
        (dict(derive="memory", axes={"rows": [1.5]}), ["rows is 1.5, but rows per head are a whole number"]),
        (dict(derive="memory", axes={"rows": [-1]}), ["rows is -1"]),
        (
            dict(derive="memory", axes={"rows": [1e30]}),
            ["rows=1e30: rows is 1e30, but no machine holds"],
        ),
        (dict(derive="memory", axes={"rows": [1]}), ["rows is 1, but rows per head are a whole number of at least 2"]),
        (
            dict(derive="memory", axes={"rows": [5]}, overrides={"model.memory": None}),
            ["the model has no n-gram table"],
        ),
        (
            dict(derive="allocation", axes={"rho": [0.5]}, overrides={"model.moe": None}),
            ["rho=0.5", "moe"],
        ),
    ],
)
def test_mistakes_name_the_point(tmp_path: Path, settings: dict, messages: list[str]) -> None:
    with pytest.raises(SweepError) as caught:
        expand(make_sweep(tmp_path, **settings))
    for message in messages:
        assert message in str(caught.value)


def test_labels_are_short(tmp_path: Path) -> None:
    axes = {"flops": [3e11, 2.5e13], "optim.lr": [0.008, 1]}
    labels = [run.label for run in expand(make_sweep(tmp_path, axes=axes))]
    assert labels == [
        "flops=3e11 optim.lr=0.008 seed=0",
        "flops=3e11 optim.lr=1 seed=0",
        "flops=2.5e13 optim.lr=0.008 seed=0",
        "flops=2.5e13 optim.lr=1 seed=0",
    ]
    # Shorter, and still the same number.
    values = [1e6, 1234567.0, 123456789.125, 2e20, -3e9, 999999.5, 0.1, 1e-7, 3_000_000_000, "3e9", None, True]
    assert [shown(value) for value in values[:5]] == ["1e6", "1.234567e6", "1.23456789125e8", "2e20", "-3e9"]
    assert [shown(value) for value in values[5:]] == [str(value) for value in values[5:]]


def test_a_part_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(SweepError, match="no part 'a': its parts are sweep"):
        expand(make_sweep(tmp_path), "a")
