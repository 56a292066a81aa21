"""What the contests of the kernels compute on: sizes for each device, and ids as skewed as those of text."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from benchmarks.passes import BACKWARD, BOTH, FORWARD
from engram.kernels.engram_lookup import advise_huge_pages


@dataclass(frozen=True)
class Sizes:
    """Memory as the targets name it; the backbone's operations in the shapes of `config`."""

    config: str
    dtype: torch.dtype
    # Batch and length of token ids.
    hash_tokens: tuple[int, int] = (16, 4096)
    rows_per_head: int = 646_400
    gather_ids: int = 1_048_576
    gather_rows: int = 10_000_000
    gather_dims: tuple[int, ...] = (64, 80)
    # Shares of distinct ids, as in the look-ups of real text.
    gather_unique: float = 0.70
    update_ids: int = 262_144
    update_rows: int = 1_000_000
    update_dim: int = 64
    update_unique: float = 0.59
    # The memory module: batch and length, hidden size, streams, width of a row.
    module_tokens: tuple[int, int] = (2, 4096)
    module_hidden: int = 512
    streams: int = 4
    module_dim: int = 64
    # Batch and length in front of the backbone's operations, and of the head's loss.
    model_tokens: tuple[int, int] = (16, 256)
    attention_tokens: tuple[int, int] = (16, 256)
    loss_tokens: int = 4096
    block_tokens: tuple[int, int] = (16, 256)
    # Of the plain copy whose bandwidth others are measured by.
    copy_bytes: int = 2**27
    # Passes of the gate and of the connections that are measured on their own.
    passes: tuple[str, ...] = (BOTH,)


CPU = Sizes(config="configs/tiny_engram.yaml", dtype=torch.bfloat16)
# One memory layer of Engram-27B over 32,768 tokens.
CUDA = Sizes(
    config="configs/paper/engram_27b.yaml",
    dtype=torch.bfloat16,
    hash_tokens=(8, 4096),
    rows_per_head=2_262_400,
    gather_ids=524_288,
    gather_rows=36_000_000,
    gather_dims=(80,),
    gather_unique=0.63,
    update_ids=524_288,
    update_rows=4_000_000,
    update_dim=80,
    update_unique=0.63,
    module_tokens=(8, 4096),
    module_hidden=2560,
    module_dim=80,
    model_tokens=(8, 4096),
    # The reference holds every score several times.
    attention_tokens=(1, 4096),
    loss_tokens=8192,
    block_tokens=(4, 4096),
    passes=(FORWARD, BACKWARD, BOTH),
    copy_bytes=2**30,
)


def zipf_ids(count: int, rows: int, unique_share: float, generator: torch.Generator) -> Tensor:
    """int64 [count] in [0, rows), drawn with p(rank) ~ rank^-s where s makes about `unique_share` of them distinct."""
    exponent = zipf_exponent(count, rows, unique_share)
    uniform = torch.rand(count, dtype=torch.float64, generator=generator, device=generator.device)
    ranks = (rows * uniform ** (1 / (1 - exponent))).long().clamp_(max=rows - 1)
    # Hashing scatters frequent rows over the table. The multiplier is a prime above any number of rows here.
    return ranks * 2_147_483_647 % rows


def zipf_exponent(count: int, rows: int, unique_share: float) -> float:
    """s in [0, 0.99] with E[distinct] = sum_rank 1 - exp(-count p(rank)) = unique_share count; 0 is uniform."""
    # Ranks as a share of all rows: the head is steep, so its points lie closer together.
    edges = np.linspace(0, 1, 20_001) ** 4
    middle, width = (edges[1:] + edges[:-1]) / 2, np.diff(edges)
    low, high = 0.0, 0.99
    for _ in range(40):
        s = (low + high) / 2
        density = (1 - s) * middle**-s
        distinct = rows * float(np.sum(width * -np.expm1(-count / rows * density)))
        low, high = (s, high) if distinct > unique_share * count else (low, s)
    return low


def tiled_rows(rows: int, dim: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """A large table [rows, dim] from one random block, whose prime length no other period of the ids meets."""
    block = torch.randn(min(rows, 65_537), dim, generator=generator, device=generator.device).to(dtype)
    table = large_empty(rows, dim, dtype, generator.device)
    for start in range(0, rows, len(block)):
        part = table[start : start + len(block)]
        part.copy_(block[: len(part)])
    return table


def large_empty(rows: int, dim: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """On huge pages where there are any, for everybody alike."""
    tensor = torch.empty(rows, dim, dtype=dtype, device=device)
    advise_huge_pages(tensor)
    return tensor


def eighths(*shape: int, generator: torch.Generator) -> Tensor:
    """float32 gradients in multiples of 1/8: their sums are exact, so that no order of summation can be wrong."""
    return torch.randint(-16, 17, shape, generator=generator, device=generator.device) / 8


def zipf_tokens(shape: tuple[int, int], vocabulary: int, generator: torch.Generator) -> Tensor:
    """int64 token ids with p(rank) ~ 1 / rank."""
    uniform = torch.rand(shape, dtype=torch.float64, generator=generator, device=generator.device)
    return (vocabulary**uniform).long().clamp_(max=vocabulary - 1)


def normal(*shape: int, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=generator, device=generator.device).to(dtype)


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
