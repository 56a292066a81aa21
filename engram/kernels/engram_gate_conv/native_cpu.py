"""The gate and convolution in C++: one pass over the inputs forward, one backward, rows in the first cache levels.

Legend: G streams, D hidden size, K taps.
"""

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from engram.kernels.native import load_library

SOURCE = Path(__file__).with_name("native.cpp")
GATES = (None, "plain", "signed_sqrt")
# Fewer taps are padded in front with zeros.
COMPILED_TAPS = (4, 8)
# Sums over tokens are taken chunk by chunk, whatever the number of threads: enough chunks for all of them, few sums.
SMALLEST_CHUNK = 128
MOST_CHUNKS = 64


class _Sizes(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("rows", "length", "streams", "width", "columns", "dilation")]


class _Saved(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_void_p) for name in ("gates", "score", "inverse_hidden", "inverse_key", "inverse_value")
    ]


def forward_native(
    hidden: Tensor,
    keys_and_value: Tensor,
    alive: Tensor,
    gain: Tensor | None,
    taps: Tensor | None,
    out: Tensor,
    gates: Tensor,
    scores: Tensor,
    scales: Tensor,
    gate: str | None,
    dilation: int,
    eps: float,
    conv_eps: float,
) -> None:
    padded_KGD = _pad(taps)
    _call(
        _entry("forward", hidden, padded_KGD),
        _sizes(hidden, keys_and_value, dilation),
        *(hidden, keys_and_value, alive, gain, padded_KGD, out),
        _saved(gates, scores, scales),
        *(ctypes.c_int(GATES.index(gate)), ctypes.c_float(eps), ctypes.c_float(conv_eps)),
    )


def backward_native(
    grad: Tensor,
    hidden: Tensor,
    keys_and_value: Tensor,
    alive: Tensor,
    gain: Tensor | None,
    taps: Tensor | None,
    gates: Tensor,
    scores: Tensor,
    scales: Tensor,
    grad_hidden: Tensor,
    grad_keys_and_value: Tensor,
    grad_gain: Tensor,
    grad_taps: Tensor,
    gate: str | None,
    dilation: int,
    conv_eps: float,
) -> None:
    rows, length, streams, width = hidden.shape
    padded_KGD = _pad(taps)
    chunk = max(SMALLEST_CHUNK, -(-rows * length // MOST_CHUNKS))
    num_chunks = rows * -(-length // chunk)
    gain_sums = None if gain is None else hidden.new_zeros((num_chunks, streams, width), dtype=torch.float32)
    tap_sums = None
    if padded_KGD is not None:
        tap_sums = hidden.new_zeros((num_chunks, streams, len(padded_KGD), width), dtype=torch.float32)
    _call(
        _entry("backward", hidden, padded_KGD),
        _sizes(hidden, keys_and_value, dilation),
        *(ctypes.c_int64(chunk), grad, hidden, keys_and_value, gain, padded_KGD),
        _saved(gates, scores, scales),
        *(ctypes.c_int(GATES.index(gate)), ctypes.c_float(conv_eps)),
        *(grad_hidden, grad_keys_and_value, gain_sums, tap_sums),
    )
    if gain_sums is not None:
        torch.sum(gain_sums, 0, out=grad_gain)
    if taps is not None and tap_sums is not None:
        grad_taps.copy_(tap_sums.sum(0)[:, -len(taps) :].transpose(0, 1))


def _pad(taps_KGD: Tensor | None) -> Tensor | None:
    if taps_KGD is None:
        return None
    compiled = next(count for count in COMPILED_TAPS if count >= len(taps_KGD))
    return torch.nn.functional.pad(taps_KGD, (0, 0, 0, 0, compiled - len(taps_KGD), 0))


def _entry(name: str, hidden: Tensor, taps_KGD: Tensor | None) -> str:
    dtype = {torch.float32: "float32", torch.bfloat16: "bfloat16"}[hidden.dtype]
    return f"{name}_{dtype}_{0 if taps_KGD is None else len(taps_KGD)}"


def _sizes(hidden: Tensor, keys_and_value: Tensor, dilation: int) -> ctypes.Structure:
    return _Sizes(*hidden.shape, keys_and_value.shape[-1], dilation)


def _saved(gates: Tensor, scores: Tensor, scales: Tensor) -> ctypes.Structure:
    three = [score.data_ptr() for score in scores] or [None] * 3
    return _Saved(gates.data_ptr(), *three, scales.data_ptr())


def _call(entry: str, *arguments: object) -> None:
    """Tensors as their addresses, None as the null pointer, structures by reference."""
    converted: list[object] = []
    for argument in arguments:
        if isinstance(argument, Tensor):
            assert argument.is_contiguous() and argument.device.type == "cpu"
            argument = ctypes.c_void_p(argument.data_ptr())
        elif isinstance(argument, ctypes.Structure):
            argument = ctypes.byref(argument)
        converted.append(ctypes.c_void_p(None) if argument is None else argument)
    getattr(load_library(SOURCE), entry)(*converted)
