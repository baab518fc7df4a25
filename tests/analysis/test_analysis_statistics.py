"""Correlated series with closed-form autocorrelation: AR(1) and the two-state Markov chain."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.signal import lfilter

from openmm_bg.analysis import (
    autocorrelation,
    block_bootstrap,
    block_count,
    block_error,
    block_means,
    effective_sample_size,
    standard_error,
    statistical_inefficiency,
)
from openmm_bg.analysis.statistics import kish_size, normalized_weights
from openmm_bg.errors import InputError


def autoregressive(rng, n, a):
    """x' = a x + noise with unit variance: rho(k) = a^k, g = (1 + a) / (1 - a)."""
    noise = rng.normal(size=n) * math.sqrt(1 - a * a)
    noise[0] = rng.normal()
    return lfilter([1.0], [1.0, -a], noise)


def two_state(rng, n, leave, enter):
    """An indicator that leaves 1 with one probability and enters it with another: rho(k) = (1 - leave - enter)^k."""
    state, out, u = rng.random() < enter / (leave + enter), np.empty(n), rng.random(n)
    for i in range(n):
        state = u[i] >= leave if state else u[i] < enter
        out[i] = state
    return out


@pytest.mark.parametrize("a", [0.0, 0.5, 0.9, 0.98])
def test_autoregressive_process(a):
    x = autoregressive(np.random.default_rng(1), 200_000, a)
    exact = (1 + a) / (1 - a)
    assert statistical_inefficiency(x) == pytest.approx(exact, rel=0.15)
    assert effective_sample_size(x) == pytest.approx(len(x) / exact, rel=0.15)
    np.testing.assert_allclose(autocorrelation(x)[:20], a ** np.arange(20), atol=0.06)


def test_autocorrelation_against_the_double_sum():
    x = np.random.default_rng(0).normal(size=50).cumsum()
    y = x - x.mean()
    direct = np.array([np.sum(y[: 50 - k] * y[k:]) for k in range(50)]) / np.sum(y * y)
    np.testing.assert_allclose(autocorrelation(x), direct, atol=1e-12)


def test_two_state_chain():
    leave, enter = 0.05, 0.01
    x = two_state(np.random.default_rng(2), 100_000, leave, enter)
    exact = (2 - leave - enter) / (leave + enter)
    assert statistical_inefficiency(x) == pytest.approx(exact, rel=0.2)


def test_a_series_without_a_transition_claims_nothing():
    assert statistical_inefficiency(np.ones(100)) == math.inf
    assert effective_sample_size(np.zeros(100)) == 0.0
    assert math.isnan(standard_error(np.zeros(100)))


def test_chains_that_disagree_are_correlated():
    rng = np.random.default_rng(3)
    same = rng.normal(size=(4, 2000))
    apart = same + np.array([[-3.0], [3.0], [-3.0], [3.0]])
    assert statistical_inefficiency(same) < 1.3
    assert statistical_inefficiency(apart) > 500


def test_anticorrelation_is_not_credited():
    assert statistical_inefficiency(np.tile([0.0, 1.0], 50)) == 1.0


def test_errors_match_the_scatter_of_independent_runs():
    rng, a, n = np.random.default_rng(4), 0.9, 4000
    runs = [autoregressive(rng, n, a) for _ in range(200)]
    scatter = np.std([x.mean() for x in runs])
    assert scatter == pytest.approx(math.sqrt((1 + a) / (1 - a) / n), rel=0.15)
    for error in (
        lambda x: standard_error(x),
        lambda x: block_error(x, block_count(x)),
        lambda x: block_bootstrap(x, block_count(x), rng).std(),
    ):
        assert np.mean([error(x) for x in runs[:50]]) == pytest.approx(scatter, rel=0.2)


def test_weighted_errors_match_the_scatter_of_independent_runs():
    rng, n = np.random.default_rng(5), 2000

    def run():
        x = rng.normal(size=n)
        w = np.exp(0.7 * x)  # to N(0.7, 1)
        return x, w

    runs = [run() for _ in range(300)]
    means = [np.average(x, weights=w) for x, w in runs]
    assert np.mean(means) == pytest.approx(0.7, abs=0.01)
    for error in (lambda x, w: standard_error(x, w), lambda x, w: block_error(x, 50, w)):
        assert np.mean([error(x, w) for x, w in runs[:50]]) == pytest.approx(np.std(means), rel=0.15)


def test_blocks():
    x = np.arange(10.0)
    np.testing.assert_allclose(block_means(x, 2), [2.0, 7.0])
    np.testing.assert_allclose(block_means(x, 2, np.r_[np.zeros(5), 1, 0, 0, 0, 1]), [np.nan, 7.0])
    assert block_count(np.random.default_rng(0).normal(size=1000)) == 100
    assert block_count(np.arange(1000.0)) == 4  # slower than the run: the fewest
    with pytest.raises(InputError, match="blocks"):
        block_means(x, 11)


def test_weights_are_checked():
    assert kish_size([2.0, 2.0, 0.0]) == pytest.approx(2.0)
    assert normalized_weights([1e308, 1e308], 2).tolist() == [0.5, 0.5]
    for bad in ([1.0], [1.0, -1.0], [1.0, np.nan], [0.0, 0.0]):
        with pytest.raises(InputError):
            normalized_weights(bad, 2)
    with pytest.raises(InputError, match="not finite"):
        statistical_inefficiency([0.0, np.nan, 1.0])
