"""Planted curves: where the two-term fit puts their minima, and where the parabola does."""

import numpy as np
import pytest
from scipy.optimize import brentq

from engram.sweep import paper
from engram.sweep.u_curve import Array, Family, TwoTerm, fit_parabola

WIDE = np.array([0.2, 0.4, 0.6, 0.7, 0.8, 0.9, 1.0])
STUDY = np.array([0.11, 0.21, 0.36, 0.5, 0.61, 0.75, 0.86, 0.93, 1.0])


def two_term(rho: Array, argmin: float, depth: float, a: float, b: float, p0: float, m0: float) -> Array:
    """The sum of two powers with its minimum 1.7109 at `argmin`, `depth` below its value at 1."""
    ratio = a * (p0 + argmin) ** (-a - 1) / (b * (m0 + 1 - argmin) ** (-b - 1))
    at = np.append(rho, [argmin, 1.0])
    shape = (p0 + at) ** -a + ratio * (m0 + 1 - at) ** -b
    return np.asarray(1.7109 + depth * (shape[:-2] - shape[-2]) / (shape[-1] - shape[-2]))


def fitted(rho: Array, loss: Array) -> TwoTerm:
    return Family(rho).polished(loss)


def papers_u(rho: Array) -> Array:
    """The two-term curve through the paper's 1.7248 at 1 and at 0.4, with its minimum 1.7109 at 0.79."""

    def miss(a: float) -> float:
        return float(two_term(np.array([0.4]), 0.79, 0.0139, a, 1.0, 0.2, 0.1)[0]) - 1.7248

    return two_term(rho, 0.79, 0.0139, float(brentq(miss, 0.05, 5)), 1.0, 0.2, 0.1)


def exponential(rho: Array) -> Array:
    """Another lopsided curve through the same points, of a kind that the fit does not know."""
    s = brentq(lambda s: np.exp(0.21 * s) - 0.21 * s - np.exp(-0.39 * s) - 0.39 * s, 0.5, 30)
    shape = np.exp(s * (rho - 0.79)) - s * (rho - 0.79) - 1
    return np.asarray(1.7109 + 0.0139 * shape / (np.exp(0.21 * s) - 0.21 * s - 1))


def test_the_papers_u_where_a_parabola_fails() -> None:
    loss = papers_u(WIDE)
    assert papers_u(np.array([0.4, 0.8, 1.0])) == pytest.approx([1.7248, 1.7109, 1.7248], abs=1e-4)
    assert fitted(WIDE, loss).argmin(0.2, 1) == pytest.approx(0.79, abs=0.015)
    assert fit_parabola(WIDE, loss).argmin(0.2, 1) == pytest.approx(0.71, abs=0.01)


def test_a_curve_of_another_kind() -> None:
    loss = exponential(WIDE)
    fit, parabola = fitted(WIDE, loss), fit_parabola(WIDE, loss)
    assert fit.argmin(0.2, 1) == pytest.approx(0.79, abs=0.03)
    assert parabola.argmin(0.2, 1) == pytest.approx(0.70, abs=0.02)
    assert fit.rmse < 0.4 * parabola.rmse


@pytest.mark.parametrize("grid", [WIDE, STUDY], ids=["seven", "nine"])
@pytest.mark.parametrize(
    ("argmin", "depth", "shape"),
    [
        (0.3, 0.1, (0.3, 0.6, 0.1, 0.02)),
        (0.5, 0.05, (0.5, 0.5, 0.05, 0.05)),
        (0.66, 0.02, (0.5, 0.2, 0.1, 0.01)),
        (0.79, 0.0139, (0.6, 0.3, 0.3, 0.02)),
    ],
)
def test_planted_minima(grid: Array, argmin: float, depth: float, shape: tuple[float, float, float, float]) -> None:
    """Two of the curves have another p0 than the fit."""
    loss = two_term(grid, argmin, depth, *shape)
    fit = fitted(grid, loss)
    assert fit.argmin(grid[0], 1) == pytest.approx(argmin, abs=0.015)
    assert fit.predict(argmin) == pytest.approx(1.7109, abs=0.01 * depth)
    assert fit.experts >= 0 and fit.memory >= 0


def test_parameters_of_its_own_kind_are_recovered() -> None:
    grid = np.linspace(0.05, 1, 20)
    fit = fitted(grid, 2.0 + 0.08 * (0.1 + grid) ** -0.7 + 0.05 * (0.03 + 1 - grid) ** -0.4)
    assert (fit.floor, fit.experts, fit.memory) == pytest.approx((2.0, 0.08, 0.05), abs=0.01)
    assert (fit.a, fit.b, fit.m0) == pytest.approx((0.7, 0.4, 0.03), rel=0.1)
    assert fit.rmse < 1e-5


@pytest.mark.parametrize("grid", [WIDE, STUDY], ids=["seven", "nine"])
def test_monotone_curves_have_their_minimum_at_the_end(grid: Array) -> None:
    falls = fitted(grid, 1.7 + 0.05 * (0.1 + grid) ** -0.5)
    rises = fitted(grid, 1.7 + 0.05 * (1.1 - grid) ** -0.5)
    assert falls.argmin(grid[0], 1) == 1 and rises.argmin(grid[0], 1) == grid[0]
    assert falls.memory < 1e-6 and rises.experts < 1e-6
    assert fitted(grid, 3 + 0.1 * grid).argmin(grid[0], 1) == grid[0]


def test_equal_losses_are_flat() -> None:
    fit = fitted(WIDE, np.full(7, 3.2))
    assert fit.predict(WIDE) == pytest.approx(np.full(7, 3.2)) and fit.rmse < 1e-12


@pytest.mark.parametrize(("budget", "place", "loss"), [("6e20", 0.738, 1.7107), ("2e20", 0.726, 1.8162)])
def test_the_papers_points(budget: str, place: float, loss: float) -> None:
    """Parabolas: 73.8 % and 72.6 %. The two-term fit misses the points by less than half of what they do."""
    rho, losses = paper.allocation()[budget]
    fit, parabola = fitted(rho, losses), fit_parabola(rho, losses)
    vertex = parabola.argmin(rho[0], 1)
    assert vertex == pytest.approx(place, abs=0.001) and parabola.predict(vertex) == pytest.approx(loss, abs=1e-4)
    assert 0.78 < fit.argmin(rho[0], 1) < 0.86 and fit.rmse < 0.4 * parabola.rmse


def test_many_curves_at_once_are_each_curve_alone() -> None:
    """The grid's best curves stay close to the refined fits."""
    rng = np.random.default_rng(1)
    losses, at = papers_u(STUDY) + rng.normal(0, 0.001, (20, 9)), np.linspace(0.11, 1, 50)
    together = Family(STUDY).curves(losses, at)
    for loss, curve in zip(losses, together, strict=True):
        assert Family(STUDY).curves(loss[None], at)[0] == pytest.approx(curve, abs=1e-12)
        assert np.sqrt(np.mean((curve - fitted(STUDY, loss).predict(at)) ** 2)) < 4e-4


def test_parabolas_without_a_minimum_end_at_an_end() -> None:
    assert fit_parabola(WIDE, -((WIDE - 0.5) ** 2)).argmin(0.2, 1) == 1
    assert fit_parabola(WIDE, (WIDE + 1) ** 2).argmin(0.2, 1) == 0.2
