"""One side of a comparison: frames that carry weight, and their bonds, angles and torsions."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from openmm_bg import units
from openmm_bg.analysis.statistics import Array, normalized_weights
from openmm_bg.analysis.structure import Structure
from openmm_bg.errors import InputError

_GRIDS = (1e-3, 1e-4)
_FEWEST = 20


@dataclass
class Ensemble:
    """Positions (nm), weights that sum to one, reduced energies; without the frames that carry no weight."""

    structure: Structure
    positions: NDArray[np.float32]
    weights: Array
    is_weighted: bool
    energies: Array | None

    @property
    def given(self) -> Array | None:
        """Weights for a distance; None keeps every frame once."""
        return self.weights if self.is_weighted else None

    @cached_property
    def bonds(self) -> NDArray[np.float32]:
        return self.structure.values(self.positions, self.structure.bonds)

    @cached_property
    def angles(self) -> NDArray[np.float32]:
        return self.structure.values(self.positions, self.structure.angles)

    @cached_property
    def torsions(self) -> NDArray[np.float32]:
        return self.structure.values(self.positions, self.structure.torsions)


def ensemble(
    name: str, positions: Any, energies: ArrayLike | None, weights: ArrayLike | None, structure: Structure
) -> Ensemble:
    """One side, checked.

    Raises
    ------
    InputError
        Where shapes do not fit, too few frames carry weight, or one that does holds a number that is not finite.
    """
    x = units.nanometers(positions)
    atoms = structure.topology.n_atoms
    if x.ndim != 3 or x.shape[1:] != (atoms, 3):
        raise InputError(f"{name} has the shape {x.shape}; give (frames, {atoms}, 3) for this topology.")
    w = normalized_weights(weights, len(x))
    u = None if energies is None else np.asarray(energies, dtype=np.float64)
    if u is not None and u.shape != (len(x),):
        raise InputError(f"The energies of the {name} have the shape {u.shape}; give one for each of {len(x)} frames.")
    used = w > 0
    x, w, u = x[used].astype(np.float32), w[used], None if u is None else u[used]
    if len(x) < _FEWEST:
        raise InputError(
            f"A comparison needs at least {_FEWEST} frames that carry weight, but there are {len(x)} of the {name}."
        )
    for what, values in (("positions", x.reshape(len(x), -1)), ("energies", u)):
        if values is not None and not (fine := np.isfinite(values).reshape(len(x), -1).all(1)).all():
            raise InputError(
                f"The {what} of the {name} are not finite in {(~fine).sum()} of {len(x)} frames; leave those frames "
                "out, and say how many."
            )
    return Ensemble(structure, x, w, weights is not None, u)


def same_grid(*sides: Ensemble) -> list[str]:
    """Round both sides as the coarser one was when it was written: XTC keeps picometres, and that widens bonds."""
    grids = [_grid(side.positions) for side in sides]
    coarsest = max(grids)
    if coarsest == 0 or grids[0] == grids[1]:
        return []
    for side in sides:  # both, so that equal numbers are equal to the last bit
        side.positions = (np.round(side.positions.astype(np.float64) / coarsest) * coarsest).astype(np.float32)
    return [f"One side was written with steps of {coarsest:g} nm; the other was rounded in the same way."]


def _grid(positions: NDArray[np.floating]) -> float:
    x = positions[:: max(1, len(positions) // 100)].astype(np.float64)
    for grid in _GRIDS:
        if np.abs(x / grid - np.round(x / grid)).max() < 0.02:
            return grid
    return 0.0
