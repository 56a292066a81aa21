"""The gate of a memory's value and the short convolution after it, for all streams (Engram, equations 3 to 5)."""

from typing import Any, Literal

import torch
from torch import Tensor

from engram.kernels.choose import Implementation, check_integers, choose, triton_obstacle, width_obstacle
from engram.kernels.engram_gate_conv.native_cpu import SOURCE, backward_native, forward_native
from engram.kernels.engram_gate_conv.reference import engram_gate_conv_ref
from engram.kernels.native import native_obstacle

__all__ = ["engram_gate_conv", "engram_gate_conv_ref"]

Gate = Literal["signed_sqrt", "plain"]
MAX_STREAMS = 8
MAX_TAPS = 8


def engram_gate_conv(
    hidden: Tensor,
    keys_and_value: Tensor,
    alive: Tensor,
    gain: Tensor | None,
    conv_weight: Tensor | None,
    conv_gain: Tensor | None,
    *,
    gate: Gate | None,
    dilation: int = 1,
    eps: float,
    conv_eps: float,
    impl: Implementation = "auto",
) -> tuple[Tensor, Tensor]:
    """out = v + silu(conv(rms(v) * conv_gain)),  v = a * value,  a = sigmoid(f(<rms(h) * gain, rms(k)> / sqrt(D)))

    f(s) is copysign(sqrt(max(|s|, 1e-6)), s) for the gate "signed_sqrt" and s for "plain"; without a gate a = 1.
    conv(x)[t] = sum_j weight[j] x[t - (K-1-j) dilation]; without weights out = v. float32 inside.

    hidden [B, T, G, D]; keys_and_value [B, T, (G+1)*D] of its dtype, keys of the streams first (without a gate only the
    value, [B, T, D]); alive bool [B, T]: elsewhere a, v and all gradients are 0 whatever the inputs hold; gain [G, D],
    the product of both norms' gains; conv_weight [G*D, 1, K], conv_gain [G, D]. Returns out [B, T, G, D] in
    `hidden.dtype`, and the gates a, float32 [B, T, G], which carry no gradient.

    `triton` needs widths that are multiples of 16, `native` is C++ for CPU; both are for float32 and bfloat16, up to 8
    streams and 8 taps. Raises ValueError or TypeError for tensors that do not fit together, ImplementationUnavailable
    where `impl` cannot run.
    """
    _validate(hidden, keys_and_value, alive, gain, conv_weight, conv_gain, gate, dilation)
    streams, width = hidden.shape[-2:]
    num_taps = 0 if conv_weight is None else conv_weight.shape[-1]
    chosen = _choice(impl, hidden.device.type, hidden.dtype, streams, width, num_taps)
    if chosen == "reference":
        tensors = hidden, keys_and_value, alive, gain, conv_weight, conv_gain
        return engram_gate_conv_ref(*tensors, gate=gate, dilation=dilation, eps=eps, conv_eps=conv_eps)
    taps_KGD = None
    if conv_weight is not None and conv_gain is not None:
        # The gain is folded into the taps, which are few.
        taps_KGD = (conv_weight.view(streams, width, -1) * conv_gain[..., None]).permute(2, 0, 1).float()
    gain = None if gain is None else gain.float()
    return torch.ops.engram.engram_gate_conv(
        hidden, keys_and_value, alive, gain, taps_KGD, gate, dilation, eps, conv_eps, chosen
    )[:2]


def _validate(
    hidden: Tensor,
    keys_and_value: Tensor,
    alive: Tensor,
    gain: Tensor | None,
    conv_weight: Tensor | None,
    conv_gain: Tensor | None,
    gate: str | None,
    dilation: int,
) -> None:
    if gate not in ("signed_sqrt", "plain", None):
        raise ValueError(f"engram_gate_conv has no gate {gate!r}: choose 'signed_sqrt', 'plain' or None")
    if hidden.dim() != 4 or not hidden.is_floating_point():
        raise ValueError(f"hidden must be floating point [B, T, G, D], not {hidden.dtype} {list(hidden.shape)}")
    if not hidden.shape[2] or not hidden.shape[3]:
        raise ValueError(f"hidden {list(hidden.shape)} must have at least one stream and one channel")
    if keys_and_value.dtype != hidden.dtype:
        raise TypeError(f"keys_and_value is {keys_and_value.dtype}, but hidden {hidden.dtype}: convert one of them")
    if alive.dtype != torch.bool:
        raise TypeError(f"alive must be torch.bool, not {alive.dtype}")
    if (gate is None) != (gain is None):
        raise ValueError("a gate and its gain come together: give both or neither")
    if (conv_weight is None) != (conv_gain is None):
        raise ValueError("conv_weight and conv_gain come together: give both or neither")
    check_integers("engram_gate_conv", dilation=dilation)
    if dilation < 1:
        raise ValueError(f"dilation is {dilation}: it must be at least 1")
    if conv_weight is not None and not conv_weight.shape[-1]:
        raise ValueError("conv_weight has no taps: give at least one, or None for no convolution")
    batch, length, streams, width = hidden.shape
    columns = width if gate is None else (streams + 1) * width
    _expect("keys_and_value", keys_and_value, (batch, length, columns))
    _expect("alive", alive, (batch, length))
    if gain is not None:
        _expect("gain", gain, (streams, width))
    if conv_weight is not None and conv_gain is not None:
        _expect("conv_weight", conv_weight, (streams * width, 1, conv_weight.shape[-1]))
        _expect("conv_gain", conv_gain, (streams, width))


def _expect(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{name} has the shape {list(tensor.shape)}, but hidden asks for {list(shape)}")


@torch.compiler.assume_constant_result
def _choice(impl: Implementation, device: str, dtype: torch.dtype, streams: int, width: int, num_taps: int) -> str:
    def limits() -> str | None:
        if dtype not in (torch.float32, torch.bfloat16):
            return f"it is for float32 and bfloat16, not {dtype}"
        if streams > MAX_STREAMS or num_taps > MAX_TAPS:
            return f"it is for up to {MAX_STREAMS} streams and {MAX_TAPS} taps, not {streams} and {num_taps}"
        return None

    def triton() -> str | None:
        return width_obstacle("streams", width) or limits() or triton_obstacle(device)

    def native() -> str | None:
        if device != "cpu":
            return f"the tensors are on {device}: native is for CPU"
        return limits() or native_obstacle(SOURCE)

    return choose("engram_gate_conv", impl, device, triton=triton, native=native)


@torch.library.custom_op("engram::engram_gate_conv", mutates_args=())
def _forward(
    hidden: Tensor,
    keys_and_value: Tensor,
    alive: Tensor,
    gain: Tensor | None,
    taps: Tensor | None,
    gate: str | None,
    dilation: int,
    eps: float,
    conv_eps: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out, gates, and what the backward pass needs of each token and stream: `scores` float32 [3, B, T, G] (the score,
    the inverse rms of hidden state and key; empty without a gate), `scales` float32 [B, T, G] (the inverse rms of the
    gated value; empty without taps). `taps` float32 [K, G, D] include the norm's gain."""
    out, gates, scores, scales = results = _allocate(hidden, gate, taps)
    if not hidden.numel():
        return results
    inputs = hidden.contiguous(), keys_and_value.contiguous(), alive.contiguous(), _contiguous(gain), _contiguous(taps)
    if impl == "triton":
        from engram.kernels.engram_gate_conv.triton import forward_triton

        with torch.cuda.device_of(hidden):
            forward_triton(*inputs, out, gates, scores, scales, gate, dilation, eps, conv_eps)
    else:
        forward_native(*inputs, out, gates, scores, scales, gate, dilation, eps, conv_eps)
    return results


@torch.library.custom_op("engram::engram_gate_conv_backward", mutates_args=())
def _backward(
    grad: Tensor,
    hidden: Tensor,
    keys_and_value: Tensor,
    alive: Tensor,
    gain: Tensor | None,
    taps: Tensor | None,
    gates: Tensor,
    scores: Tensor,
    scales: Tensor,
    gate: str | None,
    dilation: int,
    conv_eps: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of hidden, keys_and_value, gain and taps; empty for what is not there."""
    grad_hidden, grad_keys_and_value, grad_gain, grad_taps = results = _allocate_gradients(
        hidden, keys_and_value, gain, taps
    )
    if not hidden.numel():
        grad_gain.zero_()
        grad_taps.zero_()
        return results
    run = backward_native
    if impl == "triton":
        from engram.kernels.engram_gate_conv.triton import backward_triton

        run = backward_triton
    inputs = hidden.contiguous(), keys_and_value.contiguous(), alive.contiguous(), _contiguous(gain), _contiguous(taps)
    with torch.cuda.device_of(hidden):
        run(grad.contiguous(), *inputs, gates, scores, scales, *results, gate, dilation, conv_eps)
    return results


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _allocate(hidden: Tensor, gate: str | None, taps: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape = hidden.shape[:-1]
    out = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    gates = hidden.new_empty(shape, dtype=torch.float32)
    scores = hidden.new_empty((0 if gate is None else 3, *shape), dtype=torch.float32)
    scales = hidden.new_empty((0,) if taps is None else shape, dtype=torch.float32)
    return out, gates, scores, scales


def _allocate_gradients(
    hidden: Tensor, keys_and_value: Tensor, gain: Tensor | None, taps: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        hidden.new_empty((0,) if gain is None else hidden.shape),
        keys_and_value.new_empty(keys_and_value.shape),
        hidden.new_empty((0,) if gain is None else gain.shape, dtype=torch.float32),
        hidden.new_empty((0,) if taps is None else taps.shape, dtype=torch.float32),
    )


@_forward.register_fake
def _(
    hidden: Tensor,
    keys_and_value: Tensor,
    alive: Tensor,
    gain: Tensor | None,
    taps: Tensor | None,
    gate: str | None,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _allocate(hidden, gate, taps)


@_backward.register_fake
def _(
    grad: Tensor,
    hidden: Tensor,
    keys_and_value: Tensor,
    alive: Tensor,
    gain: Tensor | None,
    taps: Tensor | None,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _allocate_gradients(hidden, keys_and_value, gain, taps)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.gate, ctx.dilation, _, ctx.conv_eps, ctx.impl = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*tensors, *output[1:])


def _gradients(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    # Asked for once: a checkpointed block unpacks them only once.
    saved = ctx.saved_tensors
    gated, conv = saved[3] is not None, saved[4] is not None
    grad_hidden, grad_keys_and_value, grad_gain, grad_taps = _backward(
        grad, *saved, ctx.gate, ctx.dilation, ctx.conv_eps, ctx.impl
    )
    return (
        grad_hidden if gated else None,
        grad_keys_and_value,
        None,
        grad_gain if gated else None,
        grad_taps if conv else None,
        *(None,) * 5,
    )


_forward.register_autograd(_gradients, setup_context=_setup_context)
