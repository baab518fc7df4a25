"""MD with moves on alanine dipeptide against a long replica exchange that was not used for training."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import openmm
import pytest
import torch
from openmm import app

import openmm_bg as bg
from openmm_bg.analysis import backbone_dihedrals, populations, standard_error
from openmm_bg.sampling import LatentProposals, effective_sample_size, independence_acceptance

DATA = Path(__file__).resolve().parents[1] / "data"


@pytest.fixture(scope="module")
def generator():
    return bg.BoltzmannGenerator.load(DATA / "alanine_small.bg")


@pytest.fixture(scope="module")
def chain(alanine, generator):
    """Positions and potential energies after every iteration, and the sampler."""
    integrator = openmm.LangevinMiddleIntegrator(300, 1.0, 0.001)
    integrator.setRandomNumberSeed(5)
    simulation = app.Simulation(alanine.topology, alanine.system, integrator, openmm.Platform.getPlatform("Reference"))
    simulation.context.setPositions(alanine.positions)
    simulation.context.setVelocitiesToTemperature(300, 5)
    sampler = bg.BoltzmannGeneratorSampler(
        generator, simulation, stepsPerIteration=100, proposalsPerIteration=10, seed=5
    )
    frames, energies = [], []

    def keep(sampler):
        state = simulation.context.getState(positions=True, energy=True)
        frames.append(state.getPositions(asNumpy=True)._value.copy())
        energies.append(state.getPotentialEnergy()._value)

    sampler.reporters.append(keep)
    simulation.step(100 * 2000)
    return np.array(frames), np.array(energies), sampler


def test_populations_and_energy_agree_with_replica_exchange(alanine, chain):
    reference = json.loads((DATA / "alanine_reference.json").read_text())
    frames, energies, sampler = chain
    assert sampler.numRefused == 0
    angles = backbone_dihedrals(frames, alanine.topology)
    for found in populations(angles.phi[:, 0], angles.psi[:, 0]):
        value, error = reference["populations"][found.name]
        assert abs(found.value - value) < 3.5 * math.hypot(found.error, error), found.name
        assert found.effective_samples > 100, "the moves must carry the chain between basins"
    value, error = reference["mean_energy"]
    assert abs(energies.mean() - value) < 3.5 * math.hypot(standard_error(energies), error)


def test_acceptance_is_what_the_weights_predict(generator, chain):
    """Two ways to the same number: counted along the chain, and from independent draws alone."""
    weights = generator.sample(4000, seed=3).log_weights
    expected = independence_acceptance(weights)
    assert abs(chain[2].acceptanceRate - expected) < 0.06
    assert effective_sample_size(weights).fraction > 0.3


def test_latent_steps_carry_the_density_of_the_flow(alanine, generator):
    """Rotors, stiff torsions and all: what a step is weighed with is what its end has when looked at afresh."""
    proposals = LatentProposals(generator, 1, step=0.05, batch_size=32)
    x = generator.place(generator.sample_internal(1, torch.Generator().manual_seed(2))[0])[0].numpy()
    start = proposals.log_prob(x)
    placed, log_prob = proposals.take(32, x)
    assert np.isfinite(log_prob).all() and np.abs(placed - x).max() < 0.2
    q, log_volume = generator.coordinates(torch.tensor(np.concatenate([x[None], placed])))
    with torch.no_grad():
        expected = (generator.flow.log_prob(q) - log_volume).numpy()
    np.testing.assert_allclose([start, *log_prob], expected, rtol=0, atol=1e-7)
    potential = generator.energy.potential(torch.tensor(placed))
    assert (potential < generator.energy.potential(torch.tensor(x)[None]) + 100).float().mean() > 0.5


def test_weights_find_the_reference_populations(alanine, generator):
    reference = json.loads((DATA / "alanine_reference.json").read_text())
    samples = generator.sample(6000, seed=4)
    inside = np.isfinite(samples.log_weights.numpy())
    weights = np.exp(samples.log_weights.numpy()[inside] - samples.log_weights.max().item())
    angles = backbone_dihedrals(samples.positions.numpy()[inside], alanine.topology)
    for found in populations(angles.phi[:, 0], angles.psi[:, 0], weights):
        value, error = reference["populations"][found.name]
        assert abs(found.value - value) < 3.5 * math.hypot(found.error, error), found.name
