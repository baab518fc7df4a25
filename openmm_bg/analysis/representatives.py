"""Which conformations stand for an ensemble: one for every basin of its torsions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from openmm_bg import units
from openmm_bg.analysis.formatting import format_value
from openmm_bg.analysis.free_energy import BASINS, ROTAMERS, population, rotamer
from openmm_bg.analysis.statistics import normalized_weights
from openmm_bg.analysis.structure import Structure
from openmm_bg.errors import InputError


@dataclass(frozen=True, eq=False)
class Conformation:
    """One conformation that is shown.

    Attributes
    ----------
    name : str
        Such as the basin it stands for.
    positions : (atoms, 3) array
        nm.
    note : str
        A few words under the name, such as the basin's population.
    share : float
        Of the ensemble that it stands for; NaN where that is not known.
    """

    name: str
    positions: NDArray[np.float64]
    note: str = ""
    share: float = np.nan


def representatives(
    positions: Any, topology: Any, weights: ArrayLike | None = None, *, most: int = 6
) -> tuple[Conformation, ...]:
    """For every basin of an ensemble the frame nearest to its middle, the most populated basin first.

    Basins are those of φ and ψ (:data:`~openmm_bg.analysis.free_energy.BASINS`), every combination of several residues
    being one; of a molecule without φ and ψ, the thirds of a turn of its rotamers. The middle is the circular mean of
    every torsion that changes the shape, and the nearest frame has the least sum of 1 - cos of what it deviates by.

    Parameters
    ----------
    positions : (frames, atoms, 3) array or Quantity
        nm, in the order they were made: the errors of the populations depend on it.
    topology : openmm.app.Topology or mdtraj.Topology
        With bonds.
    weights : (frames,) array, optional
        Frames without weight are left out, whatever they hold.
    most : int
        How many basins at most.

    Returns
    -------
    tuple of Conformation
        Each noted with the population of its basin and its standard error, in percent.

    Raises
    ------
    InputError
        Where shapes do not fit, the topology has no bonds, fewer than two frames carry weight or one is not finite.

    Examples
    --------
    >>> from openmm_bg import systems
    >>> molecule = systems.load("alanine_dipeptide")
    >>> found = representatives(np.tile(molecule.positions, (4, 1, 1)), molecule.topology)
    >>> [conformation.share for conformation in found]
    [1.0]
    """
    structure = Structure.of(topology)
    x = units.nanometers(positions)
    if x.ndim != 3 or x.shape[1:] != (structure.topology.n_atoms, 3):
        raise InputError(
            f"positions has the shape {x.shape}; give (frames, {structure.topology.n_atoms}, 3) for this topology."
        )
    w = normalized_weights(weights, len(x))
    x, w = x[w > 0], w[w > 0]
    if len(x) < 2:
        raise InputError("The error of a population needs two frames or more that carry weight.")
    if not np.isfinite(x).all():
        raise InputError("positions holds values that are not finite; leave those frames out and say how many.")
    torsions = structure.values(x, structure.torsions).astype(np.float64)
    names, states = _states(structure, torsions)
    combinations, owner = np.unique(states, axis=0, return_inverse=True)
    owner = owner.ravel()
    shares = np.bincount(owner, w)
    shape = np.exp(1j * torsions[:, structure.free_torsions or slice(None)])
    found = []
    for k in np.argsort(-shares, kind="stable")[:most]:
        name = ", ".join(of[state] for of, state in zip(names, combinations[k], strict=True)) or "every conformation"
        basin = population(name, owner == k, w)
        frames = np.flatnonzero(owner == k)
        middle = np.exp(-1j * np.angle(w[frames] @ shape[frames]))
        nearest = frames[np.argmin((1 - (shape[frames] * middle).real).sum(axis=1))]
        note = f"{format_value(100 * basin.value, 100 * basin.error)} %"
        found.append(Conformation(name, x[nearest].astype(np.float64), note, basin.value))
    return tuple(found)


def _states(structure: Structure, torsions: NDArray[np.float64]) -> tuple[list[tuple[str, ...]], NDArray[np.intp]]:
    """Names of the states of each residue or rotamer, and the state of each in every frame, (frames, residues)."""
    columns, names = [], []
    for residue, phi, psi in structure.backbone:
        inside = [basin.contains(torsions[:, phi], torsions[:, psi]) for basin in BASINS]
        columns.append(np.argmax(inside, axis=0))
        alone = len(structure.backbone) == 1
        names.append(tuple(b.name if alone else f"{residue} {b.name.split()[0]}" for b in BASINS))
    if not columns:
        for k in structure.rotamers:
            columns.append(rotamer(torsions[:, k]))
            names.append(tuple(f"{structure.torsions[k].name} {s}" for s in ROTAMERS))
    return names, np.stack(columns, axis=1) if columns else np.zeros((len(torsions), 0), dtype=np.intp)
