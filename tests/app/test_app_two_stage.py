"""Two-stage acceptance in a Context against exact averages, and what the two wrong rules sample."""

from __future__ import annotations

import math

import numpy as np
import openmm
import pytest
import torch
import toys

from openmm_bg import app as bg_app
from openmm_bg.app import walker
from openmm_bg.coordinates import InternalCoordinates
from openmm_bg.energies import ForceFieldEnergy
from openmm_bg.errors import InputError
from openmm_bg.sampling.two_stage import potential_of

Sampler = bg_app.BoltzmannGeneratorSampler


def chain_deviation(simulation, sampler, generator, series=400, blocks=25):
    """Mean moments of the conformations after each series, in standard errors from the exact ones."""
    sampler.attemptMoves(20)
    frames = []
    for _ in range(series):
        sampler.attemptMoves()
        frames.append(toys.positions_of(simulation))
    coordinates = InternalCoordinates(toys.chain_zmatrix())
    q = coordinates(torch.tensor(np.array(frames)))[0].numpy()
    moments = toys.chain_moments(q)[:, 1 if generator.coordinates.constraints else 0 :]
    moments = moments.reshape(blocks, series // blocks, -1).mean(1)
    return (moments.mean(0) - toys.chain_exact()[-moments.shape[1] :]) / (moments.std(0, ddof=1) / math.sqrt(blocks))


# -- one harmonic particle


def mean_square_ratio(series=2000, stiffness=0.7, temperature=toys.TEMPERATURE):
    """<x^2> over its exact value, of moves alone, and the sampler."""
    system, topology = toys.harmonic_system()
    simulation = toys.simulation_of(system, topology, np.zeros((1, 3)))
    simulation.integrator.setTemperature(temperature)
    energy = toys.HarmonicEnergy(stiffness)
    sampler = Sampler(toys.harmonic_generator(), simulation, 1, 4, seed=3, energy=energy)
    energies = []
    for _ in range(series):
        (attempt,) = sampler.attemptMoves()
        energies.append(attempt.proposed_potential_energy if attempt.accepted else attempt.potential_energy)
    return np.mean(energies) / (1.5 * toys.KT * temperature / toys.TEMPERATURE), sampler


def test_harmonic_particle_has_the_exact_mean_square_displacement():
    ratio, sampler = mean_square_ratio()
    assert ratio == pytest.approx(1.0, abs=0.045)
    counts = sampler.statistics["independent"]
    assert counts.tried == 4 * counts.attempts > counts.moved > counts.evaluated > counts.accepted > 0


def test_temperature_of_both_stages_is_the_integrators():
    ratio, _ = mean_square_ratio(temperature=450.0)
    assert ratio == pytest.approx(1.0, abs=0.045)


@pytest.mark.parametrize("again", ["all of the ratio", "all of the energy"])
def test_using_the_cheap_stage_a_second_time_samples_another_distribution(monkeypatch, again):
    def wrong(proposals, potential, kT, n, at, rng):
        end = scan(proposals, potential, kT, n, at, rng)
        if again == "all of the energy":
            return end._replace(potential=0.0, potential_start=0.0)
        # then the decision is -beta (U' - U) + log_prob(x) - log_prob(x')
        return end._replace(potential=-kT * end.log_prob, potential_start=-kT * end.log_prob_start)

    scan = walker.scan
    monkeypatch.setattr(walker, "scan", wrong)
    ratio, _ = mean_square_ratio()
    assert ratio < 0.88


# -- the chain of four atoms, for each kind of move


@pytest.mark.parametrize("share", [0.0, 0.5], ids=["independent", "with latent steps"])
def test_chain_moments_are_exact_with_a_poor_cheap_energy(share):
    simulation = toys.simulation_of(toys.chain_system(), toys.chain_topology(), toys.CHAIN_POSITIONS)
    generator = toys.stretched_generator(topology=toys.chain_topology())
    sampler = Sampler(generator, simulation, 1, 8, seed=5, energy=toys.CheapChain(), latentShare=share, latentStep=0.6)
    assert np.abs(chain_deviation(simulation, sampler, generator)).max() < 3.5
    assert all(0 < counts.accepted < counts.attempts for counts in sampler.statistics.values())


def test_moments_with_constrained_bonds_are_exact():
    system, generator, positions = toys.hydrogen_bonds_constrained()
    simulation = toys.simulation_of(system, toys.chain_topology(), positions)
    energy = toys.CheapChain()
    sampler = Sampler(generator, simulation, 1, 8, seed=6, energy=energy, latentShare=0.3, latentStep=0.6)
    assert np.abs(chain_deviation(simulation, sampler, generator)).max() < 3.5
    x = toys.positions_of(simulation)
    for i, j in ((0, 1), (2, 3)):
        assert np.linalg.norm(x[i] - x[j]) == pytest.approx(toys.BOND, rel=1e-9)


# -- what is evaluated, and what is refused


def test_only_the_end_of_a_series_is_evaluated_in_the_context(monkeypatch):
    simulation = toys.simulation_of(toys.chain_system(), toys.chain_topology(), toys.CHAIN_POSITIONS)
    sampler = Sampler(toys.chain_generator(), simulation, 1, 50, seed=5, energy=toys.CheapChain())
    calls = []
    evaluate = walker.ContextWalker._energy
    monkeypatch.setattr(walker.ContextWalker, "_energy", lambda self, x: calls.append(0) or evaluate(self, x))
    (attempt,) = sampler.attemptMoves()
    assert (attempt.tried, len(calls)) == (50, 1) and attempt.moved > 1
    kept = [a for _ in range(30) for a in sampler.attemptMoves(1) if a.moved == 0]
    assert kept, "a scan of one proposal often ends where it began"
    assert all(math.isnan(a.proposed_potential_energy) and not a.accepted for a in kept)
    counts = sampler.statistics["independent"]
    assert counts.evaluated == len(calls) == 31 - len(kept)


def test_the_decision_is_about_what_the_context_adds():
    simulation = toys.simulation_of(toys.chain_system(), toys.chain_topology(), toys.CHAIN_POSITIONS)
    generator, energy = toys.chain_generator(), toys.CheapChain()
    sampler = Sampler(generator, simulation, 1, 20, seed=5, energy=energy)
    before = toys.positions_of(simulation)
    (attempt,) = sampler.attemptMoves()
    assert attempt.accepted
    after = toys.positions_of(simulation)
    v, v_new = energy.potential(torch.tensor(np.array([before, after]))).tolist()
    change = (attempt.proposed_potential_energy - v_new) - (attempt.potential_energy - v)
    assert attempt.log_acceptance == pytest.approx(-change / toys.KT, abs=1e-9)


def test_the_systems_own_energy_accepts_whatever_the_scan_found():
    simulation = toys.simulation_of(toys.chain_system(), toys.chain_topology(), toys.CHAIN_POSITIONS)
    energy = ForceFieldEnergy(toys.chain_system(), toys.TEMPERATURE, compile=False)
    sampler = Sampler(toys.chain_generator(), simulation, 1, 30, seed=5, energy=energy)
    attempts = [a for _ in range(20) for a in sampler.attemptMoves()]
    assert all(a.accepted and abs(a.log_acceptance) < 1e-9 for a in attempts)


def test_a_cheap_energy_without_a_value_here_is_a_refusal():
    """Nothing leads back to where V has no value, so nothing may lead away."""
    system = toys.chain_system()
    wall = openmm.CustomBondForce("sqrt(0.145-r)")
    wall.addBond(0, 1)
    system.addForce(wall)
    energy = ForceFieldEnergy(system, toys.TEMPERATURE, compile=False)
    simulation = toys.simulation_of(toys.chain_system(), toys.chain_topology(), toys.CHAIN_POSITIONS)
    sampler = Sampler(toys.chain_generator(), simulation, 1, 20, seed=5, energy=energy)
    (attempt,) = sampler.attemptMoves()
    assert attempt.refused and sampler.numRefused == 1 and attempt.tried == 0
    np.testing.assert_array_equal(toys.positions_of(simulation), toys.CHAIN_POSITIONS)


def test_energies_of_something_else_are_refused():
    simulation = toys.simulation_of(toys.chain_system(), toys.chain_topology(), toys.CHAIN_POSITIONS)
    with pytest.raises(InputError, match="molecule alone"):
        Sampler(toys.chain_generator(), simulation, energy=toys.HarmonicEnergy(1.0))
    with pytest.raises(InputError, match="potential"):
        potential_of(torch.nn.Identity(), toys.chain_generator())
