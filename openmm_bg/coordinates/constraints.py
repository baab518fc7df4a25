"""Constrained distances: the internal coordinates they freeze, and the measure of constrained dynamics.

A constraint must be a function of z-matrix coordinates that it freezes: then the generator makes exactly
constrained conformations, and nothing has to be projected afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from openmm_bg.coordinates.tables import ExactTables
from openmm_bg.coordinates.zmatrix import ZMatrix
from openmm_bg.errors import InputError

Constraint = tuple[int, int, float]


def frozen_coordinates(zmatrix: ZMatrix, constraints: Sequence[Constraint]) -> dict[int, float]:
    """The coordinates that constraints freeze, and their values.

    A constrained pair that is a z-matrix bond freezes that bond length. A constrained pair (i, k) of a
    z-matrix angle (i, j, k), both of whose bonds are frozen, freezes that angle (the H-H distance of rigid
    water, for one).

    Parameters
    ----------
    zmatrix : ZMatrix
    constraints : sequence of (i, j, distance)
        Distances in nm.

    Returns
    -------
    dict
        Position in the full coordinate vector [bonds | angles | torsions] -> length in nm or angle in
        radians.

    Raises
    ------
    InputError
        For a constraint of any other kind (a ring closure, the H-H distances of a methyl group), a pair
        constrained twice, or distances that no triangle has.

    Examples
    --------
    >>> water = ZMatrix.from_bonds(3, [(0, 1), (0, 2)], ["O", "H", "H"])
    >>> frozen_coordinates(water, [(0, 1, 0.1), (0, 2, 0.1), (1, 2, 0.1)])[2]  # 60 degrees
    1.0471975511965979
    """
    bonds = {frozenset(pair): index for index, pair in enumerate(zmatrix.bonds.tolist())}
    lengths: dict[frozenset[int], float] = {}
    for i, j, length in constraints:
        pair = frozenset((i, j))
        if len(pair) != 2 or not pair <= set(range(zmatrix.num_atoms)):
            raise InputError(f"the constraint ({i}, {j}) does not join two of the atoms 0 to {zmatrix.num_atoms - 1}.")
        if pair in lengths:
            raise InputError(f"the distance between atoms {i} and {j} is constrained twice; give each constraint once.")
        if not (math.isfinite(length) and length > 0):
            raise InputError(f"the constrained distance between atoms {i} and {j} must be positive, not {length} nm.")
        lengths[pair] = length
    frozen = {bonds[pair]: length for pair, length in lengths.items() if pair in bonds}
    angles: dict[frozenset[int], int] = {}
    for index, (i, j, k) in enumerate(zmatrix.angles.tolist()):
        if bonds.get(frozenset((i, j))) in frozen and bonds.get(frozenset((j, k))) in frozen:
            angles[frozenset((i, k))] = index
    for pair in lengths:
        if pair in bonds:
            continue
        if pair not in angles:
            i, j = sorted(pair)
            raise InputError(
                f"the constrained distance between atoms {i} and {j} is neither a z-matrix bond nor the "
                "far side of a z-matrix angle with two constrained bonds; build the System with "
                "constraints=HBonds or None."
            )
        i, j, k = zmatrix.angles[angles[pair]].tolist()
        frozen[len(bonds) + angles[pair]] = _triangle_angle(lengths, i, j, k)
    return frozen


def _triangle_angle(lengths: dict[frozenset[int], float], i: int, j: int, k: int) -> float:
    ij, jk, ik = (lengths[frozenset(pair)] for pair in ((i, j), (j, k), (i, k)))
    cosine = (ij**2 + jk**2 - ik**2) / (2 * ij * jk)
    if not -1 < cosine < 1:
        raise InputError(
            f"the constrained distances {ij}, {jk} and {ik} nm of atoms {i}, {j} and {k} form no triangle."
        )
    return math.acos(cosine)


class MassMetric(ExactTables):
    """Half the logarithm of det Z, the mass-metric (Fixman) term of constrained dynamics.

    Dynamics with constraints sigma_k(x) = |x_i - x_j| - d_k samples ``exp(-U/kT) sqrt(det Z) prod_k
    delta(sigma_k) dx`` with ``Z = C M^-1 C^T`` and ``C = d sigma / dx`` (Fixman, PNAS 71, 3050 (1974)). Only
    constraints that share an atom couple, so det Z is a product over small blocks.

    Parameters
    ----------
    pairs : int array, shape (m, 2)
        Constrained pairs of atoms.
    masses : float array, shape (N,)
        Masses in Da; positive for the constrained atoms.

    Examples
    --------
    >>> term = MassMetric([(0, 1)], [1.0, 1.0])
    >>> x = torch.tensor([[[0.0, 0.0, 0.0], [0.1, 0.0, 0.0]]], dtype=torch.float64)
    >>> round(term(x).item(), 6)  # half the logarithm of 1/1 + 1/1
    0.346574
    """

    single: Tensor

    def __init__(self, pairs: Sequence[tuple[int, int]] | np.ndarray, masses: Sequence[float] | np.ndarray) -> None:
        super().__init__()
        table = np.array(pairs, dtype=np.int64).reshape(-1, 2)
        inverse_masses = _inverse_masses(table, masses)
        single = 0.0
        by_size: dict[int, list[np.ndarray]] = {}
        for block in _blocks(table):
            if len(block) == 1:  # its Z is a number
                single += 0.5 * math.log(inverse_masses[block[0]].sum())
            else:
                by_size.setdefault(len(block), []).append(block)
        self.register_buffer("single", torch.tensor(single, dtype=torch.float64))
        self._sizes = tuple(sorted(by_size))
        for size in self._sizes:
            blocks = np.stack(by_size[size])
            weights = np.stack([_couplings(block, inverse_masses) for block in blocks])
            self.register_buffer(f"pairs{size}", torch.from_numpy(blocks))
            self.register_buffer(f"weights{size}", torch.from_numpy(weights))

    def forward(self, x: Tensor, usable: Tensor | None = None) -> Tensor:
        """Half log det Z.

        Parameters
        ----------
        x : Tensor, shape (batch, N, 3)
            Positions in nm.
        usable : BoolTensor, shape (batch,), optional
            Rows marked False are left out: their value is meaningless but finite, their gradient zero.

        Returns
        -------
        Tensor, shape (batch,)
            With masses in Da, so up to the constant that another unit would add.
        """
        total = self.single.to(x.dtype).expand(len(x))
        xyz = x.permute(2, 0, 1)
        for size in self._sizes:
            pairs, weights = getattr(self, f"pairs{size}"), getattr(self, f"weights{size}")
            ends = (xyz.index_select(2, end.reshape(-1)) for end in pairs.unbind(2))
            bond = next(ends) - next(ends)
            squared = (bond * bond).sum(0)
            unit = (bond * torch.where(squared > 0, squared, 1.0).rsqrt()).unflatten(2, (-1, size))
            # d sigma/dx are unit vectors, so Z is their Gram matrix times constants of the masses.
            gram = (unit.unsqueeze(-1) * unit.unsqueeze(-2)).sum(0)
            if usable is not None:
                gram = torch.where(
                    usable[:, None, None, None], gram, torch.eye(size, dtype=gram.dtype, device=gram.device)
                )
            total = total + 0.5 * _log_det(gram * weights.to(x.dtype)).sum(1)
        return total


def _log_det(z: Tensor) -> Tensor:
    size = z.shape[-1]
    if size == 2:
        return (z[..., 0, 0] * z[..., 1, 1] - z[..., 0, 1] ** 2).log()
    if size == 3:  # a methyl group; written out, because a factorisation waits for the device
        a, b, c = z[..., 0, 0], z[..., 1, 1], z[..., 2, 2]
        d, e, f = z[..., 0, 1], z[..., 0, 2], z[..., 1, 2]
        return (a * b * c + 2 * d * e * f - a * f**2 - b * e**2 - c * d**2).log()
    return torch.linalg.slogdet(z).logabsdet


def _inverse_masses(pairs: np.ndarray, masses: Sequence[float] | np.ndarray) -> np.ndarray:
    values = np.asarray(masses, dtype=np.float64)
    constrained = np.unique(pairs)
    if values.ndim != 1 or (constrained.size and constrained[-1] >= len(values)):
        raise InputError("constraints need the masses of all atoms, one number per atom in Da.")
    light = [int(atom) for atom in constrained if not (np.isfinite(values[atom]) and values[atom] > 0)]
    if light:
        raise InputError(f"the constrained atoms {light} have no positive finite mass.")
    return np.divide(1.0, values, out=np.zeros_like(values), where=values > 0)


def _blocks(pairs: np.ndarray) -> list[np.ndarray]:
    """Constraints grouped so that no two groups share an atom."""
    groups: list[list[list[int]]] = []
    for pair in pairs.tolist():
        touching = [group for group in groups if any(set(pair) & set(other) for other in group)]
        groups = [group for group in groups if group not in touching]
        groups.append([other for group in touching for other in group] + [pair])
    return [np.array(group) for group in groups]


def _couplings(pairs: np.ndarray, inverse_masses: np.ndarray) -> np.ndarray:
    """Z_kl / (u_k . u_l): the sum over shared atoms of the signs of d sigma/dx over the mass."""
    incidence = np.zeros((len(pairs), len(inverse_masses)))
    np.put_along_axis(incidence, pairs, [[1.0, -1.0]] * len(pairs), axis=1)
    return (incidence * inverse_masses) @ incidence.T
