"""Metrics on examples small enough to solve by hand."""

import math

import numpy as np
import pytest

from fallow.metrics import perplexity, ppl_change_percent, standard_error


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
