"""Langevin dynamics: closed-form averages, seeds, constraints, refusals."""

import math

import numpy as np
import openmm
import pytest
from openmm import app, unit

from openmm_bg import systems
from openmm_bg.errors import InputError
from openmm_bg.sampling.dynamics import LangevinPropagator, Trajectory, fastest_platform, simulate
from openmm_bg.units import GAS_CONSTANT

KT = GAS_CONSTANT * 300


@pytest.fixture(scope="module")
def molecule():
    return systems.load("alanine_dipeptide")


def oscillators(n=50, k=1000.0, mass=12.0):
    """Independent isotropic harmonic oscillators around the origin."""
    system = openmm.System()
    force = openmm.CustomExternalForce(f"{k / 2}*(x^2+y^2+z^2)")
    for i in range(n):
        system.addParticle(mass)
        force.addParticle(i)
    system.addForce(force)
    return system


def propagator(system, positions, **settings):
    defaults = {"temperature": 300, "timestep": 0.001, "friction": 1.0, "generator": np.random.default_rng(1)}
    return LangevinPropagator(system, positions, **(defaults | settings))


# omega = sqrt(k/m) = 9.1/ps: with dt = 20 fs, omega dt = 0.18; with 100 fs, 0.91. The leapfrog-middle scheme samples
# the positions of a harmonic oscillator exactly at any stable step, with noise after every step or after several.
@pytest.mark.parametrize(("timestep", "friction"), [(0.02, 5.0), (0.1, 0.3), (0.1, 10.0)])
def test_harmonic_oscillator_has_the_exact_variance(timestep, friction):
    run = simulate(
        oscillators(),
        np.zeros((50, 3)),
        temperature=300,
        n_frames=600,
        steps_per_frame=math.ceil(2 / timestep / min(friction, 5)),
        timestep=timestep,
        friction=friction,
        equilibration_steps=math.ceil(5 / timestep / min(friction, 5)),
        seed=4,
        minimize=False,
        progress=False,
    )
    # 150 independent coordinates give the error without assuming independence in time.
    per_coordinate = (run.positions**2).mean(axis=0).ravel() * 1000 / KT
    error = per_coordinate.std(ddof=1) / math.sqrt(per_coordinate.size)
    assert error < 0.01
    assert abs(per_coordinate.mean() - 1) < 4 * error
    np.testing.assert_allclose(run.potential_energy, 500 * (run.positions**2).sum((1, 2)), rtol=1e-10)


def test_velocities_have_the_temperature():
    walker = propagator(oscillators(), np.zeros((50, 3)), temperature=450, timestep=0.02, friction=5.0)
    walker.draw_velocities()
    kinetic = []
    for _ in range(400):
        walker.advance(20)
        kinetic.append((12.0 * walker.velocities**2).mean(axis=0))
    assert np.mean(kinetic) == pytest.approx(GAS_CONSTANT * 450, rel=0.02)


def test_one_step_at_a_time_is_the_middle_scheme():
    """With noise after every step the positions follow kick, half drift, friction and noise, half drift."""
    k, mass, dt, friction = 1000.0, 12.0, 0.01, 40.0  # friction * dt forces noise after every step
    start = np.array([[0.01, -0.02, 0.03]])
    walker = propagator(oscillators(1), start, timestep=dt, friction=friction, generator=np.random.default_rng(7))
    walker.velocities = np.array([[0.5, 0.1, -0.3]])
    x, v = start.copy(), walker.velocities.copy()
    noise = np.random.default_rng(7)
    c = math.exp(-friction * dt)
    for _ in range(10):
        v = v - dt * k / mass * x
        x = x + dt / 2 * v
        v = c * v + math.sqrt((1 - c * c) * KT / mass) * noise.standard_normal((1, 3))
        x = x + dt / 2 * v
    walker.advance(10)
    np.testing.assert_allclose(walker.positions, x, atol=1e-13)
    np.testing.assert_allclose(walker.velocities, v, atol=1e-11)


def test_seeds_reproduce_bitwise_and_differ(molecule):
    def run(seed):
        return simulate(
            molecule.system,
            molecule.positions,
            temperature=300,
            n_frames=3,
            steps_per_frame=60,
            seed=seed,
            progress=False,
        )

    first, again, other = run(5), run(5), run(6)
    assert np.array_equal(first.positions, again.positions)
    assert np.array_equal(first.potential_energy, again.potential_energy)
    assert not np.array_equal(first.positions, other.positions)
    assert first.force_evaluations == 3 * 60 + 3 + 2


def test_kinetic_temperature_of_a_molecule(molecule):
    walker = propagator(molecule.system, molecule.positions, friction=5.0)
    walker.draw_velocities()
    walker.advance(2000)
    masses = np.array([molecule.system.getParticleMass(i)._value for i in range(22)])[:, None]
    kinetic = []
    for _ in range(200):
        walker.advance(50)
        kinetic.append((masses * walker.velocities**2).sum())
    # Velocities are read after the noise, which moves the centre of mass: all 66 degrees of freedom count partly.
    error = np.std(kinetic) / math.sqrt(50)
    assert 63 * KT - 4 * error < np.mean(kinetic) < 66 * KT + 4 * error


def trimer():
    """Masses 12-3-12, both bonds constrained, no potential."""
    system = openmm.System()
    for mass in (12, 3, 12):
        system.addParticle(mass)
    system.addConstraint(0, 1, 0.1)
    system.addConstraint(1, 2, 0.1)
    return system, np.array([[0.0, 0, 0], [0.1, 0, 0], [0.1, 0.1, 0]])


def test_constrained_trimer_has_the_mass_metric_measure():
    system, positions = trimer()
    run = simulate(
        system,
        positions,
        temperature=300,
        n_frames=12_000,
        steps_per_frame=25,
        timestep=0.004,
        friction=5.0,
        equilibration_steps=100,
        seed=2,
        minimize=False,
        progress=False,
    )
    a, b = run.positions[:, 0] - run.positions[:, 1], run.positions[:, 2] - run.positions[:, 1]
    for bond in (a, b):
        np.testing.assert_allclose(np.linalg.norm(bond, axis=1), 0.1, rtol=1e-6)
    squares = ((a * b).sum(1) / 0.01) ** 2
    blocks = squares.reshape(30, -1).mean(1)
    error = blocks.std(ddof=1) / math.sqrt(30)
    assert error < 0.006
    assert abs(squares.mean() - 0.2947) < 4 * error  # 0.3333 without the mass-metric measure


def test_constraints_hold_in_a_molecule():
    molecule = systems.load("alanine_dipeptide", constraints=app.HBonds)
    walker = propagator(molecule.system, molecule.positions, timestep=0.002)
    walker.minimize()
    walker.draw_velocities()
    walker.advance(110)
    for c in range(molecule.system.getNumConstraints()):
        i, j, distance = molecule.system.getConstraintParameters(c)
        bond = walker.positions[i] - walker.positions[j]
        assert np.linalg.norm(bond) == pytest.approx(distance._value, rel=1e-6)
        assert abs(bond @ (walker.velocities[i] - walker.velocities[j])) / 0.1 < 1e-4  # nm/ps along the bond


def test_massless_particles_stay():
    system = oscillators(3)
    system.setParticleMass(1, 0.0)
    start = np.full((3, 3), 0.01)
    walker = propagator(system, start, timestep=0.01)
    walker.draw_velocities()
    walker.advance(60)
    assert np.array_equal(walker.positions[1], start[1])
    assert not np.array_equal(walker.positions[0], start[0])


def test_virtual_sites_follow_their_parents():
    system = oscillators(3)
    system.setParticleMass(2, 0.0)
    system.setVirtualSite(2, openmm.TwoParticleAverageSite(0, 1, 0.25, 0.75))
    walker = propagator(system, np.full((3, 3), 0.01), timestep=0.01)
    walker.draw_velocities()
    walker.advance(60)
    x = walker.positions
    np.testing.assert_allclose(x[2], 0.25 * x[0] + 0.75 * x[1], atol=1e-12)


def test_fastest_platform(molecule):
    assert fastest_platform(molecule.system) == "Reference"
    assert fastest_platform(oscillators(201)) == "CPU"
    system = oscillators(2)
    system.addForce(openmm.CustomGBForce())
    assert fastest_platform(system) == "CPU"


def test_trajectory_file_round_trip(tmp_path):
    run = Trajectory(np.random.default_rng(0).normal(size=(4, 5, 3)), np.arange(4.0), 300.0, 17, 3)
    run.save(tmp_path / "run.npz")
    again = Trajectory.load(tmp_path / "run.npz")
    assert np.array_equal(again.positions, run.positions)
    assert np.array_equal(again.potential_energy, run.potential_energy)
    assert (again.temperature, again.force_evaluations, again.seed, len(again)) == (300.0, 17, 3, 4)
    assert [path.name for path in tmp_path.iterdir()] == ["run.npz"]
    with np.load(tmp_path / "run.npz", allow_pickle=False) as file:
        assert all(file[name].dtype != object for name in file.files)
    (tmp_path / "broken.npz").write_bytes((tmp_path / "run.npz").read_bytes()[:100])
    with pytest.raises(InputError, match="damaged"):
        Trajectory.load(tmp_path / "broken.npz")
    with pytest.raises(InputError, match="no file"):
        Trajectory.load(tmp_path / "missing.npz")


def test_unstable_dynamics_is_an_error(molecule):
    with pytest.raises(InputError, match=r"became unstable.*shorten the time step"):
        simulate(
            molecule.system,
            molecule.positions,
            temperature=300,
            n_frames=1,
            steps_per_frame=2000,
            timestep=0.02,
            seed=1,
            progress=False,
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": math.nan}, "temperature must be"),
        ({"temperature": 0}, "temperature must be"),
        ({"timestep": -0.001}, "time step must be"),
        ({"timestep": 2 * unit.kelvin}, "time step has the unit"),
        ({"friction": 0}, "friction must be"),
        ({"n_frames": 0}, "n_frames must be a whole number"),
        ({"steps_per_frame": 2.5}, "steps_per_frame must be a whole number"),
        ({"equilibration_steps": -1}, "equilibration_steps must be"),
        ({"seed": None}, "seed must be"),
        ({"platform": "Abacus"}, "no OpenMM platform 'Abacus'.*Reference"),
        ({"positions": np.zeros((4, 3))}, r"positions have the shape \(4, 3\)"),
        ({"positions": np.full((3, 3), np.nan)}, "NaN or infinite"),
    ],
)
def test_bad_input_is_refused(change, message):
    settings = {
        "system": oscillators(3),
        "positions": np.zeros((3, 3)),
        "temperature": 300,
        "n_frames": 1,
        "steps_per_frame": 1,
        "seed": 1,
        "progress": False,
    }
    with pytest.raises(InputError, match=message):
        simulate(**(settings | change))


@pytest.mark.parametrize("force", [openmm.AndersenThermostat(300, 1), openmm.MonteCarloBarostat(1, 300)])
def test_thermostats_and_barostats_are_refused(force):
    system = oscillators(2)
    system.addForce(force)
    with pytest.raises(InputError, match=f"holds a {type(force).__name__}: remove it"):
        propagator(system, np.zeros((2, 3)))


def test_quantities_are_accepted():
    run = simulate(
        oscillators(2),
        np.zeros((2, 3)) * unit.angstrom,
        temperature=300 * unit.kelvin,
        n_frames=2,
        steps_per_frame=5,
        timestep=2 * unit.femtosecond,
        friction=1 / unit.picosecond,
        seed=1,
        progress=False,
    )
    assert run.temperature == 300 and run.positions.shape == (2, 2, 3)
