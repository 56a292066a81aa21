import math

import torch

from engram.config import AttentionConfig
from engram.model.rope import apply_rope, inverse_frequencies, rope_tables, softmax_scale, table_scale


def _config(rope_dim: int = 8, **yarn: float) -> AttentionConfig:
    return AttentionConfig(
        num_heads=2,
        kv_lora_rank=8,
        qk_nope_head_dim=8,
        qk_rope_head_dim=rope_dim,
        v_head_dim=8,
        yarn=yarn or None,
    )


def test_rotation_equals_complex_multiplication() -> None:
    config = _config(6)
    x = torch.randn(2, 5, 3, 6, dtype=torch.float64)
    cos, sin = rope_tables(inverse_frequencies(config), 5, 1.0, torch.float64)
    actual = apply_rope(x, cos, sin)
    for t in range(5):
        for pair in range(3):
            angle = t * 10_000.0 ** (-2 * pair / 6)
            z = torch.complex(x[:, t, :, 2 * pair], x[:, t, :, 2 * pair + 1]) * complex(
                math.cos(angle), math.sin(angle)
            )
            torch.testing.assert_close(actual[:, t, :, 2 * pair], z.real, atol=1e-6, rtol=1e-6)
            torch.testing.assert_close(actual[:, t, :, 2 * pair + 1], z.imag, atol=1e-6, rtol=1e-6)


def test_scores_depend_on_distance_alone() -> None:
    cos, sin = rope_tables(inverse_frequencies(_config()), 40, 1.0, torch.float64)
    q, k = torch.randn(2, 8, dtype=torch.float64)
    rotated_q = apply_rope(q.expand(1, 40, 1, 8), cos, sin)[0, :, 0]
    rotated_k = apply_rope(k.expand(1, 40, 1, 8), cos, sin)[0, :, 0]
    scores = rotated_q @ rotated_k.T
    for distance in (0, 3, 17):
        diagonal = scores.diagonal(-distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-4, rtol=0)


def test_yarn_keeps_fast_pairs_and_slows_slow_ones() -> None:
    plain = inverse_frequencies(_config(64))
    config = _config(64, factor=10.0, original_max_position=4096)
    extended = inverse_frequencies(config)
    torch.testing.assert_close(extended[0], plain[0])
    torch.testing.assert_close(extended[-1], plain[-1] / 10)
    ratio = plain / extended
    assert (ratio.diff() >= -1e-6).all() and ratio.min() >= 1 and ratio.max() <= 10.0001
    assert table_scale(config) == 1.0
    assert math.isclose(softmax_scale(config), (8 + 64) ** -0.5 * (0.1 * math.log(10) + 1) ** 2)
