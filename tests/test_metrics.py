"""Metrics on examples small enough to solve by hand."""

import math
from collections.abc import Callable

import numpy as np
import pytest

from fallow.common.metrics import (
    CORRELATED_FROM,
    energy_recall,
    perplexity,
    ppl_change_percent,
    standard_error,
    window_error,
)


def test_perplexity_of_a_uniform_guess() -> None:
    assert perplexity(np.full(3, math.log(8))) == pytest.approx((8, 0))


def test_perplexity_is_the_exponential_of_the_mean_loss() -> None:
    ppl, error = perplexity(np.array([1.0, 3.0]))
    assert ppl == pytest.approx(math.e**2)
    assert error == pytest.approx(math.e**2 * 1.0)  # sd sqrt(2), n 2


def test_one_window_has_no_error() -> None:
    assert perplexity(np.array([1.0]))[1] is None
    assert standard_error(np.array([4.0])) is None


def test_paired_error_ignores_what_both_sides_share() -> None:
    dense = np.array([1.0, 5.0, 3.0])
    change, error = ppl_change_percent(dense + math.log(1.1), dense)
    assert change == pytest.approx(10)
    assert error == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("correlation", [0.0, 0.5])
def test_errors_of_windows_that_are_like_their_neighbours(correlation: float) -> None:
    """Two errors hold the true mean in about 95 of 100 texts of 40 windows; plain ones do not."""
    rng = np.random.default_rng(0)
    series = rng.standard_normal((2000, 60))
    for i in range(1, series.shape[1]):
        series[:, i] += correlation * series[:, i - 1]
    texts = series[:, 20:]

    def held(error: Callable[[np.ndarray], float | None]) -> float:
        return float(np.mean([abs(t.mean()) < 2 * (error(t) or 0) for t in texts]))

    assert 0.90 < held(window_error) < 0.98
    assert (held(standard_error) < 0.8) == (correlation > 0)


def test_few_windows_cannot_tell_that_they_are_alike() -> None:
    rising = np.arange(CORRELATED_FROM, dtype=np.float64)
    assert window_error(rising[:-1]) == standard_error(rising[:-1])
    error = standard_error(rising)
    assert error is not None
    assert window_error(rising) > 2 * error
    assert window_error(np.ones(CORRELATED_FROM)) == 0


def test_energy_recall_by_hand() -> None:
    """Σ over x and c of energy over Σ over x, by token; silent ones say nothing."""
    energy = np.array([[9.0, 4.0, 1.0, 2.0], [9e6, 4e6, 1e6, 2e6], [0.0, 0.0, 0.0, 0.0]])
    right = np.array([[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0]], dtype=bool)
    chosen = np.array([[1, 0, 1, 1], [0, 1, 1, 1], [1, 1, 1, 1]], dtype=bool)
    np.testing.assert_allclose(energy_recall(energy, right, chosen), [9 / 13, 4 / 13])
    np.testing.assert_array_equal(energy_recall(energy, right, right), [1, 1])
    assert len(energy_recall(energy[2:], right[2:], chosen[2:])) == 0


def test_energy_recall_of_random_neurons_is_their_share() -> None:
    """Whatever one token of a thousand times the size does: an attention sink."""
    rng = np.random.default_rng(0)
    energy = rng.standard_normal((2000, 64)).astype(np.float32) ** 2
    energy[0] *= 1e6
    chosen, right = (
        order.argsort(axis=1) < 32
        for order in (rng.random(energy.shape), (-energy).argsort(axis=1))
    )
    np.testing.assert_array_equal(right.sum(axis=1), 32)
    assert energy_recall(energy, right, chosen).mean() == pytest.approx(0.5, abs=0.01)
