"""Molecules from PDB files: what they contain, and one clear sentence for everything that can go wrong."""

import math
from importlib.resources import files

import numpy as np
import openmm
import pytest
from openmm import app, unit

import openmm_bg as bg
from openmm_bg import systems
from openmm_bg.errors import InputError

PDB = files("openmm_bg.systems").joinpath("alanine_dipeptide.pdb").read_text()


@pytest.fixture(scope="module")
def molecule():
    return systems.load("alanine_dipeptide")


def dihedral(x, i, j, k, m):
    a, b, c = x[j] - x[i], x[k] - x[j], x[m] - x[k]
    n1, n2 = np.cross(a, b), np.cross(b, c)
    return math.degrees(math.atan2(np.cross(n1, n2) @ b / np.linalg.norm(b), n1 @ n2))


def energy_and_forces(system, positions):
    context = openmm.Context(system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference"))
    context.setPositions(positions)
    state = context.getState(energy=True, forces=True)
    return state.getPotentialEnergy()._value, np.array(state.getForces(asNumpy=True)._value)


def index(molecule, residue, name):
    (found,) = [a.index for a in molecule.topology.atoms() if (a.residue.name, a.name) == (residue, name)]
    return found


def test_alanine_dipeptide_has_its_atoms_and_bonds(molecule):
    assert molecule.num_atoms == molecule.topology.getNumAtoms() == molecule.system.getNumParticles() == 22
    assert molecule.topology.getNumBonds() == 21
    assert [r.name for r in molecule.topology.residues()] == ["ACE", "ALA", "NME"]
    assert molecule.positions.shape == (22, 3) and molecule.positions.dtype == np.float64
    assert molecule.temperature == 300.0 and molecule.name == "alanine_dipeptide"
    assert molecule.system.getNumConstraints() == 0
    names = {type(force).__name__ for force in molecule.system.getForces()}
    assert {"HarmonicBondForce", "PeriodicTorsionForce", "NonbondedForce", "GBSAOBCForce"} <= names


def test_alanine_dipeptide_is_l_and_trans(molecule):
    x, at = molecule.positions, lambda residue, name: index(molecule, residue, name)
    centre = x[at("ALA", "CA")]
    # Looking from HA, the L form runs CO, R, N clockwise ("CORN").
    towards_viewer = x[at("ALA", "HA")] - centre
    co, r, n = (x[at("ALA", name)] - centre for name in ("C", "CB", "N"))
    assert np.cross(co, r) @ towards_viewer < 0 and np.cross(r, n) @ towards_viewer < 0
    omegas = (
        dihedral(x, at("ACE", "CH3"), at("ACE", "C"), at("ALA", "N"), at("ALA", "CA")),
        dihedral(x, at("ALA", "CA"), at("ALA", "C"), at("NME", "N"), at("NME", "C")),
    )
    assert min(map(abs, omegas)) > 170


def test_positions_are_a_relaxed_structure_of_this_force_field(molecule):
    energy, forces = energy_and_forces(molecule.system, molecule.positions)
    assert energy == pytest.approx(-134.33, abs=0.05)
    # What is left comes from the three decimals of a PDB file: up to 5e-5 nm on bonds of 3e5 kJ/mol/nm^2.
    assert np.abs(forces).max() < 100


def test_system_is_the_one_openmm_makes(molecule):
    pdb = app.PDBFile(str(files("openmm_bg.systems").joinpath("alanine_dipeptide.pdb")))
    system = app.ForceField("amber99sbildn.xml", "amber99_obc.xml").createSystem(
        pdb.topology, nonbondedMethod=app.NoCutoff
    )
    assert openmm.XmlSerializer.serialize(system) == openmm.XmlSerializer.serialize(molecule.system)


def test_constraints_and_hydrogen_mass_reach_the_system():
    molecule = systems.load(
        "alanine_dipeptide", constraints=app.HBonds, hydrogen_mass=3 * unit.dalton, temperature=310 * unit.kelvin
    )
    assert molecule.system.getNumConstraints() == 12
    assert molecule.system.getParticleMass(0) == 3 * unit.dalton
    assert molecule.temperature == 310


@pytest.mark.parametrize("constraints", [app.HBonds, app.AllBonds])
def test_constrained_bonds_have_their_lengths_which_the_file_rounds(constraints):
    molecule = systems.load("alanine_dipeptide", constraints=constraints)
    x, free = molecule.positions, systems.load("alanine_dipeptide").positions
    for index in range(molecule.system.getNumConstraints()):
        i, j, length = molecule.system.getConstraintParameters(index)
        assert np.linalg.norm(x[i] - x[j]) == pytest.approx(length.value_in_unit(unit.nanometer), rel=1e-7)
    assert 0 < np.abs(x - free).max() < 0.01
    bg.BoltzmannGenerator.for_molecule(molecule.topology, molecule.system, positions=x)


def test_constraints_that_no_small_step_satisfies_are_refused(tmp_path):
    path = tmp_path / "torn.pdb"
    path.write_text(PDB.replace("  -3.115", "  93.115"))
    with pytest.raises(InputError, match=r"torn\.pdb are too far from the constrained bond lengths; minimise"):
        systems.from_pdb(path, constraints=app.HBonds)


def test_cryst1_does_not_make_the_system_periodic(tmp_path):
    path = tmp_path / "boxed.pdb"
    path.write_text("CRYST1   30.000   30.000   30.000  90.00  90.00  90.00 P 1           1\n" + PDB)
    molecule = systems.from_pdb(path)
    assert not molecule.system.usesPeriodicBoundaryConditions()
    assert molecule.name == "boxed"


def test_other_force_field():
    path = files("openmm_bg.systems").joinpath("alanine_dipeptide.pdb")
    molecule = systems.from_pdb(path, forcefield="amber99sbildn.xml")
    assert molecule.forcefield == ("amber99sbildn.xml",)
    assert not any(isinstance(f, openmm.GBSAOBCForce) for f in molecule.system.getForces())


def without_hydrogens(text):
    return "\n".join(line for line in text.splitlines() if line[76:78].strip() != "H" and "CONECT" not in line)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no atoms"),
        ("this is not a PDB file\nat all\n", "holds no atoms"),
        (PDB[: len(PDB) // 3], "could not be read as a PDB file"),
        (PDB.replace(" ALA ", " QQQ "), "no template for residue QQQ 2"),
        (without_hydrogens(PDB), "lacks hydrogens.*addHydrogens"),
        (PDB.replace("  -3.115", "     nan"), "atom H1 of residue ACE 1.*not finite"),
        (PDB.replace("  -3.115", "  abcdef"), "could not be read as a PDB file"),
    ],
    ids=["empty", "prose", "truncated", "unknown residue", "no hydrogens", "nan", "broken number"],
)
def test_unusable_files_are_refused_in_one_sentence(tmp_path, text, message):
    path = tmp_path / "bad.pdb"
    path.write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        systems.from_pdb(path)
    assert "bad.pdb" in str(caught.value) and "\n" not in str(caught.value)


def test_binary_and_missing_files(tmp_path):
    path = tmp_path / "binary.pdb"
    path.write_bytes(bytes(range(256)))
    with pytest.raises(InputError, match=r"binary\.pdb"):
        systems.from_pdb(path)
    with pytest.raises(InputError, match=r"no PDB file .*nowhere\.pdb"):
        systems.from_pdb(tmp_path / "nowhere.pdb")
    with pytest.raises(InputError, match="no PDB file"):
        systems.from_pdb(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"forcefield": ("amber99sbildn.xml", "nonsense.xml")}, r"nonsense\.xml"),
        ({"forcefield": ()}, "forcefield is empty"),
        ({"temperature": math.nan}, "temperature must be a positive finite"),
        ({"temperature": math.inf}, "temperature must be a positive finite"),
        ({"temperature": -300}, "temperature must be a positive finite"),
        ({"temperature": 1 * unit.nanometer}, "temperature has the unit"),
        ({"constraints": "HBonds"}, "constraints must be"),
        ({"hydrogen_mass": math.nan}, "hydrogen_mass must be"),
        ({"hydrogen_mass": "heavy"}, "hydrogen_mass must be"),
        ({"hydrogen_mass": 30.0}, "hydrogen_mass"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    path = files("openmm_bg.systems").joinpath("alanine_dipeptide.pdb")
    with pytest.raises(InputError, match=message):
        systems.from_pdb(path, **settings)


def test_registry():
    assert {"alanine_dipeptide", "double_well"} <= set(systems.names())
    for name in systems.names():
        assert systems.describe(name).endswith(".")
    with pytest.raises(InputError, match=r"alanine_dipeptide, .*Did you mean 'alanine_dipeptide'\?"):
        systems.load("alanine_dipeptid")
    with pytest.raises(InputError, match="no parameter 'temprature'; it takes temperature"):
        systems.load("alanine_dipeptide", temprature=310)
    with pytest.raises(InputError, match="it takes none"):
        systems.load("gmm40", beta=2)
