"""Alanine dipeptide of a known law: what differs is called different, by its right name, and nothing else is."""

from __future__ import annotations

import json
import math
from pathlib import Path

import mdtraj
import numpy as np
import pytest
from chains import SHARES, chain
from openmm import unit

from openmm_bg.analysis import backbone_dihedrals, compare
from openmm_bg.errors import InputError

N = 6000  # independent frames of either side, unless a test says otherwise
QUICK = {"n": 50, "repeats": 2}


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


def test_dihedrals_of_capped_alanine(dipeptide):
    topology, start = dipeptide
    angles = np.random.default_rng(0).uniform(-3, 3, size=(20, 2))
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


@pytest.fixture(scope="module")
def reference(alanine):
    return chain(alanine, N, 1)


def against(alanine, reference, samples, *, energies: bool, **options):
    both = {"reference_energies": reference[1], "sample_energies": samples[1]} if energies else {}
    return compare(reference[0], samples[0], topology=alanine.topology, temperature=300, **both, **QUICK, **options)


@pytest.mark.parametrize("seed", [2, 3])
def test_the_same_law_agrees(alanine, reference, seed):
    found = against(alanine, reference, chain(alanine, N, seed), energies=True)
    assert found.agrees and found.is_conclusive and found.causes == ()
    assert found.verdict.startswith("The samples agree with the reference within error: of ")
    assert "points to be noticed" in found.verdict
    assert min(found.reference_size.size, found.sample_size.size) > 0.6 * N
    assert all(p.agrees for p in found.populations)
    # six thousand of either side, half of them in a basin: 0.9 points, and Bonferroni for a hundredth
    _, points = found.resolution
    assert 2.5 < 100 * points < 4.5


@pytest.mark.parametrize("energies", [False, True])
def test_a_basin_is_named_and_what_follows_from_it_is_told_apart(alanine, reference, energies):
    found = against(alanine, reference, chain(alanine, N, 4, shares=(0.45, 0.50, 0.05)), energies=energies)
    assert not found.agrees and len(found.causes) == 1
    assert found.causes[0].startswith("ALA2 helix (φ<0, -120°≤ψ<50°) (4") and "ALA2 sheet" in found.causes[0]
    assert "ALA2 ψ" in found.consequences
    assert "What differs with it and follows from it: " in found.verdict
    helix, _, left = found.populations
    assert helix.agrees is False and left.agrees
    gap = found.free_energies[0].samples - found.free_energies[0].reference
    assert gap == pytest.approx(-math.log(0.45 / 0.50 / (0.40 / 0.55)), abs=0.12)


@pytest.mark.parametrize("energies", [False, True])
def test_d_alanine_is_named(alanine, reference, energies):
    x, u = chain(alanine, N, 5)
    x[np.random.default_rng(0).random(N) < 0.01] *= -1
    found = against(alanine, reference, (x, u), energies=energies)
    assert len(found.causes) == 1 and found.causes[0].startswith("D-ALA2 (") and "0.00 %)" in found.causes[0]
    (row,) = [row for row in found.census_rows() if row[0] == "D-ALA2"]
    assert row[1] == "0.000" and row[3] == "differs"


def test_d_alanine_is_found_wherever_its_frames_are(alanine, reference):
    x, u = chain(alanine, N, 5)
    x[-60:] *= -1  # one run of them, which no time series would call more than one event
    found = against(alanine, reference, (x, u), energies=False)
    assert found.causes[0].startswith("D-ALA2 (")


@pytest.mark.parametrize("energies", [False, True])
def test_a_longer_bond_is_named(alanine, reference, energies):
    found = against(alanine, reference, chain(alanine, N, 6, longer=0.002), energies=energies)
    assert found.causes == (f"ALA2 CA-CB ({found.causes[0].split('(')[1]}",)
    (bond,) = [c for c in found.contrasts if c.differs]
    assert bond.difference == pytest.approx(0.002, abs=4 * bond.error) and bond.error < 1e-4
    assert found.geometry_rows()[0][0] == "ALA2 CA-CB (nm)"
    (marginal,) = [d for d in found.marginals if d.name == "ALA2 CA-CB"]
    assert marginal.value > 0.0015


@pytest.mark.parametrize("energies", [False, True])
def test_a_temperature_is_named(alanine, reference, energies):
    found = against(alanine, reference, chain(alanine, N, 7, heat=310 / 300), energies=energies)
    assert len(found.causes) == 1 and found.causes[0].startswith("temperature (as at 3")
    value, error = map(float, found.causes[0].split("as at ")[1].split(" K")[0].split(" ± "))
    assert abs(value - 310) < 4 * error < 10
    assert ("energy +" in found.causes[0]) == energies


def test_energies_that_no_temperature_explains_are_not_called_hot(alanine, reference):
    x, u = chain(alanine, N, 8)
    found = against(alanine, reference, (x, u + 1.0), energies=True)
    assert len(found.causes) == 1 and found.causes[0].startswith("energy (+1.0")


def test_clashes_are_named(alanine, reference):
    x, u = chain(alanine, N, 9)
    bad = np.random.default_rng(0).random(N) < 0.02
    x[bad, 19:] = x[bad, 0:1] + 0.01 * np.random.default_rng(1).normal(size=(bad.sum(), 3, 3))
    found = against(alanine, reference, (x, u), energies=False)
    assert any("clashes" in cause for cause in found.causes)


def test_blocked_halves_of_a_slow_chain_agree(alanine):
    x, u = chain(alanine, 20_000, 10, memory=2.0)
    blocks = np.split(np.arange(len(x)), 40)
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(40)
        one, other = (np.concatenate([blocks[b] for b in part]) for part in (order[:20], order[20:]))
        found = against(alanine, (x[one], u[one]), (x[other], u[other]), energies=True)
        assert found.agrees, found.verdict
        assert found.reference_size.size < 0.5 * len(one)  # it knows how slow the chain is


def test_too_few_samples_are_called_too_few(alanine):
    slow = chain(alanine, 3000, 11, memory=60.0)
    found = against(alanine, slow, chain(alanine, 3000, 12, memory=60.0), energies=False)
    assert found.agrees and not found.is_conclusive
    assert found.verdict.startswith("Too little to tell: the reference is worth ")
    assert found.reference_size.slowest.startswith("ALA2")
    # bonds are fast: they are judged all the same
    longer = against(alanine, slow, chain(alanine, 3000, 13, memory=60.0, longer=0.002), energies=False)
    assert longer.causes[0].startswith("ALA2 CA-CB")


def test_a_lost_basin_and_one_that_nobody_knows(alanine, reference):
    lost = chain(alanine, N, 14, shares=(0.42, 0.58, 0.0))
    found = against(alanine, reference, lost, energies=False)
    assert found.populations[2].agrees is False and "left" in found.causes[0]
    assert math.isinf(next(f for f in found.free_energies if "left" in f.name).samples)
    both = against(alanine, lost, chain(alanine, N, 15, shares=(0.42, 0.58, 0.0)), energies=False)
    assert both.agrees and both.populations[2].agrees is None
    assert "Not measured, for want of transitions: ALA2 left (φ>0)." in both.verdict
    record = json.loads(json.dumps(both.to_dict(), allow_nan=False))
    assert record["populations"][2]["samples"]["error"] is None


def test_weights_mend_a_wrong_population_on_either_side(alanine, reference):
    shares = (0.25, 0.60, 0.15)
    x, u = chain(alanine, 2 * N, 16, shares=shares)
    angles = backbone_dihedrals(x, alanine.topology)
    left = angles.phi[:, 0] > 0
    helix = ~left & (np.abs(angles.psi[:, 0] + 0.5) < 1.5)
    ratio = np.array(SHARES) / shares
    weights = np.select([left, helix], [ratio[2], ratio[0]], ratio[1])
    plain = against(alanine, reference, (x, u), energies=False)
    mended = against(alanine, reference, (x, u), energies=False, weights=weights)
    assert plain.populations[2].agrees is False and mended.agrees
    assert plain.sample_kish is None and mended.sample_kish < 2 * N
    assert mended.pareto is not None and "Kish size" in str(mended)
    turned = against(alanine, (x, u), reference, energies=False, reference_weights=weights)
    assert turned.agrees
    # what carries no weight may hold anything
    x[:100], weights[:100] = np.nan, 0.0
    again = against(alanine, reference, (x, u), energies=False, weights=weights)
    assert again.sample_frames == 2 * N - 100 and again.agrees


def test_a_coarse_file_format_is_no_difference(alanine, reference):
    x, u = chain(alanine, N, 17)
    coarse = np.round(x, 3)  # as XTC does
    found = against(alanine, reference, (coarse, u), energies=False)
    assert found.agrees, found.verdict
    assert "steps of 0.001 nm" in found.notes[0]


def test_a_molecule_without_peptide(alanine):
    path = Path(__file__).resolve().parents[1] / "data" / "n_methylacetamide.pdb"
    start = mdtraj.load(str(path))
    noise = np.random.default_rng(0).normal(size=(2, 2000, 12, 3))
    one, other = start.xyz + 0.004 * noise
    found = compare(one, other, topology=start.topology, **QUICK)
    assert found.agrees and found.populations == () and found.distances == ()
    # a noise wider by two percent in square is seen in the bonds and angles
    found = compare(one, start.xyz + 0.0042 * noise[1], topology=start.topology, **QUICK)
    assert not found.agrees and "temperature" in found.causes[0]


def test_distances_have_floors_and_tables_hold_them(alanine, reference):
    found = compare(
        reference[0], chain(alanine, N, 18)[0], topology=alanine.topology, n=200, seed=3, repeats=3,
        reference_energies=reference[1], sample_energies=chain(alanine, N, 18)[1],
    )  # fmt: skip
    names = [d.name for d in found.distances]
    assert names[:3] == ["ALA2 φψ W2", "ALA2 φψ histogram TV", "energy W2"]
    assert [d.unit for d in found.distances[:3]] == ["degrees", "", "kT"]
    assert found.distances[0].n == 200
    assert all(d.within_floor for d in found.distances)
    assert len(found.marginals) == 21 + 36 + 7
    table = str(found)
    for text in ("ALA2 φψ W2 (degrees)", "floor", "free energy, kT", "census", "which is the slowest", found.verdict):
        assert text in table
    record = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert record["agrees"] is True and len(record["tests"]) == len(found.contrasts)
    assert record["distances"][0]["n"] == 200


def test_a_seed_reproduces(alanine, reference):
    again = [against(alanine, (reference[0][:500], reference[1][:500]), chain(alanine, 500, 19), energies=False, seed=5)
             for _ in range(2)]  # fmt: skip
    assert repr(again[0]) == repr(again[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reference_energies": np.zeros(40)}, "both sides"),
        ({"reference_energies": np.zeros(40), "sample_energies": np.zeros(39)}, "one for each"),
        ({"sample_energies": np.full(40, np.nan), "reference_energies": np.zeros(40)}, "not finite in 40 of 40 frames"),
        ({"samples": np.zeros((40, 21, 3))}, r"give \(frames, 22, 3\)"),
        ({"samples": np.full((40, 22, 3), np.nan)}, "positions of the samples are not finite in 40 of 40 frames"),
        ({"samples": np.zeros((5, 22, 3))}, "but there are 5 of the samples"),
        ({"samples": np.zeros((0, 22, 3))}, "no frames"),
        ({"weights": np.ones(39)}, "one weight for each of the 40 frames"),
        ({"weights": np.zeros(40)}, "All weights are zero"),
        ({"weights": -np.ones(40)}, "not negative"),
        ({"n": 1}, "2 or more"),
        ({"repeats": 1}, "2 or more"),
        ({"lag": 100}, "lag of 100 frames needs more"),
    ],
)
def test_inputs_are_checked(alanine, change, message):
    x = chain(alanine, 40, 20)[0]
    given = {"reference": x, "samples": x, "n": 10, **change}
    with pytest.raises(InputError, match=message):
        compare(given.pop("reference"), given.pop("samples"), topology=alanine.topology, **given)


def test_more_points_than_memory_holds_are_refused(alanine):
    x = np.zeros((12_000, 22, 3))
    with pytest.raises(InputError, match=r"6000 points needs 0\.3 GB and hours"):
        compare(x, x, topology=alanine.topology, n=10**9)
