"""What can be measured of any molecule, from its bonds alone: coordinates, states, stereocentres, contacts."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from openmm_bg.errors import InputError

Floats = NDArray[np.float64]

_CLASH = 0.6  # of the sum of van der Waals radii; hydrogen bonds reach down to 0.63
_PAIRS_AT_ONCE = 4_000_000
_CHI = 4


class Coordinate(NamedTuple):
    """A bond, an angle or a torsion.

    Attributes
    ----------
    name : str
        Such as "ALA2 CA-CB" or "ALA2 φ".
    atoms : tuple of int
        Two, three or four.
    fold : int
        Of a torsion: how many images differ only in the labels of like atoms, 3 for a methyl group.
    """

    name: str
    atoms: tuple[int, ...]
    fold: int = 1


class Centre(NamedTuple):
    """A stereocentre: three of its neighbours give its handedness; ``is_alpha`` where these are N, C and CB of CA."""

    name: str
    atom: int
    neighbours: tuple[int, int, int]
    is_alpha: bool


@dataclass(frozen=True)
class Structure:
    """Bonds, angles and torsions of a molecule, its rotamers, peptide bonds, stereocentres and contacts.

    Water is left out. Every chemical bond that is not terminal has one torsion; a torsion's name is that of the
    backbone or side chain where it has one.

    Parameters
    ----------
    topology : openmm.app.Topology or mdtraj.Topology
        With bonds.

    Raises
    ------
    InputError
        Where the topology has no bonds.

    Examples
    --------
    >>> structure = Structure.of(molecule.topology)                           # doctest: +SKIP
    >>> [torsion.name for torsion in structure.torsions][:2]                  # doctest: +SKIP
    ['ALA2 φ', 'ALA2 ψ']
    """

    topology: Any

    @classmethod
    def of(cls, topology: Any) -> Structure:
        import mdtraj

        if not isinstance(topology, mdtraj.Topology):
            topology = mdtraj.Topology.from_openmm(topology)
        structure = cls(topology)
        if not structure.bonds:
            raise InputError(
                "The topology has no bonds, so there are no coordinates to compare; give a PDB file with CONECT "
                "records, or a topology file of a force field (prmtop, psf)."
            )
        return structure

    @cached_property
    def _atoms(self) -> list[Any]:
        return list(self.topology.atoms)

    @cached_property
    def neighbours(self) -> list[list[int]]:
        around: list[list[int]] = [[] for _ in self._atoms]
        for a, b in self.topology.bonds:
            if not a.residue.is_water:
                around[a.index].append(b.index)
                around[b.index].append(a.index)
        return [sorted(set(atoms)) for atoms in around]

    @cached_property
    def bonds(self) -> list[Coordinate]:
        pairs = [(i, j) for i, around in enumerate(self.neighbours) for j in around if i < j]
        return [Coordinate(self._name(pair), pair) for pair in pairs]

    @cached_property
    def angles(self) -> list[Coordinate]:
        rows = [
            (i, centre, j)
            for centre, around in enumerate(self.neighbours)
            for k, i in enumerate(around)
            for j in around[k + 1 :]
        ]
        return [Coordinate(self._name(row), row) for row in rows]

    @cached_property
    def torsions(self) -> list[Coordinate]:
        """One for every bond both of whose ends go on; named ones first."""
        rows = {frozenset(atoms[1:3]): (name, atoms) for name, atoms in self._named()}
        for bond in self.bonds:
            j, k = bond.atoms
            ends = [[a for a in self.neighbours[end] if a not in (j, k)] for end in (j, k)]
            if frozenset((j, k)) not in rows and all(ends):
                first, last = (min(end, key=lambda a: (self._is_hydrogen(a), a)) for end in ends)
                rows[frozenset((j, k))] = self._name((first, j, k, last)), (first, j, k, last)
        return [Coordinate(name, atoms, self._images(*atoms[1:3])) for name, atoms in rows.values()]

    @cached_property
    def backbone(self) -> list[tuple[str, int, int]]:
        """Residues with phi and psi: name, and which torsions these are."""
        column = {torsion.name: k for k, torsion in enumerate(self.torsions)}
        names = [name.removesuffix(" φ") for name in column if name.endswith(" φ")]
        return [(name, column[f"{name} φ"], column[f"{name} ψ"]) for name in names if f"{name} ψ" in column]

    @cached_property
    def free_torsions(self) -> list[int]:
        """Phi, psi and chi, and what else is a rotamer: what changes the shape of a molecule."""
        named = [k for k, torsion in enumerate(self.torsions) if torsion.name[-2:].strip("1234 ") in tuple("φψχ")]
        return sorted({*named, *self.rotamers})

    @cached_property
    def rotamers(self) -> list[int]:
        """Which torsions have wells a third of a turn wide that chains cross: heavy ends, no ring, not φ, ψ or ω."""
        backbone = {frozenset(atoms[1:3]) for name, atoms in self._named() if name[-1] in "φψ"}
        backbone |= {frozenset(bond.atoms[1:3]) for bond in self.peptide_bonds}
        return [
            number
            for number, torsion in enumerate(self.torsions)
            if frozenset(torsion.atoms[1:3]) not in backbone
            and not any(self._is_hydrogen(a) for a in torsion.atoms)
            and torsion.fold == 1
            and not self._in_ring(*torsion.atoms[1:3])
        ]

    @cached_property
    def peptide_bonds(self) -> list[Coordinate]:
        """Amides between residues: cis where the torsion is below 90 degrees."""
        found = []
        for bond in self.bonds:
            for c, n in (bond.atoms, bond.atoms[::-1]):
                if self._symbol(c) != "C" or self._symbol(n) != "N" or self._atoms[c].residue is self._atoms[n].residue:
                    continue
                oxygens = [a for a in self.neighbours[c] if self._symbol(a) == "O" and len(self.neighbours[a]) == 1]
                before = [a for a in self.neighbours[c] if a != n and a not in oxygens]
                after = [a for a in self.neighbours[n] if a != c and not self._is_hydrogen(a)]
                if len(oxygens) == 1 and before and after:
                    last = min(after, key=lambda a: (self._atoms[a].name != "CA", a))
                    found.append(Coordinate(f"{self._residue(c)}-{self._residue(n)}", (before[0], c, n, last)))
        return found

    @cached_property
    def centres(self) -> list[Centre]:
        """Atoms with four neighbours that are all different in constitution."""
        kinds = self._constitution
        found = []
        for atom, around in enumerate(self.neighbours):
            if len(around) != 4 or len({kinds[a] for a in around}) != 4:
                continue
            named = {self._atoms[a].name: a for a in around}
            is_alpha = self._atoms[atom].name == "CA" and {"N", "C", "CB"} <= named.keys()
            three = tuple(named[name] for name in ("N", "C", "CB")) if is_alpha else tuple(around[:3])
            found.append(Centre(f"{self._residue(atom)} {self._atoms[atom].name}", atom, three, is_alpha))
        return found

    @cached_property
    def contacts(self) -> tuple[NDArray[np.intp], Floats]:
        """Pairs of atoms more than three bonds apart, (pairs, 2), and the distance in nm below which they clash."""
        n = len(self._atoms)
        apart = np.ones((n, n), dtype=bool)
        for atom in range(n):
            near = {atom}
            for _ in range(3):
                near |= {b for a in near for b in self.neighbours[a]}
            apart[atom, list(near)] = False
        # an atom without bonds is an ion or belongs to water
        bound = np.array([bool(around) for around in self.neighbours])
        pairs = np.argwhere(np.triu(apart & bound & bound[:, None], 1))
        radii = np.array([getattr(atom.element, "radius", None) or 0.15 for atom in self._atoms])
        return pairs, _CLASH * radii[pairs].sum(1)

    # -- measured on frames

    def values(self, positions: ArrayLike, coordinates: Sequence[Coordinate]) -> NDArray[np.float32]:
        """Coordinates of one kind, (frames, coordinates): nm, or radians; torsions folded to their images."""
        import mdtraj

        x = np.asarray(positions)
        if not coordinates:
            return np.zeros((len(x), 0), dtype=np.float32)
        trajectory = mdtraj.Trajectory(x, self.topology)
        atoms = np.array([c.atoms for c in coordinates])
        measure = {2: mdtraj.compute_distances, 3: mdtraj.compute_angles, 4: mdtraj.compute_dihedrals}[atoms.shape[1]]
        found = measure(trajectory, atoms, periodic=False)
        folds = np.array([c.fold for c in coordinates])
        if (folds > 1).any():
            turned = (found * folds).astype(np.float64)
            found = np.where(folds > 1, turned - 2 * np.pi * np.round(turned / (2 * np.pi)), found).astype(np.float32)
        return found

    def handedness(self, positions: ArrayLike) -> NDArray[np.bool_]:
        """Whether the triple product at each stereocentre is positive, (frames, centres): L at CA of an amino acid."""
        x = np.asarray(positions, dtype=np.float64)
        found = np.zeros((len(x), len(self.centres)), dtype=bool)
        for column, centre in enumerate(self.centres):
            arms = x[:, centre.neighbours] - x[:, [centre.atom]]
            found[:, column] = np.linalg.det(arms) > 0
        return found

    def clashes(self, positions: ArrayLike) -> NDArray[np.bool_]:
        """Whether any two atoms more than three bonds apart are closer than 0.6 of their radii, (frames,)."""
        x = np.asarray(positions, dtype=np.float32)
        pairs, least = self.contacts
        found = np.zeros(len(x), dtype=bool)
        if not len(pairs):
            return found
        limit = (least**2).astype(np.float32)
        step = max(1, _PAIRS_AT_ONCE // len(pairs))
        for start in range(0, len(x), step):
            part = x[start : start + step].transpose(2, 0, 1)
            squared = sum((axis[:, pairs[:, 0]] - axis[:, pairs[:, 1]]) ** 2 for axis in part)
            found[start : start + step] = (squared < limit).any(1)
        return found

    # -- names and graph

    def _named(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Backbone and side-chain torsions that mdtraj knows by name, and peptide bonds."""
        from mdtraj.geometry import dihedral

        tables = [("φ", dihedral.indices_phi, 2), ("ψ", dihedral.indices_psi, 1)]
        tables += [(f"χ{k}", getattr(dihedral, f"indices_chi{k}"), 1) for k in range(1, _CHI + 1)]
        for symbol, indices, owner in tables:
            for row in indices(self.topology):
                atoms = tuple(int(a) for a in row)
                if all(b in self.neighbours[a] for a, b in itertools.pairwise(atoms)):
                    yield f"{self._residue(atoms[owner])} {symbol}", atoms
        for bond in self.peptide_bonds:
            yield f"{bond.name} ω", bond.atoms

    def _name(self, atoms: Iterable[int]) -> str:
        text, residue = [], None
        for a in atoms:
            atom = self._atoms[a]
            text.append(atom.name if atom.residue is residue else f"{self._residue(a)} {atom.name}")
            residue = atom.residue
        return "-".join(text)

    def _residue(self, atom: int) -> str:
        """The residue's name, with its chain where that is not unique."""
        residue = self._atoms[atom].residue
        return f"{residue.chain.index}:{residue}" if self._names[str(residue)] > 1 else str(residue)

    @cached_property
    def _names(self) -> Counter[str]:
        return Counter(str(residue) for residue in self.topology.residues)

    def _symbol(self, atom: int) -> str:
        return getattr(self._atoms[atom].element, "symbol", "")

    def _is_hydrogen(self, atom: int) -> bool:
        return self._symbol(atom) in ("H", "D")

    def _images(self, j: int, k: int) -> int:
        """How many turns about a bond change labels alone: all atoms at an end are alike."""
        ends = [[a for a in self.neighbours[end] if a not in (j, k)] for end in (j, k)]
        return math.lcm(*(len(end) for end in ends if len({self._constitution[a] for a in end}) == 1))

    def _in_ring(self, j: int, k: int) -> bool:
        seen, edge = {j}, [a for a in self.neighbours[j] if a != k]
        while edge:
            seen |= set(edge)
            edge = [b for a in edge for b in self.neighbours[a] if b not in seen]
        return k in seen

    @cached_property
    def _constitution(self) -> list[int]:
        """Equal numbers for atoms that no bond tells apart (Morgan, J. Chem. Doc. 5, 107 (1965))."""
        kinds: list[Any] = [(self._symbol(a), len(around)) for a, around in enumerate(self.neighbours)]
        count = 0
        while count != len(set(kinds)):
            count = len(set(kinds))
            kinds = [(kinds[a], tuple(sorted(kinds[b] for b in around))) for a, around in enumerate(self.neighbours)]
            numbers = {kind: number for number, kind in enumerate(sorted(set(kinds)))}
            kinds = [numbers[kind] for kind in kinds]
        return kinds
