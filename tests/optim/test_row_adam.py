import torch
from torch import Tensor, nn

from engram.optim.row_adam import RowAdam
from engram.optim.sparse import coalesce

from .helpers import assign, random_sparse_gradient, sparse_gradient

BETAS, EPS = (0.9, 0.95), 1e-10
ROWS, WIDTH = 23, 5


def test_equals_a_loop_over_rows(generator: torch.Generator) -> None:
    """An independent Adam for every row, in float64, that takes a step only when the row has a gradient."""
    row = assign("table", torch.randn(ROWS, WIDTH, generator=generator), "table", lr_multiplier=5.0, weight_decay=0.1)
    weight = row.parameter.detach().double()
    mean, square, steps = torch.zeros_like(weight), torch.zeros_like(weight), [0] * ROWS
    role = RowAdam([row], BETAS, EPS)
    for _ in range(8):
        row.parameter.grad = random_sparse_gradient(ROWS, WIDTH, 14, generator)
        dense = row.parameter.grad.to_dense().double()
        for index in set(row.parameter.grad._indices()[0].tolist()):
            steps[index] += 1
            mean[index] = BETAS[0] * mean[index] + (1 - BETAS[0]) * dense[index]
            square[index] = BETAS[1] * square[index] + (1 - BETAS[1]) * dense[index] ** 2
            unbiased = square[index] / (1 - BETAS[1] ** steps[index])
            step = mean[index] / (1 - BETAS[0] ** steps[index]) / (unbiased.sqrt() + EPS)
            weight[index] = weight[index] * (1 - 0.05 * 0.1) - 0.05 * step
        role.step(0.01)
    assert len(set(steps)) > 3
    torch.testing.assert_close(row.parameter.double(), weight, rtol=1e-5, atol=1e-6)
    assert role.tensors["table/row_step"].tolist() == steps


def test_untouched_rows_and_their_state_do_not_move(generator: torch.Generator) -> None:
    row = assign("table", torch.randn(ROWS, WIDTH, generator=generator), "table", weight_decay=0.1)
    role = RowAdam([row], BETAS, EPS)
    row.parameter.grad = random_sparse_gradient(ROWS, WIDTH, 60, generator)
    role.step(0.01)
    before = {key: tensor.clone() for key, tensor in [*role.tensors.items(), ("weight", row.parameter.detach())]}
    touched = torch.tensor([3, 8, 22])
    row.parameter.grad = sparse_gradient(touched, torch.randn(3, WIDTH, generator=generator), ROWS)
    role.step(0.01)
    untouched = torch.tensor([index for index in range(ROWS) if index not in touched.tolist()])
    for key, tensor in [*role.tensors.items(), ("weight", row.parameter.detach())]:
        assert torch.equal(tensor[untouched], before[key][untouched]), key
        assert (tensor[touched] != before[key][touched]).all(), key


def run_against_torch_adam(row_ids: list[Tensor], generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Start, our weights and dense Adam's weights after one step for each entry of `row_ids`."""
    start = torch.randn(ROWS, WIDTH, generator=generator)
    row, theirs = assign("table", start, "table"), nn.Parameter(start.clone())
    role = RowAdam([row], BETAS, EPS)
    reference = torch.optim.Adam([theirs], lr=0.01, betas=BETAS, eps=EPS, foreach=False)
    for rows in row_ids:
        row.parameter.grad = sparse_gradient(rows, torch.randn(len(rows), WIDTH, generator=generator), ROWS)
        theirs.grad = row.parameter.grad.to_dense()
        role.step(0.01)
        reference.step()
    return start, row.parameter.detach(), theirs.detach()


def test_equals_dense_adam_when_every_row_is_touched(generator: torch.Generator) -> None:
    every_row_twice = [torch.randperm(2 * ROWS, generator=generator) % ROWS for _ in range(7)]
    _, ours, theirs = run_against_torch_adam(every_row_twice, generator)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_is_not_dense_adam_when_rows_rest(generator: torch.Generator) -> None:
    start, ours, theirs = run_against_torch_adam([torch.tensor([4, 9])] + [torch.tensor([9])] * 5, generator)
    # Row 4 was read once: its first step has full size here, and dense Adam's stale moments move it on.
    torch.testing.assert_close((ours - start)[4].abs(), torch.full((WIDTH,), 0.01), rtol=1e-4, atol=1e-7)
    assert ((theirs - start)[4].abs() > 0.03).all()
    torch.testing.assert_close(ours[9], theirs[9], rtol=1e-5, atol=1e-6)


def test_first_update_is_full_size_however_late(generator: torch.Generator) -> None:
    row = assign("table", torch.zeros(ROWS, WIDTH), "table")
    role = RowAdam([row], BETAS, EPS)
    for index in [0] * 30 + [1]:
        row.parameter.grad = sparse_gradient(torch.tensor([index]), torch.full((1, WIDTH), 1e-6), ROWS)
        role.step(0.01)
    torch.testing.assert_close(row.parameter[1].detach(), torch.full((WIDTH,), -0.01), rtol=1e-3, atol=0.0)


def test_duplicates_and_accumulated_gradients_count_as_one_gradient(generator: torch.Generator) -> None:
    start, values = torch.randn(ROWS, WIDTH, generator=generator), torch.randn(5, WIDTH, generator=generator)
    split, summed = assign("table", start, "table"), assign("table", start, "table")
    first = sparse_gradient(torch.tensor([7, 2, 7]), values[:3], ROWS)
    second = sparse_gradient(torch.tensor([2, 11]), values[3:], ROWS)
    split.parameter.grad = first
    split.parameter.grad = split.parameter.grad + second
    totals = torch.stack([values[1] + values[3], values[0] + values[2], values[4]])
    summed.parameter.grad = sparse_gradient(torch.tensor([2, 7, 11]), totals, ROWS)
    for row in (split, summed):
        RowAdam([row], BETAS, EPS).step(0.01)
    torch.testing.assert_close(split.parameter, summed.parameter, rtol=1e-6, atol=1e-7)
    moved = (split.parameter != start).any(dim=1).nonzero()[:, 0]
    assert moved.tolist() == [2, 7, 11]


def test_sums_made_before_the_update_give_the_same_bits(generator: torch.Generator) -> None:
    """As clipping does, which measures the norm of the summed gradient."""
    start, gradient = torch.randn(ROWS, WIDTH, generator=generator), random_sparse_gradient(ROWS, WIDTH, 40, generator)
    at_once, before = assign("table", start, "table"), assign("table", start, "table")
    at_once.parameter.grad, before.parameter.grad = gradient, coalesce(gradient)
    for row in (at_once, before):
        RowAdam([row], BETAS, EPS).step(0.01)
    assert torch.equal(at_once.parameter, before.parameter)


def test_empty_and_missing_gradients_change_nothing(generator: torch.Generator) -> None:
    start = torch.randn(ROWS, WIDTH, generator=generator)
    row = assign("table", start, "table", weight_decay=0.1)
    role = RowAdam([row], BETAS, EPS)
    role.step(0.01)
    row.parameter.grad = sparse_gradient(torch.empty(0, dtype=torch.int64), torch.empty(0, WIDTH), ROWS)
    role.step(0.01)
    assert torch.equal(row.parameter, start)
    assert all(tensor.count_nonzero() == 0 for tensor in role.tensors.values())
