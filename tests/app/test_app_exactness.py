"""Averages of MD with moves, and of moves alone, against exact values; and the errors that each omission would make."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import toys
from toys import KT, PriorDropped

from openmm_bg import app as bg_app
from openmm_bg.coordinates import InternalCoordinates
from openmm_bg.sampling.metropolis import log_acceptance
from openmm_bg.sampling.proposals import IndependenceProposals


class QDropped(IndependenceProposals):
    """A faulty queue that treats the proposal as symmetric."""

    def take(self, n, at):
        placed, log_prob = super().take(n, at)
        return placed, np.where(np.isfinite(log_prob), 0.0, log_prob)

    def log_prob(self, positions):
        return 0.0


# -- one harmonic particle, dynamics and moves


def mean_square_ratio(iterations, queue=None):
    system, topology = toys.harmonic_system()
    simulation = toys.simulation_of(system, topology, np.zeros((1, 3)), time_step=0.01)
    sampler = bg_app.BoltzmannGeneratorSampler(toys.harmonic_generator(), simulation, 20, 5, seed=2)
    if queue is not None:
        sampler._proposals = queue(sampler.generator, 3)
    energies = []
    move = sampler.attemptMove
    sampler.attemptMove = lambda: energies.append(move()) or energies[-1]
    simulation.step(20 * iterations)
    # U = k x^2 / 2 in three dimensions, so <U> / (3 kT / 2) is <x^2> over its exact value.
    return np.mean([a.potential_energy for a in energies]) / (1.5 * KT), sampler


def test_harmonic_particle_has_the_exact_mean_square_displacement():
    ratio, sampler = mean_square_ratio(8000)
    assert ratio == pytest.approx(1.0, abs=0.01)
    assert sampler.acceptanceRate == pytest.approx(0.52, abs=0.02)


def test_harmonic_particle_without_the_q_term_is_twenty_percent_off():
    ratio, _ = mean_square_ratio(1500, QDropped)
    assert ratio < 0.85


# -- the chain of four atoms: the rule on many walkers at once, for power


def walker_averages(generator, kinetic=False, drop_q=False, walkers=2000, steps=60, burn=20, seed=0):
    """Deviation of each moment from its exact value, in standard errors over independent walkers."""
    random, rng = torch.Generator().manual_seed(seed), np.random.default_rng(seed)

    def draw():
        q, log_prob = (t.numpy() for t in generator.sample_internal(walkers, random))
        if drop_q:
            log_prob = np.where(np.isfinite(log_prob), 0.0, log_prob)
        energy = np.where(np.isfinite(log_prob), toys.chain_energy(q), np.inf)
        if kinetic:
            energy = energy + rng.gamma(6.0, size=walkers)  # K/kT of four free atoms
        return q, log_prob, energy

    # Every walker starts from the middle of the well, which all variants can make.
    q, log_prob, energy = draw()
    bad = ~np.isfinite(energy)
    good = int(np.argmin(bad))
    q[bad], log_prob[bad], energy[bad] = q[good], log_prob[good], energy[good]
    total = 0.0
    for step in range(steps):
        q_new, log_prob_new, energy_new = draw()
        ratio = log_acceptance(energy, energy_new, log_prob, log_prob_new)
        yes = -rng.standard_exponential(walkers) <= ratio
        q[yes], log_prob[yes], energy[yes] = q_new[yes], log_prob_new[yes], energy_new[yes]
        if step >= burn:
            total = total + toys.chain_moments(q)
    mean = total / (steps - burn)
    return (mean.mean(0) - toys.chain_exact()) / (mean.std(0) / math.sqrt(walkers))


def test_chain_moments_are_exact():
    assert np.abs(walker_averages(toys.chain_generator())).max() < 3


@pytest.mark.parametrize(
    ("generator", "options"),
    [
        pytest.param(toys.chain_generator(), {"drop_q": True}, id="q term"),
        pytest.param(toys.chain_generator(flow=PriorDropped), {}, id="prior"),
        pytest.param(toys.chain_generator(coordinates=toys.JacobianDropped), {}, id="Jacobian"),
        pytest.param(toys.chain_generator(flow=PriorDropped), {"kinetic": True}, id="prior and kinetic energy"),
    ],
)
def test_chain_moments_are_wrong_without(generator, options):
    assert np.abs(walker_averages(generator, **options)).max() > 10


@pytest.mark.parametrize("dimension", [1, 6])
def test_the_rule_without_prior_and_with_kinetic_energy_halves_the_temperature(dimension):
    """A perfect generator (identity flow over the target itself): U/d must be 1/2, and that rule gives 1/4."""
    rng = np.random.default_rng(0)
    walkers = 20_000
    results = {}
    for faulty in (False, True):
        x, k = rng.normal(size=(walkers, dimension)), rng.gamma(dimension / 2, size=walkers)
        accepted = 0.0
        for _ in range(40):
            y, k_new = rng.normal(size=(walkers, dimension)), rng.gamma(dimension / 2, size=walkers)
            u, u_new = 0.5 * (x**2).sum(1), 0.5 * (y**2).sum(1)
            log_det = np.zeros(walkers)
            if faulty:
                ratio = log_acceptance(u + k, u_new + k_new, log_det, log_det)
            else:
                ratio = log_acceptance(u, u_new, -u + log_det, -u_new + log_det)
            yes = -rng.standard_exponential(walkers) <= ratio
            x[yes], k[yes] = y[yes], k_new[yes]
            accepted += yes.mean() / 40
        results[faulty] = 0.5 * (x**2).mean(), k.mean() / dimension, accepted
    error = 0.5 * math.sqrt(2 / (walkers * dimension))
    assert results[False][0] == pytest.approx(0.5, abs=3 * error)
    assert results[False][2] == pytest.approx(1.0, abs=1e-12)
    assert results[True][0] < 0.5 - 10 * error
    assert results[True][1] < 0.5 - 10 * error


# -- the same chain, through the sampler and a Context


def test_chain_moments_through_the_sampler():
    generator = toys.chain_generator()
    simulation = toys.simulation_of(toys.chain_system(), toys.chain_topology(), toys.CHAIN_POSITIONS)
    sampler = bg_app.BoltzmannGeneratorSampler(generator, simulation, 1, 1, seed=4)
    coordinates = InternalCoordinates(toys.chain_zmatrix())
    sampler.attemptMoves(50)
    frames = []
    for _ in range(1200):
        sampler.attemptMoves(12)
        frames.append(toys.positions_of(simulation))
    q = coordinates(torch.tensor(np.array(frames)))[0].numpy()
    moments = toys.chain_moments(q).reshape(40, 30, 4).mean(1)  # blocks
    deviation = (moments.mean(0) - toys.chain_exact()) / (moments.std(0, ddof=1) / math.sqrt(40))
    assert np.abs(deviation).max() < 3
    assert 0.15 < sampler.acceptanceRate < 0.7


def test_seed_frame_stays_in_place():
    generator = toys.chain_generator()
    positions = toys.CHAIN_POSITIONS + np.array([3.0, -2.0, 1.0])
    simulation = toys.simulation_of(toys.chain_system(), toys.chain_topology(), positions)
    sampler = bg_app.BoltzmannGeneratorSampler(generator, simulation, 1, 40, seed=4)
    sampler.attemptMoves()
    assert sampler.numAccepted > 0
    before, after = (generator.frame(torch.tensor(x)[None]) for x in (positions, toys.positions_of(simulation)))
    torch.testing.assert_close(before.origin, after.origin, rtol=0, atol=1e-13)
    torch.testing.assert_close(before.rotation, after.rotation, rtol=0, atol=1e-12)


# -- constraints


def trimer_average(generator, system, topology, positions, n=1200):
    simulation = toys.simulation_of(system, topology, positions)
    sampler = bg_app.BoltzmannGeneratorSampler(generator, simulation, 1, 1, seed=6)
    values = []
    for _ in range(n):
        sampler.attemptMoves(8)
        x = toys.positions_of(simulation)
        a, c = x[0] - x[1], x[2] - x[1]
        values.append((a @ c / (0.1 * 0.12)) ** 2)
    blocks = np.reshape(values, (50, -1)).mean(1)
    return blocks.mean(), blocks.std(ddof=1) / math.sqrt(50), simulation


def test_constrained_trimer_has_the_mass_metric_measure():
    system, topology, generator, positions = toys.trimer()
    mean, error, simulation = trimer_average(generator, system, topology, positions)
    theta = np.linspace(0, np.pi, 100_001)
    measure = np.sin(theta) * np.sqrt((5 / 12) ** 2 - (np.cos(theta) / 3) ** 2)
    exact = np.sum(np.cos(theta) ** 2 * measure) / np.sum(measure)
    assert exact == pytest.approx(0.2947, abs=1e-4)
    assert abs(mean - exact) < 3 * error
    # Accepted conformations keep the constraints, and the velocities drawn there do too.
    x, v = toys.positions_of(simulation), toys.velocities_of(simulation)
    for i, j, length in ((0, 1, 0.1), (1, 2, 0.12)):
        assert np.linalg.norm(x[i] - x[j]) == pytest.approx(length, rel=1e-9)
        assert abs((x[i] - x[j]) @ (v[i] - v[j])) / length < 1e-4


def test_constrained_trimer_is_wrong_without_the_mass_metric_term():
    system, topology, generator, positions = toys.trimer()
    generator.coordinates.mass_metric = None
    mean, error, _ = trimer_average(generator, system, topology, positions, n=1200)
    assert mean - 0.2947 > 4 * error
    assert mean == pytest.approx(1 / 3, abs=4 * error)
