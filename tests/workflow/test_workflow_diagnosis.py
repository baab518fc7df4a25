"""Basins and coordinates of molecules, by name: against mdtraj, and against a generator with a flaw put in."""

from __future__ import annotations

import math

import mdtraj
import numpy as np
import pytest
import torch

import openmm_bg as bg
from openmm_bg.workflow import RunSettings, generator_for
from openmm_bg.workflow.diagnosis import backbone_regions, coordinate_names, diagnose_generator


@pytest.fixture(scope="module")
def proline():
    return bg.systems.peptide("ACE PRO LEU NME")


def scattered(molecule, n: int, generator=None) -> np.ndarray:
    """Conformations with every torsion anywhere."""
    generator = generator or generator_for(molecule, RunSettings())
    q, _ = generator.coordinates(torch.as_tensor(molecule.positions)[None])
    q = q.repeat(n, 1)
    free = generator.flow.chart.free
    q[:, free] = torch.rand(n, len(free), generator=torch.Generator().manual_seed(1), dtype=q.dtype) * 2 * math.pi
    return generator.place(q).numpy()


def test_regions_are_those_of_mdtraj(proline):
    x = scattered(proline, 200)
    regions = backbone_regions(torch.as_tensor(x), proline.topology)
    trajectory = mdtraj.Trajectory(x, mdtraj.Topology.from_openmm(proline.topology))
    _, phi = mdtraj.compute_phi(trajectory, periodic=False)
    _, omega = mdtraj.compute_omega(trajectory, periodic=False)  # between residues with CA: PRO-LEU alone
    leucine = np.degrees(phi[:, 1])
    assert np.array_equal(regions["φ > 0 of LEU 3"], (leucine >= 0) & (leucine < 150))
    assert np.array_equal(regions["cis peptide bond before LEU 3"], np.abs(omega[:, 0]) < np.pi / 2)
    names = [f"cis peptide bond before {residue}" for residue in ("PRO 2", "LEU 3", "NME 4")]
    assert [name for name in regions if name.startswith("cis")] == names
    # each residue lies in one basin, and a conformation that is none lies nowhere
    for residue in ("PRO 2", "LEU 3"):
        basins = [regions[f"{basin} of {residue}"] for basin in ("helix", "sheet", "φ > 0")]
        assert np.array_equal(np.sum(basins, axis=0), np.ones(200))
    lost = backbone_regions(torch.full((3, proline.num_atoms, 3), math.nan, dtype=torch.float64), proline.topology)
    assert not any(inside.any() for inside in lost.values())


def test_the_conformation_a_cis_peptide_is_built_in(proline):
    cis = bg.systems.peptide("ACE PRO LEU NME", cis=[0])
    for molecule, expected in ((proline, False), (cis, True)):
        regions = backbone_regions(torch.as_tensor(molecule.positions)[None], molecule.topology)
        assert regions["cis peptide bond before PRO 2"].tolist() == [expected]
        assert regions["cis peptide bond before LEU 3"].tolist() == [False]


def test_coordinates_have_the_names_of_chemistry(proline):
    generator = generator_for(proline, RunSettings())
    names = coordinate_names(generator)
    assert len(set(names)) == len(names) == generator.flow.dimension
    free = [names[i] for i in generator.flow.chart.free.tolist()]
    for name in (
        "φ of LEU 3",
        "ψ of LEU 3",
        "ψ of PRO 2",
        "ω before PRO 2",
        "ω before NME 4",
        "χ1 of LEU 3",
        "χ2 of LEU 3",
    ):
        assert free.count(name) == 1, name
    assert sum(name.startswith("turn of the hydrogens of ") for name in free) == 4
    assert not any("φ of PRO" in name for name in names)  # its ring holds it
    # the values are what the names say
    x = scattered(proline, 20, generator)
    q, _ = generator.coordinates(torch.as_tensor(x))
    trajectory = mdtraj.Trajectory(x, mdtraj.Topology.from_openmm(proline.topology))
    for name, angle in (("φ of LEU 3", mdtraj.compute_phi(trajectory, periodic=False)[1][:, 1]),
                        ("χ1 of LEU 3", mdtraj.compute_chi1(trajectory, periodic=False)[1][:, -1])):  # fmt: skip
        np.testing.assert_allclose(np.cos(q[:, names.index(name)].numpy()), np.cos(angle), atol=1e-4)
    atoms = {f"{a.residue.name} {a.residue.id} {a.name}": a.index for a in proline.topology.atoms()}
    pair = [atoms["LEU 3 C"], atoms["NME 4 N"]]
    (column,) = [i for i, name in enumerate(names) if name in ("N-C bond of LEU 3/NME 4", "C-N bond of LEU 3/NME 4")]
    lengths = np.linalg.norm(x[:, pair[0]] - x[:, pair[1]], axis=1)
    np.testing.assert_allclose(q[:, column].numpy(), lengths)


def test_a_flaw_of_a_generator_is_found(alanine):
    """Weights that depend on psi, and frames in a basin that the draws avoid."""
    generator = generator_for(alanine, RunSettings())
    x = scattered(alanine, 4000, generator)
    regions = backbone_regions(torch.as_tensor(x), alanine.topology)
    names = coordinate_names(generator)
    psi = generator.coordinates(torch.as_tensor(x))[0][:, names.index("ψ of ALA 2")].numpy()
    draws = x.copy()
    draws[regions["φ > 0 of ALA 2"]] = math.nan
    log_w = np.where(regions["φ > 0 of ALA 2"], -np.inf, 0.5 * np.cos(psi))
    found = diagnose_generator(generator, draws, log_w, x[:400], 3.0 * regions["φ > 0 of ALA 2"][:400], 4)
    assert [region.name for region in found.regions if region.is_missed] == ["φ > 0 of ALA 2"]
    assert found.dependences[0].name == "ψ of ALA 2" and abs(found.dependences[0].thinnest) < 15
    assert found.dependences[0].explained > 0.9 > 0.1 > found.dependences[1].explained


def test_a_rotor_is_judged_by_all_its_hydrogens(alanine):
    """Weights of a threefold symmetry in the mean of three torsions, whose labels are turned at random."""
    generator = generator_for(alanine, RunSettings())
    names = coordinate_names(generator)
    column = names.index("turn of the hydrogens of CB of ALA 2")
    x = torch.as_tensor(scattered(alanine, 4000, generator))
    t, _ = generator.flow.chart.split(generator.coordinates(x)[0])
    turn = t[:, generator.flow.chart.free.tolist().index(column)].numpy()
    found = diagnose_generator(generator, x, 0.3 * np.cos(3 * turn), x[:40].numpy(), np.zeros(40))
    assert found.dependences[0].name == names[column] and found.dependences[0].explained > 0.7
