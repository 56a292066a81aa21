"""Rotary position embedding over interleaved pairs, with YaRN as DeepSeek-V3 extends it.

Legend: T positions, R rotated dimensions, P = R / 2 pairs.
"""

import math

import torch
from torch import Tensor

from engram.config import AttentionConfig, YarnConfig


def inverse_frequencies(config: AttentionConfig) -> Tensor:
    """Angular step of each pair, float32 [R / 2]: theta^(-2i/R), interpolated by YaRN where its wavelength is long."""
    dim = config.qk_rope_head_dim
    plain = config.rope_theta ** -(torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    if config.yarn is None:
        return plain
    # Pairs that turn more than beta_fast times over the original context keep their speed,
    # those below beta_slow are slowed by the factor, and a ramp joins the two.
    low = _pair_with_turns(config.yarn.beta_fast, config, config.yarn)
    high = _pair_with_turns(config.yarn.beta_slow, config, config.yarn)
    low, high = max(math.floor(low), 0), min(math.ceil(high), dim - 1)
    ramp = (torch.arange(dim // 2, dtype=torch.float32) - low) / max(high - low, 0.001)
    keep = 1 - ramp.clamp(0, 1)
    return plain / config.yarn.factor * (1 - keep) + plain * keep


def _pair_with_turns(turns: float, config: AttentionConfig, yarn: YarnConfig) -> float:
    wavelengths = yarn.original_max_position / (turns * 2 * math.pi)
    return config.qk_rope_head_dim * math.log(wavelengths) / (2 * math.log(config.rope_theta))


def _temperature(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0


def table_scale(config: AttentionConfig) -> float:
    """Factor of the cosine and sine tables under YaRN."""
    if config.yarn is None:
        return 1.0
    yarn = config.yarn
    return _temperature(yarn.factor, yarn.mscale) / _temperature(yarn.factor, yarn.mscale_all_dim)


def softmax_scale(config: AttentionConfig) -> float:
    """1 / sqrt(head dim), times YaRN's squared temperature."""
    scale = config.qk_head_dim**-0.5
    return scale if config.yarn is None else scale * _temperature(config.yarn.factor, config.yarn.mscale_all_dim) ** 2


def rope_tables(frequencies_P: Tensor, num_positions: int, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines [T, P] of positions 0 .. T-1."""
    angles_TP = torch.arange(num_positions, device=frequencies_P.device).unsqueeze(1) * frequencies_P
    return (angles_TP.cos() * scale).to(dtype), (angles_TP.sin() * scale).to(dtype)


def apply_rope(x: Tensor, cos_TP: Tensor, sin_TP: Tensor) -> Tensor:
    """Rotate pairs (2i, 2i+1) of x [B, T, H, R] by position."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos_TP.unsqueeze(1), sin_TP.unsqueeze(1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)
