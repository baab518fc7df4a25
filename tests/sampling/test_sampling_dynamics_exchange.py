"""Replica exchange and bursts: exact populations, reproducibility across threads and interruptions."""

import math
import os
import signal
import threading

import numpy as np
import openmm
import pytest
from scipy.integrate import quad

from openmm_bg import systems
from openmm_bg.errors import InputError
from openmm_bg.sampling.bursts import bursts
from openmm_bg.sampling.dynamics import simulate
from openmm_bg.sampling.replica_exchange import (
    ReplicaExchange,
    ReplicaExchangeResult,
    geometric_temperatures,
    replica_exchange,
)
from openmm_bg.units import GAS_CONSTANT


@pytest.fixture(scope="module")
def molecule():
    return systems.load("alanine_dipeptide")


HEIGHT, TILT, STIFF = 15.0, 2.0, 50.0


def double_well():
    """One particle in an uneven double well along x; plain dynamics at 300 K (barrier 6 kT) hardly ever crosses."""
    system = openmm.System()
    system.addParticle(10.0)
    force = openmm.CustomExternalForce(f"{HEIGHT}*(x^2-1)^2 + {TILT}*x + {STIFF}*(y^2+z^2)")
    force.addParticle(0)
    system.addForce(force)
    return system


def right_population(temperature):
    beta = 1 / (GAS_CONSTANT * temperature)

    def weight(x):
        return math.exp(-beta * (HEIGHT * (x * x - 1) ** 2 + TILT * x))

    right, left = quad(weight, 0, 4)[0], quad(weight, -4, 0)[0]
    return right / (right + left)


def exchange(**change):
    settings = {
        "system": double_well(),
        "positions": [[1.0, 0, 0]],
        "temperatures": geometric_temperatures(300, 2400, 4),
        "n_iterations": 12,
        "steps_per_iteration": 40,
        "timestep": 0.02,
        "friction": 0.5,
        "seed": 3,
        "minimize": False,
        "progress": False,
    }
    return replica_exchange(**(settings | change))


def same(a: ReplicaExchangeResult, b: ReplicaExchangeResult) -> bool:
    return (
        a.force_evaluations == b.force_evaluations
        and all(
            np.array_equal(getattr(a, name), getattr(b, name))
            for name in ("potential_energy", "walkers", "exchanges_tried", "exchanges_accepted", "round_trips")
        )
        and all(np.array_equal(a.frames[index], b.frames[index]) for index in a.frames)
    )


def test_populations_of_every_temperature_are_exact():
    result = exchange(n_iterations=8_000, equilibration_iterations=200, keep=range(4), workers=1)
    for index, temperature in enumerate(result.temperatures):
        right = result.frames[index][:, 0, 0] > 0
        blocks = right.reshape(40, -1).mean(1)
        error = blocks.std(ddof=1) / math.sqrt(40)
        assert error < 0.025
        assert abs(right.mean() - right_population(temperature)) < 4 * error
        # The stiff directions: <(y^2 + z^2) STIFF> = kT.
        energy = STIFF * (result.frames[index][:, 0, 1:] ** 2).sum(1)
        assert energy.mean() == pytest.approx(GAS_CONSTANT * temperature, rel=0.06)
    assert (result.acceptance > 0.3).all()
    assert result.round_trips.sum() > 100
    x = result.frames[0][:, 0]
    expected = HEIGHT * (x[:, 0] ** 2 - 1) ** 2 + TILT * x[:, 0] + STIFF * (x[:, 1:] ** 2).sum(1)
    np.testing.assert_allclose(result.potential_energy[:, 0], expected, rtol=1e-9)


def test_number_of_threads_does_not_change_the_numbers(molecule):
    def run(workers):
        return replica_exchange(
            molecule.system,
            molecule.positions,
            temperatures=geometric_temperatures(300, 600, 4),
            n_iterations=6,
            steps_per_iteration=60,
            seed=8,
            workers=workers,
            progress=False,
        )

    assert same(run(1), run(3))


def test_seed_reproduces_and_matters():
    assert same(exchange(), exchange())
    assert not same(exchange(), exchange(seed=4))


def test_resume_equals_an_uninterrupted_run(tmp_path):
    path = tmp_path / "run.npz"
    settings = {"equilibration_iterations": 5, "keep": (0, 2)}
    straight = exchange(n_iterations=20, **settings)
    for total in (4, 11, 20):
        resumed = exchange(n_iterations=total, checkpoint=path, resume=True, **settings)
    assert same(straight, resumed)
    assert [file.name for file in tmp_path.iterdir()] == ["run.npz"]


def test_resume_of_a_molecule_is_bitwise(molecule, tmp_path):
    def run(**settings):
        return replica_exchange(
            molecule.system,
            molecule.positions,
            temperatures=[300, 360],
            steps_per_iteration=50,
            seed=8,
            progress=False,
            **settings,
        )

    run(n_iterations=3, checkpoint=tmp_path / "a.npz")
    assert same(run(n_iterations=6), run(n_iterations=6, checkpoint=tmp_path / "a.npz", resume=True))


def test_interrupted_equilibration_resumes(tmp_path):
    path = tmp_path / "run.npz"

    def build():
        return ReplicaExchange(
            double_well(), [[1.0, 0, 0]], temperatures=[300, 900], seed=1, timestep=0.02, steps_per_iteration=10
        )

    first = build()
    first.run(3, record=False, checkpoint=path, progress=False)
    resumed = replica_exchange(
        double_well(),
        [[1.0, 0, 0]],
        temperatures=[300, 900],
        seed=1,
        timestep=0.02,
        steps_per_iteration=10,
        equilibration_iterations=5,
        n_iterations=4,
        checkpoint=path,
        resume=True,
        progress=False,
    )
    straight = build()
    straight.run(5, record=False, progress=False)
    straight.run(4, progress=False)
    assert same(straight.result(), resumed)


@pytest.mark.skipif(threading.current_thread() is not threading.main_thread(), reason="signals need the main thread")
def test_interrupt_finishes_the_iteration_and_saves(tmp_path):
    path = tmp_path / "run.npz"

    def press(run):
        if len(run) == 5:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        exchange(n_iterations=1000, checkpoint=path, callback=press)
    assert signal.getsignal(signal.SIGINT) is before
    assert same(exchange(n_iterations=9), exchange(n_iterations=9, checkpoint=path, resume=True))


def test_checkpoints_of_other_runs_are_refused(tmp_path):
    path = tmp_path / "run.npz"
    exchange(checkpoint=path)
    with pytest.raises(InputError, match="exists already: pass resume=True"):
        exchange(checkpoint=path)
    with pytest.raises(InputError, match=r"another run \(it differs in seed\)"):
        exchange(checkpoint=path, resume=True, seed=9)
    with pytest.raises(InputError, match=r"differs in temperatures"):
        exchange(checkpoint=path, resume=True, temperatures=[300, 700, 900, 1000])
    with pytest.raises(InputError, match="needs the checkpoint"):
        exchange(resume=True)
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(InputError, match="damaged"):
        exchange(checkpoint=path, resume=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperatures": [300]}, "at least two temperatures in rising order"),
        ({"temperatures": [400, 300]}, "rising order"),
        ({"temperatures": [300, math.nan]}, "temperature must be"),
        ({"keep": (7,)}, "keep must name temperatures"),
        ({"keep": ()}, "keep must name temperatures"),
        ({"n_iterations": 0}, "n_iterations must be"),
        ({"workers": 0}, "workers must be"),
        ({"positions": [[np.nan, 0, 0]]}, "NaN or infinite"),
    ],
)
def test_bad_input_is_refused(change, message):
    with pytest.raises(InputError, match=message):
        exchange(**change)


def test_round_trips_are_counted_from_the_bottom():
    # Walker 0: bottom, top, bottom = one trip. Walker 1: top, bottom, top = none yet.
    walkers = np.array([[0, 1], [1, 0], [0, 1]])
    result = ReplicaExchangeResult(
        np.array([300.0, 400.0]), np.zeros((3, 2)), walkers, np.zeros(1), np.zeros(1), {}, 0, 0
    )
    assert result.round_trips.tolist() == [1, 0]
    assert np.isnan(result.acceptance).all()
    with pytest.raises(InputError, match="not kept"):
        result.trajectory(0)


def test_lowest_trajectory():
    result = exchange(keep=(0, 3))
    run = result.trajectory(3)
    assert run.temperature == pytest.approx(2400) and run.positions.shape == (12, 1, 3)
    assert np.array_equal(run.potential_energy, result.potential_energy[:, 3])
    # Per replica: two for the first velocities, then 40 steps and one energy per iteration.
    assert result.force_evaluations == 4 * (2 + 12 * 41)


def test_geometric_temperatures():
    ladder = geometric_temperatures(300, 1000, 6)
    np.testing.assert_allclose(ladder[1:] / ladder[:-1], (1000 / 300) ** 0.2)
    assert ladder[0] == 300 and ladder[-1] == pytest.approx(1000)
    with pytest.raises(InputError, match="must lie above"):
        geometric_temperatures(400, 300, 3)


@pytest.fixture(scope="module")
def frames(molecule):
    return simulate(
        molecule.system,
        molecule.positions,
        temperature=300,
        n_frames=40,
        steps_per_frame=200,
        equilibration_steps=4000,
        seed=2,
        progress=False,
    )


def backbone(x):
    def dihedral(i, j, k, m):
        a, b, c = x[:, j] - x[:, i], x[:, k] - x[:, j], x[:, m] - x[:, k]
        n1, n2 = np.cross(a, b), np.cross(b, c)
        return np.arctan2((np.cross(n1, n2) * b).sum(1) / np.linalg.norm(b, axis=1), (n1 * n2).sum(1))

    return np.stack([dihedral(4, 6, 8, 14), dihedral(6, 8, 14, 16)], axis=1)


def test_bursts_keep_torsions_and_renew_bonds(molecule, frames):
    run = bursts(molecule.system, frames.positions, temperature=300, n_bursts=8, seed=5, progress=False)
    assert run.positions.shape == (320, 22, 3) and len(run.potential_energy) == 320
    start = np.repeat(frames.positions, 8, axis=0)
    turn = np.angle(np.exp(1j * (backbone(run.positions) - backbone(start))))
    assert np.sqrt((turn**2).mean()) < 0.25  # rad

    bonds = np.array([(a.index, b.index) for a, b in molecule.topology.bonds()])

    def lengths(x):
        return np.linalg.norm(x[:, bonds[:, 0]] - x[:, bonds[:, 1]], axis=2)

    before, after = lengths(start), lengths(run.positions)
    correlation = [np.corrcoef(before[:, b], after[:, b])[0, 1] for b in range(len(bonds))]
    assert np.max(np.abs(correlation)) < 0.6 and np.mean(np.abs(correlation)) < 0.3
    # Bursts of one frame differ from each other by as much as equilibrium bonds do.
    within = after.reshape(40, 8, -1).std(axis=1, ddof=1).mean(0)
    assert (within > 0.6 * lengths(frames.positions).std(0)).all()
    assert within.mean() > 0.85 * lengths(frames.positions).std(0).mean()


@pytest.mark.parametrize("timestep", [0.02, 0.1])
def test_bursts_stay_in_equilibrium(timestep):
    """Harmonic oscillators in equilibrium stay there from the first step on, at omega dt = 0.18 and at 0.91."""
    n, k, sigma = 500, 1000.0, math.sqrt(GAS_CONSTANT * 300 / 1000)
    system, force = openmm.System(), openmm.CustomExternalForce(f"{k / 2}*(x^2+y^2+z^2)")
    for i in range(n):
        system.addParticle(12.0)
        force.addParticle(i)
    system.addForce(force)
    frames = sigma * np.random.default_rng(1).standard_normal((60, n, 3))
    settings = {"timestep": timestep, "friction": 1.0, "progress": False, "platform": "Reference"}
    for steps in (1, 2, 3, 7):
        run = bursts(system, frames, temperature=300, n_bursts=2, steps=steps, seed=steps, **settings)
        ratio = (run.positions**2).mean() / sigma**2
        # 180,000 values, not quite independent: a standard error of about 0.004. Velocities that ignore the
        # discretisation are off by up to (omega dt)^2 / 4 = 0.2 at the longer step.
        assert abs(ratio - 1) < 0.02


def test_bursts_do_not_depend_on_threads(molecule, frames):
    def run(workers, seed=5):
        return bursts(
            molecule.system,
            frames.positions[:20],
            temperature=300,
            n_bursts=2,
            steps=10,
            seed=seed,
            workers=workers,
            progress=False,
        ).positions

    assert np.array_equal(run(1), run(2))
    assert not np.array_equal(run(1), run(1, seed=6))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"frames": np.zeros((0, 22, 3))}, "frames have the shape"),
        ({"frames": np.zeros((22, 3))}, "frames have the shape"),
        ({"frames": np.full((1, 22, 3), np.inf)}, "NaN or infinite"),
        ({"n_bursts": 0}, "n_bursts must be"),
        ({"steps": 0}, "steps must be"),
        ({"temperature": -1}, "temperature must be"),
    ],
)
def test_bad_burst_input_is_refused(molecule, change, message):
    settings = {"frames": molecule.positions[None], "temperature": 300, "seed": 1, "progress": False}
    with pytest.raises(InputError, match=message):
        bursts(molecule.system, **(settings | change))
