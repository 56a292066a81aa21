"""Muon: momentum, orthogonalised by Newton-Schulz (Jordan et al. 2024), at AdamW's update size (arXiv 2502.16982).

Legend: N matrices in a stack, R rows <= C columns (tall matrices are transposed).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from engram.config import MuonConfig
from engram.kernels.products import add_product, product
from engram.optim.groups import Assignment
from engram.optim.role import Role

# The quintic a s + b s^3 + c s^5 that lifts small singular values fastest and holds large ones in about [0.7, 1.2].
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
# Bound on the elements of a stack, and so on Newton-Schulz's temporary memory.
STACK_ELEMENTS = 2**26


def newton_schulz(stack_NRC: Tensor, steps: int) -> Tensor:
    """U V^T of each matrix's singular value decomposition, its singular values in about [0.7, 1.2] rather than 1.

    Computes in the dtype given (bfloat16 suffices); overwrites the stack. Zero matrices stay zero.
    """
    a, b, c = COEFFICIENTS
    norms_N11 = torch.linalg.vector_norm(stack_NRC, dim=(1, 2), keepdim=True, dtype=torch.float32)
    stack_NRC.div_((norms_N11 + 1e-7).to(stack_NRC.dtype))
    for _ in range(steps):
        gram_NRR = product(stack_NRC, stack_NRC.mT)
        polynomial_NRR = add_product(gram_NRR, gram_NRR, gram_NRR, beta=b, alpha=c)
        stack_NRC = add_product(stack_NRC, polynomial_NRR, stack_NRC, beta=a)
    return stack_NRC


@dataclass(frozen=True, eq=False)
class _Piece:
    """Some matrices of one parameter, wide: views [n, R, C] of weight, momentum and gradient."""

    weight: Tensor
    momentum: Tensor
    gradient: Tensor
    lr: float
    weight_decay: float


class Muon(Role):
    """M = mu M + (1-mu) G;  W = (1 - lr wd) W - lr update_rms sqrt(max(R, C)) NewtonSchulz((1-mu) G + mu M).

    The scale gives an update the root mean square `update_rms` (times that of the singular values), which makes AdamW's
    learning rate and weight decay fit. Matrices that leading dimensions of a parameter count, or that stand below one
    another in it (`Rule.rows_as`), are orthogonalised each on its own; all matrices of one shape, of all parameters,
    share a chain of batched products.
    """

    def __init__(self, assignments: Sequence[Assignment], settings: MuonConfig) -> None:
        super().__init__(assignments)
        self.settings = settings
        for each in self.assignments:
            assert each.parameter.is_contiguous(), f"{each.name} must be contiguous, to be seen as a stack of matrices"
            self.tensors[f"{each.name}/momentum"] = torch.zeros_like(each.parameter)

    @torch.no_grad()
    def step(self, lr: float) -> None:
        live = [each for each in self.assignments if each.parameter.grad is not None]
        if not live:
            return
        momenta = [self.tensors[f"{each.name}/momentum"] for each in live]
        gradients = [each.parameter.grad for each in live if each.parameter.grad is not None]
        torch._foreach_lerp_(momenta, gradients, 1 - self.settings.momentum)
        pieces = [
            _Piece(weight, momentum, gradient, lr * each.lr_multiplier, each.weight_decay)
            for each, *tensors in zip(live, momenta, gradients, strict=True)
            for weight, momentum, gradient in zip(
                *(_wide_views(tensor, each.matrices) for tensor in (each.parameter, *tensors)), strict=True
            )
        ]
        for stack in _stacks(pieces):
            self._update(stack)

    def _update(self, stack: list[_Piece]) -> None:
        weights = [piece.weight for piece in stack]
        gradients = [piece.gradient for piece in stack]
        directions = [piece.momentum for piece in stack]
        if self.settings.nesterov:
            directions = list(torch._foreach_lerp(gradients, directions, self.settings.momentum))
        sizes = [piece.weight.shape[0] for piece in stack]
        dtype = getattr(torch, self.settings.newton_schulz_dtype)
        stack_NRC = torch.empty(sum(sizes), *weights[0].shape[1:], dtype=dtype, device=weights[0].device)
        torch._foreach_copy_(stack_NRC.split(sizes), directions)
        orthogonal = newton_schulz(stack_NRC, self.settings.newton_schulz_steps).split(sizes)
        scale = self.settings.update_rms * math.sqrt(stack_NRC.shape[2])
        torch._foreach_mul_(weights, [1 - piece.lr * piece.weight_decay for piece in stack])
        for piece, update in zip(stack, orthogonal, strict=True):
            piece.weight.add_(update, alpha=-piece.lr * scale)


def _wide_views(tensor: Tensor, below_one_another: int) -> tuple[Tensor, ...]:
    """Views [n, R, C] of all matrices in [..., below_one_another * rows, columns], none larger than a stack may be."""
    matrices = tensor.unflatten(-2, (below_one_another, -1)).flatten(0, -3)
    matrices = matrices.mT if matrices.shape[1] > matrices.shape[2] else matrices
    return matrices.split(max(1, STACK_ELEMENTS // matrices[0].numel()))


def _stacks(pieces: list[_Piece]) -> Iterator[list[_Piece]]:
    """Pieces of equal shape and device, packed in order into stacks of at most STACK_ELEMENTS (or of one matrix)."""

    def kind(piece: _Piece) -> tuple[str, int, int]:
        return (str(piece.weight.device), *piece.weight.shape[1:])

    for _, same in groupby(sorted(pieces, key=kind), key=kind):
        stack: list[_Piece] = []
        elements = 0
        for piece in same:
            if stack and elements + piece.weight.numel() > STACK_ELEMENTS:
                yield stack
                stack, elements = [], 0
            stack.append(piece)
            elements += piece.weight.numel()
        yield stack
