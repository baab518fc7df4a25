"""Alanine dipeptide turned about its two bonds: angles and comparisons with a known answer."""

from __future__ import annotations

import json

import numpy as np
import pytest
from openmm import unit

from openmm_bg.analysis import backbone_dihedrals, compare
from openmm_bg.errors import InputError

mdtraj = pytest.importorskip("mdtraj")


def torsion(x, i, j, k, m):
    """IUPAC sign, by projection onto the plane normal to the central bond."""
    axis = (x[k] - x[j]) / np.linalg.norm(x[k] - x[j])
    a, b = x[i] - x[j], x[m] - x[k]
    a, b = a - axis * (a @ axis), b - axis * (b @ axis)
    return np.arctan2(np.cross(axis, a) @ b, a @ b)


def rotate(x, start, end, atoms, angle):
    axis = (x[end] - x[start]) / np.linalg.norm(x[end] - x[start])
    v = x[atoms] - x[end]
    c, s = np.cos(angle), np.sin(angle)
    y = x.copy()
    y[atoms] = x[end] + c * v + s * np.cross(axis, v) + np.outer(v @ axis, axis) * (1 - c)
    return y


@pytest.fixture(scope="module")
def dipeptide():
    testsystems = pytest.importorskip("openmmtools.testsystems")
    molecule = testsystems.AlanineDipeptideVacuum(constraints=None)
    return molecule.topology, molecule.positions.value_in_unit(unit.nanometer)


def conformations(start, angles):
    """The geometry with phi and psi set to (n, 2) angles."""
    frames = []
    for phi, psi in angles:
        x = rotate(start, 6, 8, list(range(9, 22)), phi - torsion(start, 4, 6, 8, 14))
        frames.append(rotate(x, 8, 14, list(range(15, 22)), psi - torsion(x, 6, 8, 14, 16)))
    return np.array(frames)


def draws(rng, n, left=0.1):
    phi = np.where(rng.random(n) < left, 1.0, -1.4) + 0.2 * rng.normal(size=n)
    psi = np.where(rng.random(n) < 0.5, -0.5, 2.9) + 0.3 * rng.normal(size=n)
    return np.stack([phi, psi], axis=1)


def test_dihedrals_of_capped_alanine(dipeptide):
    topology, start = dipeptide
    angles = draws(np.random.default_rng(0), 20)
    x = conformations(start, angles)
    backbone = backbone_dihedrals(x * unit.nanometer, topology)
    assert backbone.residues == ("ALA2",)
    assert backbone.phi_atoms.tolist() == [[4, 6, 8, 14]]
    assert backbone.psi_atoms.tolist() == [[6, 8, 14, 16]]
    difference = backbone.pair() - angles
    np.testing.assert_allclose(np.angle(np.exp(1j * difference)), 0, atol=1e-4)  # mdtraj keeps float32
    again = backbone_dihedrals(x, mdtraj.Topology.from_openmm(topology))
    np.testing.assert_array_equal(backbone.phi, again.phi)


def test_dihedral_inputs_are_checked(dipeptide):
    topology, start = dipeptide
    with pytest.raises(InputError, match="shape"):
        backbone_dihedrals(start, topology)
    with pytest.raises(InputError, match="not finite"):
        backbone_dihedrals(np.full((1, 22, 3), np.nan), topology)
    with pytest.raises(InputError, match="peptide"):
        backbone_dihedrals(start[None, :6], mdtraj.Topology.from_openmm(topology).subset(range(6)))


def test_one_ensemble_agrees_with_itself_and_a_lost_basin_does_not(dipeptide):
    topology, start = dipeptide
    rng = np.random.default_rng(1)
    reference = conformations(start, draws(rng, 1600))
    same = conformations(start, draws(rng, 800))
    lost = conformations(start, draws(rng, 800, left=0.0))
    energies = rng.gamma(5.0, size=1600)
    good = compare(
        reference,
        same,
        topology=topology,
        reference_energies=energies,
        sample_energies=rng.gamma(5.0, size=800),
        n=300,
    )
    assert good.agrees, str(good)
    assert [d.unit for d in good.distances] == ["degrees", "", "kT"]
    assert "agree" in good.verdict
    bad = compare(reference, lost, topology=topology, n=300)
    assert not bad.agrees
    assert bad.populations[2].agrees is False
    assert bad.populations[2].samples.effective_samples == 0.0
    assert "φ>0" in bad.verdict

    record = json.loads(json.dumps(bad.to_dict(), allow_nan=False))
    assert record["distances"][0]["n"] == 300
    assert record["populations"][2]["samples"]["error"] is None
    table = str(good)
    assert "ALA2 φψ W2 (degrees)" in table
    assert "floor" in table
    assert compare(reference, same, topology=topology, n=100, seed=3) == compare(
        reference, same, topology=topology, n=100, seed=3
    )


def test_weights_mend_a_wrong_population(dipeptide):
    topology, start = dipeptide
    rng = np.random.default_rng(2)
    reference = conformations(start, draws(rng, 1600))
    angles = draws(rng, 1600, left=0.4)
    samples = conformations(start, angles)
    weights = np.where(angles[:, 0] > -0.2, 0.1 / 0.4, 0.9 / 0.6)
    plain = compare(reference, samples, topology=topology, n=200)
    mended = compare(reference, samples, topology=topology, weights=weights, n=200)
    assert plain.populations[2].agrees is False
    assert mended.populations[2].agrees
    assert plain.sample_kish is None
    assert mended.sample_kish < 1600
    assert mended.distances[0].value < plain.distances[0].value


def test_energies_are_needed_on_both_sides(dipeptide):
    topology, start = dipeptide
    x = conformations(start, draws(np.random.default_rng(3), 40))
    with pytest.raises(InputError, match="both sides"):
        compare(x, x, topology=topology, reference_energies=np.zeros(40))
    with pytest.raises(InputError, match="one for each"):
        compare(x, x, topology=topology, reference_energies=np.zeros(40), sample_energies=np.zeros(39))
