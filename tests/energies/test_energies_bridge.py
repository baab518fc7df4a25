"""OpenMM dynamics on torch energies."""

from __future__ import annotations

from importlib.metadata import entry_points

import numpy as np
import openmm
import pytest
import torch
from openmm import unit

import openmm_bg as bg
from openmm_bg.energies import python_force
from openmm_bg.energies.base import Energy
from openmm_bg.errors import InputError


def alone(molecule: bg.systems.Molecule, force: openmm.Force) -> openmm.Context:
    system = openmm.System()
    for i in range(molecule.system.getNumParticles()):
        system.addParticle(molecule.system.getParticleMass(i))
    system.addForce(force)
    context = openmm.Context(system, openmm.VerletIntegrator(0.0005), openmm.Platform.getPlatform("Reference"))
    context.setPositions(molecule.positions)
    return context


def test_same_energy_forces_and_trajectory() -> None:
    molecule = bg.systems.load("alanine_dipeptide")
    context = alone(molecule, python_force(bg.ForceFieldEnergy(molecule.system, 300)))
    own = openmm.Context(molecule.system, openmm.VerletIntegrator(0.0005), openmm.Platform.getPlatform("Reference"))
    own.setPositions(molecule.positions)
    for steps in (0, 50):
        found = []
        for c in (context, own):
            c.getIntegrator().step(steps)
            state = c.getState(energy=True, forces=True, positions=True)
            found.append((state.getPotentialEnergy()._value, state.getForces(asNumpy=True)._value))
        assert found[0][0] == pytest.approx(found[1][0], rel=1e-9)
        np.testing.assert_allclose(found[0][1], found[1][1], rtol=1e-6, atol=1e-5)


def test_dynamics_on_a_regularised_energy_and_serialisation() -> None:
    molecule = bg.systems.load("alanine_dipeptide")
    soft = bg.regularize(bg.ForceFieldEnergy(molecule.system, 300), 500.0)
    force = python_force(soft)
    copied = openmm.XmlSerializer.deserialize(openmm.XmlSerializer.serialize(force))
    for f in (force, copied):
        energy = alone(molecule, f).getState(energy=True).getPotentialEnergy()
        expected = float(soft(torch.as_tensor(molecule.positions[None]))) * soft.energy.thermal_energy
        assert energy.value_in_unit(unit.kilojoule_per_mole) == pytest.approx(expected)


class Spring(Energy):
    def reduced(self, x: torch.Tensor) -> torch.Tensor:
        return (x**2).sum((1, 2))


def test_part_of_a_system() -> None:
    system = openmm.System()
    for _ in range(4):
        system.addParticle(1.0)
    bg.energies.bridge.PotentialFactory().createImpl("openmm_bg", energy=Spring((2, 3)), temperature=300).addForces(
        None, system, [3, 1], 5
    )
    assert system.getForce(0).getForceGroup() == 5
    context = openmm.Context(system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatform("Reference"))
    x = np.arange(12.0).reshape(4, 3)
    context.setPositions(x)
    forces = context.getState(forces=True).getForces(asNumpy=True)._value
    assert (forces[[0, 2]] == 0).all()
    np.testing.assert_allclose(forces[[1, 3]], -2 * 2.494338785445972 * x[[1, 3]])


def test_openmm_ml_finds_it() -> None:
    (found,) = [e for e in entry_points(group="openmmml.potentials") if e.name == "openmm_bg"]
    assert found.load() is bg.energies.bridge.PotentialFactory


def test_wrong_input() -> None:
    with pytest.raises(InputError, match="event shape"):
        python_force(bg.systems.load("double_well"))
    with pytest.raises(InputError, match="temperature"):
        python_force(Spring((2, 3)))
    with pytest.raises(InputError, match="3 were given"):
        python_force(Spring((2, 3)), 300, [0, 1, 2])
    with pytest.raises(InputError, match="energy"):
        bg.energies.bridge.PotentialFactory().createImpl("openmm_bg")
