"""The z-matrix: which distance, angle and torsion places every atom, for any connected molecule.

Three seed atoms a-b-c span a frame; every other atom is placed from a bond length, an angle and a torsion
relative to atoms that stand already. Two rules make the torsions easy to learn. The first substituent behind
a bond carries the proper dihedral about it, the one *free* torsion that turns everything behind. Every
further substituent hangs on that first one, so that its torsion is narrow by chemistry: about +-120 degrees
at sp3 centres, 180 at planar ones.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from openmm import app

from openmm_bg.coordinates.bondgraph import BondGraph
from openmm_bg.errors import InputError


@dataclass(frozen=True, eq=False)
class ZMatrix:
    """Seed and rows of a z-matrix.

    Parameters
    ----------
    seed : (a, b, c)
        Three atoms; b is bonded to a and to c.
    rows : int array, shape (N-3, 4)
        Columns [atom, bond, angle, torsion]: the atom is placed by r(atom, bond), theta(atom, bond, angle)
        and phi(atom, bond, angle, torsion). References stand in the seed or in an earlier row.
    closures : int array, shape (k, 2)
        Bonds of the molecule that close a ring, and so are not among the z-matrix bonds.
    rotors : tuple of (i, j, k)
        Row indices of threefold rotors with three identical hydrogens (methyl, ammonium): i is the free
        torsion of the first hydrogen, j and k are the other two, which hang on it.

    Examples
    --------
    >>> water = ZMatrix.from_bonds(3, [(0, 1), (0, 2)], ["O", "H", "H"])
    >>> water.seed, len(water.rows)
    ((1, 0, 2), 0)
    """

    seed: tuple[int, int, int]
    rows: np.ndarray
    closures: np.ndarray = field(default_factory=lambda: np.zeros((0, 2), np.int64))
    rotors: tuple[tuple[int, int, int], ...] = ()

    def __post_init__(self) -> None:
        set_field = object.__setattr__
        set_field(self, "seed", tuple(int(atom) for atom in self.seed))
        set_field(self, "rows", _table(self.rows, 4, "rows"))
        set_field(self, "closures", _table(self.closures, 2, "closures"))
        set_field(self, "rotors", tuple(tuple(int(row) for row in rotor) for rotor in self.rotors))
        placed = set(self.seed)
        if len(self.seed) != 3 or len(placed) != 3:
            raise InputError(f"the seed of a z-matrix is three different atoms, not {self.seed}.")
        for row in self.rows.tolist():
            atom, *references = row
            if atom in placed or len(set(references)) != 3 or not placed.issuperset(references):
                raise InputError(
                    f"the z-matrix row {row} must place a new atom relative to three different atoms placed before it."
                )
            placed.add(atom)
        if placed != set(range(self.num_atoms)):
            raise InputError(f"the z-matrix must place the atoms 0 to {self.num_atoms - 1}, each exactly once.")
        if self.closures.size and not placed.issuperset(self.closures.ravel().tolist()):
            raise InputError("the ring closures of a z-matrix must join atoms of the molecule.")
        if any(len(set(rotor) & set(range(len(self.rows)))) != 3 for rotor in self.rotors):
            raise InputError("a rotor is three different row indices of the z-matrix.")

    @classmethod
    def from_bonds(cls, num_atoms: int, bonds: Iterable[Sequence[int]], elements: Sequence[Any]) -> ZMatrix:
        """The z-matrix of one connected molecule: chains, branches, rings; equal input, equal rows.

        The seed lies in the middle of the heavy-atom backbone. Heavy atoms are placed first, outwards, then
        the hydrogens. In a peptide the free torsions are phi, psi and omega.

        Parameters
        ----------
        num_atoms : int
            At least 3.
        bonds : iterable of (int, int)
        elements : sequence of str, openmm Element or None
            One per atom.

        Raises
        ------
        InputError
            With fewer than three atoms, several fragments, or bonds between atoms that do not exist.
        """
        graph = BondGraph(num_atoms, bonds, elements)
        seed = _central_seed(graph)
        rows = _grow(graph, seed)
        tree = {frozenset(pair) for pair in ((seed[0], seed[1]), (seed[1], seed[2]))}
        tree |= {frozenset(row[:2]) for row in rows}
        closures = [bond for bond in sorted(graph.bonds) if frozenset(bond) not in tree]
        without_rotors = cls(seed, np.array(rows), np.array(closures))
        return cls(seed, without_rotors.rows, without_rotors.closures, _find_rotors(graph, without_rotors))

    @classmethod
    def from_topology(cls, topology: app.Topology) -> ZMatrix:
        """The z-matrix of an OpenMM Topology that holds one molecule with all its bonds."""
        bonds = [(bond[0].index, bond[1].index) for bond in topology.bonds()]
        return cls.from_bonds(topology.getNumAtoms(), bonds, [atom.element for atom in topology.atoms()])

    @property
    def num_atoms(self) -> int:
        """Number of atoms, N: the seed's three and one for each row."""
        return len(self.rows) + 3

    @cached_property
    def bonds(self) -> np.ndarray:
        """Atoms of the bond lengths, shape (N-1, 2): (a, b), (b, c), then the rows."""
        a, b, c = self.seed
        return _table([[a, b], [b, c], *self.rows[:, :2].tolist()], 2, "bonds")

    @cached_property
    def angles(self) -> np.ndarray:
        """Atoms of the angles, shape (N-2, 3): (a, b, c), then the rows."""
        return _table([list(self.seed), *self.rows[:, :3].tolist()], 3, "angles")

    @property
    def torsions(self) -> np.ndarray:
        """Atoms of the torsions, shape (N-3, 4): the rows."""
        return self.rows

    @cached_property
    def neighbours(self) -> tuple[frozenset[int], ...]:
        """The atoms bonded to every atom, ring closures included."""
        around: list[set[int]] = [set() for _ in range(self.num_atoms)]
        for i, j in [*self.bonds.tolist(), *self.closures.tolist()]:
            around[i].add(j)
            around[j].add(i)
        return tuple(frozenset(atoms) for atoms in around)

    @cached_property
    def siblings(self) -> np.ndarray:
        """(N-3,) bool: True where the torsion atom is bonded to the same centre as the atom itself."""
        return np.array([torsion in self.neighbours[bond] for _, bond, _, torsion in self.rows.tolist()], bool)

    @cached_property
    def free_torsions(self) -> np.ndarray:
        """(N-3,) bool: True for the one torsion per rotatable bond that turns everything behind it.

        Rotatable are the bonds outside rings whose two atoms both have other neighbours.
        """
        rings = self._ring_bonds()
        free = np.zeros(len(self.rows), bool)
        axes = set()
        for index, (_, bond, angle, _) in enumerate(self.rows.tolist()):
            axis = frozenset((bond, angle))
            free[index] = not self.siblings[index] and axis not in rings and axis not in axes
            if free[index]:
                axes.add(axis)
        return free

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, fit for JSON."""
        return {
            "seed": list(self.seed),
            "rows": self.rows.tolist(),
            "closures": self.closures.tolist(),
            "rotors": [list(rotor) for rotor in self.rotors],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ZMatrix:
        """The z-matrix that :meth:`to_dict` wrote."""
        unknown = set(data) ^ {"seed", "rows", "closures", "rotors"}
        if unknown:
            raise InputError(f"a stored z-matrix has seed, rows, closures and rotors; check {sorted(unknown)}.")
        return cls(tuple(data["seed"]), data["rows"], data["closures"], data["rotors"])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ZMatrix) and self.to_dict() == other.to_dict()

    def __hash__(self) -> int:
        return hash((self.seed, self.rows.tobytes(), self.closures.tobytes(), self.rotors))

    def _ring_bonds(self) -> set[frozenset[int]]:
        # The z-matrix bonds form a tree; a closure makes a ring of the tree path between its two atoms.
        a, b, c = self.seed
        parent = {a: b, c: b} | {atom: bond for atom, bond, *_ in self.rows.tolist()}
        rings: set[frozenset[int]] = set()
        for i, j in self.closures.tolist():
            ring = {frozenset((i, j))}
            for atom in (i, j):
                while atom in parent:
                    ring ^= {frozenset((atom, parent[atom]))}
                    atom = parent[atom]
            rings |= ring
        return rings


def _central_seed(graph: BondGraph) -> tuple[int, int, int]:
    def remoteness(atom: int) -> tuple[bool, bool, int, int, int]:
        steps = [d for other, d in graph.distances(atom).items() if not graph.is_hydrogen(other)] or [0]
        backbone = sum(not graph.is_hydrogen(other) for other in graph.neighbours[atom]) >= 2
        return atom in graph.straight, not backbone, max(steps), sum(steps), atom

    b = min((atom for atom in range(len(graph.symbols)) if graph.degree(atom) > 1), key=remoteness)
    a, c = graph.ranked(b)[:2]
    return a, b, c


def _grow(graph: BondGraph, seed: tuple[int, int, int]) -> list[list[int]]:
    """Rows outwards from the seed: heavy atoms breadth first, then hydrogens."""
    a, b, c = seed
    parent = {a: b, c: b, b: a}
    order = {a: 0, b: 1, c: 2}  # when each atom was placed
    straight = graph.straight if b not in graph.straight else frozenset()
    queue: list[tuple[bool, int, int, int]] = []
    pushed = 0

    def reach_out(centre: int) -> None:
        nonlocal pushed
        for atom in graph.ranked(centre):
            if atom not in order:
                heapq.heappush(queue, (graph.is_hydrogen(atom), pushed, atom, centre))
                pushed += 1

    def torsion_atom(centre: int, previous: int) -> int:
        attached = [atom for atom in graph.neighbours[centre] if atom in order and atom != previous]
        if attached:
            return min(attached, key=order.__getitem__)  # hang on the first sibling
        behind, here = centre, previous
        while here in straight:  # a straight stretch defines no plane: look past it
            behind, here = here, parent[here]
        taken = (centre, previous, behind)
        others = [atom for atom in graph.neighbours[here] if atom in order and atom not in taken]
        return min(others, key=lambda atom: graph.rank(here, atom))

    rows = []
    for centre in (b, a, c):
        reach_out(centre)
    while queue:
        _, _, atom, centre = heapq.heappop(queue)
        if atom in order:  # a ring reached it from its other side first
            continue
        previous = parent[centre]
        rows.append([atom, centre, previous, torsion_atom(centre, previous)])
        parent[atom] = centre
        order[atom] = len(order)
        reach_out(atom)
    return rows


def _find_rotors(graph: BondGraph, zmatrix: ZMatrix) -> tuple[tuple[int, int, int], ...]:
    hydrogens: dict[int, list[int]] = {}
    for index, (atom, centre, *_) in enumerate(zmatrix.rows.tolist()):
        if graph.is_hydrogen(atom) and graph.degree(atom) == 1:
            hydrogens.setdefault(centre, []).append(index)
    return tuple(
        (rows[0], rows[1], rows[2])
        for centre, rows in hydrogens.items()
        if len(rows) == 3
        and graph.degree(centre) == 4
        and graph.symbols[centre] in ("C", "N")
        and len({graph.symbols[zmatrix.rows[row, 0]] for row in rows}) == 1
        and zmatrix.free_torsions[rows[0]]
    )


def _table(values: Any, columns: int, name: str) -> np.ndarray:
    table = np.array(values, dtype=np.int64)
    if table.size == 0:
        table = table.reshape(0, columns)
    if table.ndim != 2 or table.shape[1] != columns:
        raise InputError(f"the {name} of a z-matrix form a table of {columns} columns, not an array {table.shape}.")
    table.setflags(write=False)
    return table
