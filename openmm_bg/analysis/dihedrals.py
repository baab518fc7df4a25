"""Backbone torsions of a trajectory, by mdtraj."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from openmm_bg import units
from openmm_bg.errors import InputError


@dataclass(frozen=True)
class Backbone:
    """phi and psi of every residue that has both.

    Attributes
    ----------
    residues : tuple of str
        mdtraj's names, such as "ALA2".
    phi, psi : (frames, residues) arrays
        Radians, in [-pi, pi].
    phi_atoms, psi_atoms : (residues, 4) arrays
        The atoms each torsion runs through.
    """

    residues: tuple[str, ...]
    phi: NDArray[np.float64]
    psi: NDArray[np.float64]
    phi_atoms: NDArray[np.int64]
    psi_atoms: NDArray[np.int64]

    def pair(self, residue: int = 0) -> NDArray[np.float64]:
        """(frames, 2) array of phi and psi of one residue, radians."""
        return np.stack([self.phi[:, residue], self.psi[:, residue]], axis=1)


def backbone_dihedrals(positions: Any, topology: Any) -> Backbone:
    """phi and psi of every residue that has both, in radians.

    Parameters
    ----------
    positions : (frames, atoms, 3) array or Quantity
        nm. Molecules must be whole: no periodic image is searched for.
    topology : openmm.app.Topology or mdtraj.Topology

    Examples
    --------
    >>> angles = backbone_dihedrals(molecule.positions[None], molecule.topology)    # doctest: +SKIP
    >>> angles.residues, angles.phi_atoms.tolist()                                  # doctest: +SKIP
    (('ALA2',), [[4, 6, 8, 14]])
    """
    import mdtraj

    if not isinstance(topology, mdtraj.Topology):
        topology = mdtraj.Topology.from_openmm(topology)
    x = units.nanometers(positions)
    if x.ndim != 3 or x.shape[1:] != (topology.n_atoms, 3):
        raise InputError(f"positions has the shape {x.shape}; give (frames, {topology.n_atoms}, 3) for this topology.")
    if not np.isfinite(x).all():
        raise InputError("positions holds values that are not finite; leave those frames out and say how many.")
    trajectory = mdtraj.Trajectory(x, topology)
    phi_atoms, phi = mdtraj.compute_phi(trajectory, periodic=False)
    psi_atoms, psi = mdtraj.compute_psi(trajectory, periodic=False)
    # phi is C-N-CA-C and psi is N-CA-C-N: the two of one residue share their CA
    of_alpha = {int(atoms[1]): row for row, atoms in enumerate(psi_atoms)}
    rows = [(i, of_alpha[int(atoms[2])]) for i, atoms in enumerate(phi_atoms) if int(atoms[2]) in of_alpha]
    if not rows:
        raise InputError("No residue of this topology has both phi and psi; backbone angles need a peptide chain.")
    first, second = (np.array(column) for column in zip(*rows, strict=True))
    names = tuple(str(topology.atom(int(phi_atoms[i, 2])).residue) for i in first)
    return Backbone(
        names,
        phi[:, first].astype(np.float64),
        psi[:, second].astype(np.float64),
        phi_atoms[first].astype(np.int64),
        psi_atoms[second].astype(np.int64),
    )
