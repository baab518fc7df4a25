"""Batched dynamics: moments that are known, OpenMM's own energies, ladders, cooling."""

import math

import numpy as np
import openmm
import pytest
import torch
from openmm import app

from openmm_bg import systems
from openmm_bg.energies import ForceFieldEnergy
from openmm_bg.errors import InputError
from openmm_bg.sampling import BatchedLangevin, bursts, cool, replica_exchange, simulate
from openmm_bg.sampling.batched import batchable
from openmm_bg.units import GAS_CONSTANT

KT = GAS_CONSTANT * 300


def oscillators(stiffness=(1000.0, 300.0), mass=12.0):
    """Independent particles on springs to the origin."""
    system = openmm.System()
    force = openmm.CustomExternalForce("0.5*k*(x^2+y^2+z^2)")
    force.addPerParticleParameter("k")
    for k in stiffness:
        force.addParticle(system.addParticle(mass), [k])
    system.addForce(force)
    return system


def double_well(depth=4.0):
    """One particle with two minima along x, the right one lower."""
    system = openmm.System()
    system.addParticle(12.0)
    force = openmm.CustomExternalForce("h*((x/a)^2-1)^2 - 0.5*x/a + 500*(y^2+z^2)")
    force.addGlobalParameter("h", depth)
    force.addGlobalParameter("a", 0.1)
    force.addParticle(0, [])
    system.addForce(force)
    return system


def right_share(temperature, depth=4.0):
    x = np.linspace(-0.3, 0.3, 20001)
    w = np.exp(-(depth * ((x / 0.1) ** 2 - 1) ** 2 - 0.5 * x / 0.1) / (GAS_CONSTANT * temperature))
    return w[x > 0].sum() / w.sum()


def batch(system, positions, n, seed=1, **keywords):
    settings = {"temperature": 300, "timestep": 0.001, "friction": 5.0, "dtype": torch.float64} | keywords
    return BatchedLangevin(
        ForceFieldEnergy(system, 400), np.repeat(np.asarray(positions)[None], n, 0),
        generator=torch.Generator().manual_seed(seed), **settings,
    )  # fmt: skip


def test_variances_of_oscillators_are_exact_at_each_walkers_temperature():
    # leapfrog-middle has the exact position variance of a harmonic oscillator at any stable step
    temperatures = np.repeat([300.0, 600.0], 2000)
    walkers = batch(oscillators(), np.zeros((2, 3)), 4000, temperature=temperatures, timestep=0.01)
    walkers.draw_velocities()
    squares = []
    for _ in range(30):
        walkers.advance(40)
        squares.append(walkers.positions.square().mean(-1).reshape(2, 2000, 2).mean(1))
    measured = torch.stack(squares).mean(0)
    expected = KT * torch.tensor([[1.0], [2.0]]) / torch.tensor([1000.0, 300.0])
    assert (measured / expected - 1).abs().max() < 0.02


def test_kinetic_energy_of_fresh_velocities_follows_the_leapfrog():
    # half a step behind, a mode of frequency w has <v^2> = kT/m (1 + (w dt)^2 / 4) with x at equilibrium
    k, mass, dt = 1000.0, 12.0, 0.05
    walkers = batch(oscillators((k,), mass), np.zeros((1, 3)), 40_000, timestep=dt)
    x = torch.randn(walkers.positions.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    walkers.positions = x * math.sqrt(KT / k)
    walkers.draw_velocities()
    started = walkers.velocities.square().mean()
    walkers.advance(200)
    assert float(started) == pytest.approx(float(walkers.velocities.square().mean()), rel=0.02)


def test_a_seed_gives_the_same_numbers_and_another_does_not():
    def run(seed):
        walkers = batch(oscillators(), np.zeros((2, 3)), 5, seed)
        walkers.draw_velocities()
        walkers.advance(30)
        return walkers.positions

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))


def test_energies_are_those_of_openmm_and_temperature_of_the_energy_does_not_matter():
    molecule = systems.load("alanine_dipeptide")
    walkers = batch(molecule.system, molecule.positions, 2)
    context = openmm.Context(molecule.system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatform("Reference"))
    context.setPositions(molecule.positions)
    expected = context.getState(energy=True).getPotentialEnergy()._value
    assert walkers.potential_energy().numpy() == pytest.approx(expected, abs=1e-6)
    assert walkers.force_evaluations == 2


def test_a_free_molecule_does_not_drift_away_but_a_bound_one_stays_where_it_is():
    molecule = systems.load("alanine_dipeptide")
    walkers = batch(molecule.system, molecule.positions + 50.0, 3)
    walkers.draw_velocities()
    walkers.advance(2)
    assert walkers.positions.abs().max() < 2
    bound = batch(oscillators(), np.full((2, 3), 0.05), 3, friction=0.01)
    bound.advance(1)
    assert float(bound.positions.mean()) == pytest.approx(0.05, abs=0.01)


def test_dynamics_of_a_molecule_has_the_mean_energy_of_openmm():
    molecule = systems.load("alanine_dipeptide")
    theirs = simulate(
        molecule.system, molecule.positions, temperature=300, n_frames=150, steps_per_frame=40,
        equilibration_steps=1000, friction=5.0, seed=1, progress=False,
    )  # fmt: skip
    walkers = batch(molecule.system, theirs.positions[-1], 64, dtype=torch.float32)
    walkers.draw_velocities()
    walkers.advance(600)
    energies = []
    for _ in range(10):
        walkers.advance(40)
        energies.append(walkers.potential_energy().mean())
    blocks = theirs.potential_energy.reshape(10, -1).mean(1)
    error = blocks.std(ddof=1) / math.sqrt(len(blocks))
    assert float(torch.stack(energies).mean()) == pytest.approx(blocks.mean(), abs=5 * math.hypot(error, 0.6))


def test_what_cannot_be_batched_says_why():
    constrained = systems.load("alanine_dipeptide", constraints=app.HBonds)
    with pytest.raises(InputError, match="it has constraints"):
        batch(constrained.system, constrained.positions, 2)
    massless = openmm.System()
    massless.addParticle(0.0)
    assert batchable(massless) == "it has particles without mass"
    odd = openmm.System()
    odd.addParticle(1.0)
    odd.addForce(openmm.CustomCVForce("0"))
    assert batchable(odd) is None or "has no torch form" in batchable(odd)
    assert batchable(oscillators()) is None


def test_wrong_input_is_refused():
    with pytest.raises(InputError, match="shape"):
        batch(oscillators(), np.zeros((3, 3)), 2)
    with pytest.raises(InputError, match="NaN"):
        batch(oscillators(), np.full((2, 3), np.nan), 2)
    with pytest.raises(InputError, match="3 temperatures for 2 walkers"):
        batch(oscillators(), np.zeros((2, 3)), 2, temperature=[300, 300, 300])


def test_a_broken_walker_is_reported_and_never_goes_on():
    molecule = systems.load("alanine_dipeptide")
    walkers = batch(molecule.system, molecule.positions, 3, timestep=0.05)
    walkers.draw_velocities()
    with pytest.raises(InputError, match="shorten the time step"):
        walkers.advance(200)


def ladders(**change):
    settings = {
        "system": double_well(), "positions": [[-0.1, 0.0, 0.0]], "temperatures": [150, 300, 600],
        "n_iterations": 40, "steps_per_iteration": 20, "friction": 5.0, "timestep": 0.004, "ladders": 50, "seed": 3,
        "progress": False, "minimize": False,
    }  # fmt: skip
    return replica_exchange(**(settings | change))


def test_ladders_give_the_populations_of_every_temperature():
    result = ladders(n_iterations=200, equilibration_iterations=100, keep=(0, 1, 2))
    assert result.frames[0].shape == (50 * 200, 1, 3) and result.potential_energy.shape == (50 * 200, 3)
    for index, temperature in enumerate((150, 300, 600)):
        right = (result.frames[index][:, 0, 0] > 0).reshape(50, -1).mean(1)
        error = right.std(ddof=1) / math.sqrt(50)
        assert right.mean() == pytest.approx(right_share(temperature), abs=4 * error)
        assert error < 0.02
    assert result.round_trips.shape == (150,) and result.round_trips.sum() > 100
    assert 0.2 < result.acceptance.min() and result.acceptance.max() < 1


def test_ladders_stand_one_after_the_other():
    result = ladders(keep=(0, 2))
    first = result.walkers.reshape(50, 40, 3)
    # a walker moves by one temperature at most between two iterations of its ladder
    where = np.argsort(first, -1)
    assert np.abs(np.diff(where, axis=1)).max() == 1
    assert (np.sort(result.walkers, -1) == np.arange(3)).all()
    x = result.frames[0][:, 0, 0].reshape(50, 40)
    energy = 4.0 * ((x / 0.1) ** 2 - 1) ** 2 - 5 * x + 500 * (result.frames[0][:, 0, 1:] ** 2).sum(-1).reshape(50, 40)
    assert result.potential_energy.reshape(50, 40, 3)[..., 0] == pytest.approx(energy, abs=1e-3)


def test_ladders_resume_bitwise(tmp_path):
    straight = ladders()
    path = tmp_path / "exchange.npz"
    ladders(n_iterations=15, checkpoint=path)
    resumed = ladders(checkpoint=path, resume=True)
    assert (straight.frames[0] == resumed.frames[0]).all() and (straight.walkers == resumed.walkers).all()
    assert (straight.potential_energy == resumed.potential_energy).all()
    assert straight.force_evaluations == resumed.force_evaluations
    with pytest.raises(InputError, match="ladders"):
        ladders(checkpoint=path, resume=True, ladders=20)


def test_ladders_run_in_openmm_where_torch_cannot(tmp_path):
    molecule = systems.load("alanine_dipeptide", constraints=app.HBonds)
    result = replica_exchange(
        molecule.system, molecule.positions, temperatures=[300, 400], n_iterations=2, steps_per_iteration=3, ladders=2,
        seed=1, progress=False,
    )  # fmt: skip
    assert result.frames[0].shape == (4, 22, 3)
    bond = np.linalg.norm(result.frames[0][:, 1] - result.frames[0][:, 0], axis=-1)
    assert np.ptp(bond) < 1e-5


def test_bursts_in_torch_are_reproducible_and_count_what_they_cost():
    molecule = systems.load("alanine_dipeptide")
    frames = molecule.positions[None].repeat(3, 0)
    one, two = (
        bursts(molecule.system, frames, temperature=300, n_bursts=4, steps=6, seed=1, progress=False) for _ in range(2)
    )
    assert (one.positions == two.positions).all() and one.positions.shape == (12, 22, 3)
    # lengths 3 to 9, two forces for velocities, one energy
    assert 12 * (3 + 3) <= one.force_evaluations <= 12 * (9 + 3)
    kept = [np.abs(one.positions[i] - one.positions[j]).max() for i in range(12) for j in range(i)]
    assert min(kept) > 1e-4


def test_cooling_gives_the_ratio_of_partition_functions():
    # Z of a classical oscillator grows as T^(d/2)
    result = cool(
        oscillators(), np.zeros((2, 3)), temperatures=np.geomspace(900, 300, 8), n_walkers=1500,
        equilibration_steps=300, steps_per_temperature=150, friction=5.0, timestep=0.005, seed=1, progress=False,
    )  # fmt: skip
    assert result.log_z_ratio == pytest.approx(3 * math.log(300 / 900), abs=0.06)
    weights = np.exp(result.log_weights - result.log_weights.max())
    square = (weights[:, None] * result.positions[:, 1] ** 2).sum(0) / weights.sum()
    assert square.mean() == pytest.approx(KT / 300, rel=0.08)


@pytest.mark.parametrize("resample_below", [0.0, 0.9])
def test_cooling_keeps_the_populations_that_walkers_could_not_reach(resample_below):
    depth = 12.0  # some ten kT at the end: nobody crosses there
    result = cool(
        double_well(depth), [[-0.1, 0.0, 0.0]], temperatures=np.geomspace(1200, 150, 12), n_walkers=3000,
        equilibration_steps=800, steps_per_temperature=60, friction=5.0, timestep=0.004, seed=2, progress=False,
        resample_below=resample_below,
    )  # fmt: skip
    weights = np.exp(result.log_weights - result.log_weights.max())
    right = (weights * (result.positions[:, 0, 0] > 0)).sum() / weights.sum()
    assert right == pytest.approx(right_share(150, depth), abs=0.04)
    assert (np.bincount(result.ancestors).max() > 1) == (resample_below > 0)


def test_cooling_refuses_a_rising_ladder():
    with pytest.raises(InputError, match="each below the one before"):
        cool(
            oscillators(), np.zeros((2, 3)), temperatures=[300, 400], n_walkers=2, equilibration_steps=1,
            steps_per_temperature=1, seed=0,
        )  # fmt: skip
