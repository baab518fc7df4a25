"""Representatives lie where their basins are, and carry what these hold."""

from __future__ import annotations

import itertools

import mdtraj
import numpy as np
import pytest
from chains import HELIX, LEFT, SHARES, SHEET, chain

import openmm_bg as bg
from openmm_bg import analysis as bga
from openmm_bg.errors import InputError


def test_one_for_each_basin_near_its_middle(alanine):
    x, _ = chain(alanine, 3000, 1)
    found = bga.representatives(x, alanine.topology)
    assert [c.name.split()[0] for c in found] == ["sheet", "helix", "left"]  # the most populated first
    assert [c.share for c in found] == pytest.approx([SHARES[1], SHARES[0], SHARES[2]], abs=0.04)
    shown = np.stack([c.positions for c in found])
    angles = bga.backbone_dihedrals(shown, alanine.topology)
    # eight torsions are near their middle at once, of frames that spread by 0.25 in two of them
    assert np.abs(angles.pair() - [SHEET, HELIX, LEFT]).max() < 0.35
    assert [c.name for c in bga.representatives(x, alanine.topology, most=2)] == [c.name for c in found[:2]]
    for conformation in found:
        assert (x == conformation.positions).all(axis=(1, 2)).any()
        basin = next(p for p in bga.populations(*bga.backbone_dihedrals(x, alanine.topology).pair().T)
                     if p.name == conformation.name)  # fmt: skip
        assert conformation.note == f"{bga.format_value(100 * basin.value, 100 * basin.error)} %"


def test_weights_count_and_frames_without_any_do_not(alanine):
    x, _ = chain(alanine, 400, 2)
    left = bga.left_handed(bga.backbone_dihedrals(x, alanine.topology).phi[:, 0])
    x[:3], left[:3] = np.nan, False
    (found,) = bga.representatives(x, alanine.topology, left.astype(float))
    assert found.name.startswith("left") and found.share == pytest.approx(1.0)
    with pytest.raises(InputError, match="not finite"):
        bga.representatives(x, alanine.topology)
    with pytest.raises(InputError, match="shape"):
        bga.representatives(x[:, 1:], alanine.topology)


def test_several_residues_make_combinations():
    peptide = bg.systems.load("alanine_tetrapeptide")
    x = peptide.positions + 0.002 * np.random.default_rng(0).normal(size=(5, *peptide.positions.shape))
    (found,) = bga.representatives(x, peptide.topology)
    assert len(found.name.split(", ")) == 3 and found.name.startswith("ALA")


def test_without_a_backbone_rotamers_are_the_basins():
    topology = mdtraj.Topology()
    residue = topology.add_residue("BUT", topology.add_chain())
    carbons = [topology.add_atom(f"C{k}", mdtraj.element.carbon, residue) for k in range(4)]
    for a, b in itertools.pairwise(carbons):
        topology.add_bond(a, b)
    turns = np.radians([60.0, 180.0, 179.0, 181.0, -65.0, 176.0])
    last = np.stack([0.1 + 0 * turns, 0.1 * np.cos(turns), 0.1 * np.sin(turns)], axis=1)
    x = np.tile([[0, 0.1, 0], [0, 0, 0], [0.1, 0, 0], [0, 0, 0]], (6, 1, 1))
    x[:, 3] = last
    found = bga.representatives(x, topology)
    assert [c.name.split()[-1] for c in found] == ["trans", "gauche+", "gauche-"]
    assert [c.share for c in found] == pytest.approx([4 / 6, 1 / 6, 1 / 6])
    assert (found[0].positions[3] == last[2]).all()  # 179 degrees is the mean
