"""Effective size as everywhere else in the package, and the shape of a tail against samples whose shape is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import genpareto

from openmm_bg.analysis.weights import pareto_shape, pareto_smooth, weight_size
from openmm_bg.errors import InputError
from openmm_bg.sampling import effective_sample_size, log_normalizer


@pytest.mark.parametrize("shape", [-0.2, 0.2, 0.5, 0.7, 1.0, 1.5])
def test_the_shape_of_generalised_pareto_samples_is_found(shape):
    rng = np.random.default_rng(3)
    found = [
        pareto_shape(np.log(genpareto.rvs(shape, scale=2.0, size=10_000, random_state=rng) + 1.0)) for _ in range(30)
    ]
    k, error = np.array([f.value for f in found]), np.array([f.error for f in found])
    # ten weights of 310 pull towards 1/2
    expected = (300 * shape + 10 * 0.5) / 310
    assert abs(k.mean() - expected) < 4 * k.std() / math.sqrt(30) + 0.02
    assert 0.7 < k.std() / error.mean() < 1.4


def test_gaussian_log_weights_have_heavier_tails_the_wider_they_are():
    normal = np.random.default_rng(0).standard_normal(100_000)
    shapes = [pareto_shape(width * normal).value for width in (0.2, 0.5, 1.0, 3.0)]
    assert shapes == sorted(shapes) and shapes[0] < 0.3 < 0.7 < shapes[-1]


def test_a_constant_and_weights_of_zero_change_nothing():
    rng = np.random.default_rng(1)
    log_w = -0.6 * np.log(rng.random(5000))
    k = pareto_shape(log_w).value
    assert pareto_shape(log_w - 1e4).value == pytest.approx(k, abs=1e-9)
    assert pareto_shape(rng.permutation(log_w)).value == k
    lost = np.concatenate([np.sort(log_w)[1000:], np.full(1000, -np.inf)])
    assert pareto_shape(lost).value == k


def test_what_has_no_tail_has_no_shape():
    for log_w in (np.zeros(1000), np.arange(15.0), np.full(1000, -np.inf), np.array([])):
        assert math.isnan(pareto_shape(log_w).value) and math.isnan(pareto_shape(log_w).error)
    for bad in (np.array([0.0, np.nan]), np.array([np.inf, 0.0]), np.zeros((3, 3))):
        with pytest.raises(InputError, match="one row of numbers"):
            pareto_shape(bad)


def test_the_size_is_that_of_the_sampling_room():
    rng = np.random.default_rng(9)
    for n in (2, 30, 30_000):
        log_w = 700 + 1.5 * rng.standard_normal(n)
        log_w[: n // 10] = -np.inf
        found, expected = weight_size(log_w), effective_sample_size(log_w)
        assert (found.share, found.clipped) == pytest.approx((expected.fraction, expected.clipped))
        assert found.log_mean == pytest.approx(log_normalizer(log_w).value)
    for nothing in ([], [-np.inf, -np.inf]):
        with pytest.raises(InputError, match="All weights are zero"):
            weight_size(nothing)


def test_smoothed_weights_keep_their_order_and_all_but_the_tail():
    log_w = 0.6 * np.random.default_rng(3).exponential(size=5000)
    log_w[7] = -np.inf
    smooth, shape = pareto_smooth(log_w)
    assert shape == pareto_shape(log_w)
    order = np.argsort(log_w)
    assert (np.diff(smooth[order]) >= 0).all() and smooth.max() <= log_w.max()
    changed = (smooth != log_w) | (log_w == log_w.max())  # the largest keeps its value as a cap
    assert 100 < changed.sum() <= 213 and log_w[changed].min() > log_w[~changed].max()  # 3 sqrt(5000)
    assert smooth[7] == -np.inf


def test_smoothing_lowers_the_error_of_a_heavy_tail():
    rng = np.random.default_rng(4)
    raw, smooth = [], []
    for _ in range(400):
        log_w = 0.65 * rng.exponential(size=1000)  # weights of infinite variance, with mean 1 / (1 - 0.65)
        raw.append(np.exp(log_w).mean())
        smooth.append(np.exp(pareto_smooth(log_w).log_weights).mean())
    exact = 1 / 0.35
    assert np.std(smooth) < 0.8 * np.std(raw)
    assert np.sqrt(np.mean((np.array(smooth) - exact) ** 2)) < np.sqrt(np.mean((np.array(raw) - exact) ** 2))


def test_weights_without_a_tail_are_left_alone():
    log_w = np.zeros(100)
    smooth, shape = pareto_smooth(log_w)
    assert (smooth == log_w).all() and np.isnan(shape.value)
