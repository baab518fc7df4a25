"""The way back: OpenMM dynamics on an energy written in torch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import openmm
import torch
from openmm import unit

from openmm_bg import units
from openmm_bg.energies.base import Energy
from openmm_bg.errors import InputError


class _Compute:
    """What a PythonForce calls; a class at module level, so that it can be pickled with its energy."""

    def __init__(self, energy: Energy, thermal_energy: float, atoms: list[int] | None) -> None:
        self.energy, self.thermal_energy, self.atoms = energy, thermal_energy, atoms

    def __call__(self, state: openmm.State) -> tuple[float, np.ndarray]:
        positions = state.getPositions(asNumpy=True).value_in_unit(unit.nanometer)
        chosen = positions if self.atoms is None else positions[self.atoms]
        u, gradient = self.energy.value_and_gradient(torch.as_tensor(chosen[None], dtype=torch.float64))
        if not torch.isfinite(u).all():
            raise ValueError("The torch energy of these positions is not finite; start from relaxed positions.")
        forces = np.zeros(positions.shape)
        forces[slice(None) if self.atoms is None else self.atoms] = -self.thermal_energy * gradient[0].numpy()
        return float(u) * self.thermal_energy, forces


def python_force(energy: Energy, temperature: Any = None, atoms: Iterable[int] | None = None) -> openmm.PythonForce:
    """A force that gives OpenMM the energy and forces of a torch energy.

    Parameters
    ----------
    energy
        Its event shape is ``(atoms, 3)``, in nm.
    temperature
        Quantity, or a number in K: what turns the reduced energy into kJ/mol. Not needed for energies that know
        their temperature.
    atoms
        The particles it acts on, in its own order; all by default.

    Returns
    -------
    openmm.PythonForce
        In its own System it gives real dynamics on, say, a regularised energy. It is serialised through pickle. A
        conformation whose energy is not finite stops the simulation with an error.

    Raises
    ------
    InputError
        If the energy is not one of atoms, or no temperature is known.

    Examples
    --------
    >>> import openmm_bg as bg
    >>> molecule = bg.systems.load("alanine_dipeptide")
    >>> soft = bg.regularize(bg.ForceFieldEnergy(molecule.system, 300), threshold=500)
    >>> system = openmm.System()
    >>> for i in range(22):
    ...     _ = system.addParticle(molecule.system.getParticleMass(i))
    >>> _ = system.addForce(python_force(soft))
    """
    if not isinstance(energy, Energy) or len(energy.event_shape) != 2 or energy.event_shape[1] != 3:
        raise InputError("python_force needs an Energy of atoms, with the event shape (atoms, 3).")
    known = temperature
    inner: Any = energy
    while known is None and inner is not None:
        known, inner = getattr(inner, "temperature", None), getattr(inner, "energy", None)
    if known is None:
        raise InputError("This energy has no temperature of its own; give temperature, in K.")
    chosen = None if atoms is None else [int(i) for i in atoms]
    if chosen is not None and len(chosen) != energy.event_shape[0]:
        raise InputError(f"The energy is one of {energy.event_shape[0]} atoms, and {len(chosen)} were given.")
    return openmm.PythonForce(_Compute(energy, units.thermal_energy(units.kelvin(known)), chosen))


class PotentialFactory:
    """How openmm-ml finds the energies of this package: ``MLPotential("openmm_bg", energy=energy)``."""

    def createImpl(self, name: str, **args: Any) -> Potential:
        """The potential of an energy; called by openmm-ml."""
        if not isinstance(args.get("energy"), Energy):
            raise InputError('MLPotential("openmm_bg", energy=...) needs an Energy of this package.')
        return Potential(args["energy"], args.get("temperature"))


class Potential:
    """An energy as openmm-ml's MLPotentialImpl."""

    def __init__(self, energy: Energy, temperature: Any = None) -> None:
        self.energy, self.temperature = energy, temperature

    def addForces(
        self, topology: Any, system: openmm.System, atoms: Iterable[int] | None, forceGroup: int, **args: Any
    ) -> None:
        """Add the force to a System; called by openmm-ml."""
        force = python_force(self.energy, args.get("temperature", self.temperature), atoms)
        force.setForceGroup(forceGroup)
        system.addForce(force)
