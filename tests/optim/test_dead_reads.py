"""Dead ids (-1) touch no row: the update is that of the living reads, on the GPU's way of leaving them out too."""

import pytest
import torch
from torch import Tensor

from engram.config import TableOptimConfig
from engram.memory import table as module
from engram.memory.table import RowTable
from engram.optim.clip import clip_grad_norm
from engram.optim.groups import Assignment
from engram.optim.role import TableRole
from engram.optim.row_adam import RowAdam
from engram.optim.rowwise_adagrad import RowwiseAdagrad
from engram.optim.sinkhorn import SinkhornMomentum
from engram.optim.sparse import coalesce

ROWS, WIDTH, LR = 11, 5, 0.1
KINDS = ("row_adam", "rowwise_adagrad", "sinkhorn")
DEAD = torch.full((2, 3, 2), -1)
MIXED = torch.tensor([[[-1, 3], [-1, -1], [7, 3]], [[-1, -1], [4, -1], [-1, -1]]])


@pytest.fixture(params=["cpu", "gpu"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """How the backward pass leaves dead ids out: by looking where they are, or without waiting for the device."""
    if request.param == "gpu":
        monkeypatch.setattr(module, "_drop_dead", module._neutralise_dead)


class Trained:
    """A table and its optimizer after one step in which every row was read: all of them have momentum."""

    def __init__(self, kind: str) -> None:
        self.table = RowTable(ROWS, WIDTH)
        with torch.no_grad():
            self.table.weight.copy_(torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1)))
        rows = [Assignment("table", self.table.weight, "table", 1.0, 0.1)]
        self.role: TableRole = {
            "row_adam": lambda: RowAdam(rows, (0.9, 0.95), 1e-10),
            "rowwise_adagrad": lambda: RowwiseAdagrad(rows, 1e-10),
            "sinkhorn": lambda: SinkhornMomentum(rows, TableOptimConfig(kind="sinkhorn")),
        }[kind]()
        self.read(torch.arange(ROWS).view(1, ROWS, 1))
        self.step()

    def read(self, ids: Tensor) -> None:
        """Adds gradients that belong to the places of `ids`."""
        values = torch.randn(*ids.shape, WIDTH, generator=torch.Generator().manual_seed(2))
        self.table(ids, torch.float32).backward(values.flatten(-2))

    def step(self, max_norm: float | None = None) -> float:
        norm = float(clip_grad_norm([self.table.weight], max_norm))
        self.role.step(LR)
        self.table.weight.grad = None
        return norm

    def tensors(self) -> dict[str, Tensor]:
        return {"weight": self.table.weight.detach().clone(), **{k: v.clone() for k, v in self.role.tensors.items()}}


def living_alone(trained: Trained, ids: Tensor) -> None:
    """The gradient of the living among `ids`, made by hand."""
    values = torch.randn(*ids.shape, WIDTH, generator=torch.Generator().manual_seed(2)).view(-1, WIDTH)
    alive = (ids >= 0).flatten()
    rows = ids.flatten()[alive]
    trained.table.weight.grad = torch.sparse_coo_tensor(rows[None], values[alive], (ROWS, WIDTH), check_invariants=True)


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert [name for name in expected if not torch.equal(actual[name], expected[name])] == []


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("max_norm", [None, 1e-3])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "ids", [DEAD, DEAD[:1, :1, :1], MIXED, MIXED[:1, :1, 1:], MIXED[1:]], ids=lambda ids: str(ids.numel())
)
def test_the_update_is_that_of_the_living_reads(ids: Tensor, kind: str, max_norm: float | None) -> None:
    read, by_hand = Trained(kind), Trained(kind)
    before = read.tensors()
    read.read(ids)
    living_alone(by_hand, ids)
    assert read.step(max_norm) == by_hand.step(max_norm)
    after = read.tensors()
    assert_equal(after, by_hand.tensors())
    if kind != "sinkhorn":
        # Its momentum is of the whole table, and so is the move.
        touched = {row for row in ids.flatten().tolist() if row >= 0}
        moved = (after["weight"] != before["weight"]).any(1).nonzero().flatten().tolist()
        assert set(moved) == touched


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("kind", KINDS)
def test_without_clipping_as_well(kind: str) -> None:
    read, untouched = Trained(kind), Trained(kind)
    for ids in (DEAD, DEAD[:1, :1, :1]):
        read.read(ids)
        read.role.step(LR)
        read.table.weight.grad = None
        living_alone(untouched, DEAD)
        untouched.role.step(LR)
        assert_equal(read.tensors(), untouched.tensors())


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dead_first", [True, False])
def test_a_dead_micro_batch_beside_a_living_one(dead_first: bool) -> None:
    read, by_hand = Trained("row_adam"), Trained("row_adam")
    for ids in (DEAD, MIXED) if dead_first else (MIXED, DEAD):
        read.read(ids)
        assert read.table.weight.grad is not None
        read.table.weight.grad = coalesce(read.table.weight.grad)
    living_alone(by_hand, MIXED)
    read.step()
    by_hand.step()
    assert_equal(read.tensors(), by_hand.tensors())
