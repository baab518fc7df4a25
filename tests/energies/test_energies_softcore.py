"""The energy regularised pair by pair: Theorem 1's properties, the force field file, and dynamics on it."""

from __future__ import annotations

import copy
import math

import numpy as np
import openmm
import pytest
import torch
from openmm import app, unit

import openmm_bg as bg
from openmm_bg.energies.readers.nonbonded import COULOMB
from openmm_bg.energies.softcore import pair_energy, soften
from openmm_bg.errors import InputError

KT = 2.494338785445972


@pytest.fixture(scope="module")
def molecule() -> bg.systems.Molecule:
    return bg.systems.load("alanine_dipeptide")


@pytest.fixture(scope="module")
def frames(molecule: bg.systems.Molecule) -> torch.Tensor:
    noise = np.random.default_rng(0).normal(size=(30, 22, 3))
    return torch.as_tensor(molecule.positions + 0.006 * noise)


def pair(charge: float, other: float, epsilon: float = 0.5) -> openmm.System:
    system = openmm.System()
    force = openmm.NonbondedForce()
    for q in (charge, other):
        system.addParticle(20.0)
        force.addParticle(q, 0.3, epsilon)
    system.addForce(force)
    return system


def apart(distances: np.ndarray) -> torch.Tensor:
    x = torch.zeros(len(distances), 2, 3, dtype=torch.float64)
    x[:, 1, 0] = torch.as_tensor(distances)
    return x


def test_nothing_changes_below_the_threshold(molecule: bg.systems.Molecule, frames: torch.Tensor) -> None:
    """(iv), bitwise against the same System without caps, and up to rounding against the original."""
    energy = bg.ForceFieldEnergy(molecule.system, 300)
    soft = bg.regularize(energy, 1000.0, "pairwise")
    u = energy(frames)
    below = u <= 1000.0
    assert below.all() and soft.exempt_pairs == []
    uncapped = bg.ForceFieldEnergy(soften(molecule.system, 300, math.inf).system, 300)
    assert torch.equal(soft(frames), uncapped(frames))
    torch.testing.assert_close(soft(frames), u, rtol=1e-12, atol=1e-10)
    torch.testing.assert_close(
        soft.value_and_gradient(frames)[1], energy.value_and_gradient(frames)[1], rtol=1e-10, atol=1e-8
    )


@pytest.mark.parametrize("charges", [(0.5, -0.5), (0.5, 0.5), (0.0, 0.0), (3.0, 3.0), (1.0, -1.0)])
@pytest.mark.parametrize("threshold", [5.0, 100.0])
def test_every_capped_distance_lies_above_the_threshold(charges: tuple[float, float], threshold: float) -> None:
    """(iv) over the whole range of one pair, in both directions, and (i) and (ii) along it."""
    system = pair(*charges)
    soft = soften(system, 300, threshold)
    r = np.geomspace(1e-4, 2.0, 4000)
    u = bg.ForceFieldEnergy(system, 300)(apart(r))
    capped = bg.ForceFieldEnergy(soft.system, 300)(apart(r))
    below = u <= threshold
    torch.testing.assert_close(capped[below], u[below], rtol=1e-12, atol=1e-12)
    assert (capped[~below] > threshold - 1e-9).all()
    assert abs(float(pair_energy(soft.radii, *_parameters(*charges))[0]) - (threshold * KT + soft.depth)) < 1e-6 * KT

    energy = bg.ForceFieldEnergy(soft.system, 300)
    r = np.linspace(0.0, 1.5 * soft.radii[0], 20001)
    u, gradient = energy.value_and_gradient(apart(r))
    slope = gradient[:, 1, 0]
    assert torch.isfinite(u).all() and float(slope[0]) == 0.0
    # continuous: no step of value or slope beyond what the next derivative allows
    h = r[1] - r[0]
    torch.testing.assert_close(
        torch.gradient(u, spacing=(torch.as_tensor(r),))[0][1:-1], slope[1:-1], rtol=1e-2, atol=50
    )
    assert float(slope.abs().max()) < 2 * float(slope.abs()[np.searchsorted(r, soft.radii[0]) + 1]) + 1
    assert float(slope.diff().abs().max()) < 20 * h * float(slope.abs().max()) / soft.radii[0]


def _parameters(a: float, b: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return np.array([COULOMB * a * b]), np.array([0.3]), np.array([0.5])


def test_converges_as_the_threshold_grows() -> None:
    """(iii)"""
    x = apart(np.array([0.12, 0.15, 0.2]))
    u = bg.ForceFieldEnergy(pair(0.5, -0.5), 300)(x)
    errors = [
        float((bg.ForceFieldEnergy(soften(pair(0.5, -0.5), 300, c).system, 300)(x) - u).abs().max())
        for c in (1e1, 1e3, 1e5, 1e7)
    ]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-6 < errors[0]


@pytest.mark.parametrize("threshold", [1.0, 2.0, 4.0, 8.0])
def test_error_bound_of_an_ion_pair(threshold: float) -> None:
    """||rho_eps - rho||_1 <= 2 |Omega| exp(-c) / Z for two ions with Lennard-Jones in a ball of radius 1 nm."""
    r = np.linspace(1e-5, 1.0, 200001)
    system = pair(0.1, -0.1)
    volume = 4 * np.pi * r**2

    def density(of: openmm.System) -> tuple[np.ndarray, float]:
        weight = np.exp(-bg.ForceFieldEnergy(of, 300)(apart(r)).numpy()) * volume
        z = float(np.trapezoid(weight, r))
        return weight / z, z

    soft = soften(system, 300, threshold)
    (exact, z), (bounded, _) = density(system), density(soft.system)
    distance = float(np.trapezoid(np.abs(exact - bounded), r))
    assert 0 < distance <= 2 * (4 / 3 * np.pi) * math.exp(-threshold) / z


@pytest.mark.parametrize("threshold", [2.0, 4.0, 8.0])
@pytest.mark.parametrize("kind", ["rational", "smooth"])
def test_error_bound_of_the_double_well(threshold: float, kind: str) -> None:
    """The same bound in a box, for the total form."""
    energy = bg.systems.load("double_well")
    axis = torch.linspace(-3, 3, 601, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    u = energy(grid)
    lowest = float(u.min())
    v = bg.regularize(energy, threshold, kind, offset=lowest)(grid)
    cell = float(axis[1] - axis[0]) ** 2
    z, z_bounded = (float(torch.exp(-w + lowest).sum() * cell) for w in (u, v))
    distance = float((torch.exp(-u + lowest) / z - torch.exp(-v + lowest) / z_bounded).abs().sum() * cell)
    assert 0 < distance <= 2 * 36.0 * math.exp(-threshold) / z


def test_opposite_charges_without_repulsion_are_listed() -> None:
    soft = soften(pair(0.4, -0.4, epsilon=0.0), 300, 50.0)
    assert soft.exempt_pairs == [(0, 1)] and soft.radii.tolist() == [0.05]
    u = bg.ForceFieldEnergy(soft.system, 300)(apart(np.array([0.0, 0.05, 0.2])))
    assert torch.isfinite(u).all()
    torch.testing.assert_close(u[1:] * KT, torch.tensor([-0.16 * COULOMB / 0.05, -0.16 * COULOMB / 0.2]).double())


def test_collisions_are_finite(molecule: bg.systems.Molecule, frames: torch.Tensor) -> None:
    soft = bg.regularize(bg.ForceFieldEnergy(molecule.system, 300), 100.0, "pairwise")
    x = frames[:4].clone()
    x[0, 5] = x[0, 18]
    x[1, 2] = x[1, 15]
    x[2, 1] = x[2, 12] + 1e-7
    u, gradient = soft.value_and_gradient(x)
    assert torch.isfinite(u).all() and torch.isfinite(gradient).all() and (u[:3] > 100).all()
    reference = bg.ContextEnergy(soft.softened.system, 300, platform="Reference")
    torch.testing.assert_close(u, reference(x), rtol=1e-10, atol=1e-8)
    # OpenMM divides by r on the way to a force, so that exact coincidence is left out
    _, expected = reference.value_and_gradient(x[2:])
    torch.testing.assert_close(gradient[2:], expected, rtol=1e-7, atol=1e-4)


def test_force_field_file_in_any_order(molecule: bg.systems.Molecule, frames: torch.Tensor) -> None:
    names = ["amber99sbildn.xml", "amber99_obc.xml"]
    expected = bg.ForceFieldEnergy(molecule.system, 300)(frames[:3])
    for files in ([*names, "softcore.xml"], ["softcore.xml", *names]):
        system = app.ForceField(*files).createSystem(molecule.topology)
        assert not any(isinstance(force, openmm.NonbondedForce) for force in system.getForces())
        torch.testing.assert_close(bg.ForceFieldEnergy(system, 300)(frames[:3]), expected, rtol=1e-11, atol=1e-9)
    field = app.ForceField(*names, "softcore.xml")
    gentle = field.createSystem(molecule.topology, softcoreThreshold=20.0, softcoreTemperature=310 * unit.kelvin)
    wanted = soften(molecule.system, 310, 20.0).radii
    (bonds,) = [force for force in gentle.getForces() if isinstance(force, openmm.CustomBondForce)]
    found = [bonds.getBondParameters(n)[2][0] for n in range(bonds.getNumBonds())]
    np.testing.assert_allclose(sorted(found), sorted(wanted))
    with pytest.raises(InputError, match="without cutoff"):
        field.createSystem(molecule.topology, nonbondedMethod=app.CutoffNonPeriodic)


def test_dynamics_starts_from_a_collision(molecule: bg.systems.Molecule) -> None:
    system = soften(molecule.system, 300, 100.0).system
    integrator = openmm.LangevinMiddleIntegrator(300, 10, 0.0005)
    context = openmm.Context(system, integrator, openmm.Platform.getPlatform("Reference"))
    x = molecule.positions.copy()
    x[5] = x[18] + 1e-4
    context.setPositions(x)
    openmm.LocalEnergyMinimizer.minimize(context, maxIterations=100)
    integrator.step(100)
    assert math.isfinite(context.getState(energy=True).getPotentialEnergy()._value)


def test_wrong_input(molecule: bg.systems.Molecule) -> None:
    with pytest.raises(InputError, match="one NonbondedForce"):
        soften(openmm.System(), 300, 100.0)
    with pytest.raises(InputError, match="positive"):
        soften(molecule.system, 300, -1.0)
    unknown = copy.deepcopy(molecule.system)
    unknown.addForce(openmm.CustomBondForce("-r"))
    with pytest.raises(InputError, match=r"CustomBondForce.*other_depth"):
        soften(unknown, 300, 100.0)
    assert soften(unknown, 300, 100.0, other_depth=10.0).depth == soften(molecule.system, 300, 100.0).depth + 10
    with pytest.raises(InputError, match="ForceFieldEnergy"):
        bg.regularize(bg.systems.load("double_well"), 10.0, "pairwise")
