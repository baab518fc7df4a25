"""Distances whose value is known: shifts, Gaussians, halves of one sample."""

from __future__ import annotations

import math

import numpy as np
import pytest

from openmm_bg.analysis import Distance, energy_w2, measure, torus_w2, total_variation
from openmm_bg.errors import InputError


def backbone(rng, n, helix=0.4):
    """Points like those of a capped alanine, its sheet lying across the cut at 180 degrees."""
    psi = np.where(rng.random(n) < helix, -0.4, 2.9) + 0.35 * rng.normal(size=n)
    phi = -1.5 + 0.4 * rng.normal(size=n)
    angles = np.stack([phi, psi], axis=1)
    return (angles + np.pi) % (2 * np.pi) - np.pi


@pytest.mark.parametrize(("shift", "distance"), [(10, 10), (350, 10), (180, 180), (-30, 30)])
def test_a_shift_across_the_cut_costs_the_short_way(shift, distance):
    rng = np.random.default_rng(0)
    a = np.radians(rng.uniform(-5, 5, size=(40, 2)) + [170.0, 0.0])
    b = a + np.radians([shift, 0.0])
    assert torus_w2(a, b) == pytest.approx(distance, rel=0.05 if distance == 180 else 1e-9)


def test_distance_in_the_plane_is_pythagorean_and_symmetric():
    a = np.zeros((1, 2))
    b = np.radians([[3.0, 356.0]])
    assert torus_w2(a, b) == pytest.approx(5.0)
    assert torus_w2(b, a) == pytest.approx(5.0)
    assert torus_w2(a, a) == 0.0


def test_weights_equal_repeated_points():
    rng = np.random.default_rng(1)
    a, b = backbone(rng, 20), backbone(rng, 30)
    counts = rng.integers(1, 4, 20)
    assert torus_w2(a, b, a_weights=counts) == pytest.approx(torus_w2(np.repeat(a, counts, axis=0), b), abs=1e-9)
    u, v = rng.normal(size=20), rng.normal(size=30)
    assert energy_w2(u, v, a_weights=counts) == pytest.approx(energy_w2(np.repeat(u, counts), v), abs=1e-12)


def test_w2_of_gaussians():
    """W2^2 = (difference of means)^2 + (difference of standard deviations)^2, summed over the axes."""
    rng = np.random.default_rng(2)
    u, v = rng.normal(0, 1, 200_000), rng.normal(3, 2, 200_000)
    assert energy_w2(u, v) == pytest.approx(math.sqrt(10), rel=0.01)
    a = np.radians(rng.normal([0, 0], [10, 10], (1200, 2)))
    b = np.radians(rng.normal([20, 0], [10, 20], (1200, 2)))
    # plus the floor of two samples of 1200, about 1.5 degrees, in quadrature
    assert torus_w2(a, b) == pytest.approx(math.sqrt(500), rel=0.05)


def test_total_variation():
    a, b = np.zeros((10, 2)), np.full((10, 2), 2.0)
    assert total_variation(a, b) == pytest.approx(1.0)
    assert total_variation(a, a) == 0.0
    assert total_variation(np.r_[a, b], b) == pytest.approx(0.5)
    assert total_variation(np.r_[a, b], b, a_weights=np.r_[np.zeros(10), np.ones(10)]) == pytest.approx(0.0)
    # the two ends of the circle are one place
    assert total_variation([[np.pi]], [[-np.pi]]) == 0.0


@pytest.mark.parametrize("metric", [torus_w2, total_variation])
def test_one_ensemble_stays_within_its_floor_and_a_shift_does_not(metric):
    rng = np.random.default_rng(3)
    small, large = (400, 2000) if metric is torus_w2 else (None, None)
    reference = backbone(rng, 20_000)
    same = measure("same", metric, reference, backbone(rng, 10_000), rng, n=small)
    # at n = 2000 the share of a basin is known to 1.5 points between two draws: the W2 of 400 could not see five
    shifted = measure("shifted", metric, reference, backbone(rng, 10_000, helix=0.45), rng, n=large, repeats=4)
    assert same.within_floor
    assert abs(same.excess) < 3 * (same.value * same.error + same.floor * same.floor_error) + 1e-12
    assert not shifted.within_floor
    if metric is torus_w2:
        # at most all of the mass moves from centre to centre, 0.05 * 171^2; points at the near edges move less
        assert 10 < shifted.debiased < np.sqrt(0.05) * 171


def test_the_sign_of_the_debiased_distance_is_kept():
    closer = Distance("x", 3.0, 0.1, 5.0, 0.1, 10, "degrees")
    assert closer.excess == -16.0
    assert closer.debiased == -4.0
    assert closer.within_floor
    assert "debiased −4.0" in str(closer)  # noqa: RUF001


def test_a_drifting_reference_has_a_high_floor():
    """Halves in blocks show what halves drawn frame by frame would hide."""
    rng = np.random.default_rng(4)
    drift = np.repeat(rng.normal(size=10), 1000)[:, None] + 0.1 * rng.normal(size=(10_000, 1))
    blocked = measure("drift", energy_w2, drift[:, 0], drift[::2, 0], rng)
    shuffled = measure("shuffled", energy_w2, rng.permutation(drift[:, 0]), drift[::2, 0], rng)
    assert blocked.floor > 5 * shuffled.floor


def test_weights_move_the_samples():
    rng = np.random.default_rng(5)
    reference, proposal = rng.normal(size=8000), 1.3 * rng.normal(size=8000)
    weights = np.exp(-(proposal**2) / 2 * (1 - 1 / 1.69))
    plain = measure("plain", energy_w2, reference, proposal, np.random.default_rng(0))
    weighted = measure("weighted", energy_w2, reference, proposal, np.random.default_rng(0), weights=weights)
    assert not plain.within_floor
    assert weighted.value < plain.value / 3
    assert plain.floor == pytest.approx(weighted.floor, rel=0.5)


def test_a_seed_reproduces_and_inputs_are_checked():
    a, b = backbone(np.random.default_rng(0), 300), backbone(np.random.default_rng(1), 100)
    first, second = (measure("x", torus_w2, a, b, np.random.default_rng(7), n=50) for _ in range(2))
    assert first == second
    assert measure("x", torus_w2, a, b, np.random.default_rng(7)).n == 100
    for wrong in (
        lambda: measure("x", torus_w2, a, b, np.random.default_rng(0), repeats=1),
        lambda: measure("x", torus_w2, a, b, np.random.default_rng(0), blocks=3),
        lambda: measure("x", torus_w2, a[:5], b, np.random.default_rng(0)),
        lambda: torus_w2(a, b[:, :1]),
        lambda: torus_w2(np.full((2, 2), np.nan), b),
        lambda: energy_w2([np.inf, 0.0], [0.0]),
    ):
        with pytest.raises(InputError):
            wrong()
    # what has no weight may be infinite
    assert energy_w2([np.inf, 1.0], [0.0], a_weights=[0.0, 1.0]) == 1.0
