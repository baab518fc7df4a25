"""Coordinates, states, centres and contacts from bonds alone, against other code and by hand."""

from __future__ import annotations

from pathlib import Path

import mdtraj
import numpy as np
import pytest
import torch
from openmm import app

import openmm_bg as bg
from openmm_bg.analysis import Structure
from openmm_bg.coordinates import dihedral
from openmm_bg.errors import InputError

DATA = Path(__file__).resolve().parents[1] / "data"


@pytest.fixture(scope="module")
def dipeptide(alanine) -> Structure:
    return Structure.of(alanine.topology)


@pytest.fixture(scope="module")
def frames(alanine) -> np.ndarray:
    noise = np.random.default_rng(0).normal(size=(50, 22, 3))
    return alanine.positions + 0.01 * noise


def test_every_bond_angle_and_torsion_is_there_once(dipeptide):
    assert (len(dipeptide.bonds), len(dipeptide.angles), len(dipeptide.torsions)) == (21, 36, 7)
    assert len({frozenset(t.atoms[1:3]) for t in dipeptide.torsions}) == 7
    names = {t.name: t.fold for t in dipeptide.torsions}
    assert names["ALA2 φ"] == names["ALA2 ψ"] == names["ACE1-ALA2 ω"] == 1
    assert sorted(names.values()) == [1, 1, 1, 1, 3, 3, 3]
    assert "ALA2 CA-CB" in {b.name for b in dipeptide.bonds}
    assert "ALA2 C-NME3 N" in {b.name for b in dipeptide.bonds}


def test_values_are_those_of_the_coordinates(dipeptide, frames):
    x = torch.as_tensor(frames)
    torsions = torch.tensor([t.atoms for t in dipeptide.torsions])
    folds = np.array([t.fold for t in dipeptide.torsions])
    gap = dipeptide.values(frames, dipeptide.torsions) - dihedral(x, torsions).numpy() * folds
    np.testing.assert_allclose(np.angle(np.exp(1j * gap)), 0, atol=2e-4)  # single precision, threefold
    i, j = np.array([b.atoms for b in dipeptide.bonds]).T
    lengths = np.linalg.norm(frames[:, i] - frames[:, j], axis=-1)
    np.testing.assert_allclose(dipeptide.values(frames, dipeptide.bonds), lengths, atol=1e-6)
    i, j, k = np.array([a.atoms for a in dipeptide.angles]).T
    u, v = frames[:, i] - frames[:, j], frames[:, k] - frames[:, j]
    cosine = (u * v).sum(-1) / np.linalg.norm(u, axis=-1) / np.linalg.norm(v, axis=-1)
    np.testing.assert_allclose(dipeptide.values(frames, dipeptide.angles), np.arccos(cosine), atol=1e-5)


def test_relabelled_hydrogens_change_no_folded_torsion(dipeptide, frames):
    turned = frames.copy()
    turned[:, [11, 12, 13]] = frames[:, [12, 13, 11]]  # of CB
    (k,) = [k for k, t in enumerate(dipeptide.torsions) if 11 in t.atoms]
    exact = frames[0].copy()
    axis = (exact[10] - exact[8]) / np.linalg.norm(exact[10] - exact[8])
    arm = exact[11] - exact[10]
    for number, atom in enumerate((11, 12, 13)):  # an ideal rotor
        angle = number * 2 * np.pi / 3
        rotated = arm * np.cos(angle) + np.cross(axis, arm) * np.sin(angle) + axis * (axis @ arm) * (1 - np.cos(angle))
        exact[atom] = exact[10] + rotated
    other = exact.copy()
    other[[11, 12, 13]] = exact[[12, 13, 11]]
    a, b = dipeptide.values(np.stack([exact, other]), dipeptide.torsions)[:, k]
    assert abs(np.angle(np.exp(1j * (a - b)))) < 1e-3


def test_a_mirror_image_has_the_other_hand(dipeptide, frames):
    assert [c.name for c in dipeptide.centres] == ["ALA2 CA"] and dipeptide.centres[0].is_alpha
    assert dipeptide.handedness(frames).all()
    assert not dipeptide.handedness(-frames).any()


def test_side_chains_centres_and_planar_ends():
    structure = Structure.of(bg.systems.peptide("ACE ILE PHE GLU NME").topology)
    assert [c.name for c in structure.centres] == ["ILE2 CA", "ILE2 CB", "PHE3 CA", "GLU4 CA"]
    folds = {t.name: t.fold for t in structure.torsions}
    # the two halves of a ring and of a carboxylate differ in labels alone
    assert folds["PHE3 χ2"] == folds["GLU4 χ3"] == 2 and folds["ILE2 χ1"] == folds["GLU4 χ2"] == 1
    assert [structure.torsions[k].name for k in structure.rotamers] == [
        "ILE2 χ1", "PHE3 χ1", "GLU4 χ1", "ILE2 χ2", "GLU4 χ2",
    ]  # fmt: skip
    assert [p.name for p in structure.peptide_bonds] == ["ACE1-ILE2", "ILE2-PHE3", "PHE3-GLU4", "GLU4-NME5"]
    assert [name for name, _, _ in structure.backbone] == ["ILE2", "PHE3", "GLU4"]


def test_proline_has_no_rotamers_in_its_ring():
    structure = Structure.of(bg.systems.peptide("ACE PRO NME").topology)
    assert structure.rotamers == []
    (trans, _) = structure.peptide_bonds
    assert structure.topology.atom(trans.atoms[3]).name == "CA"


def test_clashes_are_those_of_all_pairs(dipeptide, alanine):
    pairs, least = dipeptide.contacts
    graph = {frozenset(b.atoms) for b in dipeptide.bonds}
    assert not any(frozenset(map(int, pair)) in graph for pair in pairs)
    squeezed = alanine.positions[None] * np.linspace(1.0, 0.3, 60)[:, None, None]
    gaps = np.linalg.norm(squeezed[:, pairs[:, 0]] - squeezed[:, pairs[:, 1]], axis=-1)
    expected = (gaps < least).any(1)
    assert 0 < expected.sum() < 60
    np.testing.assert_array_equal(dipeptide.clashes(squeezed), expected)


def test_water_is_left_out():
    molecule = bg.systems.load("alanine_dipeptide")
    modeller = app.Modeller(molecule.topology, molecule.positions * app.topology.nanometers)
    modeller.addSolvent(app.ForceField("amber99sbildn.xml", "tip3p.xml"), numAdded=20)
    structure = Structure.of(modeller.topology)
    assert len(structure.bonds) == 21 and len(structure.contacts[0]) == 133


def test_a_molecule_without_peptide_and_one_without_bonds():
    methylacetamide = Structure.of(mdtraj.load(str(DATA / "n_methylacetamide.pdb")).topology)
    assert methylacetamide.backbone == [] and len(methylacetamide.torsions) == 3
    bare = mdtraj.Topology()
    residue = bare.add_residue("LIG", bare.add_chain())
    bare.add_atom("C", mdtraj.element.carbon, residue)
    with pytest.raises(InputError, match="no bonds"):
        Structure.of(bare)
