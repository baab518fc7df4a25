"""The bonds of one molecule as a graph, and which neighbour of an atom is the best to build on."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

from openmm_bg.errors import InputError

HYDROGENS = frozenset({"H", "D", "T"})


class BondGraph:
    """Atoms 0 ... n-1 and their bonds; refused unless they are one molecule of at least three atoms.

    Parameters
    ----------
    num_atoms : int
    bonds : iterable of (int, int)
    elements : sequence of str, openmm Element or None
        One per atom; a symbol, or something with a ``symbol``.

    Attributes
    ----------
    neighbours : tuple of tuple of int
        Sorted neighbours of every atom.
    bonds : frozenset of (int, int)
        Every bond once, the lower index first.
    symbols : tuple of str
    """

    def __init__(self, num_atoms: int, bonds: Iterable[Sequence[int]], elements: Sequence[Any]) -> None:
        if num_atoms < 3:
            raise InputError(f"internal coordinates need at least 3 atoms; this molecule has {num_atoms}.")
        if len(elements) != num_atoms:
            raise InputError(f"{num_atoms} atoms need {num_atoms} elements, not {len(elements)}.")
        pairs = set()
        for bond in bonds:
            i, j = sorted(int(atom) for atom in bond)
            if i == j or i < 0 or j >= num_atoms:
                raise InputError(f"the bond ({i}, {j}) does not join two of the atoms 0 to {num_atoms - 1}.")
            pairs.add((i, j))
        self.bonds = frozenset(pairs)
        self.symbols = tuple(str(getattr(element, "symbol", element)) for element in elements)
        around: list[list[int]] = [[] for _ in range(num_atoms)]
        for i, j in sorted(pairs):
            around[i].append(j)
            around[j].append(i)
        self.neighbours = tuple(tuple(sorted(atoms)) for atoms in around)
        self._require_one_piece()
        # A carbon with two neighbours (nitrile, alkyne, allene) is straight: it defines no plane for a
        # torsion.
        self.straight = frozenset(a for a in range(num_atoms) if self.symbols[a] == "C" and self.degree(a) == 2)
        self.rank = cache(self._rank)

    def degree(self, atom: int) -> int:
        """Number of atoms bonded to an atom."""
        return len(self.neighbours[atom])

    def is_hydrogen(self, atom: int) -> bool:
        """Whether the atom is a hydrogen isotope."""
        return self.symbols[atom] in HYDROGENS

    def distances(self, start: int, without: int | None = None) -> dict[int, int]:
        """Number of bonds from ``start`` to every atom that can be reached without crossing ``without``."""
        steps = {start: 0}
        queue = deque([start])
        while queue:
            atom = queue.popleft()
            for neighbour in self.neighbours[atom]:
                if neighbour != without and neighbour not in steps:
                    steps[neighbour] = steps[atom] + 1
                    queue.append(neighbour)
        return steps

    def ranked(self, centre: int) -> list[int]:
        """The neighbours of an atom, the one that continues the backbone first, hydrogens last."""
        return sorted(self.neighbours[centre], key=lambda atom: self.rank(centre, atom))

    def _rank(self, centre: int, atom: int) -> tuple[bool, int, int, int]:
        # A peptide chain meets a nitrogen or a carbonyl carbon before any side chain does; elsewhere the
        # larger branch wins. So the first dihedrals are phi, psi and omega wherever there are such.
        if self.degree(atom) == 1:
            reach = {atom: 0}
        else:
            reach = self.distances(atom, without=centre)
        landmark = min((steps for other, steps in reach.items() if self._is_landmark(other)), default=len(self.symbols))
        heavy = sum(not self.is_hydrogen(other) for other in reach)
        return self.is_hydrogen(atom), landmark, -heavy, atom

    def _is_landmark(self, atom: int) -> bool:
        if self.symbols[atom] == "C":
            return any(self.symbols[other] == "O" and self.degree(other) == 1 for other in self.neighbours[atom])
        return self.symbols[atom] == "N"

    def _require_one_piece(self) -> None:
        missing = sorted(set(range(len(self.neighbours))) - self.distances(0).keys())
        if missing:
            raise InputError(
                f"the bonds do not join all atoms: {len(missing)} of {len(self.neighbours)} cannot be "
                f"reached from atom 0, atom {missing[0]} the first; give one connected molecule with all its bonds."
            )
