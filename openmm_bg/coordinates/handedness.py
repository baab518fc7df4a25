"""Which torsions a reference conformation restricts to half a turn, so that its handedness is kept."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from openmm_bg import units
from openmm_bg.coordinates.geometry import dihedral
from openmm_bg.coordinates.zmatrix import ZMatrix
from openmm_bg.errors import InputError


def half_turns_from(zmatrix: ZMatrix, positions: Any) -> np.ndarray:
    """Half turns that keep the handedness of reference positions: chirality and the labels of hydrogens.

    Restricted are the torsions between siblings at a centre with four neighbours, where the reference has
    them between 60 and 150 degrees either way. Planar centres, and nitrogens that invert, stay free.

    Parameters
    ----------
    zmatrix : ZMatrix
    positions : array or Quantity, shape (N, 3)
        Reference positions, in nm if bare numbers.

    Returns
    -------
    int8 array, shape (N-3,)
        +1 or -1 by the sign of the torsion; 0 for no restriction.
    """
    x = torch.tensor(units.nanometers(positions))
    if x.shape != (zmatrix.num_atoms, 3):
        raise InputError(f"reference positions have the shape ({zmatrix.num_atoms}, 3), not {tuple(x.shape)}.")
    torsions = dihedral(x[None], torch.tensor(zmatrix.torsions))[0].numpy()
    tetrahedral = np.array([len(zmatrix.neighbours[centre]) == 4 for centre in zmatrix.rows[:, 1]], bool)
    narrow = (np.abs(torsions) > np.pi / 3) & (np.abs(torsions) < np.pi * 5 / 6)
    return np.where(zmatrix.siblings & tetrahedral & narrow, np.sign(torsions), 0).astype(np.int8)
