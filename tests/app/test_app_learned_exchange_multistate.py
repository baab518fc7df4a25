"""Learned exchange in openmmtools: exact averages, storage and resume, and what an exchange leaves alone."""

from __future__ import annotations

import logging
import math

import numpy as np
import openmm
import pytest
import torch
import toys
from openmm import unit
from toys import FACTOR, HOT, KT, TEMPERATURE, exact_chain

import openmm_bg as bg
from openmm_bg.coordinates import InternalCoordinates
from openmm_bg.flows import RealNVP
from openmm_bg.sampling import GeneratorMap


@pytest.fixture(scope="module")
def multistate_tools():
    logging.getLogger("openmmtools").setLevel(logging.ERROR)
    pytest.importorskip("openmmtools")
    from openmmtools import cache, mcmc, multistate, states

    cache.global_context_cache.platform = openmm.Platform.getPlatform("Reference")
    return mcmc, multistate, states


def small_generator(seed):
    """One that can be stored, of a flow that is nearly the identity: a map that changes little, and costs little."""
    flow = RealNVP(6, layers=2, hidden=(4,), seed=seed)
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter += 0.015 * torch.randn(parameter.shape, generator=random)
    return bg.BoltzmannGenerator(
        None, flow, InternalCoordinates(toys.chain_zmatrix(), compile=False), topology=toys.chain_topology()
    )


def multistate_sampler(tools, folder, generators=None, steps=20, **options):
    mcmc, multistate, states = tools
    if generators is None:
        generators = [small_generator(1), small_generator(2)]
    move = mcmc.LangevinDynamicsMove(timestep=1 * unit.femtosecond, n_steps=steps, reassign_velocities=True)
    sampler = bg.app.MultiStateLearnedExchangeSampler(
        generators=generators, seed=3, directory=folder / "generators", mcmc_moves=move, online_analysis_interval=None,
        **options,
    )  # fmt: skip
    system = toys.chain_system()
    temperatures = [TEMPERATURE, HOT]
    sampler.create(
        [states.ThermodynamicState(system, t * unit.kelvin) for t in temperatures],
        states.SamplerState(toys.CHAIN_POSITIONS * unit.nanometer),
        multistate.MultiStateReporter(str(folder / "exchange.nc"), checkpoint_interval=2),
    )
    return sampler


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_openmmtools_replicas_have_exact_moments(multistate_tools, tmp_path):
    sampler = multistate_sampler(multistate_tools, tmp_path, replica_mixing_scheme=None)
    rng = np.random.default_rng(8)
    coordinates = InternalCoordinates(toys.chain_zmatrix(), compile=False)
    frames = []
    for _ in range(1200):
        hot, cold = (int(np.flatnonzero(sampler._replica_thermodynamic_states == s)[0]) for s in (1, 0))
        x = coordinates.inverse(torch.from_numpy(exact_chain(1, FACTOR, rng)))[0][0].numpy()
        sampler._sampler_states[hot].positions = x * unit.nanometer
        frames.append(sampler._positions(cold))
        sampler._compute_energies()
        sampler._mix_replicas()
    q = coordinates(torch.tensor(np.array(frames)))[0].numpy()
    blocks = toys.chain_moments(q).reshape(30, 40, 4).mean(1)
    deviation = (blocks.mean(0) - toys.chain_exact()) / (blocks.std(0, ddof=1) / math.sqrt(30))
    assert np.abs(deviation).max() < 3.5
    assert sampler.statistics.acceptance[0, 1] > 0.1 and sampler.statistics.round_trips.sum() > 100


@pytest.mark.filterwarnings("ignore")
def test_openmmtools_runs_stores_and_resumes(multistate_tools, tmp_path):
    _, multistate, _ = multistate_tools
    sampler = multistate_sampler(multistate_tools, tmp_path, number_of_iterations=8)
    sampler.run()
    assert sampler.statistics.attempts[0, 1] == 8
    energies = sampler._energy_thermodynamic_states.copy()
    sampler._compute_energies()
    np.testing.assert_allclose(sampler._energy_thermodynamic_states, energies, rtol=1e-10)
    del sampler
    reporter = multistate.MultiStateReporter(str(tmp_path / "exchange.nc"), open_mode="r", checkpoint_interval=2)
    accepted, proposed = reporter.read_mixing_statistics()
    assert proposed[1:].sum() >= 16 and accepted.shape == proposed.shape
    reporter.close()
    resumed = bg.app.MultiStateLearnedExchangeSampler.from_storage(
        multistate.MultiStateReporter(str(tmp_path / "exchange.nc"), checkpoint_interval=2)
    )
    assert resumed.iteration == 8
    resumed.extend(3)
    assert resumed.iteration == 11 and resumed.statistics.attempts[0, 1] == 3


@pytest.mark.filterwarnings("ignore")
def test_openmmtools_weighs_restores_and_draws_velocities(multistate_tools, tmp_path):
    sampler = multistate_sampler(multistate_tools, tmp_path, replica_mixing_scheme=None, number_of_iterations=40)
    pair = GeneratorMap(small_generator(2), small_generator(1))
    coordinates = InternalCoordinates(toys.chain_zmatrix(), compile=False)
    masses, seen, kinetic = np.array([12.0, 16.0, 16.0, 12.0])[:, None], [], {0: [], 1: []}
    attempt = sampler._attempt_mapped_swap

    def reduced(x, factor):
        return float(toys.chain_energy(coordinates(x)[0].numpy())[0] / factor)

    def watched(si, sj, rng):
        states = sampler._replica_thermodynamic_states.tolist()
        x = [torch.from_numpy(sampler._positions(k).copy())[None] for k in (0, 1)]
        hot, cold = x[states.index(1)], x[states.index(0)]
        (down, log_det), (up, log_det_inverse) = pair.exchange(hot, cold)
        outcome = attempt(si, sj, rng)
        expected = reduced(hot, FACTOR) + reduced(cold, 1) - reduced(up, FACTOR) - reduced(down, 1)
        assert outcome.log_acceptance == pytest.approx(expected + float(log_det + log_det_inverse), abs=1e-8)
        new = {states.index(1): down, states.index(0): up} if outcome.accepted else dict(enumerate(x))
        for k, positions in new.items():
            np.testing.assert_allclose(sampler._positions(k), positions[0].numpy(), rtol=0, atol=1e-12)
            if outcome.accepted:
                v = sampler._sampler_states[k].velocities.value_in_unit(unit.nanometer / unit.picosecond)
                kinetic[int(sampler._replica_thermodynamic_states[k])].append(0.5 * np.sum(masses * v**2))
        energies = sampler._energy_thermodynamic_states.copy()
        sampler._compute_energies()
        np.testing.assert_allclose(sampler._energy_thermodynamic_states, energies, rtol=1e-9)
        seen.append((outcome.accepted, abs(float(log_det))))
        return outcome

    sampler._attempt_mapped_swap = watched
    sampler.run()
    accepted, determinants = (np.array(column) for column in zip(*seen, strict=True))
    assert 5 < accepted.sum() < 40 and determinants.max() > 1e-3
    for state, factor in ((0, 1.0), (1, FACTOR)):
        assert np.mean(kinetic[state]) == pytest.approx(6 * KT * factor, rel=0.45)


def test_openmmtools_without_generators_or_with_locality_is_refused(multistate_tools):
    with pytest.raises(bg.InputError, match="one per thermodynamic state"):
        bg.app.MultiStateLearnedExchangeSampler()
    with pytest.raises(bg.InputError, match="locality"):
        bg.app.MultiStateLearnedExchangeSampler(generators=["a.bg", "b.bg"], locality=1)
