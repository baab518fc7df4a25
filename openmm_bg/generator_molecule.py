"""What a generator takes from the chemistry of its molecule: coordinates, the shape of its flow, first scales."""

from __future__ import annotations

import math

import numpy as np
import openmm
import torch
from openmm import app
from torch import Tensor

from openmm_bg.coordinates import InternalCoordinates, ZMatrix, half_turns_from
from openmm_bg.errors import InputError
from openmm_bg.flows import MolecularFlow
from openmm_bg.units import kelvin, nanometers, thermal_energy

# kJ/mol/nm^2, kJ/mol/rad^2 and rad, where the force field has no harmonic term
_USUAL_BOND, _USUAL_ANGLE, _USUAL_TORSION = 3e5, 500.0, 0.1


def constraint_distances(system: openmm.System, place: dict[int, int] | None = None) -> dict[frozenset[int], float]:
    """The constrained pairs of a molecule and their distances in nm.

    Parameters
    ----------
    system : openmm.System
    place : dict of int to int, optional
        The molecule's number of every particle that belongs to it; None where all do, in their order.

    Raises
    ------
    InputError
        If a constraint joins the molecule to a particle outside it.
    """
    constraints = {}
    for k in range(system.getNumConstraints()):
        i, j, distance = system.getConstraintParameters(k)
        if place is not None:
            if (i in place) != (j in place):
                raise InputError(f"A constraint joins atom {i} or {j} of the molecule to an atom outside it.")
            if i not in place:
                continue
            i, j = place[i], place[j]
        constraints[frozenset((i, j))] = float(nanometers(distance))
    return constraints


def internal_coordinates(zmatrix: ZMatrix, system: openmm.System, reference: np.ndarray | None) -> InternalCoordinates:
    """The coordinates that the System's constraints leave free, of the handedness of ``reference`` (atoms, 3) in nm."""
    constraints = [(*sorted(pair), d) for pair, d in constraint_distances(system).items()]
    masses = np.array([system.getParticleMass(i)._value for i in range(system.getNumParticles())])
    half_turns = None if reference is None else half_turns_from(zmatrix, reference)
    return InternalCoordinates(zmatrix, constraints=constraints, masses=masses, half_turns=half_turns)


def molecular_flow(
    topology: app.Topology,
    zmatrix: ZMatrix,
    coordinates: InternalCoordinates,
    kind: str,
    seed: int,
    local: bool,
) -> MolecularFlow:
    """The flow of a molecule: which coordinates are free torsions, rotors and stiff, and which residue each is of.

    Parameters
    ----------
    topology, zmatrix, coordinates
        Of one molecule.
    kind : {"spline", "realnvp"}
        Model of the free torsions.
    seed : int
        Draws masks and initial weights.
    local : bool
        Whether networks see the neighbouring residues alone.

    Raises
    ------
    InputError
        For another ``kind``, or if the constraints leave nothing but torsions.
    """
    if kind not in ("spline", "realnvp"):
        raise InputError(f"flow must be 'spline', 'realnvp' or a Flow, not {kind!r}.")
    column = {int(row): i for i, row in enumerate(coordinates.torsion_rows) if row >= 0}
    torsions = [i for row, i in column.items() if zmatrix.free_torsions[row]]
    # a peptide bond is cis or trans first and all else follows: given the others, a rare isomer has no place of its own
    torsions.sort(key=lambda i: not _trigonal(zmatrix, int(coordinates.torsion_rows[i])))
    rotors = {column[i]: (column[j], column[k]) for i, j, k in zmatrix.rotors if {i, j, k} <= column.keys()}
    if coordinates.dimension == len(torsions):
        raise InputError("The System's constraints leave no bond and no angle free; constrain fewer of them.")
    stiff = [i for i in column.values() if i not in set(torsions)]
    blocks, bonded = None, []
    if local:
        residues = [atom.residue.index for atom in topology.atoms()]
        placed = [int(row[0]) for table in (zmatrix.bonds, zmatrix.angles, zmatrix.torsions) for row in table]
        blocks = [residues[placed[i]] for i in coordinates.free.tolist()]
        bonded = sorted({tuple(sorted((residues[a.index], residues[b.index]))) for a, b in topology.bonds()})
    return MolecularFlow(
        coordinates.dimension,
        torsions,
        rotors,
        stiff,
        torsion_model=kind,
        seed=seed,
        blocks=blocks,
        bonded_blocks=bonded,
        neighbours=_neighbours(zmatrix, coordinates, torsions),
        mixing=True,
    )


def _trigonal(zmatrix: ZMatrix, row: int) -> bool:
    """Whether this torsion turns the bond of two atoms of three neighbours each, which is planar mostly."""
    return all(len(zmatrix.neighbours[int(atom)]) == 3 for atom in zmatrix.torsions[row][1:3])


def _neighbours(zmatrix: ZMatrix, coordinates: InternalCoordinates, torsions: list[int]) -> list[tuple[int, int]]:
    """Pairs of stiff coordinates that move one atom, two siblings, or an atom and the one it hangs on."""
    rows = [tuple(map(int, row[:2])) for table in (zmatrix.bonds, zmatrix.angles, zmatrix.torsions) for row in table]
    moved = {i: rows[row] for i, row in enumerate(coordinates.free.tolist()) if i not in set(torsions)}

    def near(first: tuple[int, int], second: tuple[int, int]) -> bool:
        return first[0] in second or second[0] in first or first[1] == second[1]

    return [(i, j) for i in moved for j in moved if i < j and near(moved[i], moved[j])]


def harmonic_scales(coordinates: InternalCoordinates, system: openmm.System, temperature: float) -> Tensor:
    """Spread of each free coordinate in the harmonic terms of the force field, sqrt(kT/k); typical values elsewhere.

    ``(dimension,)``, float64: bonds in nm, angles and torsions in radian; ``temperature`` in K.
    """
    kt = thermal_energy(kelvin(temperature))
    bonds: dict[frozenset[int], float] = {}
    angles: dict[tuple[frozenset[int], int], float] = {}
    for force in system.getForces():
        if isinstance(force, openmm.HarmonicBondForce):
            for n in range(force.getNumBonds()):
                i, j, _, k = force.getBondParameters(n)
                if k._value > 0:
                    bonds[frozenset((i, j))] = k._value
        elif isinstance(force, openmm.HarmonicAngleForce):
            for n in range(force.getNumAngles()):
                i, j, k, _, strength = force.getAngleParameters(n)
                if strength._value > 0:
                    angles[frozenset((i, k)), j] = strength._value
    z = coordinates.zmatrix
    full = [
        *(math.sqrt(kt / bonds.get(frozenset((int(i), int(j))), _USUAL_BOND)) for i, j in z.bonds),
        *(math.sqrt(kt / angles.get((frozenset((int(i), int(k))), int(j)), _USUAL_ANGLE)) for i, j, k in z.angles),
        *([_USUAL_TORSION] * len(z.torsions)),
    ]
    return torch.tensor(full, dtype=torch.float64)[coordinates.free]
