"""Softmax, loss and gradient of one chunk's logits, in place: no float32 copy of them exists."""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from engram.kernels.compile_ahead import Build, record
from engram.kernels.linear_cross_entropy.reference import IGNORE

# Classes at a time: 32 values for each thread of 8 warps are enough loads in flight, and fit registers as float32.
BLOCK = 8192


@triton.jit
def _cross_entropy_kernel(
    logits_ptr, targets_ptr, losses_ptr, num_classes,
    IGNORED: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program takes one token's row: once for its maximum and sum, once more to overwrite it if GRADIENT."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * num_classes
    target = tl.load(targets_ptr + row)
    columns = tl.arange(0, BLOCK)
    exists = (target >= 0) & (target < num_classes)
    picked = tl.load(logits_ptr + target, mask=exists, other=float("nan")).to(tl.float32)
    largest = tl.full((), float("-inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    for first in range(0, num_classes, BLOCK):
        inside = first + columns < num_classes
        logits = tl.load(logits_ptr + first + columns, mask=inside, other=float("-inf")).to(tl.float32)
        larger = tl.maximum(largest, tl.max(logits, axis=0))
        total = total * tl.exp(largest - larger) + tl.sum(tl.exp(logits - larger), axis=0)
        largest = larger
    log_norm = largest + tl.log(total)
    tl.store(losses_ptr + row, tl.where(target == IGNORED, 0.0, log_norm - picked))
    if GRADIENT:
        # Makes an ignored token's softmax 0.
        log_norm = tl.where(target == IGNORED, float("inf"), log_norm)
        for first in range(0, num_classes, BLOCK):
            inside = first + columns < num_classes
            logits = tl.load(logits_ptr + first + columns, mask=inside, other=float("-inf")).to(tl.float32)
            delta = tl.exp(logits - log_norm) - (first + columns == target).to(tl.float32)
            tl.store(logits_ptr + first + columns, delta, mask=inside)


def cross_entropy_triton_(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """Losses float32 [N]; the logits (contiguous) become their gradient, softmax - onehot, 0 for a target of -100."""
    return _launch(logits_NV, targets_N, gradient=True)


def cross_entropy_triton(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """Losses float32 [N]."""
    return _launch(logits_NV, targets_N, gradient=False)


def _launch(logits: Tensor, targets: Tensor, *, gradient: bool) -> Tensor:
    num_tokens, num_classes = logits.shape
    assert logits.is_contiguous()
    losses = torch.empty(num_tokens, dtype=torch.float32, device=logits.device)
    block = min(triton.next_power_of_2(num_classes), BLOCK)
    with torch.cuda.device_of(logits):
        _cross_entropy_kernel[(num_tokens,)](
            logits, targets.contiguous(), losses, num_classes, IGNORE, gradient, block, num_warps=8
        )
    return losses


def builds() -> list[Build]:
    """The heads of the shipped configs: 4,096 classes (quickstart, tiny) and DeepSeek's 129,280."""
    builds = []
    for num_classes, dtype in ((4096, torch.float32), (4096, torch.bfloat16), (129280, torch.bfloat16)):
        logits = torch.empty(4096, num_classes, dtype=dtype, device="meta")
        targets = torch.empty(4096, dtype=torch.int64, device="meta")
        name = f"{num_classes} {str(dtype).removeprefix('torch.')}"
        builds += record(f"{name} loss", functools.partial(cross_entropy_triton, logits, targets))
        builds += record(f"{name} gradient", functools.partial(cross_entropy_triton_, logits, targets))
    return builds
