"""Cross-entropy of a linear head, by chunks of tokens: all logits of a large vocabulary never exist at once.

Legend: T tokens, D hidden, V vocabulary, N tokens of one chunk.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from engram.kernels.choose import Implementation, choose, triton_obstacle
from engram.kernels.linear_cross_entropy.reference import (
    IGNORE,
    cross_entropy_,
    cross_entropy_chunk,
    linear_cross_entropy_ref,
)
from engram.kernels.products import product_into, widened

__all__ = ["IGNORE", "linear_cross_entropy", "linear_cross_entropy_ref", "token_cross_entropy"]

# Logits in one chunk: 2^22 float32 values are 16 MiB, which a CPU's last cache level may hold. A GPU's chunk must be
# long: each reads and writes the head's whole float32 gradient, which takes a tenth of its products' time at 4096
# tokens; for 129,280 classes that is 2^29 logits, 1 GiB of bfloat16, less than that gradient.
CHUNK_LOGITS = 2**22
CHUNK_LOGITS_CUDA = 2**29
# Products are fastest for whole tiles of tokens, and fewer would not pay for reading the head.
MIN_TOKENS = 128


def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, *, compiled: bool = False, impl: Implementation = "auto"
) -> Tensor:
    """L = sum_t logsumexp(W x_t) - (W x_t)[target_t] over targets that are not -100; a float32 scalar.

    x [T, D] in the compute dtype, weight [V, D] float32 (the product runs in x's dtype, the softmax in float32),
    targets int64 [T]. A sum scales its gradient by one number, so the gradient is taken while a chunk's logits are at
    hand and no product is computed twice; the head's gradient is summed in float32. `compiled` fuses what `reference`,
    plain torch by chunks, does between the products; `triton` overwrites the logits by their gradient in one kernel and
    never waits for the device. Any other target outside [0, V) raises IndexError on CPU; on CUDA, where looking would
    wait for the device, it makes the loss NaN in `triton`. There is no second derivative: asking for one raises.
    """
    chosen = _check(x, weight, targets, impl)
    if not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)):
        return torch.ops.engram.token_cross_entropy(x, weight, targets, chosen).sum()
    return torch.ops.engram.linear_cross_entropy(x, weight, targets, compiled, chosen)[0]


@torch.no_grad()
def token_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, *, impl: Implementation = "auto") -> Tensor:
    """Loss of each token, float32 [T], 0 where the target is -100; without a gradient. Else as above."""
    return torch.ops.engram.token_cross_entropy(x, weight, targets, _check(x, weight, targets, impl))


@torch.library.custom_op("engram::linear_cross_entropy", mutates_args=())
def _forward(x: Tensor, weight: Tensor, targets: Tensor, compiled: bool, impl: str) -> tuple[Tensor, Tensor, Tensor]:
    """The summed loss, and its gradients by x and weight."""
    _check_targets(targets, len(weight))
    chunk_losses_ = _in_place(impl, compiled)
    (head,) = widened(weight.to(x.dtype))
    total = torch.zeros((), dtype=torch.float32, device=x.device)
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    grad_weight = torch.zeros_like(weight, dtype=torch.float32)
    for part, logits_NV in _chunks(x, head):
        product_into(logits_NV, x[part], head.t())
        total += chunk_losses_(logits_NV, targets[part]).sum()
        product_into(grad_x[part], logits_NV, head)
        _add_product_(grad_weight, logits_NV.t(), x[part])
    return total, grad_x, grad_weight


@torch.library.custom_op("engram::token_cross_entropy", mutates_args=())
def _token_losses(x: Tensor, weight: Tensor, targets: Tensor, impl: str) -> Tensor:
    _check_targets(targets, len(weight))
    (head,) = widened(weight.to(x.dtype))
    losses = torch.empty(len(x), dtype=torch.float32, device=x.device)
    for part, logits_NV in _chunks(x, head):
        product_into(logits_NV, x[part], head.t())
        losses[part] = _losses(impl)(logits_NV, targets[part])
    return losses


@_forward.register_fake
def _(x: Tensor, weight: Tensor, targets: Tensor, compiled: bool, impl: str) -> tuple[Tensor, Tensor, Tensor]:
    grad_weight = torch.empty_like(weight, dtype=torch.float32)
    return x.new_empty((), dtype=torch.float32), x.new_empty(x.shape), grad_weight


@_token_losses.register_fake
def _(x: Tensor, weight: Tensor, targets: Tensor, impl: str) -> Tensor:
    return x.new_empty(len(x), dtype=torch.float32)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:])


# The saved gradients are constants to autograd: a second derivative would silently lack its largest part.
@torch.autograd.function.once_differentiable
def _gradient(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 5
    grad_x, grad_weight = ctx.saved_tensors
    # In float32: 1 / tokens rounded to bfloat16 would scale the backbone's gradient, but not the head's.
    return (grad_x.float() * grad).to(grad_x.dtype), grad_weight * grad, None, None, None


_forward.register_autograd(_gradient, setup_context=_setup_context)


def _chunks(x: Tensor, head: Tensor) -> list[tuple[slice, Tensor]]:
    """The tokens of each chunk, and the room for their logits, which all chunks share."""
    most = (CHUNK_LOGITS_CUDA if x.is_cuda else CHUNK_LOGITS) // len(head)
    size = max(most // MIN_TOKENS, 1) * MIN_TOKENS
    room = x.new_empty(min(size, len(x)), len(head))
    parts = [slice(start, min(start + size, len(x))) for start in range(0, len(x), size)]
    return [(part, room[: part.stop - part.start]) for part in parts]


def _add_product_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b, summed in total's float32."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        a, b = widened(a, b)
        total += a @ b


def _in_place(impl: str, compiled: bool) -> Callable[[Tensor, Tensor], Tensor]:
    if impl == "triton":
        from engram.kernels.linear_cross_entropy.triton import cross_entropy_triton_

        return cross_entropy_triton_
    return _compiled_cross_entropy_() if compiled else cross_entropy_


def _losses(impl: str) -> Callable[[Tensor, Tensor], Tensor]:
    if impl == "triton":
        from engram.kernels.linear_cross_entropy.triton import cross_entropy_triton

        return cross_entropy_triton
    return cross_entropy_chunk


@functools.cache
def _compiled_cross_entropy_() -> Callable[[Tensor, Tensor], Tensor]:
    return torch.compile(cross_entropy_)


def _check(x: Tensor, weight: Tensor, targets: Tensor, impl: str) -> str:
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1] or targets.shape != x.shape[:1]:
        raise ValueError(
            "linear_cross_entropy wants x [T, D], weight [V, D] and targets [T], not "
            f"{list(x.shape)}, {list(weight.shape)} and {list(targets.shape)}"
        )
    if not len(weight):
        raise ValueError("linear_cross_entropy wants a weight [V, D] of at least one row, not none")
    if not (x.is_floating_point() and weight.is_floating_point()) or targets.dtype != torch.int64:
        raise TypeError(
            "linear_cross_entropy wants floating-point x and weight, and int64 targets, not "
            f"{x.dtype}, {weight.dtype} and {targets.dtype}"
        )
    return _choice(impl, x.device.type)


def _check_targets(targets: Tensor, classes: int) -> None:
    # Elsewhere than on CPU, looking would wait for the device.
    if targets.device.type != "cpu":
        return
    outside = ((targets < 0) | (targets >= classes)) & (targets != IGNORE)
    if outside.any():
        position = int(outside.nonzero()[0])
        raise IndexError(
            f"target {int(targets[position])} at [{position}] is none of the {classes} classes: targets are 0 to "
            f"{classes - 1}, or {IGNORE} where no loss is wanted"
        )


@torch.compiler.assume_constant_result
def _choice(impl: str, device: str) -> str:
    return choose("linear_cross_entropy", impl, device, triton=lambda: triton_obstacle(device))
