"""Distances, angles and dihedrals of a batch, and the way back: an atom placed from its three numbers.

All lengths are in nm, all angles in radians. The functions are written with cross products and ``atan2``:
unlike the arc cosine, these keep full precision near 0 and pi. Where a quantity or its derivative does not
exist, the gradient is exactly zero, so that one impossible conformation never spoils the gradient of a batch.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def collinearity_threshold(dtype: torch.dtype) -> float:
    """The sine below which three atoms count as collinear: a few units of rounding."""
    return 16 * torch.finfo(dtype).eps


def distance(x: Tensor, pairs: Tensor) -> Tensor:
    """Distances between pairs of atoms.

    Parameters
    ----------
    x : Tensor, shape (batch, atoms, 3)
        Positions in nm.
    pairs : LongTensor, shape (m, 2)
        Atom indices (i, j).

    Returns
    -------
    Tensor, shape (batch, m)
        ``|x_j - x_i|`` in nm. The gradient is zero where the atoms coincide.

    Examples
    --------
    >>> x = torch.tensor([[[0.0, 0.0, 0.0], [0.3, 0.4, 0.0]]], dtype=torch.float64)
    >>> distance(x, torch.tensor([[0, 1]])).item()
    0.5
    """
    i, j = _points(x, pairs)
    squared = _dot(j - i, j - i)
    apart = squared > 0
    return torch.where(apart, torch.where(apart, squared, 1.0).sqrt(), 0.0)


def angle(x: Tensor, triples: Tensor) -> Tensor:
    """Angles at the middle atom of triples of atoms.

    Parameters
    ----------
    x : Tensor, shape (batch, atoms, 3)
        Positions in nm.
    triples : LongTensor, shape (m, 3)
        Atom indices (i, j, k); j is the apex.

    Returns
    -------
    Tensor, shape (batch, m)
        Angles in [0, pi], ``atan2(|a x b|, a . b)``. Exactly 0 or pi, with zero gradient, where the three
        atoms are collinear to rounding; NaN, with zero gradient, where an arm has no length.

    Examples
    --------
    >>> x = torch.tensor([[[1.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 1.0, 0.0]]], dtype=torch.float64)
    >>> round(angle(x, torch.tensor([[0, 1, 2]])).item(), 6)
    1.570796
    """
    i, j, k = _points(x, triples)
    a, b = i - j, k - j
    normal = _cross(a, b)
    squared, along = _dot(normal, normal), _dot(a, b)
    bent = squared > collinearity_threshold(x.dtype) ** 2 * _dot(a, a) * _dot(b, b)
    value = torch.atan2(torch.where(bent, squared, 1.0).sqrt(), torch.where(bent, along, 0.0))
    straight = torch.full_like(along, math.nan).masked_fill(along > 0, 0.0).masked_fill(along < 0, math.pi)
    return torch.where(bent, value, straight)


def dihedral(x: Tensor, quadruples: Tensor) -> Tensor:
    """Dihedral angles about the middle bond of quadruples of atoms, with the sign of IUPAC and OpenMM.

    Parameters
    ----------
    x : Tensor, shape (batch, atoms, 3)
        Positions in nm.
    quadruples : LongTensor, shape (m, 4)
        Atom indices (i, j, k, l); j-k is the axis.

    Returns
    -------
    Tensor, shape (batch, m)
        Angles in (-pi, pi]: 0 is cis, and positive means that, looking from j to k, the bond k-l is turned
        clockwise against j-i. NaN, with zero gradient, where i-j-k or j-k-l are collinear.

    Notes
    -----
    ``atan2(|b2| b1 . (b2 x b3), (b1 x b2) . (b2 x b3))`` with b1 = x_j - x_i, b2 = x_k - x_j, b3 = x_l - x_k
    (Blondel and Karplus, J. Comput. Chem. 17, 1132 (1996)).
    """
    first, second, third, fourth = _points(x, quadruples)
    b1, b2, b3 = second - first, third - second, fourth - third
    n1, n2 = _cross(b1, b2), _cross(b2, b3)
    axis = _dot(b2, b2)
    limit = collinearity_threshold(x.dtype) ** 2 * axis
    defined = (_dot(n1, n1) > limit * _dot(b1, b1)) & (_dot(n2, n2) > limit * _dot(b3, b3))
    sine = torch.where(defined, axis, 1.0).sqrt() * _dot(b1, n2)
    value = torch.atan2(torch.where(defined, sine, 0.0), torch.where(defined, _dot(n1, n2), 1.0))
    value = torch.where(value <= -math.pi, value + 2 * math.pi, value)
    return torch.where(defined, value, math.nan)


def place(
    bond: Tensor, angle: Tensor, torsion: Tensor, r: Tensor, along: Tensor, across: Tensor, out: Tensor
) -> tuple[Tensor, Tensor]:
    """Atoms from their internal coordinates relative to three atoms that stand already.

    Parameters
    ----------
    bond, angle, torsion : Tensor, shape (3, ...)
        Positions of the three reference atoms; the components come first.
    r, along, across, out : Tensor, shape (...)
        Bond length, and the three direction cosines of the new bond: cos(theta) along bond -> angle,
        sin(theta) cos(phi) towards the torsion atom, sin(theta) sin(phi) out of their plane.

    Returns
    -------
    position : Tensor, shape (3, ...)
    defined : BoolTensor, shape (...)
        False where the three references are collinear: the position there is finite and meaningless, with a
        finite gradient; the caller must discard it.
    """
    axis, arm = angle - bond, torsion - angle
    normal = _cross(axis, arm)
    axis2, normal2 = _dot(axis, axis), _dot(normal, normal)
    defined = normal2 > collinearity_threshold(r.dtype) ** 2 * axis2 * _dot(arm, arm)
    e1 = axis * torch.where(defined, axis2, 1.0).rsqrt()
    e3 = normal * torch.where(defined, normal2, 1.0).rsqrt()
    e2 = _cross(e3, e1)
    return bond + r * (along * e1 + across * e2 - out * e3), defined


def _points(x: Tensor, atoms: Tensor) -> tuple[Tensor, ...]:
    # Components first: sums over x, y, z then run over whole vectors instead of three numbers at a time.
    xyz = x.permute(2, 0, 1)
    return tuple(xyz.index_select(2, column) for column in atoms.unbind(1))


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(0)


def _cross(a: Tensor, b: Tensor) -> Tensor:
    return torch.linalg.cross(a, b, dim=0)
