"""Other people's ways of doing what our kernels do: NumPy, numba, torch, FBGEMM, Liger.

Legend: B batch, T tokens, C hash columns, N longest n-gram, O = N - 1 orders, H heads, R rows, U ids, D width, E
experts, F expert width, K experts of a token.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.contest import Run
from benchmarks.demo import DemoEngram, hash_demo
from engram.memory.engram import Engram
from engram.memory.hashing import NgramHash

Array = np.ndarray[Any, np.dtype[np.int64]]
# (ids [B, T], multipliers [N], primes [O, H], offsets [C], pad id) -> [B, T, C]
ArrayHash = Callable[[Array, Array, Array, Array, int], Array]


def numpy_hash(ids_BT: Array, multipliers_N: Array, primes_OH: Array, offsets_C: Array, pad_id: int) -> Array:
    """As DeepSeek's demo computes it, and the rows' offsets, which its embedding adds."""
    return hash_demo(ids_BT, multipliers_N, primes_OH.tolist(), pad_id) + offsets_C


@functools.cache
def numba_hash() -> ArrayHash:
    """One compiled loop over tokens in parallel, with the processor's own remainder."""
    import numba

    numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))

    @numba.njit(parallel=True)
    def hash_ids(ids_BT, multipliers_N, primes_OH, offsets_C, pad_id):  # type: ignore[no-untyped-def]
        batch, length = ids_BT.shape
        orders, heads = primes_OH.shape
        out_BTC = np.empty((batch, length, orders * heads), dtype=np.int64)
        for position in numba.prange(batch * length):
            b, t = position // length, position % length
            mix = ids_BT[b, t] * multipliers_N[0]
            for order in range(orders):
                shift = order + 1
                mix ^= (ids_BT[b, t - shift] if t >= shift else pad_id) * multipliers_N[shift]
                for head in range(heads):
                    column = order * heads + head
                    out_BTC[b, t, column] = mix % primes_OH[order, head] + offsets_C[column]
        return out_BTC

    return hash_ids  # type: ignore[no-any-return]


def sparse_adam(table_RD: Tensor, ids_U: Tensor, gradient_UD: Tensor, *, lr: float, eps: float) -> Run:
    table = nn.Parameter(table_RD.clone())
    table.grad = torch.sparse_coo_tensor(ids_U[None], gradient_UD, table.shape, check_invariants=False)
    optimizer = torch.optim.SparseAdam([table], lr=lr, eps=eps)

    def step() -> list[Tensor]:
        optimizer.step()
        return [table.detach()]

    return Run(step)


def dense_adam(table_RD: Tensor, ids_U: Tensor, gradient_UD: Tensor, *, lr: float, eps: float) -> Run:
    """The same gradient as a whole table, and Adam over all rows."""
    table = nn.Parameter(table_RD.clone())
    optimizer = torch.optim.AdamW([table], lr=lr, eps=eps, weight_decay=0, fused=True)

    def step() -> list[Tensor]:
        table.grad = None
        table.grad = torch.ops.aten.embedding_dense_backward(gradient_UD, ids_U, len(table), -1, False)
        optimizer.step()
        return [table.detach()]

    return Run(step)


def fbgemm_rowwise_adagrad(table_RD: Tensor, ids_U: Tensor, gradient_UD: Tensor, *, lr: float, eps: float) -> Run:
    """FBGEMM's fused backward pass and update on CPU. Its forward pass is not timed."""
    from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode, EmbeddingLocation, PoolingMode
    from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
        ComputeDevice,
        SplitTableBatchedEmbeddingBagsCodegen,
    )

    bags = SplitTableBatchedEmbeddingBagsCodegen(
        [(*table_RD.shape, EmbeddingLocation.HOST, ComputeDevice.CPU)],
        optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD,
        learning_rate=lr,
        eps=eps,
        pooling_mode=PoolingMode.SUM,
        weights_precision=SparseType.FP32,
        bounds_check_mode=BoundsCheckMode.NONE,
    )
    (table,) = bags.split_embedding_weights()
    table.copy_(table_RD)
    # Every bag holds one id.
    starts = torch.arange(len(ids_U) + 1)
    outputs: list[Tensor] = []

    def forward() -> None:
        outputs[:] = [bags(ids_U, starts)]

    def step() -> list[Tensor]:
        outputs[0].backward(gradient_UD)
        return [table]

    return Run(step, prepare=forward)


def grouped_mm_experts(
    x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor
) -> Tensor:
    """torch's grouped products between a sort and its inverse, by torch's own derivatives."""
    experts = len(down_EDF)
    order = ids_TK.flatten().argsort()
    counts_E = torch.histc(ids_TK.flatten().float(), bins=experts, min=0, max=experts - 1)
    ends_E = counts_E.cumsum(0).to(torch.int32)
    x = x_TD[order // ids_TK.shape[1]]
    gate, up = F.grouped_mm(x, gate_up_E2FD.flatten(1, 2).transpose(1, 2), offs=ends_E).chunk(2, dim=-1)
    y = F.grouped_mm(F.silu(gate) * up, down_EDF.transpose(1, 2), offs=ends_E)
    y = y * weights_TK.flatten()[order].unsqueeze(1).to(y.dtype)
    return y[order.argsort()].unflatten(0, ids_TK.shape).sum(1)


def liger_connection(steps: int, eps: float) -> Callable[..., tuple[Tensor, Tensor]]:
    """Liger's mHC: (x, y, weight, scale, bias) -> (u, x'). Its Sinkhorn ends on columns, ours on rows."""
    from liger_kernel.transformers.functional import liger_mhc_coeffs, liger_mhc_post_res, liger_mhc_pre

    def connect(x: Tensor, y: Tensor, weight: Tensor, scale: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        h_pre, h_post, h_res = liger_mhc_coeffs(x, weight.to(x.dtype).t(), bias, *scale, tmax=steps, rms_eps=eps)
        return liger_mhc_pre(x, h_pre), liger_mhc_post_res(x, y, h_post, h_res)

    return connect


def demo_of(module: Engram, hasher: NgramHash, *, sparse: bool) -> DemoEngram:
    """The demo's module with the weights of ours; it shares the table. `sparse` spares it a gradient of all rows."""
    layer, (streams, width) = module.layer_id, module.q_weight.shape
    with torch.device("meta"):
        demo = DemoEngram(
            primes=hasher.vocab_sizes[layer],
            multipliers=np.array(hasher.multipliers[layer]),
            head_dim=module.config.head_dim,
            hidden_size=width,
            hc_mult=streams,
            pad_id=hasher.pad_id,
        )
    assert module.conv is not None
    weights, biases = module.wkv.weight.split(width), module.wkv.bias.split(width)
    state = {
        "embedding.weight": module.embed.weight,
        "offsets": torch.tensor(hasher.offsets[layer], device=module.wkv.weight.device),
        "value_proj.weight": weights[-1],
        "value_proj.bias": biases[-1],
        "short_conv.conv.weight": module.conv.weight,
    }
    for stream in range(streams):
        state |= {
            f"key_projs.{stream}.weight": weights[stream],
            f"key_projs.{stream}.bias": biases[stream],
            f"query_norms.{stream}.weight": module.q_weight[stream],
            f"key_norms.{stream}.weight": module.k_weight[stream],
            f"short_conv.norms.{stream}.weight": module.conv_norm[stream],
        }
    demo.load_state_dict({name: tensor.detach() for name, tensor in state.items()}, assign=True)
    demo.embedding.sparse = sparse
    return demo
