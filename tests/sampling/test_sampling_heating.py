"""Replica exchange from hot walkers: their temperatures, what they cost, and that a run goes on where it was."""

import numpy as np
import openmm
import pytest

from openmm_bg import systems
from openmm_bg.errors import InputError
from openmm_bg.sampling import ReplicaExchange, replica_exchange
from openmm_bg.units import GAS_CONSTANT

ATOMS, MASS, STIFF = 40, 12.0, 1000.0
TEMPERATURES = np.array([300.0, 600.0, 1200.0])
# one ladder runs on Contexts, several in one batch
ONE_AND_MANY = pytest.mark.parametrize("ladders", [1, 8])


def oscillators():
    system, force = openmm.System(), openmm.CustomExternalForce(f"{STIFF / 2}*(x^2+y^2+z^2)")
    for i in range(ATOMS):
        system.addParticle(MASS)
        force.addParticle(i)
    system.addForce(force)
    return system


SETTINGS = {
    "temperatures": TEMPERATURES, "steps_per_iteration": 10, "timestep": 0.01, "friction": 5.0, "seed": 3,
    "minimize": False,
}  # fmt: skip


def build(ladders, **change):
    return ReplicaExchange(oscillators(), np.zeros((ATOMS, 3)), **(SETTINGS | {"ladders": ladders} | change))


def exchange(ladders, **change):
    settings = SETTINGS | {"n_iterations": 6, "heating_steps": 70, "ladders": ladders, "progress": False}
    return replica_exchange(oscillators(), np.zeros((ATOMS, 3)), **(settings | change))


def state(run, path):
    """Positions and velocities, (ladders, temperatures, atoms, 3), as a checkpoint has them."""
    run.save(path)
    with np.load(path, allow_pickle=False) as file:
        return [
            file[name].astype(float).reshape(-1, len(TEMPERATURES), ATOMS, 3) for name in ("positions", "velocities")
        ]


def same(a, b):
    return (
        np.array_equal(a.frames[0], b.frames[0])
        and np.array_equal(a.potential_energy, b.potential_energy)
        and a.force_evaluations == b.force_evaluations
    )


@ONE_AND_MANY
def test_positions_are_hot_and_velocities_those_of_each_temperature(ladders, tmp_path):
    run = build(ladders)
    before = run.result().force_evaluations
    run.heat(400, progress=False)
    # every step of every walker is paid for, and two evaluations for its velocities
    assert run.result().force_evaluations - before == ladders * 3 * 402
    x, v = state(run, tmp_path / "run.npz")
    # closed form: <x^2> = kT/k at the highest temperature everywhere, <v^2> = kT/m at each one's own
    error = 5 * np.sqrt(2 / (3 * ATOMS * ladders))
    hottest = np.full(3, GAS_CONSTANT * TEMPERATURES[-1] / STIFF)
    np.testing.assert_allclose((x**2).mean((0, 2, 3)), hottest, rtol=error)
    np.testing.assert_allclose((v**2).mean((0, 2, 3)), GAS_CONSTANT * TEMPERATURES / MASS, rtol=error)
    # walkers know nothing of each other
    correlation = np.corrcoef(x.reshape(3 * ladders, -1)) - np.eye(3 * ladders)
    assert np.abs(correlation).max() < 5 / np.sqrt(3 * ATOMS)


def test_a_molecule_is_hot_everywhere(tmp_path):
    molecule = systems.load("alanine_dipeptide")
    run = ReplicaExchange(
        molecule.system, molecule.positions, temperatures=[300, 550, 1000], steps_per_iteration=5, seed=1, ladders=16
    )
    run.heat(2000, progress=False)
    run.save(tmp_path / "run.npz")
    context = openmm.Context(
        molecule.system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference")
    )
    energy = []
    with np.load(tmp_path / "run.npz", allow_pickle=False) as file:
        for x in file["positions"].astype(float):
            context.setPositions(x)
            energy.append(context.getState(energy=True).getPotentialEnergy()._value)
    cold, _, hot = np.reshape(energy, (16, 3)).T
    assert abs(cold.mean() - hot.mean()) < 5 * np.std(energy) * np.sqrt(2 / 16)
    # 60 coordinates, most of them harmonic, half a kT each; -60 kJ/mol on average at 300 K
    assert cold.mean() + 60.0 > 0.7 * 30 * GAS_CONSTANT * 700


@ONE_AND_MANY
def test_a_heated_run_resumes_to_the_same_numbers(ladders, tmp_path):
    straight = exchange(ladders)
    for total in (1, 4, 6):
        resumed = exchange(ladders, n_iterations=total, checkpoint=tmp_path / "run.npz", resume=True)
    assert same(straight, resumed)
    assert not same(straight, exchange(ladders, heating_steps=80))


@ONE_AND_MANY
def test_a_long_heating_is_told_of_piece_by_piece(ladders):
    run, told = build(ladders), []
    run._replicas.heat(1001, told.append)
    assert told == [500, 500, 1]


def test_threads_do_not_change_the_numbers():
    assert same(exchange(1, workers=1), exchange(1, workers=3))


def test_an_interrupted_heating_leaves_every_thermostat_at_its_own_temperature(tmp_path):
    def press(steps):
        raise KeyboardInterrupt

    run = build(1)
    with pytest.raises(KeyboardInterrupt):
        run._replicas.heat(20, press)
    run.run(60, progress=False)
    _, v = state(run, tmp_path / "run.npz")
    np.testing.assert_allclose(
        (v**2).mean((0, 2, 3)), GAS_CONSTANT * TEMPERATURES / MASS, rtol=5 * np.sqrt(2 / (3 * ATOMS))
    )


def test_what_cannot_be_heated_is_refused():
    run = build(1)
    with pytest.raises(InputError, match="steps must be"):
        run.heat(0)
    run.run(1, record=False, progress=False)
    with pytest.raises(InputError, match="before the first iteration, and 1 are done"):
        run.heat(10)
    with pytest.raises(InputError, match="heating_steps must be"):
        exchange(1, heating_steps=-1)
