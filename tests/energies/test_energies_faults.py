"""Faults known from other libraries: each would make a wrong ensemble without a word."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable

import numpy as np
import openmm
import pytest
import torch
from openmm import app, unit

from openmm_bg.energies import ContextEnergy, Energy, ForceFieldEnergy
from openmm_bg.errors import InputError

PLATFORMS = [openmm.Platform.getPlatform(i).getName() for i in range(openmm.Platform.getNumPlatforms())]


@pytest.fixture(scope="module")
def peptide() -> tuple[openmm.System, torch.Tensor]:
    """ACE-ALA-NME with implicit solvent, and 64 thermal conformations in nm."""
    from openmmtools.testsystems import AlanineDipeptideVacuum

    geometry = AlanineDipeptideVacuum(constraints=None)
    field = app.ForceField("amber99sbildn.xml", "amber99_obc.xml")
    system = field.createSystem(geometry.topology, nonbondedMethod=app.NoCutoff, constraints=None)
    noise = 0.005 * np.random.default_rng(0).normal(size=(64, 22, 3))
    return system, torch.as_tensor(geometry.positions.value_in_unit(unit.nanometer) + noise)


MAKERS: dict[str, Callable[[openmm.System], Energy]] = {
    "torch": lambda system: ForceFieldEnergy(system, 300),
    **{name: lambda system, name=name: ContextEnergy(system, 300, platform=name) for name in PLATFORMS},
}


@pytest.fixture(params=list(MAKERS))
def energy(request: pytest.FixtureRequest, peptide: tuple[openmm.System, torch.Tensor]) -> Energy:
    return MAKERS[request.param](peptide[0])


def test_one_replaced_row_is_seen(energy: Energy, peptide: tuple[openmm.System, torch.Tensor]) -> None:
    x = peptide[1].clone()
    before = energy(x)
    x[30] = x[31]
    after = energy(x)
    assert after[30] == before[31] != before[30]
    assert torch.equal(after[:30], before[:30]) and torch.equal(after[31:], before[31:])


def test_one_atom_moved_by_little_is_seen(energy: Energy, peptide: tuple[openmm.System, torch.Tensor]) -> None:
    x = peptide[1][:1].clone()
    u, gradient = energy.value_and_gradient(x)
    x[0, 8, 0] += 2e-5
    assert float(energy(x) - u) == pytest.approx(2e-5 * float(gradient[0, 8, 0]), rel=0.1, abs=1e-4)
    assert energy(x) != u


def test_two_energies_do_not_mix(peptide: tuple[openmm.System, torch.Tensor]) -> None:
    system, x = peptide
    cold, hot = ContextEnergy(system, 300), ContextEnergy(system, 600)
    bonds = ContextEnergy(system, 300, forces=[0])
    a, b, c = cold(x[:1]), hot(x[1:2]), bonds(x[:1])
    assert torch.equal(cold(x[:1]), a) and torch.equal(hot(x[1:2]), b) and torch.equal(bonds(x[:1]), c)
    torch.testing.assert_close(2 * hot(x[:1]), a)
    assert not torch.equal(c, a)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_bad_coordinates(energy: Energy, peptide: tuple[openmm.System, torch.Tensor], value: float) -> None:
    assert_infinite(energy, peptide[1][:5], 2, lambda row: row[7, 1].fill_(value))


@pytest.mark.parametrize("pair", [(4, 5), (4, 6), (0, 21)], ids=["bonded", "angle", "distant"])
def test_coincident_atoms(energy: Energy, peptide: tuple[openmm.System, torch.Tensor], pair: tuple[int, int]) -> None:
    assert_infinite(energy, peptide[1][:5], 2, lambda row: row[pair[0]].copy_(row[pair[1]]))


def assert_infinite(energy: Energy, x: torch.Tensor, row: int, spoil: Callable[[torch.Tensor], object]) -> None:
    """The spoiled row is +inf with zero gradient in every way of asking, the others do not change."""
    others = [i for i in range(len(x)) if i != row]
    u, gradient = energy.value_and_gradient(x)
    x = x.clone()
    spoil(x[row])
    v, spoiled = energy.value_and_gradient(x)
    x.requires_grad_()
    forward = energy(x)
    (by_autograd,) = torch.autograd.grad(forward.sum(), x)
    with torch.no_grad():
        without_graph = energy(x)
    for value in (v, forward, without_graph):
        assert value[row] == torch.inf
        torch.testing.assert_close(value[others], u[others], rtol=1e-12, atol=0)
    for slope in (spoiled, by_autograd):
        assert (slope[row] == 0).all()
        torch.testing.assert_close(slope[others], gradient[others], rtol=1e-10, atol=1e-10)
    all_bad = x[row : row + 1]
    assert (energy(all_bad) == torch.inf).all() and (energy.value_and_gradient(all_bad)[1] == 0).all()


def test_second_derivative_beside_a_bad_row(peptide: tuple[openmm.System, torch.Tensor]) -> None:
    energy = ForceFieldEnergy(peptide[0], 300)
    x = peptide[1][:3].clone()
    x[1, 4] = x[1, 5]
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(energy(x).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), x)
    assert torch.isfinite(second).all() and (second[1] == 0).all() and (second[[0, 2]] != 0).any()


def test_overflow_in_float32(peptide: tuple[openmm.System, torch.Tensor]) -> None:
    energy = ForceFieldEnergy(peptide[0], 300)

    def collide(row: torch.Tensor) -> None:
        row[0] = row[21] + 1e-5

    x = peptide[1][:3].float()
    collide(x[1])
    u, gradient = energy.value_and_gradient(x)
    assert u[1] == torch.inf and (gradient[1] == 0).all() and torch.isfinite(u[[0, 2]]).all()
    torch.testing.assert_close(energy(x), u)


def test_default_platform(peptide: tuple[openmm.System, torch.Tensor]) -> None:
    assert ContextEnergy(peptide[0], 300).platform == "Reference"
    generalized = openmm.System()
    generalized.addParticle(1.0)
    generalized.addForce(openmm.CustomGBForce())
    assert ContextEnergy(generalized, 300).platform == "CPU"
    assert ContextEnergy(generalized, 300, platform="Reference").platform == "Reference"
    with pytest.raises(InputError, match="Reference"):
        ContextEnergy(peptide[0], 300, platform="reference")
    with pytest.raises(InputError, match="Force 99"):
        ContextEnergy(peptide[0], 300, forces=[99])


def test_the_platform_named_is_the_platform_used(peptide: tuple[openmm.System, torch.Tensor]) -> None:
    for name in PLATFORMS:
        energy = ContextEnergy(peptide[0], 300, platform=name)
        energy(peptide[1][:1])
        assert energy._local.context.getPlatform().getName() == name


def test_other_exceptions_are_raised() -> None:
    system = openmm.System()
    system.addParticle(1.0)
    force = openmm.CustomExternalForce("x^2*missing")
    force.addParticle(0)
    system.addForce(force)
    with pytest.raises(openmm.OpenMMException, match="missing"):
        ContextEnergy(system, 300)(torch.zeros(1, 1, 3))


def test_copies_of_a_context_energy_work(peptide: tuple[openmm.System, torch.Tensor]) -> None:
    energy = ContextEnergy(peptide[0], 300)
    expected = energy(peptide[1][:2])
    assert torch.equal(copy.deepcopy(energy)(peptide[1][:2]), expected)
    assert torch.equal(pickle.loads(pickle.dumps(energy))(peptide[1][:2]), expected)


def with_walls(system: openmm.System) -> openmm.System:
    """With a force that has no torch formula."""
    system = copy.deepcopy(system)
    walls = openmm.CustomCVForce("k*wall")
    walls.addGlobalParameter("k", 3.0)
    wall = openmm.CustomExternalForce("x^4 + y^2*z^2")
    for i in range(system.getNumParticles()):
        wall.addParticle(i)
    walls.addCollectiveVariable("wall", wall)
    system.addForce(walls)
    return system


def test_fallback(peptide: tuple[openmm.System, torch.Tensor]) -> None:
    system, x = with_walls(peptide[0]), peptide[1][:4]
    with pytest.warns(UserWarning, match="CustomCVForce") as record:
        energy = ForceFieldEnergy(system, 300)
    assert len(record) == 1 and energy.fallback == ("CustomCVForce",) and len(energy.native) == 5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        u, gradient = energy.value_and_gradient(x)
    v, expected = ContextEnergy(system, 300).value_and_gradient(x)
    torch.testing.assert_close(u, v, rtol=1e-10, atol=0)
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-9)

    y = x.clone().requires_grad_()
    (by_autograd,) = torch.autograd.grad((2 * energy(y)).sum(), y, create_graph=True)
    torch.testing.assert_close(by_autograd.detach(), 2 * gradient)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(by_autograd.sum(), y)
    assert_infinite(energy, x, 1, lambda row: row[3, 0].fill_(torch.nan))
    assert torch.equal(copy.deepcopy(energy)(x), u)


def test_fallback_platform(peptide: tuple[openmm.System, torch.Tensor]) -> None:
    with pytest.warns(UserWarning, match="on the CPU platform"):
        ForceFieldEnergy(with_walls(peptide[0]), 300, platform="CPU")


def test_fallback_of_features() -> None:
    """Periodic boundaries and Ewald sums are OpenMM's; the sum is the whole System's."""
    rng = np.random.default_rng(0)
    system = openmm.System()
    system.setDefaultPeriodicBoxVectors((1.5, 0, 0), (0, 1.5, 0), (0, 0, 1.5))
    for _ in range(6):
        system.addParticle(12.0)
    plain, periodic = openmm.HarmonicBondForce(), openmm.HarmonicBondForce()
    periodic.setUsesPeriodicBoundaryConditions(True)
    for bonds in (plain, periodic):
        bonds.addBond(0, 5, 0.1, 100.0)
    ewald, offsets = openmm.NonbondedForce(), openmm.NonbondedForce()
    ewald.setNonbondedMethod(openmm.NonbondedForce.PME)
    ewald.setCutoffDistance(0.6)
    offsets.addGlobalParameter("scale", 0.5)
    for force in (ewald, offsets):
        for i in range(6):
            force.addParticle(0.3 * (-1) ** i, 0.2, 0.5)
    offsets.addParticleParameterOffset("scale", 2, 1.0, 0.0, 0.0)
    for force in (plain, periodic, ewald, offsets, openmm.MonteCarloBarostat(1, 300)):
        system.addForce(force)
    with pytest.warns(UserWarning, match=r"BondForce \(periodic\).*NonbondedForce \(periodic"):
        energy = ForceFieldEnergy(system, 300)
    assert energy.native == ("HarmonicBondForce", "NonbondedForce") and len(energy.fallback) == 2
    x = torch.as_tensor(rng.uniform(0, 3, size=(3, 6, 3)))
    torch.testing.assert_close(
        energy.value_and_gradient(x), ContextEnergy(system, 300).value_and_gradient(x), rtol=1e-9, atol=1e-9
    )
