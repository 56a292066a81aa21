"""Rows copied to several places, sums over the copies of a row, and rows exchanged among ranks; all with gradients.

A copy's gradient is its row's of the sum, and the other way round: both are gathers, nothing is scattered, so results
repeat on GPUs too.

Legend: N rows, K possible copies of each, P that there are at most, C copies of all.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, distributed
from torch.distributed import ProcessGroup


class Copies(NamedTuple):
    """Which copies there are: choice int64 [C] in [0, N K), source int64 [C] in [0, N), where int64 [N, P].

    Copy c is number choice[c] of the N K possible ones, and made of row source[c]; where[n] are the copies of row n, in
    order, and C for each that it lacks.
    """

    choice: Tensor
    source: Tensor
    where: Tensor

    @classmethod
    def of(cls, order_NK: Tensor, count: int, most: int) -> Self:
        """The `count` copies of least order, sorted by it, then by row; at most `most` of any row are among them."""
        choice = order_NK.flatten().argsort(stable=True)[:count]
        where = torch.full((order_NK.numel(),), count, device=order_NK.device)
        where.scatter_(0, choice, torch.arange(count, device=order_NK.device))
        where_NP = where.view_as(order_NK).sort(1).values[:, :most]
        return cls(choice, choice.div(order_NK.shape[1], rounding_mode="floor"), where_NP)


def copy_rows(rows: Tensor, copies: Copies) -> Tensor:
    """rows [N, ...] -> [C, ...]."""
    return _CopyRows.apply(rows, copies.source, copies.where)


def sum_copies(rows: Tensor, copies: Copies) -> Tensor:
    """Sum over the copies of each row: [C, ...] -> [N, ...]; 0 where a row has none."""
    return _SumCopies.apply(rows, copies.source, copies.where)


def exchange_rows(
    rows: Sequence[Tensor], sent: list[int], received: list[int], group: ProcessGroup
) -> tuple[Tensor, ...]:
    """Each tensor's first sent[0] rows go to the group's rank 0, and so on -> what all ranks sent here, in order.

    All ranks of the group call it, and those behind it in the backward pass, in the same order.
    """
    return _ExchangeRows.apply(sent, received, group, *rows)


def _sum(rows: Tensor, where_NP: Tensor) -> Tensor:
    padded = torch.cat((rows, rows.new_zeros(1, *rows.shape[1:])))
    return padded.index_select(0, where_NP.flatten()).unflatten(0, where_NP.shape).sum(1)


class _CopyRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, source_C: Tensor, where_NP: Tensor) -> Tensor:
        ctx.save_for_backward(where_NP)
        return rows.index_select(0, source_C)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (where_NP,) = ctx.saved_tensors
        return _sum(grads[0], where_NP), None, None


class _SumCopies(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, source_C: Tensor, where_NP: Tensor) -> Tensor:
        ctx.save_for_backward(source_C)
        return _sum(rows, where_NP)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (source_C,) = ctx.saved_tensors
        return grads[0].index_select(0, source_C), None, None


class _ExchangeRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, sent: list[int], received: list[int], group: ProcessGroup, *rows: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.route = sent, received, group
        outputs = _exchange(rows, sent, received, group)
        ctx.mark_non_differentiable(*(each for each in outputs if not each.is_floating_point()))
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        sent, received, group = ctx.route
        wanted = ctx.needs_input_grad[3:]
        back = iter(_exchange([grad for grad, want in zip(grads, wanted, strict=True) if want], received, sent, group))
        return None, None, None, *(next(back) if want else None for want in wanted)


def _exchange(rows: Sequence[Tensor], sent: list[int], received: list[int], group: ProcessGroup) -> tuple[Tensor, ...]:
    outputs = tuple(each.new_empty(sum(received), *each.shape[1:]) for each in rows)
    pending = [
        distributed.all_to_all_single(output, each.contiguous(), received, sent, group=group, async_op=True)
        for output, each in zip(outputs, rows, strict=True)
    ]
    for work in pending:
        assert work is not None
        work.wait()
    return outputs
