"""Weighted averages of Gaussians, whose weights have closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from openmm_bg.errors import InputError
from openmm_bg.sampling.reweighting import (
    effective_sample_size,
    forward_effective_sample_size,
    largest_log_ratio,
    log_normalizer,
    resample,
    reweighted_mean,
)

SCALE = 1.5  # of the proposal; the target is a standard normal


def log_w(x):
    """u = x^2/2, q = N(0, SCALE^2)."""
    return -0.5 * x**2 + 0.5 * (x / SCALE) ** 2 + math.log(SCALE) + 0.5 * math.log(2 * math.pi)


# E_q[w^2] / E_q[w]^2 of two Gaussians, by the Gaussian integral.
EXACT_FRACTION = math.sqrt(2 / SCALE**2 - 1 / SCALE**4)


def draws(n, seed=0):
    return SCALE * np.random.default_rng(seed).normal(size=n)


def test_reverse_and_forward_fractions_and_log_z():
    n = 200_000
    weights = log_w(draws(n))
    ess = effective_sample_size(weights)
    assert ess.n == n
    assert ess.size == n * ess.fraction
    assert ess.fraction == pytest.approx(EXACT_FRACTION, abs=0.003)
    z = log_normalizer(weights)
    assert abs(z.value - 0.5 * math.log(2 * math.pi)) < 4 * z.error
    reference = log_w(np.random.default_rng(1).normal(size=n))
    assert forward_effective_sample_size(reference, z.value) == pytest.approx(EXACT_FRACTION, abs=0.006)
    assert largest_log_ratio(reference, z.value) == pytest.approx(math.log(SCALE), abs=4 * z.error)


def test_log_z_error_is_the_spread_over_repetitions():
    estimates = [log_normalizer(log_w(draws(500, seed))) for seed in range(400)]
    spread = np.std([e.value for e in estimates])
    assert np.mean([e.error for e in estimates]) == pytest.approx(spread, rel=0.12)


def test_weights_far_from_one_do_not_overflow():
    weights = log_w(draws(1000))
    for shift in (-1e5, 1e5):
        assert effective_sample_size(weights + shift).fraction == pytest.approx(effective_sample_size(weights).fraction)
        assert log_normalizer(weights + shift).value == pytest.approx(log_normalizer(weights).value + shift)


def test_clipping_lowers_only_the_largest():
    weights = np.zeros(20_000)
    weights[:2] = [30.0, 40.0]
    ess = effective_sample_size(weights)
    assert ess.fraction == pytest.approx(1 / 20_000, rel=1e-3)
    assert ess.clipped == pytest.approx(1.0)
    assert effective_sample_size(np.zeros(5)) == (1.0, 5, 1.0)
    assert effective_sample_size([0.0]).fraction == 1.0


def test_the_reverse_fraction_is_blind_to_a_lost_mode_and_the_forward_one_is_not():
    """Target: two modes of equal weight; the generator is perfect on one and never sees the other."""
    u_seen = np.zeros(1000)
    assert effective_sample_size(u_seen).fraction == 1.0
    reference = np.concatenate([np.zeros(500), np.full(500, 25.0)])
    assert forward_effective_sample_size(reference, 0.0) < 1e-10
    assert largest_log_ratio(reference, 0.0) == 25.0
    reference[0] = math.inf
    assert forward_effective_sample_size(reference, 0.0) == 0.0
    assert largest_log_ratio(reference, 0.0) == math.inf


def test_zero_weights_count_as_draws():
    weights = np.array([0.0, -math.inf, 0.0, -math.inf])
    assert effective_sample_size(weights).fraction == 0.5
    assert log_normalizer(weights).value == pytest.approx(math.log(0.5))
    assert effective_sample_size([-math.inf] * 3) == (0.0, 3, 0.0)


def test_reweighted_mean_and_its_error():
    errors, values = [], []
    for seed in range(300):
        x = draws(400, seed)
        estimate = reweighted_mean(np.stack([x**2, np.ones_like(x)], axis=1), log_w(x))
        assert estimate.value.shape == (2,)
        assert estimate.value[1] == pytest.approx(1.0)
        assert estimate.error[1] == pytest.approx(0.0, abs=1e-12)
        values.append(estimate.value[0])
        errors.append(estimate.error[0])
    assert np.mean(values) == pytest.approx(1.0, abs=4 * np.std(values) / math.sqrt(300) + 0.005)
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.12)


def test_impossible_draws_do_not_spoil_the_mean():
    estimate = reweighted_mean(torch.tensor([1.0, math.nan, 3.0]), torch.tensor([0.0, -math.inf, 0.0]))
    assert estimate.value == 2.0
    with pytest.raises(InputError, match="Values"):
        reweighted_mean([1.0, math.nan], [0.0, 0.0])
    with pytest.raises(InputError, match="one row per weight"):
        reweighted_mean([1.0], [0.0, 0.0])


def test_resampling_follows_the_weights():
    indices = resample(np.log([0.1, 0.6, 0.3]), 50_000, np.random.default_rng(0))
    np.testing.assert_allclose(np.bincount(indices) / 50_000, [0.1, 0.6, 0.3], atol=0.01)
    assert 1 not in resample([0.0, -math.inf], 1000, np.random.default_rng(0))


@pytest.mark.parametrize("bad", [[math.nan, 0.0], [math.inf, 0.0], [], [[0.0]]])
@pytest.mark.parametrize("function", [effective_sample_size, log_normalizer])
def test_faulty_weights_are_refused(function, bad):
    with pytest.raises(InputError):
        function(bad)


@pytest.mark.parametrize("function", [log_normalizer, lambda w: reweighted_mean(np.zeros(2), w)])
def test_nothing_can_be_normalised_by_zero(function):
    with pytest.raises(InputError, match="zero"):
        function([-math.inf, -math.inf])


@pytest.mark.parametrize("bad", [[math.nan], [-math.inf]])
def test_reference_frames_need_an_energy(bad):
    with pytest.raises(InputError):
        largest_log_ratio(bad, 0.0)
