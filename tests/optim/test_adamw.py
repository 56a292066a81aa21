import torch
from torch import nn

from engram.optim.adamw import AdamW

from .helpers import assign, random_sparse_gradient

SHAPES = {"matrix": (7, 5), "gain": (13,), "stack": (3, 2, 9, 5)}
STATES = ("first_moment", "second_moment")


def test_equals_torch_adamw_for_twenty_steps(generator: torch.Generator) -> None:
    values = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    decay = {"matrix": 0.1, "gain": 0.0, "stack": 0.1}
    rows = [assign(name, value, weight_decay=decay[name]) for name, value in values.items()]
    ours = AdamW(rows, betas=(0.9, 0.95), eps=1e-10)
    theirs = {name: nn.Parameter(value.double()) for name, value in values.items()}
    reference = torch.optim.AdamW(
        [{"params": [theirs[name]], "weight_decay": decay[name]} for name in SHAPES],
        betas=(0.9, 0.95),
        eps=1e-10,
        foreach=False,
    )
    for step in range(20):
        lr = 1e-2 / (step + 1)
        for row in rows:
            row.parameter.grad = torch.randn(row.shape, generator=generator)
            theirs[row.name].grad = row.parameter.grad.double()
        for group in reference.param_groups:
            group["lr"] = lr
        ours.step(lr)
        reference.step()
    for row in rows:
        torch.testing.assert_close(row.parameter.double(), theirs[row.name], rtol=1e-5, atol=1e-6)
    assert ours.counts == {f"{name}/step": 20 for name in SHAPES}


def test_missing_gradient_leaves_weights_moments_and_count_alone(generator: torch.Generator) -> None:
    rows = [assign(name, torch.randn(5, 3, generator=generator), weight_decay=0.1) for name in ("here", "gone")]
    role = AdamW(rows, betas=(0.9, 0.95), eps=1e-10)
    for row in rows:
        row.parameter.grad = torch.randn(5, 3, generator=generator)
    role.step(1e-2)
    rows[1].parameter.grad = None
    before = [rows[1].parameter.clone(), *(role.tensors[f"gone/{state}"].clone() for state in STATES)]
    role.step(1e-2)
    after = [rows[1].parameter, *(role.tensors[f"gone/{state}"] for state in STATES)]
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
    assert role.counts == {"here/step": 2, "gone/step": 1}


def test_each_lr_multiplier_counts() -> None:
    rows = [assign("slow", torch.zeros(4)), assign("fast", torch.zeros(4), lr_multiplier=5.0)]
    role = AdamW(rows, betas=(0.9, 0.95), eps=1e-10)
    for row in rows:
        row.parameter.grad = torch.tensor([1.0, -2.0, 3.0, -4.0])
    role.step(1e-2)
    # The first step of Adam is the sign of the gradient.
    torch.testing.assert_close(rows[0].parameter.data, torch.tensor([-0.01, 0.01, -0.01, 0.01]))
    torch.testing.assert_close(rows[1].parameter.data, torch.tensor([-0.05, 0.05, -0.05, 0.05]))


def test_transposed_and_expanded_gradients_are_read_right(generator: torch.Generator) -> None:
    for gradient in (torch.randn(5, 7, generator=generator).T, torch.randn(7, 1, generator=generator).expand(7, 5)):
        strided, plain = assign("a", torch.ones(7, 5)), assign("a", torch.ones(7, 5))
        strided.parameter.grad, plain.parameter.grad = gradient, gradient.contiguous()
        for row in (strided, plain):
            AdamW([row], betas=(0.9, 0.95), eps=1e-10).step(0.1)
        assert torch.equal(strided.parameter, plain.parameter)


def test_as_dense_adam_of_a_table_equals_torch_adam(generator: torch.Generator) -> None:
    row = assign("table", torch.randn(23, 5, generator=generator), "table")
    role = AdamW([row], betas=(0.9, 0.95), eps=1e-10)
    theirs = nn.Parameter(row.parameter.detach().clone())
    reference = torch.optim.Adam([theirs], lr=1e-2, betas=(0.9, 0.95), eps=1e-10, foreach=False)
    for _ in range(6):
        row.parameter.grad = random_sparse_gradient(23, 5, 19, generator)
        theirs.grad = row.parameter.grad.to_dense()
        role.step(1e-2)
        reference.step()
    torch.testing.assert_close(row.parameter, theirs, rtol=1e-5, atol=1e-6)
