"""One number of a lens curve: the depth where its divergence has fallen to a threshold, and the area below it.

Legend: P places 0..L of a curve, `...` draws of documents or nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from eval.bootstrap import Array, means, resampled_means
from eval.over_runs import Sample

if TYPE_CHECKING:
    from eval.lens.logit_lens import Lens

# Above this, in nats, a place is not near the model's own prediction.
TAU = 1.0
SCALARS = {
    "depth_tau": "first place 0..L whose divergence is at most tau",
    "depth_half": "first place whose divergence is at most half of the embedding's",
    "crossing_half": "the same, interpolated between places",
    "area": "area below the divergence, as shares of the embedding's and of the depth",
}


def first_depth(curves: npt.ArrayLike, tau: npt.ArrayLike) -> Array:
    """The first index along the last axis [..., P] where the curve is at most tau [...]; NaN where it never is."""
    below = np.asarray(curves) <= np.asarray(tau)[..., None]
    return np.where(below.any(-1), below.argmax(-1), np.nan)


def crossing(curves: npt.ArrayLike, tau: npt.ArrayLike) -> Array:
    """Where the curve, drawn with straight lines between its places, first falls to tau."""
    curves, tau = np.asarray(curves, np.float64), np.asarray(tau, np.float64)
    after = first_depth(curves, tau)
    index = np.nan_to_num(after).astype(np.int64)
    high = np.take_along_axis(curves, np.maximum(index - 1, 0)[..., None], -1)[..., 0]
    low = np.take_along_axis(curves, index[..., None], -1)[..., 0]
    falls = high > low
    step = np.where(falls, (high - tau) / np.where(falls, high - low, 1), 1)
    return np.where(index == 0, after, after - 1 + step)


def area(curves: npt.ArrayLike) -> Array:
    """Integral of curve / curve_0 over depth / L, by trapezoids: about 1 for what falls at the very end."""
    curves = np.asarray(curves, np.float64)
    return np.asarray(np.trapezoid(curves / curves[..., :1], axis=-1) / (curves.shape[-1] - 1))


def scalars(curves: npt.ArrayLike, tau: float = TAU) -> Array:
    """All of SCALARS in their order, float64 [..., 4], of curves [..., P]."""
    curves = np.asarray(curves, np.float64)
    half = curves[..., 0] / 2
    absolute = np.full_like(half, tau)
    found = (first_depth(curves, absolute), first_depth(curves, half), crossing(curves, half), area(curves))
    return np.stack(found, -1)


def curve_sample(lens: Lens, draws: int = 2000, seed: int = 0) -> Sample:
    """Means over tokens of all places and metrics, float64 [P, M], with their draws of documents."""
    counts = lens.counts
    return Sample(means(lens.sums, counts), resampled_means(lens.sums, counts, draws, seed))


def normalised(sample: Sample, metrics: list[int]) -> Sample:
    """Those metrics [P, M] as shares of the first place's, drawn together with it."""
    value, draws = sample.value[:, metrics], sample.draws[:, :, metrics]
    return Sample(value / value[:1], draws / draws[:, :1])
