"""Momentum with Sinkhorn balancing, the table optimizer of DeepSeek-V4.1 (arXiv 2609.19969, section 2.5).

Legend: R rows of the table, U rows with a gradient, D width of a row.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from engram.kernels.choose import Implementation, check_integers, choose, triton_obstacle, width_obstacle
from engram.kernels.native import native_obstacle
from engram.kernels.sinkhorn_momentum.native_cpu import SOURCE, sinkhorn_momentum_native_
from engram.kernels.sinkhorn_momentum.reference import sinkhorn_momentum_ref_
from engram.kernels.table_update.part import TablePart

__all__ = ["sinkhorn_momentum_"]

_DTYPES = (torch.float32, torch.bfloat16)
_DIVIDED = "the table is divided, and it balances whole tables only"


def sinkhorn_momentum_(
    table: Tensor,
    momentum: Tensor,
    gradient: Tensor,
    rows: Tensor,
    *,
    lr: float,
    beta: float,
    steps: int,
    threshold: float,
    update_rms: float,
    weight_decay: float = 0.0,
    seed: int = 0,
    part: TablePart | None = None,
    impl: Implementation = "auto",
) -> None:
    """M = beta M + (1-beta) G;  H = beta M + (1-beta) G;  W = (1 - lr wd) W - lr update_rms sqrt(D) balanced(H).

    Balancing divides rows and columns by their L2 norms in turn, `steps` (odd) times, and ends on rows: a row moves by
    lr update_rms in root mean square, or not at all, where its norm in H is at most `threshold` times the mean norm of
    the table's rows. Columns of zeros stay so.

    In place: `table` [R, D] float32, or bfloat16 rounded stochastically by an integer hash of `seed` (at least 0, below
    2^32), row and column; `momentum` [R, D] float32. `gradient` [U, D] float32 or bfloat16 belongs to the distinct,
    ascending `rows` [U] int64. All contiguous. Where `table` is a part of a larger one,
    all parts call this together, also those without a row, and the reference does the work. Raises TypeError,
    ValueError, and on CPU IndexError for a row that the table does not have.
    """
    _check(table, momentum, gradient, rows, steps, seed)
    chosen = _choice(impl, table.device.type, table.shape[1], divided=part is not None)
    if part is not None:
        # Collectives are not for the dispatcher.
        sinkhorn_momentum_ref_(
            table.detach(),
            momentum,
            gradient,
            rows,
            lr=lr,
            beta=beta,
            steps=steps,
            threshold=threshold,
            update_rms=update_rms,
            weight_decay=weight_decay,
            seed=seed,
            part=part,
        )
        return
    settings = (lr, beta, steps, threshold, update_rms, weight_decay, seed, chosen)
    _sinkhorn_momentum(table.detach(), momentum, gradient, rows, *settings)


@torch.compiler.assume_constant_result
def _choice(impl: Implementation, device: str, width: int, divided: bool) -> str:
    return choose(
        "sinkhorn_momentum_",
        impl,
        device,
        triton=lambda: _DIVIDED if divided else _triton_obstacle(device, width),
        native=lambda: _DIVIDED if divided else _native_obstacle(device),
    )


def _native_obstacle(device: str) -> str | None:
    return native_obstacle(SOURCE) if device == "cpu" else f"it is for CPU, not {device}"


def _triton_obstacle(device: str, width: int) -> str | None:
    return width_obstacle("rows", width, most=1024) or triton_obstacle(device)


def _check(table: Tensor, momentum: Tensor, gradient: Tensor, rows: Tensor, steps: int, seed: int) -> None:
    dtypes = {"table": (table, _DTYPES), "momentum": (momentum, (torch.float32,)), "gradient": (gradient, _DTYPES)}
    for name, (tensor, allowed) in dtypes.items():
        if tensor.dtype not in allowed:
            raise TypeError(f"{name} is {tensor.dtype}, but must be {' or '.join(map(str, allowed))}")
        if tensor.ndim != 2 or not tensor.is_contiguous():
            raise ValueError(f"{name} must be a contiguous matrix, not {list(tensor.shape)}: call .contiguous()")
    if rows.dtype != torch.int64 or rows.ndim != 1 or not rows.is_contiguous():
        raise TypeError(f"rows must be a contiguous int64 vector, not {rows.dtype} {list(rows.shape)}")
    if momentum.shape != table.shape:
        raise ValueError(f"momentum is {list(momentum.shape)}, but the table is {list(table.shape)}")
    if gradient.shape != (len(rows), table.shape[1]):
        raise ValueError(
            f"gradient is {list(gradient.shape)}, but {len(rows)} rows of width {table.shape[1]} have a gradient"
        )
    check_integers("sinkhorn_momentum_", steps=steps, seed=seed)
    if steps < 1 or steps % 2 == 0:
        raise ValueError(f"steps is {steps}, but an odd number is needed to end on rows")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed is {seed}, but must be at least 0 and below 2^32")
    if len(devices := {each.device for each in (table, momentum, gradient, rows)}) > 1:
        raise ValueError(f"the tensors lie on several devices: {', '.join(map(str, devices))}")


@torch.library.custom_op("engram::sinkhorn_momentum_", mutates_args=("table", "momentum"))
def _sinkhorn_momentum(
    table: Tensor,
    momentum: Tensor,
    gradient: Tensor,
    rows: Tensor,
    lr: float,
    beta: float,
    steps: int,
    threshold: float,
    update_rms: float,
    weight_decay: float,
    seed: int,
    impl: str,
) -> None:
    # Elsewhere than on CPU, looking would wait for the device.
    if table.device.type == "cpu" and len(rows):
        outside = rows[(rows < 0) | (rows >= len(table))]
        if len(outside):
            raise IndexError(f"row {int(outside[0])} has a gradient, but the table has rows 0 to {len(table) - 1}")
        if not (rows.diff() > 0).all():
            raise ValueError("rows must be distinct and ascend: sort them, and add up the gradients of equal ones")
    run: Callable[..., None]
    if impl == "triton":
        # Imports triton, which may be absent.
        from engram.kernels.sinkhorn_momentum.triton import sinkhorn_momentum_triton_

        run = sinkhorn_momentum_triton_
    else:
        run = sinkhorn_momentum_native_ if impl == "native" else sinkhorn_momentum_ref_
    with torch.cuda.device_of(table):
        run(
            table,
            momentum,
            gradient,
            rows,
            lr=lr,
            beta=beta,
            steps=steps,
            threshold=threshold,
            update_rms=update_rms,
            weight_decay=weight_decay,
            seed=seed,
        )
