"""Profiles of densities that are known, populations with honest errors."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.special import i0

from openmm_bg.analysis import BASINS, free_energy_difference, free_energy_profile, populations
from openmm_bg.errors import InputError


def exact_bins(kappa, bins):
    """-log of a von Mises density averaged over each bin, its minimum at zero."""
    fine = np.linspace(-np.pi, np.pi, 200 * bins + 1)
    density = np.exp(kappa * np.cos(fine)) / (2 * np.pi * i0(kappa))
    mean = np.array([np.trapezoid(density[200 * k : 200 * k + 201], dx=1 / 200) for k in range(bins)])
    f = -np.log(mean)
    return f - f.min()


@pytest.mark.parametrize("weighted", [False, True])
def test_profile_of_a_von_mises_density(weighted):
    rng, kappa, bins = np.random.default_rng(0), 1.5, 36
    if weighted:  # from another von Mises, reweighted
        x = rng.vonmises(0.0, 1.0, 40_000)
        weights = np.exp((kappa - 1.0) * np.cos(x))
    else:
        x, weights = rng.vonmises(0.0, kappa, 40_000), None
    profile = free_energy_profile(x, weights, bins=bins)
    # gauge both by the mean of the bins; the minimum of a noisy profile is a biased gauge
    pull = (profile.free_energy - profile.free_energy.mean()) - (lambda f: f - f.mean())(exact_bins(kappa, bins))
    assert np.max(np.abs(pull / profile.error)) < 4.5
    assert 0.6 < np.std(pull / profile.error) < 1.5
    assert profile.blocks_are_long
    np.testing.assert_allclose(profile.centres[[0, -1]], [-np.pi + np.pi / bins, np.pi - np.pi / bins])


def test_errors_of_a_correlated_angle_are_those_of_independent_runs():
    """An angle that sits in each of two wells for about 100 frames."""
    rng = np.random.default_rng(1)

    def run():
        stays = rng.geometric(0.01, 400)
        well = np.repeat(np.arange(400) % 2, stays)[:10_000]
        return np.where(well, 1.0, -1.0) + 0.1 * rng.normal(size=len(well))

    profiles = [free_energy_profile(run(), bins=2, seed=k) for k in range(60)]
    scatter = np.std([np.exp(-p.free_energy[1]) / np.exp(-p.free_energy).sum() for p in profiles])
    claimed = np.mean([p.error[1] * np.exp(-p.free_energy[1]) / np.exp(-p.free_energy).sum() for p in profiles])
    assert claimed == pytest.approx(scatter, rel=0.35)
    assert scatter > 3 * math.sqrt(0.25 / 10_000)  # the naive error


def test_unvisited_bins_are_infinite_and_have_no_error():
    profile = free_energy_profile(np.random.default_rng(2).uniform(0.1, 1.0, 500), bins=10)
    assert np.isinf(profile.free_energy[0])
    assert np.isnan(profile.error[0])
    assert profile.free_energy.min() == 0.0


def test_basins_cover_the_plane_once():
    rng = np.random.default_rng(3)
    phi, psi = rng.uniform(-np.pi, np.pi, (2, 5000))
    inside = np.array([basin.contains(phi, psi) for basin in BASINS])
    assert (inside.sum(axis=0) == 1).all()
    corners = np.radians([-180.0, 0.0, 180.0])
    assert sum(basin.contains(corners, corners[::-1]).astype(int) for basin in BASINS).tolist() == [1, 1, 1]
    helix, sheet, left = (basin.contains(*np.radians([[-70, -70, 60], [-40, 170, 40]])).tolist() for basin in BASINS)
    assert (helix, sheet, left) == ([True, False, False], [False, True, False], [False, False, True])


def test_populations_and_their_errors():
    rng = np.random.default_rng(4)
    phi = np.where(rng.random(10_000) < 0.1, 1.0, -1.0)
    psi = np.zeros(10_000)
    helix, sheet, left = populations(phi, psi)
    assert left.value == pytest.approx(0.1, abs=4 * left.error)
    assert left.error == pytest.approx(math.sqrt(0.09 / 10_000), rel=0.1)
    assert left.effective_samples == pytest.approx(10_000, rel=0.15)
    assert helix.value + left.value == pytest.approx(1.0)
    assert sheet.value == 0.0
    assert math.isnan(sheet.error)
    assert sheet.effective_samples == 0.0
    assert str(sheet).endswith("0 ± ? %")
    weights = np.where(phi > 0, 9.0, 1.0)
    doubled = populations(phi, psi, weights)[2]
    assert doubled.value == pytest.approx(0.5, abs=4 * doubled.error)
    assert doubled.effective_samples < 10_000


def test_five_percentage_points_are_seen():
    rng = np.random.default_rng(5)
    psi = np.full(10_000, 2.5)
    one, other = (populations(np.where(rng.random(10_000) < p, 1.0, -1.0), psi)[2] for p in (0.10, 0.15))
    assert other.value - one.value > 5 * math.hypot(one.error, other.error)


def test_inputs_are_checked():
    with pytest.raises(InputError):
        free_energy_profile([0.0, np.nan, 0.0, 1.0])
    with pytest.raises(InputError):
        populations([0.0, 1.0], [0.0])


def test_free_energy_differences_have_the_errors_of_repetition():
    rng = np.random.default_rng(11)
    found = []
    for _ in range(120):
        state = np.searchsorted([0.5, 0.8], rng.random(400)).repeat(3)  # every draw three times: correlated
        found.append(free_energy_difference(state == 2, state == 0))
    values, errors = np.array(found).T
    assert values.mean() == pytest.approx(math.log(0.5 / 0.2), abs=0.03)
    assert errors.mean() == pytest.approx(values.std(), rel=0.2)


def test_free_energy_differences_of_weights_and_of_what_was_never_seen():
    third = np.arange(600) % 3
    value, _ = free_energy_difference(third == 2, third == 0, np.where(third == 2, 2.0, 1.0))
    assert value == pytest.approx(-math.log(2))
    never, error = free_energy_difference(np.zeros(9, dtype=bool), np.ones(9, dtype=bool))
    assert never == math.inf and math.isnan(error)
