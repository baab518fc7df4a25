"""Distances, angles and dihedrals of a batch: each distinct one computed once, shared by all terms.

Inside, the batch comes last: an array of coordinates is (atoms, 3, batch), a set of distances (pairs, batch).
A gather then copies whole rows of the batch and every operation runs along contiguous memory.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


class Catalogue:
    """Collects the pairs, angles and torsions that terms ask for and numbers the distinct ones.

    >>> catalogue = Catalogue()
    >>> catalogue.pairs([(0, 1), (2, 1), (1, 0)])
    array([0, 1, 0])
    """

    def __init__(self) -> None:
        self._pairs: dict[tuple[int, ...], int] = {}
        self._angles: dict[tuple[int, ...], int] = {}
        self._torsions: dict[tuple[int, ...], int] = {}

    def pairs(self, atoms: list[tuple[int, ...]]) -> np.ndarray:
        """Rows of the distances (i, j), in either order."""
        return _rows(self._pairs, [(min(i, j), max(i, j)) for i, j in atoms])

    def angles(self, atoms: list[tuple[int, ...]]) -> np.ndarray:
        """Rows of the angles (i, j, k) at j, in either order."""
        return _rows(self._angles, [(i, j, k) if i < k else (k, j, i) for i, j, k in atoms])

    def torsions(self, atoms: list[tuple[int, ...]]) -> np.ndarray:
        """Rows of the dihedrals (i, j, k, l); the dihedral of (l, k, j, i) is the same."""
        return _rows(self._torsions, [(i, j, k, m) if i < m else (m, k, j, i) for i, j, k, m in atoms])

    def tables(self) -> dict[str, Tensor]:
        """The atoms of everything asked for: ``pairs (P, 2)``, ``angles (A, 3)``, ``torsions (T, 4)``."""
        return {
            name: torch.as_tensor(np.array(list(known), dtype=np.int64).reshape(-1, width))
            for name, known, width in (
                ("pairs", self._pairs, 2),
                ("angles", self._angles, 3),
                ("torsions", self._torsions, 4),
            )
        }


def _rows(known: dict[tuple[int, ...], int], wanted: list[tuple[int, ...]]) -> np.ndarray:
    return np.array([known.setdefault(atoms, len(known)) for atoms in wanted], dtype=np.int64)


class Geometry:
    """The internal coordinates of a batch, for the rows of a `Catalogue`.

    Parameters
    ----------
    x
        Positions in nm, ``(atoms, 3, batch)``.
    pairs, angles, torsions
        The tables of `Catalogue.tables`.

    Attributes
    ----------
    num_atoms : int
    distance, inverse_distance : Tensor
        ``(P, batch)``, nm and 1/nm.
    angle : Tensor
        ``(A, batch)``, radians in [0, pi]. A collinear angle has a value and, as in OpenMM, no force.
    cos_torsion, sin_torsion : Tensor
        ``(T, batch)``; NaN where three successive atoms are collinear and the dihedral does not exist.
    """

    def __init__(self, x: Tensor, pairs: Tensor, angles: Tensor, torsions: Tensor) -> None:
        self.num_atoms = len(x)

        d = _vectors(x, pairs[:, 0], pairs[:, 1])
        self.inverse_distance = torch.rsqrt(_dot(d, d))
        # 0 * inf: coincident atoms get NaN, and with it no energy, whatever the term.
        self.distance = _dot(d, d) * self.inverse_distance

        a, b = _vectors(x, angles[:, 0], angles[:, 1]), _vectors(x, angles[:, 2], angles[:, 1])
        self.angle = torch.atan2(_safe_norm(_cross(a, b)), _dot(a, b))
        # An arm of length zero makes no angle; atan2(0, 0) would claim zero.
        vanishing = (_dot(a, a) == 0) | (_dot(b, b) == 0)
        self.angle = self.angle.masked_fill(vanishing, torch.nan)

        b1 = _vectors(x, torsions[:, 1], torsions[:, 0])
        b2 = _vectors(x, torsions[:, 2], torsions[:, 1])
        b3 = _vectors(x, torsions[:, 3], torsions[:, 2])
        c1, c2 = _cross(b1, b2), _cross(b2, b3)
        scale = torch.rsqrt(_dot(c1, c1)) * torch.rsqrt(_dot(c2, c2))
        self.cos_torsion = _dot(c1, c2) * scale
        self.sin_torsion = _dot(b1, c2) * torch.sqrt(_dot(b2, b2)) * scale


def take(values: Tensor, rows: Tensor | slice) -> Tensor:
    """Rows of an array: a view where they are consecutive, a gather where they are not."""
    return values[rows] if isinstance(rows, slice) else values.index_select(0, rows)


def _vectors(x: Tensor, head: Tensor, tail: Tensor) -> Tensor:
    """x[head] - x[tail], ``(rows, 3, batch)``."""
    return x.index_select(0, head) - x.index_select(0, tail)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(1)


def _cross(a: Tensor, b: Tensor) -> Tensor:
    (ax, ay, az), (bx, by, bz) = a.unbind(1), b.unbind(1)
    return torch.stack((ay * bz - az * by, az * bx - ax * bz, ax * by - ay * bx), 1)


def _safe_norm(a: Tensor) -> Tensor:
    """The length of a, with gradient zero instead of NaN at a = 0."""
    square = _dot(a, a)
    zero = square == 0
    return torch.sqrt(square.masked_fill(zero, 1.0)).masked_fill(zero, 0.0)
