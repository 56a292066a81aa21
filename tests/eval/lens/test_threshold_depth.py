"""Numbers of a lens curve by hand, and that planted depth moves them by exactly its own amount."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from eval.lens.logit_lens import METRICS, Lens, measure
from eval.lens.threshold_depth import SCALARS, area, crossing, curve_sample, first_depth, normalised, scalars
from eval.over_runs import difference, over_runs
from tests.eval.planted import documents, lively, plant


def test_by_hand() -> None:
    curve = np.array([4.0, 3.0, 1.0, 2.0, 0.0])
    assert first_depth(curve, 3.0) == 1 and first_depth(curve, 0.5) == 4 and first_depth(curve, 9.0) == 0
    assert math.isnan(first_depth(curve, -1.0)) and math.isnan(crossing(curve, -1.0))
    # Half of the first is 2, halfway between places 1 and 2.
    assert crossing(curve, 2.0) == 1.5 and crossing(curve, 3.0) == 1 and crossing(curve, 4.0) == 0
    assert area(curve) == (0.5 * 4 + 3 + 1 + 2) / 4 / 4
    assert area(np.array([2.0, 2.0, 2.0])) == 1
    np.testing.assert_allclose(scalars(curve, tau=1.0), [2, 2, 1.5, area(curve)])
    assert len(SCALARS) == 4


def test_all_draws_at_once_equal_one_by_one() -> None:
    curves = np.sort(np.random.default_rng(0).exponential(size=(20, 3, 6)), axis=-1)[..., ::-1]
    together = scalars(curves, tau=0.7)
    assert together.shape == (20, 3, 4)
    for place in np.ndindex(20, 3):
        np.testing.assert_allclose(together[place], scalars(curves[place], tau=0.7))


def test_curve_and_its_share_of_the_embedding() -> None:
    rng = np.random.default_rng(1)
    counts = rng.integers(2, 9, size=12)
    lens = Lens([], rng.exponential(size=(12, 4, 6)) * counts[:, None, None], counts)
    curve = curve_sample(lens, draws=30, seed=2)
    np.testing.assert_allclose(curve.value, lens.sums.sum(0) / counts.sum())
    share = normalised(curve, [0, 1])
    np.testing.assert_allclose(share.value, curve.value[:, :2] / curve.value[0, :2])
    # Each draw is divided by its own embedding: point 0 has no spread.
    np.testing.assert_allclose(share.draws[:, 2], curve.draws[:, 2, :2] / curve.draws[:, 0, :2])
    assert (over_runs([share]).low[0] == 1).all()


@pytest.mark.parametrize("extra", [1, 2, 3])
def test_extra_identity_blocks_shift_the_threshold_depth(extra: int) -> None:
    """Blocks that do nothing, put before all others, move what follows deeper by their number, in every draw."""
    texts = documents((30, 20, 25, 40))
    shallow = lively(num_layers=3, memory=None, moe=None)
    deep = lively(num_layers=3 + extra, memory=None, moe=None)
    for name in ("embed", "readout", "norm", "head"):
        getattr(deep, name).load_state_dict(getattr(shallow, name).state_dict())
    deep.blocks = nn.ModuleList([*deep.blocks[:extra], *shallow.blocks])
    for layer in range(extra):
        plant(deep, layer, lambda x: x)
    kl = METRICS.index("kl_layer_to_final")
    curves = [curve_sample(measure(model, texts), draws=200) for model in (shallow, deep)]
    below, above = sorted(curves[0].value[1:3, kl])[0], curves[0].value[0, kl]
    tau = (below + above) / 2
    found = [type(curve)(scalars(curve.value[:, kl], tau), scalars(curve.draws[:, :, kl], tau)) for curve in curves]
    assert np.isfinite(found[0].draws).all() and 1 <= found[0].value[0] <= 3
    shift = difference([found[1]], [found[0]])
    for ends in (shift.mean, shift.low, shift.high):
        np.testing.assert_allclose(ends[:3], extra, atol=1e-6)
    torch.testing.assert_close(torch.tensor(curves[1].value[extra:]), torch.tensor(curves[0].value))
