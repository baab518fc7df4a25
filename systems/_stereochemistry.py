"""What the handedness of centres, planar groups and rings ask of a peptide's torsions, and whether they were obeyed."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from openmm import app

from openmm_bg.coordinates import ZMatrix, dihedral

_PROLINE_RING = {  # degrees within the ring
    frozenset({"N", "CA"}): -15.0,
    frozenset({"CA", "CB"}): 32.0,
    frozenset({"CB", "CG"}): -36.0,
    frozenset({"CG", "CD"}): 26.0,
    frozenset({"CD", "N"}): -6.0,
}
_PROLINE_PHI = -65.0
_LEAST_HANDEDNESS = 0.3
"""Least triple product of unit vectors at a centre with four neighbours; 0.77 at an ideal one."""
_LARGEST_TWIST = math.radians(40)
"""Largest deviation of a peptide bond or another planar torsion from 0 or 180 degrees."""
_LARGEST_STRETCH = 0.1
"""Largest relative deviation of a bond from its equilibrium length."""
_LEAST_DISTANCE = 0.12
"""Least distance in nm of atoms that are three or more bonds apart."""


class Rotamer(NamedTuple):
    """Torsions in degrees that chemistry leaves open, the same for all residues."""

    phi: float
    psi: float
    chi: float
    """About CA-CB."""


class Stereochemistry:
    """Which torsions the handedness of every centre, planar groups and rings ask for.

    The neighbours of every atom are kept in an order of meaning: seen from the first, the second, third and
    fourth follow each other clockwise. Sorted from the backbone outwards, heavy atoms first, labels rising, all
    centres of the twenty amino acids are of that kind but two, and the nitrogen of a charged end.
    """

    def __init__(self, topology: app.Topology, cis: Sequence[int]) -> None:
        self.atoms = list(topology.atoms())
        self.cis = frozenset(cis)
        around: list[list[int]] = [[] for _ in self.atoms]
        for a, b in topology.bonds():
            around[a.index].append(b.index)
            around[b.index].append(a.index)
        self.neighbours = [self._ordered(centre, atoms) for centre, atoms in enumerate(around)]
        self.bonds = [(i, j) for i, atoms in enumerate(self.neighbours) for j in atoms if i < j]
        self.rings = sorted({ring for bond in self.bonds for ring in self._rings_of(*bond)})

    def _ordered(self, centre: int, around: Iterable[int]) -> list[int]:
        def key(index: int) -> tuple[bool, int, str]:
            name = self.atoms[index].name
            rank = -1 if name == "N" else "ABGDEZH".find(name[1]) if len(name) > 1 else 9
            return self._is_hydrogen(index), rank, name

        ordered = sorted(around, key=key)
        atom = self.atoms[centre]
        charged_end = atom.name == "N" and len(ordered) == 4
        if charged_end or (atom.residue.name, atom.name) in (("ILE", "CB"), ("PRO", "CD")):
            ordered[2:] = ordered[:1:-1]
        return ordered

    def _is_hydrogen(self, index: int) -> bool:
        return self.atoms[index].element is app.element.hydrogen

    def _rings_of(self, i: int, j: int) -> Iterator[tuple[int, ...]]:
        """The shortest ring through a bond, if it has one, as a closed path with a fixed start."""
        paths, queue = {i: (i,)}, deque([i])
        while queue:
            atom = queue.popleft()
            for other in self.neighbours[atom]:
                if other not in paths and (atom, other) != (i, j):
                    paths[other] = (*paths[atom], other)
                    queue.append(other)
        if j in paths:
            ring = paths[j]
            start = ring.index(min(ring))
            ring = ring[start:] + ring[:start]
            yield ring if ring[1] < ring[-1] else ring[:1] + ring[:0:-1]

    def is_tetrahedral(self, centre: int) -> bool:
        return len(self.neighbours[centre]) == 4

    def is_planar(self, centre: int) -> bool:
        """Three neighbours in a plane: not so an amine, whose neighbours are all saturated."""
        around = self.neighbours[centre]
        amine = self.atoms[centre].element is app.element.nitrogen and all(
            self._is_hydrogen(other) or self.is_tetrahedral(other) for other in around
        )
        return len(around) == 3 and not amine

    def azimuths(self, centre: int, axis: int) -> dict[int, float]:
        """Degrees, clockwise seen from ``axis``, at which the other neighbours of the centre stand about it."""
        around = self.neighbours[centre]
        place = around.index(axis)
        others = around[:place] + around[place + 1 :]
        if len(others) == 3 and place % 2:  # only an even permutation keeps the handedness
            others[1:] = others[:0:-1]
        step = 180.0 if self.is_planar(centre) else 120.0
        return {other: n * step for n, other in enumerate(others)}

    def torsion(self, i: int, j: int, k: int, m: int, rotamer: Rotamer) -> float:
        """Degrees of a row of the z-matrix."""
        here = self.azimuths(j, k)
        if m in here:
            return here[i] - here[m]
        there = self.azimuths(k, j)
        first, last, value = self._reference(j, k, rotamer)
        return value + here[i] - here[first] + there[m] - there[last]

    def _reference(self, j: int, k: int, rotamer: Rotamer) -> tuple[int, int, float]:
        """One neighbour at either end of a bond, and their torsion in degrees."""
        names = frozenset({self.atoms[j].name, self.atoms[k].name})
        ends = self.ends(j, k)
        ring = self._ring(j, k)
        residue = self.atoms[j].residue
        if residue is not self.atoms[k].residue:
            bond = min(residue.index, self.atoms[k].residue.index)
            return *ends, 0.0 if bond in self.cis else 180.0
        if ring and not any(map(self.is_tetrahedral, ring)):
            return *ends, 0.0
        if self._is_phi(j, k):
            return *ends, _PROLINE_PHI if ring else rotamer.phi
        if ring:
            return *ends, _PROLINE_RING[names]
        if names == {"CA", "C"}:
            return *ends, rotamer.psi
        if names == {"CA", "CB"}:
            return *ends, rotamer.chi
        if self.is_planar(j) and self.is_planar(k):
            return *ends, 0.0 if residue.name == "ARG" else 180.0
        flat = [any(centre in ring for ring in self.rings) for centre in (j, k)]
        across = any(flat) and (self.is_tetrahedral(j) or self.is_tetrahedral(k))
        return *ends, 90.0 if across else 180.0

    def ends(self, j: int, k: int) -> tuple[int, int]:
        """The neighbours at either end that name the torsion of a bond: C for phi, those of a ring, else the first."""
        ring, phi = self._ring(j, k), self._is_phi(j, k)

        def end(centre: int, axis: int) -> int:
            others = [other for other in self.neighbours[centre] if other != axis]
            if phi:
                return next(other for other in others if self.atoms[other].name == "C")
            return next((other for other in others if other in ring), others[0])

        return end(j, k), end(k, j)

    def flat_torsions(self) -> Iterator[tuple[int, int, int, int, float]]:
        """Torsions that stay near 0 or 180 degrees, peptide bonds and labels of planar groups among them."""
        for j, k in self.bonds:
            ring = self._ring(j, k)
            flat_ring = bool(ring) and not any(map(self.is_tetrahedral, ring))
            if flat_ring or (self.is_planar(j) and self.is_planar(k)):
                first, last, value = self._reference(j, k, Rotamer(0.0, 0.0, 0.0))
                yield first, j, k, last, value

    def _ring(self, j: int, k: int) -> tuple[int, ...]:
        return next((ring for ring in self.rings if j in ring and k in ring), ())

    def _is_phi(self, j: int, k: int) -> bool:
        carbonyls = [any(self.atoms[other].name == "C" for other in self.neighbours[centre]) for centre in (j, k)]
        return {self.atoms[j].name, self.atoms[k].name} == {"N", "CA"} and all(carbonyls)


# The checks


def fault_of(x: np.ndarray, molecule: Stereochemistry, zmatrix: ZMatrix, lengths: np.ndarray) -> str:
    """What is wrong with a relaxed conformation; empty where nothing is."""

    def label(*indices: int) -> str:
        atoms = [molecule.atoms[index] for index in indices]
        return "-".join(f"{atom.name} of {atom.residue.name} {atom.residue.id}" for atom in atoms)

    if not np.isfinite(x).all():
        return "positions are not finite"
    for centre in filter(molecule.is_tetrahedral, range(len(x))):
        arms = x[molecule.neighbours[centre][1:]] - x[centre]
        arms /= np.linalg.norm(arms, axis=1, keepdims=True)
        if not np.linalg.det(arms) > _LEAST_HANDEDNESS:
            return f"{label(centre)} has the wrong handedness"
    flat = list(molecule.flat_torsions())
    if flat:
        rows = torch.tensor([row[:4] for row in flat])
        found = dihedral(torch.from_numpy(x)[None], rows)[0].numpy()
        for (_, j, k, _, value), angle in zip(flat, found, strict=True):
            if not math.cos(angle - math.radians(value)) > math.cos(_LARGEST_TWIST):
                return f"{label(j, k)} is not at {value:g} degrees but at {math.degrees(angle):.0f}"
    bonds = [*zmatrix.bonds.tolist(), *zmatrix.closures.tolist()]
    for (i, j), length in zip(bonds, lengths, strict=True):
        if not abs(np.linalg.norm(x[i] - x[j]) / length - 1) < _LARGEST_STRETCH:
            return f"the bond {label(i, j)} is stretched"
    if overlap := _overlap(x, zmatrix):
        return f"{label(overlap[0])} and {label(overlap[1])} overlap"
    for ring in molecule.rings:
        for i, j in molecule.bonds:
            if not {i, j} & set(ring) and _threads(x[i], x[j], x[list(ring)]):
                return f"the bond {label(i, j)} runs through a ring"
    return ""


def _overlap(x: np.ndarray, zmatrix: ZMatrix) -> tuple[int, int] | None:
    distances = np.linalg.norm(x[:, None] - x[None], axis=2)
    for atom, near in enumerate(zmatrix.neighbours):
        distances[np.ix_([atom, *near], [atom, *near])] = np.inf
    i, j = np.unravel_index(distances.argmin(), distances.shape)
    return None if distances[i, j] > _LEAST_DISTANCE else (int(i), int(j))


def _threads(start: np.ndarray, end: np.ndarray, ring: np.ndarray) -> bool:
    """Whether a segment meets the fan of triangles about the centre of a ring."""
    middle = ring.mean(0)
    if np.linalg.norm((start + end) / 2 - middle) > 0.4:
        return False
    for a, b in zip(ring, np.roll(ring, -1, axis=0), strict=True):
        edges = np.stack([a - middle, b - middle, start - end], axis=1)
        if abs(np.linalg.det(edges)) > 1e-12:
            u, v, t = np.linalg.solve(edges, start - middle)
            if min(u, v, t) >= 0 and u + v <= 1 and t <= 1:
                return True
    return False
