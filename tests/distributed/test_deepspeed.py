"""Every ZeRO stage against one process: gradients, losses, Muon, state that moves between stages.

Ranks import DeepSpeed and torch's compiler, which takes seconds: a few processes go through many cases.
"""

import importlib.metadata
import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engram.config import UserError
from engram.distributed.deepspeed import Backbone
from engram.distributed.world import SINGLE, World
from engram.optim.groups import assign_roles
from engram.optim.optimizer import OptimizerStateError
from tests.distributed.backbones import LR, RankProcess, SingleProcess, Snapshot, fresh_model, tiny_config
from tests.distributed.ranks import run_ranks, values

STEPS = 10
Case = tuple[int, bool]
CASES: list[Case] = [(0, False), (1, False), (2, False), (3, False), (2, True), (3, True)]


@dataclass
class Course:
    """What one case did on rank 0, and on single ranks what differs among them."""

    norm: float
    losses: list[float]
    gradients: dict[str, Tensor]
    before: dict[str, Tensor]
    after: dict[str, Tensor]
    roles: dict[str, str]
    # Elements of optimizer state on each rank.
    state_elements: list[int]


def course(process: RankProcess, steps: int) -> Course:
    before = process.parameters()
    loss, norm = process.gradient(0)
    gradients = {name: gradient.clone() for name, gradient in process.backbone.gradients()}
    process.apply()
    after = process.parameters()
    shares = process.backbone.shares
    state = sum(flat.numel() for share in shares for flat in share.states().values())
    return Course(
        norm,
        [loss, *process.losses(range(1, steps))],
        gradients,
        before,
        after,
        {member.name: type(share.role).__name__ for share in shares for member in share.members},
        process.world.gather(state),
    )


def train_all_cases(world: World) -> dict[Case, Course]:
    # Nobody finds a compiler.
    os.environ["PATH"] = "/nowhere"
    courses = {}
    for case in CASES:
        process = RankProcess(world, tiny_config(*case))
        courses[case] = course(process, STEPS)
        process.backbone.close()
    return courses


@pytest.fixture(scope="module")
def courses(tmp_path_factory: pytest.TempPathFactory) -> dict[Case, Course]:
    first, second = values(run_ranks(2, train_all_cases, folder=tmp_path_factory.mktemp("ranks")))
    for case in CASES:
        assert first[case].losses == second[case].losses and first[case].norm == second[case].norm
        assert all(torch.equal(first[case].after[name], second[case].after[name]) for name in first[case].after)
    return first


@pytest.fixture(scope="module")
def expected() -> Course:
    """The same from one process."""
    single = SingleProcess(tiny_config())
    return single_course(single, STEPS)


def single_course(single: SingleProcess, steps: int) -> Course:
    roles = {each.name: each.role for each in single.optimizer.groups if each.role != "table"}
    parameters = {name: value for name, value in single.model.named_parameters() if name in roles}
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    loss, norm = single.gradient(0)
    gradients = {name: parameter.grad.clone() for name, parameter in parameters.items() if parameter.grad is not None}
    single.apply()
    after = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    return Course(norm, [loss, *single.losses(range(1, steps))], gradients, before, after, roles, [])


def assert_one_step_equal(actual: Course, expected: Course) -> None:
    assert actual.norm == pytest.approx(expected.norm, rel=1e-6)
    for name in expected.roles:
        assert torch.equal(actual.before[name], expected.before[name]), name
        gradient, right = actual.gradients[name], expected.gradients[name]
        difference = (gradient - right).abs().max() / right.abs().max().clamp(min=1e-3)
        assert difference < 1e-5, f"gradient of {name}: {difference}"
        # A thousandth of what one update moves.
        difference = (actual.after[name] - expected.after[name]).abs().max()
        assert difference < 1e-3 * LR, f"update of {name}: {difference}"
        assert not torch.equal(expected.after[name], expected.before[name]), name


@pytest.mark.parametrize("case", CASES)
def test_gradients_losses_and_first_update_equal_one_process(
    case: Case, courses: dict[Case, Course], expected: Course
) -> None:
    actual = courses[case]
    clip_norm = tiny_config().optim.clip_norm
    assert clip_norm is not None and expected.norm > clip_norm, "nothing was clipped"
    assert_one_step_equal(actual, expected)
    assert actual.losses == pytest.approx(expected.losses, abs=1e-5)
    assert max(expected.losses) - min(expected.losses) > 0.05, "nothing was learned"


@pytest.mark.parametrize("case", CASES)
def test_first_updates_of_exactly_the_hidden_matrices_are_orthogonal(case: Case, courses: dict[Case, Course]) -> None:
    actual, config = courses[case], tiny_config()
    assert config.optim.muon is not None
    assignments = assign_roles(fresh_model(config, 0).named_parameters(), config.optim)
    assert set(actual.roles) == {each.name for each in assignments if each.role != "table"}
    hidden = [each for each in assignments if each.role == "muon"]
    assert {each.name for each in hidden} == {name for name, role in actual.roles.items() if role.endswith("Muon")}
    assert any(each.matrices > 1 for each in hidden) and any(each.parameter.ndim == 4 for each in hidden)
    for each in hidden:
        update = actual.before[each.name] * (1 - LR * each.weight_decay) - actual.after[each.name]
        gradient = actual.gradients[each.name]
        for matrix, slope in zip(split(update, each.matrices), split(gradient, each.matrices), strict=True):
            size = LR * config.optim.muon.update_rms * max(matrix.shape) ** 0.5
            singular, slopes = torch.linalg.svdvals(matrix / size), torch.linalg.svdvals(slope)
            # Five steps lift whatever is not tiny from the start.
            strong = singular[slopes > 0.01 * slope.norm()]
            assert len(strong) and strong.min() > 0.6 and singular.max() < 1.3, f"{each.name}: {singular}"


def split(tensor: Tensor, below_one_another: int) -> Tensor:
    """All matrices of a parameter: [N, R, C]."""
    return tensor.unflatten(-2, (below_one_another, -1)).flatten(0, -3)


def test_optimizer_state_is_divided_from_stage_1_on(courses: dict[Case, Course]) -> None:
    whole = courses[0, False].state_elements
    assert whole[0] == whole[1]
    for case in CASES[1:]:
        # Up to the padding of groups (stages 1 and 2) and of each parameter (stage 3).
        assert sum(courses[case].state_elements) == pytest.approx(whole[0], rel=0.01)
        assert max(courses[case].state_elements) == pytest.approx(whole[0] / 2, rel=0.01)


def train_unevenly(world: World) -> list[Course]:
    found = []
    for stage, checkpointing in ((1, False), (3, True)):
        process = RankProcess(world, tiny_config(stage), checkpointing=checkpointing)
        found.append(course(process, STEPS))
        process.backbone.close()
    return found


def test_three_ranks_and_activation_checkpointing(tmp_path: Path, expected: Course) -> None:
    for actual in values(run_ranks(3, train_unevenly, folder=tmp_path))[1]:
        assert_one_step_equal(actual, expected)
        assert actual.losses == pytest.approx(expected.losses, abs=1e-5)


def evaluate(process: RankProcess) -> Tensor:
    with torch.no_grad():
        return process.backbone.run("token_losses", torch.arange(12).view(2, 6), torch.arange(1, 13).view(2, 6))


def move_state(world: World) -> tuple[Snapshot, list[list[float]], list[Tensor], list[bool]]:
    """Three steps in stage 2, then on from there in others, each of which has its own past and discards a step."""
    first = RankProcess(world, tiny_config(2))
    first.losses(range(3))
    snapshot = first.snapshot()
    losses, evaluations, checks = [first.losses(range(3, 6))], [evaluate(first)], []
    first.backbone.close()
    for stage, offload, threshold in ((3, False, 0), (1, False, 0), (3, True, 100), (0, False, 0)):
        other = RankProcess(world, tiny_config(stage, offload), seed=99, persistence_threshold=threshold)
        other.losses(range(20, 21))
        other.restore(snapshot)
        checks.append(same(other.snapshot(), snapshot))
        other.gradient(7)
        other.discard()
        checks.append(same(other.snapshot(), snapshot))
        losses.append(other.losses(range(3, 6)))
        evaluations.append(evaluate(other))
        other.backbone.close()
    return snapshot, losses, evaluations, checks


def same(one: Snapshot, other: Snapshot) -> bool:
    """To the bit."""
    return one.counts == other.counts and all(
        mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)
        for mine, theirs in ((one.model, other.model), (one.optimizer, other.optimizer))
    )


def test_state_moves_between_stages_and_into_one_process(tmp_path: Path) -> None:
    snapshot, losses, evaluations, checks = values(run_ranks(2, move_state, folder=tmp_path))[0]
    assert checks == 8 * [True]
    for other, evaluation in zip(losses[1:], evaluations[1:], strict=True):
        assert other == pytest.approx(losses[0], abs=1e-5)
        torch.testing.assert_close(evaluation, evaluations[0], atol=1e-5, rtol=0)
    single = SingleProcess(tiny_config(), seed=5)
    single.restore(snapshot)
    assert single.losses(range(3, 6)) == pytest.approx(losses[0], abs=1e-5)


SPOILED: list[Case] = [(0, False), (1, True), (3, False)]


def spoil(world: World) -> tuple[list[list[str]], list[bool], list[str]]:
    names, unchanged, messages = [], [], []
    for stage, offload in SPOILED:
        process = RankProcess(world, tiny_config(stage, offload))
        process.losses(range(1))
        before = process.snapshot()
        process.gradient(1, factor=float("inf") if world.rank == 1 else 1.0)
        names.append(process.backbone.nonfinite_gradients())
        process.discard()
        unchanged.append(same(before, process.snapshot()))
        process.losses(range(2, 3))
        unchanged.append(all(bool(tensor.isfinite().all()) for tensor in process.snapshot().model.values()))
        messages += [
            refusal(process.backbone, before),
            refusal(process.backbone, before, "blocks.0.attn.o_proj.weight"),
        ]
        process.backbone.close()
    return names, unchanged, messages


def refusal(backbone: Backbone, snapshot: Snapshot, cut: str | None = None) -> str:
    """What is said of a state without the head's moments, or with a parameter cut short."""
    if cut:
        wrong = snapshot.model | {cut: snapshot.model[cut][1:]}
    else:
        wrong = {key: tensor for key, tensor in snapshot.optimizer.items() if not key.startswith("head")}
    try:
        backbone.load_tensors("parameters" if cut else "optimizer", wrong)
    except OptimizerStateError as error:
        return str(error)
    return "taken over"


def test_gradients_that_are_not_finite_are_named_and_forgotten(tmp_path: Path, expected: Course) -> None:
    for names, checks, messages in values(run_ranks(2, spoil, folder=tmp_path)):
        assert names == len(SPOILED) * [sorted(expected.gradients)]
        assert checks == 2 * len(SPOILED) * [True]
        assert messages == len(SPOILED) * [
            "the saved state lacks head.weight/first_moment: resume with the model and optim.muon that it was saved "
            "with",
            "the saved blocks.0.attn.o_proj.weight is torch.float32 [15, 12], but this model needs torch.float32 "
            "[16, 12]: resume with the model that it was saved with",
        ]


def test_other_versions_of_deepspeed_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config()
    model = fresh_model(config, 0)
    assignments = assign_roles(model.named_parameters(), config.optim)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.20.1")
    with pytest.raises(UserError, match="need deepspeed 0.19.8, but it is 0.20.1: pip install deepspeed==0.19.8"):
        Backbone(model, assignments, config, SINGLE)
