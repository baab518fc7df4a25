"""The automatic z-matrix: valid for every molecule, chemical in its torsions, refused where it makes no sense."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from openmm import app

from openmm_bg.coordinates import ZMatrix, dihedral
from openmm_bg.errors import InputError


def is_ring_bond(bond, bonds, num_atoms):
    """Whether the atoms of a bond stay joined without it."""
    around = [set() for _ in range(num_atoms)]
    for i, j in bonds:
        if {i, j} != set(bond):
            around[i].add(j)
            around[j].add(i)
    reached, stack = {bond[0]}, [bond[0]]
    while stack:
        fresh = around[stack.pop()] - reached
        reached |= fresh
        stack += fresh
    return bond[1] in reached


def test_every_molecule(molecule):
    elements, bonds = molecule
    zmatrix = ZMatrix.from_bonds(len(elements), bonds, elements)
    graph = {frozenset(bond) for bond in bonds}
    assert zmatrix.bonds.shape == (len(elements) - 1, 2)
    assert zmatrix.angles.shape == (len(elements) - 2, 3)
    assert zmatrix.torsions.shape == (len(elements) - 3, 4)
    # Every length is a chemical bond, every angle lies between two of them, and the closures are the other bonds.
    used = {frozenset(pair) for pair in zmatrix.bonds.tolist()}
    assert used <= graph and {frozenset(pair) for pair in zmatrix.closures.tolist()} == graph - used
    assert all({frozenset(t[:2]), frozenset(t[1:])} <= graph for t in zmatrix.angles.tolist())

    degree = np.bincount(np.ravel(bonds))
    rotatable = [
        frozenset(bond)
        for bond in bonds
        if degree[bond[0]] > 1 and degree[bond[1]] > 1 and not is_ring_bond(bond, bonds, len(elements))
    ]
    axes = [frozenset(row[1:3]) for row in zmatrix.rows[zmatrix.free_torsions].tolist()]
    assert len(axes) == len(rotatable) and set(axes) == set(rotatable)
    assert not (zmatrix.free_torsions & zmatrix.siblings).any()

    # All further substituents of a centre hang on one sibling, and a heavy one where there is one.
    for index, (atom, centre, previous, sibling) in enumerate(zmatrix.rows.tolist()):
        if zmatrix.siblings[index]:
            assert {frozenset((sibling, centre)), frozenset((atom, centre)), frozenset((previous, centre))} <= graph
            others = zmatrix.neighbours[centre] - {previous, atom}
            assert elements[sibling] != "H" or all(elements[other] == "H" for other in others)


def test_deterministic_and_independent_of_the_order_of_bonds(molecule):
    elements, bonds = molecule
    first = ZMatrix.from_bonds(len(elements), bonds, elements)
    assert first == ZMatrix.from_bonds(len(elements), [bond[::-1] for bond in bonds[::-1]], elements)


def test_stored_and_copied(molecule):
    elements, bonds = molecule
    zmatrix = ZMatrix.from_bonds(len(elements), bonds, elements)
    stored = ZMatrix.from_dict(json.loads(json.dumps(zmatrix.to_dict())))
    assert stored == zmatrix and hash(stored) == hash(zmatrix) and copy.deepcopy(zmatrix) == zmatrix
    assert (stored.free_torsions == zmatrix.free_torsions).all()


def test_alanine_dipeptide_has_phi_psi_omega(dipeptide):
    zmatrix = dipeptide.zmatrix
    names = [f"{atom.residue.name}:{atom.name}" for atom in dipeptide.topology.atoms()]
    free = {tuple(names[i] for i in row) for row in zmatrix.rows[zmatrix.free_torsions].tolist()}
    assert [names[i] for i in zmatrix.seed] == ["ALA:N", "ALA:CA", "ALA:C"]
    assert len(free) == 7
    assert {
        ("ACE:C", "ALA:N", "ALA:CA", "ALA:C"),
        ("NME:N", "ALA:C", "ALA:CA", "ALA:N"),
        ("ACE:CH3", "ACE:C", "ALA:N", "ALA:CA"),
        ("NME:C", "NME:N", "ALA:C", "ALA:CA"),
    } <= free
    assert len(zmatrix.rotors) == 3
    for i, j, k in zmatrix.rotors:
        first = zmatrix.rows[i, 0]
        assert zmatrix.free_torsions[i] and zmatrix.rows[j, 3] == first and zmatrix.rows[k, 3] == first
        assert all(names[zmatrix.rows[row, 0]].split(":")[1].startswith("H") for row in (i, j, k))


def test_backbone_of_every_capped_residue(residue):
    """Also beside a bulky side chain the free torsions are phi and psi themselves; the phi of proline is not free."""
    name, (elements, bonds, index) = residue
    zmatrix = ZMatrix.from_bonds(len(elements), bonds, elements)
    free = {frozenset((row, row[::-1])) for row in map(tuple, zmatrix.rows[zmatrix.free_torsions].tolist())}

    def is_free(*atoms):
        row = tuple(index[atom] for atom in atoms)
        return frozenset((row, row[::-1])) in free

    n, ca, c = (f"{name}:{atom}" for atom in ("N", "CA", "C"))
    assert is_free("ACE:C", n, ca, c) == (name != "PRO")
    assert is_free(n, ca, c, "NME:N")
    assert is_free(ca, c, "NME:N", "NME:C" if "NME:C" in index else "NME:CH3")


def test_narrow_torsions_stay_narrow(dipeptide):
    """Over 300 K dynamics every torsion that is not free keeps within 60 degrees of its mean."""
    torsions = dihedral(dipeptide.frames, torch.tensor(dipeptide.zmatrix.torsions)).numpy()
    phases = np.exp(1j * torsions[:, ~dipeptide.zmatrix.free_torsions])
    spread = np.angle(phases / phases.mean(0))
    assert np.abs(spread).max() < np.pi / 3


def test_rotors():
    def rotors(elements, bonds):
        return len(ZMatrix.from_bonds(len(elements), bonds, elements).rotors)

    methyl_ammonium = ["C", "N", *"HHHHHH"], [(0, 1), (0, 2), (0, 3), (0, 4), (1, 5), (1, 6), (1, 7)]
    assert rotors(*methyl_ammonium) == 1  # the other end holds a seed hydrogen
    assert rotors(["N", *"HHH"], [(0, 1), (0, 2), (0, 3)]) == 0
    methylamine = ["C", "N", *"HHHHH"], [(0, 1), (0, 2), (0, 3), (0, 4), (1, 5), (1, 6)]
    assert rotors(*methylamine) <= 1
    deuterated = ["C", "C", "C", "D", *"HHHHHHH"], [(0, 1), (1, 2), *[(0, i) for i in (3, 4, 5)]]
    deuterated[1].extend([(1, 6), (1, 7), (2, 8), (2, 9), (2, 10)])
    assert rotors(*deuterated) == 1  # CH2D is no threefold rotor


def test_straight_groups_are_looked_past():
    """Behind a triple bond the torsion refers to an atom off the line."""
    elements = ["C"] * 6
    zmatrix = ZMatrix.from_bonds(
        6 + 6,
        [(i, i + 1) for i in range(5)] + [(0, 6), (0, 7), (0, 8), (5, 9), (5, 10), (5, 11)],
        elements + ["H"] * 6,
    )
    line = {0, 1, 2, 3, 4, 5}
    for row in zmatrix.rows.tolist():
        assert not set(row[1:]) <= line


@pytest.mark.parametrize(
    ("num_atoms", "bonds", "elements", "match"),
    [
        (2, [(0, 1)], "HH", "at least 3"),
        (4, [(0, 1), (2, 3)], "HHHH", "do not join all atoms"),
        (4, [(0, 1), (1, 2)], ["H", "O", "H", None], "do not join all atoms"),  # a virtual site
        (3, [(0, 1), (1, 3)], "HOH", "does not join"),
        (3, [(0, 1), (1, 1)], "HOH", "does not join"),
        (3, [(0, 1), (1, 2)], "HO", "elements"),
    ],
)
def test_refused_molecules(num_atoms, bonds, elements, match):
    with pytest.raises(InputError, match=match):
        ZMatrix.from_bonds(num_atoms, bonds, elements)


@pytest.mark.parametrize(
    ("seed", "rows", "match"),
    [
        ((0, 1, 1), [], "seed"),
        ((0, 1, 2), [[4, 0, 1, 2]], "each exactly once"),
        ((0, 1, 2), [[3, 0, 1, 4], [4, 0, 1, 2]], "placed before"),
        ((0, 1, 2), [[3, 0, 0, 1]], "different"),
        ((0, 1, 2), [[3, 0, 1]], "columns"),
    ],
)
def test_refused_tables(seed, rows, match):
    with pytest.raises(InputError, match=match):
        ZMatrix(seed, np.array(rows))


def test_refused_dict():
    with pytest.raises(InputError, match="closures"):
        ZMatrix.from_dict({"seed": [0, 1, 2], "rows": [], "rotors": []})


def test_two_molecules_are_refused():
    topology = app.Topology()
    chain = topology.addChain()
    for _ in range(2):
        residue = topology.addResidue("HOH", chain)
        o, h1, h2 = (topology.addAtom(n, app.Element.getBySymbol(n[0]), residue) for n in ("O", "H1", "H2"))
        topology.addBond(o, h1)
        topology.addBond(o, h2)
    with pytest.raises(InputError, match="one connected molecule"):
        ZMatrix.from_topology(topology)
