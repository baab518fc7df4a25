"""A drawing of a molecule shows the molecule: its distances, its handedness, all of its atoms and bonds."""

from __future__ import annotations

import csv
import io
import xml.etree.ElementTree as ElementTree

import mdtraj
import numpy as np
import pytest
from scipy.spatial.distance import pdist
from scipy.spatial.transform import Rotation

from openmm_bg import analysis as bga
from openmm_bg.errors import InputError


@pytest.fixture(scope="module")
def view(alanine):
    """The same conformation twice, the second one elsewhere."""
    elsewhere = Rotation.from_euler("xyz", [1.0, 2.0, 3.0]).apply(alanine.positions) + 5.0
    shown = [bga.Conformation("here", alanine.positions), bga.Conformation("there", elsewhere, "5 %")]
    return bga.MoleculeView("Twice", alanine.topology, shown)


def test_positions_are_superposed_and_neither_deformed_nor_mirrored(view, alanine):
    here, there = view.positions / 1000.0
    assert np.abs(here - there).max() <= 0.002
    assert pdist(here) == pytest.approx(pdist(alanine.positions), abs=0.002)
    triple = [np.linalg.det(x[[6, 10, 14]] - x[8]) for x in (here, alanine.positions)]
    assert triple[0] == pytest.approx(triple[1], abs=1e-4) and triple[0] * triple[1] > 0
    spread = here.std(axis=0)
    assert spread[0] > spread[1] > spread[2]  # flattest towards the eye


def test_every_atom_and_both_halves_of_every_bond_are_drawn(view, alanine):
    first, second = (ElementTree.fromstring(text) for text in view.drawings())
    assert first.get("viewBox") == second.get("viewBox") and "5 %" in second.get("aria-label")
    atoms = [element for element in first.iter() if element.get("data-atom")]
    assert sorted(int(a.get("data-atom")) for a in atoms) == list(range(22))
    assert {a.get("class") for a in atoms} == {"ball C", "ball H", "ball N", "ball O"}
    sticks = [tuple(map(int, e.get("data-ends").split())) for e in first.iter() if e.get("data-ends")]
    bonds = {(a.index, b.index) for a, b in alanine.topology.bonds()}
    assert sorted(sticks) == sorted(bonds | {pair[::-1] for pair in bonds})
    radius = {a.get("class"): float(a.find("circle").get("r")) for a in atoms}
    assert radius["ball H"] < radius["ball C"]


def test_the_data_are_the_atoms_as_drawn(view):
    rows = list(csv.DictReader(io.StringIO(view.csv())))
    assert [row["conformation"] for row in rows] == ["here"] * 22 + ["there"] * 22
    assert (rows[8]["residue"], rows[8]["atom"]) == ("ALA2", "CA")
    x = np.array([[float(row[f"{axis} / nm"]) for axis in "xyz"] for row in rows])
    assert x == pytest.approx(view.positions.reshape(-1, 3) / 1000)


def test_water_is_left_out(alanine):
    topology = mdtraj.Topology.from_openmm(alanine.topology)
    topology.add_atom("O", mdtraj.element.oxygen, topology.add_residue("HOH", topology.add_chain()))
    x = np.vstack([alanine.positions, [[9.0, 9.0, 9.0]]])
    assert bga.MoleculeView("It", topology, [bga.Conformation("dry", x)]).positions.shape == (1, 22, 3)


def test_what_cannot_be_shown_is_refused(alanine):
    with pytest.raises(InputError, match="no conformation"):
        bga.MoleculeView("It", alanine.topology, [])
    for x in (alanine.positions[1:], np.full((22, 3), np.nan)):
        with pytest.raises(InputError, match="finite positions"):
            bga.MoleculeView("It", alanine.topology, [bga.Conformation("one", x)])
