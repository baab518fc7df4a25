"""What a generator takes from its molecule: constraints in its numbering, free torsions, rotors, residues, scales."""

from __future__ import annotations

import math

import numpy as np
import openmm
import pytest
import torch
from openmm import app

import openmm_bg as bg
from openmm_bg.coordinates import ZMatrix
from openmm_bg.generator_molecule import (
    constraint_distances,
    harmonic_scales,
    internal_coordinates,
    molecular_flow,
)
from openmm_bg.units import thermal_energy


@pytest.fixture(scope="module")
def parts(alanine):
    """Z-matrix and coordinates of alanine dipeptide."""
    zmatrix = ZMatrix.from_topology(alanine.topology)
    return zmatrix, internal_coordinates(zmatrix, alanine.system, np.asarray(alanine.positions))


def test_constraints_come_in_the_molecules_numbering():
    system = openmm.System()
    for _ in range(6):
        system.addParticle(1.0)
    system.addConstraint(0, 1, 0.1)  # of another molecule
    system.addConstraint(4, 2, 0.2)
    assert constraint_distances(system) == {frozenset((0, 1)): 0.1, frozenset((2, 4)): 0.2}
    assert constraint_distances(system, {2: 1, 3: 2, 4: 0}) == {frozenset((0, 1)): 0.2}
    with pytest.raises(bg.InputError, match="outside it"):
        constraint_distances(system, {2: 0, 3: 1})


def atoms_of(topology: app.Topology) -> list[str]:
    return [f"{atom.residue.name} {atom.name}" for atom in topology.atoms()]


@pytest.mark.parametrize("constraints", [None, app.HBonds], ids=["free", "constrained"])
def test_free_torsions_and_rotors_are_those_of_chemistry(constraints):
    """By their axes: phi, psi, both peptide bonds, and three methyls, on whose first hydrogens the others hang."""
    molecule = bg.systems.load("alanine_dipeptide", constraints=constraints)
    zmatrix = ZMatrix.from_topology(molecule.topology)
    coordinates = internal_coordinates(zmatrix, molecule.system, np.asarray(molecule.positions))
    config = molecular_flow(molecule.topology, zmatrix, coordinates, "spline", 0, False).config()
    names = atoms_of(molecule.topology)
    first = coordinates.dimension - len(zmatrix.torsions)  # torsions come last, and none is constrained

    def torsion(column):
        return [names[atom] for atom in zmatrix.torsions[column - first]]

    assert {frozenset(torsion(column)[1:3]) for column in config["torsions"]} == {
        frozenset(axis)
        for axis in (
            ("ALA N", "ALA CA"), ("ALA CA", "ALA C"), ("ACE C", "ALA N"), ("ALA C", "NME N"),
            ("ACE CH3", "ACE C"), ("ALA CB", "ALA CA"), ("NME C", "NME N"),
        )
    }  # fmt: skip
    # cis or trans is decided before anything else
    assert {frozenset(torsion(column)[1:3]) for column in config["torsions"][:2]} == {
        frozenset(("ACE C", "ALA N")), frozenset(("ALA C", "NME N"))
    }  # fmt: skip
    hydrogens = {tuple(torsion(column)[0] for column in rotor) for rotor in config["rotors"]}
    assert hydrogens == {
        ("ACE H1", "ACE H2", "ACE H3"), ("ALA HB1", "ALA HB2", "ALA HB3"), ("NME H1", "NME H2", "NME H3")
    }  # fmt: skip
    assert sorted(config["torsions"] + config["stiff_torsions"]) == list(range(first, coordinates.dimension))
    assert "blocks" not in config  # files of joint networks keep their fingerprint


def test_masks_part_coordinates_of_one_atom_and_of_bonded_ones(alanine, parts):
    """Each stiff coordinate has neighbours, and a neighbour is never farther than the atom it hangs on."""
    zmatrix, coordinates = parts
    config = molecular_flow(alanine.topology, zmatrix, coordinates, "spline", 0, False).config()
    rows = [row.tolist() for table in (zmatrix.bonds, zmatrix.angles, zmatrix.torsions) for row in table]
    steps = dict(bond_distances(zmatrix))
    moved = {i: rows[row][0] for i, row in enumerate(coordinates.free.tolist()) if i not in config["torsions"]}
    assert {i for pair in config["neighbours"] for i in pair} == set(moved)
    assert all(steps[moved[i]][moved[j]] <= 2 for i, j in config["neighbours"])
    same = [(i, j) for i in moved for j in moved if i < j and moved[i] == moved[j]]
    assert set(same) <= set(map(tuple, config["neighbours"]))


def bond_distances(zmatrix):
    """Bonds between every two atoms, breadth first."""
    for start in range(zmatrix.num_atoms):
        steps, edge = {start: 0}, [start]
        while edge:
            edge = [j for i in edge for j in zmatrix.neighbours[i] if steps.setdefault(j, steps[i] + 1) == steps[i] + 1]
            edge = [j for j in dict.fromkeys(edge) if steps[j] == max(steps.values())]
        yield start, steps


def test_local_networks_know_the_residue_that_each_coordinate_places(alanine, parts):
    zmatrix, coordinates = parts
    config = molecular_flow(alanine.topology, zmatrix, coordinates, "spline", 0, True).config()
    residues = ["ACE", "ALA", "NME"]
    placed = [row[0] for table in (zmatrix.bonds, zmatrix.angles, zmatrix.torsions) for row in table]
    names = atoms_of(alanine.topology)
    assert [residues[block] for block in config["blocks"]] == [names[atom].split()[0] for atom in placed]
    assert [pair for pair in config["bonded_blocks"] if pair[0] != pair[1]] == [[0, 1], [1, 2]]


@pytest.mark.parametrize("temperature", [300.0, 600.0])
def test_scales_are_those_of_the_harmonic_terms(alanine, parts, temperature):
    """sqrt(kT/k) of each bond and angle, and 0.1 rad for a torsion; a spring of zero strength says nothing."""
    zmatrix, coordinates = parts
    system = openmm.XmlSerializer.deserialize(openmm.XmlSerializer.serialize(alanine.system))
    strengths = {}
    for force in system.getForces():
        if isinstance(force, openmm.HarmonicBondForce):
            soft = tuple(sorted(force.getBondParameters(0)[:2]))
            force.setBondParameters(0, *soft, 0.1, 0.0)
            for n in range(1, force.getNumBonds()):
                i, j, _, k = force.getBondParameters(n)
                strengths[tuple(sorted((i, j)))] = k._value
    scales = harmonic_scales(coordinates, system, temperature)
    kt = thermal_energy(temperature)
    assert scales.dtype == torch.float64 and len(scales) == coordinates.dimension
    for pair, scale in zip(zmatrix.bonds, scales.tolist()[: len(zmatrix.bonds)], strict=True):
        pair = tuple(sorted(int(atom) for atom in pair))
        assert scale == pytest.approx(math.sqrt(kt / (3e5 if pair == soft else strengths[pair])))
    assert (scales[-len(zmatrix.torsions) :] == 0.1).all()
    angles = scales[len(zmatrix.bonds) : -len(zmatrix.torsions)]
    # amber's angles: 35 to 80 kcal/mol/rad^2, which OpenMM doubles
    strength = kt / angles.square() / (2 * 4.184)
    assert strength.min() > 29.0 and strength.max() < 90.0


def test_constrained_bonds_have_no_scale_and_unknown_flows_are_refused():
    molecule = bg.systems.load("alanine_dipeptide", constraints=app.HBonds)
    zmatrix = ZMatrix.from_topology(molecule.topology)
    coordinates = internal_coordinates(zmatrix, molecule.system, None)
    assert len(harmonic_scales(coordinates, molecule.system, 300)) == coordinates.dimension == 48
    with pytest.raises(bg.InputError, match="flow must be"):
        molecular_flow(molecule.topology, zmatrix, coordinates, "splines", 0, False)
