"""Whether a generator fits a simulation: particles, molecule, constraints, masses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import openmm
from numpy.typing import NDArray
from openmm import app, unit

from openmm_bg.errors import InputError

Constraints = tuple[NDArray[np.int64], NDArray[np.float64]]
"""Pairs (m, 2) of atoms and their distances (m,) in nm."""


def num_atoms(generator: Any) -> int:
    """Atoms that a generator makes; without coordinates its dimensions are x, y and z of each."""
    if generator.coordinates is not None:
        return int(generator.coordinates.num_atoms)
    if generator.flow.dimension % 3:
        raise InputError(f"A generator of {generator.flow.dimension} dimensions does not make positions of particles.")
    return generator.flow.dimension // 3


def particle_indices(atoms: Any, system: openmm.System, generator: Any) -> NDArray[np.int64]:
    """The particles that a generator moves, checked: as many as it has atoms, all different, none without a mass.

    `atoms` None stands for all particles of the System.
    """
    total = system.getNumParticles()
    indices = np.arange(total) if atoms is None else np.asarray(atoms)
    if indices.ndim != 1 or not np.issubdtype(indices.dtype, np.integer):
        raise InputError("atoms must be a list of particle indices, one for each atom of the generator, in its order.")
    if len(set(indices.tolist())) != len(indices) or len(indices) == 0 or indices.min() < 0 or indices.max() >= total:
        raise InputError(f"atoms must be different particle indices between 0 and {total - 1}.")
    expected = num_atoms(generator)
    if len(indices) != expected:
        raise InputError(
            f"The generator makes {expected} atoms, but the moves were to place {len(indices)} particles; give "
            "atoms=[...] to say which particles of the System are the generator's molecule."
        )
    for i in indices.tolist():
        if system.isVirtualSite(i) or system.getParticleMass(i).value_in_unit(unit.dalton) == 0:
            raise InputError(f"Particle {i} is a virtual site or has no mass; a generator can only move real atoms.")
    return indices.astype(np.int64)


def has_virtual_sites(system: openmm.System) -> bool:
    """Whether any particle is a virtual site."""
    return any(system.isVirtualSite(i) for i in range(system.getNumParticles()))


def constraints_within(system: openmm.System, atoms: Sequence[int] | NDArray[np.int64]) -> Constraints | None:
    """The constraints among some particles, in the numbering of `atoms`; None where there are none.

    Raises
    ------
    InputError
        If a constraint joins one of the atoms with a particle outside.
    """
    number = {int(particle): k for k, particle in enumerate(atoms)}
    pairs, distances = [], []
    for index in range(system.getNumConstraints()):
        i, j, distance = system.getConstraintParameters(index)
        if (i in number) != (j in number):
            raise InputError(
                f"The System constrains particles {i} and {j}, of which only one belongs to the generator; a move "
                "cannot keep such a constraint."
            )
        if i in number:
            pairs.append((number[i], number[j]))
            distances.append(distance.value_in_unit(unit.nanometer))
    return (np.array(pairs), np.array(distances)) if pairs else None


def check_molecule(generator: Any, topology: app.Topology, system: openmm.System, atoms: Any) -> None:
    """Refuse a simulation of another molecule; warn where only the System differs."""
    if generator.topology is not None and generator.coordinates is not None:
        generator.check_simulation(topology, system, atoms)


def check_constraints(generator: Any, system: openmm.System, atoms: NDArray[np.int64]) -> Constraints | None:
    """The constraints that the moves have to keep, or an InputError where the generator was built for others.

    The mass-metric term of the generator's density depends on the masses, so with constraints these must
    agree too.
    """
    constraints = constraints_within(system, atoms)
    theirs = set() if constraints is None else {frozenset(pair) for pair in constraints[0].tolist()}
    coordinates = generator.coordinates
    ours = set() if coordinates is None else {frozenset((i, j)) for i, j, _ in coordinates.constraints}
    if theirs != ours:
        raise InputError(
            f"The System constrains {len(theirs)} distances of the molecule and the generator was built for "
            f"{len(ours)}, not the same ones; build both with the same constraints."
        )
    if constraints is not None:
        masses = [system.getParticleMass(int(i)).value_in_unit(unit.dalton) for i in atoms]
        if not np.allclose(masses, coordinates.masses, rtol=1e-6, atol=0):
            raise InputError(
                "The System has constraints and other masses than the generator was built for; its density holds only "
                "for the masses it knows (hydrogenMass must agree)."
            )
    return constraints
