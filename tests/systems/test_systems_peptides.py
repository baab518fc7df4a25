"""Peptides from their sequence: atoms, bonds, handedness and labels against molecules that other programs made."""

import importlib.util
import io
import itertools
import math
from functools import cache
from pathlib import Path

import numpy as np
import openmm
import pytest
from openmm import app, unit
from openmm_bg.systems import _stereochemistry, peptides

import openmm_bg as bg
from openmm_bg import systems
from openmm_bg.coordinates import ZMatrix
from openmm_bg.errors import InputError

AMINO_ACIDS = "ALA ARG ASN ASP CYS GLN GLU GLY HIS ILE LEU LYS MET PHE PRO SER THR TRP TYR VAL".split()
STORED = np.load(Path(__file__).parents[1] / "data" / "amino_acids.npz")
OPENMMTOOLS = Path(importlib.util.find_spec("openmmtools").submodule_search_locations[0], "data")
RINGS = {
    "HIS": "CG ND1 CE1 NE2 CD2",
    "PHE": "CG CD1 CE1 CZ CE2 CD2",
    "TYR": "CG CD1 CE1 CZ CE2 CD2 OH",
    "TRP": "CG CD1 NE1 CE2 CZ2 CH2 CZ3 CE3 CD2",
}


@cache
def build(sequence, **options):
    return systems.peptide(sequence, **options)


def dihedral(x, i, j, k, m):
    a, b, c = x[j] - x[i], x[k] - x[j], x[m] - x[k]
    n1, n2 = np.cross(a, b), np.cross(b, c)
    return math.degrees(math.atan2(np.cross(n1, n2) @ b / np.linalg.norm(b), n1 @ n2))


def energy_and_forces(system, positions):
    context = openmm.Context(system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatform("Reference"))
    context.setPositions(positions)
    state = context.getState(energy=True, forces=True)
    return state.getPotentialEnergy()._value, np.array(state.getForces(asNumpy=True)._value)


def names_of(topology):
    return [(atom.residue.index, atom.residue.name, atom.name) for atom in topology.atoms()]


def bonds_of(molecule):
    return [(a.index, b.index) for a, b in molecule.topology.bonds()]


def index(molecule, residue, name):
    """The atom of a name in the residue of a number, counted from 0."""
    (found,) = [a.index for a in molecule.topology.atoms() if (a.residue.index, a.name) == (residue, name)]
    return found


def handedness(positions, names, bonds):
    """The sign of the volume that the sorted neighbours of every centre with four of them span."""
    around = {atom: [] for atom in range(len(names))}
    for i, j in bonds:
        around[int(i)].append(int(j))
        around[int(j)].append(int(i))
    signs = {}
    for centre, neighbours in around.items():
        if len(neighbours) == 4:
            first, *others = sorted(neighbours, key=lambda atom: names[atom][-1])
            signs[centre] = np.sign(np.linalg.det(positions[others] - positions[first]))
    return around, signs


def descriptor(molecule, residue, ranked):
    """R or S of the centre between four atoms, given by rank: seen against the lowest, R runs clockwise."""
    a, b, c, lowest = (molecule.positions[index(molecule, residue, name)] for name in ranked.split())
    return "R" if np.cross(b - a, c - a) @ (lowest - a) > 0 else "S"


def omegas(molecule):
    """Degrees, one for every peptide bond."""
    found = []
    residues = list(molecule.topology.residues())
    for before, after in itertools.pairwise(residues):
        alpha = "CH3" if before.name == "ACE" else "CA"
        next_alpha = "C" if after.name == "NME" else "CA"
        i, j = (index(molecule, before.index, name) for name in (alpha, "C"))
        k, m = (index(molecule, after.index, name) for name in ("N", next_alpha))
        found.append(dihedral(molecule.positions, i, j, k, m))
    return np.array(found)


def capped(residue):
    # the stored histidine carries its hydrogen on ND1
    return build(f"ACE {'HID' if residue == 'HIS' else residue} NME")


@pytest.mark.parametrize("residue", AMINO_ACIDS)
def test_amino_acid_has_the_atoms_and_bonds_of_the_stored_one(residue):
    molecule = capped(residue)
    stored = [tuple(str(line).split()[:2]) for line in STORED[f"{residue}_atoms"]]
    names = [name[1:] for name in names_of(molecule.topology)]
    assert sorted(names) == sorted(stored)
    expected = {frozenset((stored[i], stored[j])) for i, j in STORED[f"{residue}_bonds"]}
    assert {frozenset((names[i], names[j])) for i, j in bonds_of(molecule)} == expected
    assert molecule.topology.getNumBonds() == len(expected)
    elements = {tuple(line.split()[:2]): line.split()[2] for line in map(str, STORED[f"{residue}_atoms"])}
    assert all(a.element.symbol == elements[a.residue.name, a.name] for a in molecule.topology.atoms())


@pytest.mark.parametrize("residue", AMINO_ACIDS)
def test_amino_acid_has_the_handedness_of_the_stored_one(residue):
    molecule = capped(residue)
    stored = [tuple(str(line).split()[:2]) for line in STORED[f"{residue}_atoms"]]
    names = [name[1:] for name in names_of(molecule.topology)]
    around, signs = handedness(molecule.positions, names, bonds_of(molecule))
    _, expected = handedness(STORED[f"{residue}_positions"].astype(float), stored, STORED[f"{residue}_bonds"])
    compared = 0
    for centre, sign in signs.items():
        # the stored hydrogens were placed with no regard to their labels; tleap's are compared below
        if sum(names[atom][1].startswith("H") for atom in around[centre]) < 2:
            assert sign == expected[stored.index(names[centre])], names[centre]
            compared += 1
    assert compared == {"GLY": 0, "ILE": 2, "LEU": 2, "THR": 2, "VAL": 2}.get(residue, 1)


@pytest.mark.parametrize("residue", sorted(set(AMINO_ACIDS) - {"GLY"}))
def test_amino_acid_is_l(residue):
    molecule = capped(residue)
    x, centre = molecule.positions, index(molecule, 1, "CA")
    # Looking from HA, the L form runs CO, R, N clockwise ("CORN").
    towards_viewer = x[index(molecule, 1, "HA")] - x[centre]
    co, r, n = (x[index(molecule, 1, name)] - x[centre] for name in ("C", "CB", "N"))
    assert np.cross(co, r) @ towards_viewer < 0 and np.cross(r, n) @ towards_viewer < 0


@cache
def tleap_signs():
    """Handedness of every kind of centre in a protein and a dipeptide that tleap made."""
    found = {}
    for folder, stem in (("T4-lysozyme-L99A-implicit", "receptor"), ("alanine-dipeptide-gbsa", "alanine-dipeptide")):
        path = OPENMMTOOLS / folder / stem
        topology = app.AmberPrmtopFile(f"{path}.prmtop").topology
        positions = app.AmberInpcrdFile(f"{path}.crd").getPositions(asNumpy=True).value_in_unit(unit.nanometer)
        names = names_of(topology)
        around, signs = handedness(positions, names, [(a.index, b.index) for a, b in topology.bonds()])
        for centre, sign in signs.items():
            key = (*names[centre][1:], *sorted(names[atom][2] for atom in around[centre]))
            assert found.setdefault(key, sign) == sign
    return found


@pytest.mark.parametrize("residue", sorted(set(AMINO_ACIDS) - {"CYS"}))  # tleap's protein has no cysteine
def test_labels_of_hydrogens_and_methyl_groups_are_those_of_tleap(residue):
    molecule = capped(residue)
    names = names_of(molecule.topology)
    around, signs = handedness(molecule.positions, names, bonds_of(molecule))
    for centre, sign in signs.items():
        key = (*names[centre][1:], *sorted(names[atom][2] for atom in around[centre]))
        assert sign == tleap_signs()[key], key
    assert signs


def test_labels_of_cysteine_and_of_a_charged_end():
    molecule = build("MET CYS ALA")
    names = names_of(molecule.topology)
    around, signs = handedness(molecule.positions, names, bonds_of(molecule))
    key = ("MET", "N", *sorted(names[atom][2] for atom in around[index(molecule, 0, "N")]))
    assert signs[index(molecule, 0, "N")] == tleap_signs()[key]
    # sulfur takes the place of the oxygen of serine: CA, HB2, HB3, SG
    assert signs[index(molecule, 1, "CB")] == tleap_signs()["SER", "CB", "CA", "HB2", "HB3", "OG"]


def test_labels_in_planar_groups():
    for residue, torsion, degrees in (
        ("ARG", "CD NE CZ NH1", 0), ("ARG", "NE CZ NH1 HH11", 0), ("ARG", "NE CZ NH2 HH21", 0),
        ("ASN", "CB CG ND2 HD21", 180), ("GLN", "CG CD NE2 HE21", 180),
    ):  # fmt: skip
        molecule = capped(residue)
        found = dihedral(molecule.positions, *(index(molecule, 1, name) for name in torsion.split()))
        assert math.cos(math.radians(found - degrees)) > 0.9, torsion


@pytest.mark.parametrize("residue", AMINO_ACIDS)
def test_amino_acid_is_relaxed_and_trans(residue):
    molecule = capped(residue)
    assert np.abs(omegas(molecule)).min() > 160
    assert molecule.positions.dtype == np.float64 and np.abs(molecule.positions.mean(0)).max() < 1e-12
    energy, forces = energy_and_forces(molecule.system, molecule.positions)
    assert math.isfinite(energy) and np.abs(forces).max() < 15
    zmatrix = ZMatrix.from_topology(molecule.topology)
    assert len(zmatrix.rows) == molecule.num_atoms - 3
    if residue in RINGS:
        ring = molecule.positions[[index(molecule, 1, name) for name in RINGS[residue].split()]]
        assert np.linalg.svd(ring - ring.mean(0))[1][2] < 0.015  # nm out of their plane


@pytest.mark.parametrize("residue", ["HIE", "HID", "HIP", "ASH", "GLH", "LYN", "CYM"])
def test_protonation_variants(residue):
    hydrogens = {
        "HIE": "HD2 HE1 HE2", "HID": "HD1 HD2 HE1", "HIP": "HD1 HD2 HE1 HE2", "ASH": "HD2", "GLH": "HE2 HG2 HG3",
        "LYN": "HD2 HD3 HE2 HE3 HG2 HG3 HZ2 HZ3", "CYM": "",
    }  # fmt: skip
    molecule = build(f"ACE {residue} NME")
    residue_name = list(molecule.topology.residues())[1].name
    assert residue_name == {"A": "ASP", "C": "CYS", "G": "GLU", "H": "HIS", "L": "LYS"}[residue[0]]
    found = {n for _, r, n in names_of(molecule.topology) if r == residue_name and n[0] == "H" and n[1:2] not in "AB"}
    assert sorted(found) == hydrogens[residue].split()


def test_histidine_is_hie():
    assert names_of(build("ACE HIS NME").topology) == names_of(build("ACE HIE NME").topology)


def test_elil():
    molecule = systems.load("elil")
    assert molecule.num_atoms == 75 and molecule.topology.getNumBonds() == 74
    assert [r.name for r in molecule.topology.residues()] == ["GLU", "LEU", "ILE", "LEU"]
    assert (np.abs(omegas(molecule)) > 160).all() and len(omegas(molecule)) == 3
    ends = {name for number, _, name in names_of(molecule.topology) if number in (0, 3)}
    assert {"H", "H2", "H3", "OXT"} <= ends
    assert descriptor(molecule, 2, "N C CB HA") == descriptor(molecule, 2, "CA CG1 CG2 HB") == "S"
    generator = bg.BoltzmannGenerator.for_molecule(
        molecule.topology, molecule.system, temperature=300, positions=molecule.positions
    )
    assert generator.flow.dimension == 219


def test_centres_by_their_descriptors():
    for residue, ranked, expected in (
        ("ILE", "N C CB HA", "S"), ("ILE", "CA CG1 CG2 HB", "S"), ("THR", "N C CB HA", "S"),
        ("THR", "OG1 CA CG2 HB", "R"), ("CYS", "N CB C HA", "R"), ("VAL", "CA CG1 CG2 HB", "R"),
        ("LEU", "CB CD1 CD2 HG", "R"),
    ):  # fmt: skip
        assert descriptor(build(f"ACE {residue} NME"), 1, ranked) == expected, (residue, ranked)


@pytest.mark.parametrize(("name", "atoms"), [("alanine_tetrapeptide", 42), ("alanine_hexapeptide", 62)])
def test_alanine_chains(name, atoms):
    molecule = systems.load(name, temperature=310, constraints=app.HBonds)
    assert molecule.num_atoms == molecule.system.getNumParticles() == atoms
    assert molecule.topology.getNumBonds() == atoms - 1 and molecule.name == name and molecule.temperature == 310
    assert (np.abs(omegas(molecule)) > 160).all()
    assert molecule.system.getNumConstraints() == sum(
        "H" in (a.element.symbol, b.element.symbol) for a, b in molecule.topology.bonds()
    )
    assert f"({atoms} atoms)" in molecule.description


def test_chignolin():
    molecule = systems.load("chignolin")
    assert molecule.num_atoms == 138 and molecule.temperature == 310
    assert molecule.topology.getNumBonds() == 138 - 1 + 4  # tyrosine, proline and the two rings of tryptophan
    assert (np.abs(omegas(molecule)) > 150).all() and len(omegas(molecule)) == 9
    assert molecule.forcefield == ("amber14-all.xml", "implicit/obc1.xml")
    energy, forces = energy_and_forces(molecule.system, molecule.positions)
    assert math.isfinite(energy) and np.abs(forces).max() < 30


@pytest.mark.parametrize(
    ("sequence", "cis"), [("ACE ALA NME", (0,)), ("ACE ALA PRO NME", (1,)), ("ALA TYR PRO GLY", [2, 0, 2])]
)
def test_cis_peptide_bonds(sequence, cis):
    molecule = systems.peptide(sequence, cis=cis)
    is_cis = np.abs(omegas(molecule)) < 30
    assert np.flatnonzero(is_cis).tolist() == sorted(set(cis))
    assert (np.abs(omegas(molecule))[~is_cis] > 150).all()
    assert "cis" in molecule.description and "cis" not in build("ACE ALA NME").description


def test_mixed_ends():
    assert [systems.peptide(s).num_atoms for s in ("ACE ALA", "ALA NME", "ACE NME", "ALA ALA")] == [17, 18, 12, 23]


@pytest.mark.parametrize("constraints", [app.HBonds, app.AllBonds, app.HAngles])
def test_positions_obey_constraints(constraints):
    molecule = systems.peptide("ACE PHE NME", constraints=constraints, hydrogen_mass=3 * unit.dalton)
    for n in range(molecule.system.getNumConstraints()):
        i, j, length = molecule.system.getConstraintParameters(n)
        found = np.linalg.norm(molecule.positions[i] - molecule.positions[j])
        assert found == pytest.approx(length.value_in_unit(unit.nanometer), rel=1e-6)
    assert n > 10
    masses = {
        round(molecule.system.getParticleMass(a.index)._value, 3)
        for a in molecule.topology.atoms()
        if a.element is app.element.hydrogen
    }
    assert masses == {3.0}


def test_a_generator_can_be_made():
    molecule = systems.peptide("ACE PRO TRP NME", constraints=app.HBonds)
    generator = bg.BoltzmannGenerator.for_molecule(
        molecule.topology, molecule.system, temperature=300, positions=molecule.positions
    )
    assert generator.flow.dimension == 3 * molecule.num_atoms - 6 - molecule.system.getNumConstraints()


def test_same_positions_every_time():
    first, second = (systems.peptide("ACE ARG TRP NME") for _ in range(2))
    assert np.array_equal(first.positions, second.positions)


def test_other_force_field():
    molecule = systems.peptide("GLU TRP NME", forcefield=("amber14-all.xml", "implicit/obc2.xml"), name="mine")
    assert molecule.name == "mine" and molecule.forcefield == ("amber14-all.xml", "implicit/obc2.xml")
    assert any(isinstance(force, openmm.CustomGBForce) for force in molecule.system.getForces())


@pytest.mark.parametrize("sequence", ["GLU LEU ILE LEU", "ACE HIP LYN ASH PRO NME", "ACE CYM HID GLH NME"])
def test_a_pdb_file_keeps_the_molecule(sequence, tmp_path):
    molecule, text = build(sequence), io.StringIO()
    app.PDBFile.writeFile(molecule.topology, molecule.positions * unit.nanometer, text, keepIds=True)
    path = tmp_path / "peptide.pdb"
    path.write_text(text.getvalue())
    again = systems.from_pdb(path)
    assert names_of(again.topology) == names_of(molecule.topology)
    assert set(map(frozenset, bonds_of(again))) == set(map(frozenset, bonds_of(molecule)))
    before, after = (energy_and_forces(m.system, molecule.positions)[0] for m in (molecule, again))
    assert after == pytest.approx(before, abs=1e-6)


def test_a_bad_rotamer_is_passed_over_and_a_bad_molecule_never_returned(monkeypatch):
    usual, sound = build("ACE ALA NME"), peptides.fault_of
    answers = iter(["this one was thought bad"])
    monkeypatch.setattr(peptides, "fault_of", lambda *arguments: next(answers, "") or sound(*arguments))
    other = systems.peptide("ACE ALA NME")
    assert np.abs(other.positions - usual.positions).max() > 0.05
    monkeypatch.setattr(peptides, "fault_of", lambda *arguments: "a reason")
    with pytest.raises(InputError, match=r"No sound conformation of ACE-ALA-NME .*, a reason"):
        systems.peptide("ACE ALA NME")


def test_checks_see_what_is_wrong():
    molecule = build("ACE PHE NME")
    x, zmatrix = molecule.positions, ZMatrix.from_topology(molecule.topology)
    shape = _stereochemistry.Stereochemistry(molecule.topology, ())
    bonds = np.concatenate([zmatrix.bonds, zmatrix.closures])
    lengths = np.linalg.norm(x[bonds[:, 0]] - x[bonds[:, 1]], axis=1)
    assert _stereochemistry.fault_of(x, shape, zmatrix, lengths) == ""
    assert "handedness" in _stereochemistry.fault_of(x * (-1, 1, 1), shape, zmatrix, lengths)
    assert "stretched" in _stereochemistry.fault_of(x * 1.2, shape, zmatrix, lengths)
    assert "finite" in _stereochemistry.fault_of(np.where(x > 0.2, np.nan, x), shape, zmatrix, lengths)
    other = _stereochemistry.Stereochemistry(molecule.topology, (1,))
    assert "C of PHE 2-N of NME 3 is not at 0 degrees" in _stereochemistry.fault_of(x, other, zmatrix, lengths)
    close = x.copy()
    close[index(molecule, 1, "HZ")] = x[index(molecule, 0, "O")] + 0.05
    assert _stereochemistry._overlap(close, zmatrix) is not None and _stereochemistry._overlap(x, zmatrix) is None


def test_threaded_ring():
    angles = np.arange(6) * math.pi / 3
    ring = 0.14 * np.stack([np.cos(angles), np.sin(angles), 0 * angles], axis=1)
    bond = np.array([[0.02, 0.03, -0.07], [0.03, 0.01, 0.08]])
    assert _stereochemistry._threads(*bond, ring)
    assert not _stereochemistry._threads(*(bond + (0.16, 0, 0)), ring)
    assert not _stereochemistry._threads(*(bond + (0, 0, 0.1)), ring)


def test_published_alanine_dipeptide():
    from openmmtools.testsystems import AlanineDipeptideImplicit

    theirs = AlanineDipeptideImplicit(constraints=None)
    molecule = systems.load("alanine_dipeptide_ff96")
    assert openmm.XmlSerializer.serialize(molecule.system) == openmm.XmlSerializer.serialize(theirs.system)
    positions = theirs.positions.value_in_unit(unit.nanometer)
    for x in (positions, molecule.positions):
        energy, _ = energy_and_forces(theirs.system, x)
        assert energy_and_forces(molecule.system, x)[0] == pytest.approx(energy, abs=1e-8)
    _, forces = energy_and_forces(molecule.system, molecule.positions)
    assert np.abs(forces).max() < 15 and molecule.num_atoms == 22 and molecule.topology.getNumBonds() == 21
    assert (np.abs(omegas(molecule)) > 160).all()
    assert names_of(molecule.topology) == names_of(systems.load("alanine_dipeptide").topology)
    heavy = systems.load("alanine_dipeptide_ff96", constraints=app.HBonds, hydrogen_mass=3)
    assert heavy.system.getNumConstraints() == 12 and heavy.system.getParticleMass(0) == 3 * unit.dalton
    with pytest.raises(InputError, match="hydrogen_mass"):
        systems.load("alanine_dipeptide_ff96", hydrogen_mass=30)
    with pytest.raises(InputError, match="constraints must be"):
        systems.load("alanine_dipeptide_ff96", constraints="HBonds")


@pytest.mark.parametrize(
    ("sequence", "options", "message"),
    [
        ("ELIL", {}, '"ELIL" looks like one-letter codes; .* such as "GLU LEU ILE LEU"'),
        ("ACE G NME", {}, '"G" looks like one-letter codes'),
        ("", {}, "sequence is empty"),
        (("ACE", "NME"), {}, 'sequence is a string such as "ACE ALA NME"'),
        ("ACE GLUU NME", {}, r"no residue 'GLUU' .* did you mean GLU\?"),
        ("ACE ala NME", {}, r"did you mean ALA\?"),
        ("ACE ??? NME", {}, "known are ALA, ARG"),
        ("ACE-ALA-NME", {}, 'blanks, not hyphens: "ACE ALA NME"'),
        ("ACE CYX NME", {}, "disulfide"),
        ("ALA ACE NME", {}, "ACE .* only stand first"),
        ("ACE NME ALA", {}, "NME .* only stand last"),
        ("GLY", {}, "at least two residues, caps included, not GLY alone"),
        ("ASH ALA NME", {}, "no template NASH for ASH at the start; put ACE before it"),
        ("ACE ASH", {}, "no template CASH for ASH at the end; put NME behind it"),
        ("ACE ALA NME", {"forcefield": "tip3p.xml"}, r"tip3p\.xml has no template ACE; .* AMBER"),
        ("ACE ALA NME", {"forcefield": "amoeba2018.xml"}, "no harmonic term for .* in ACE-ALA-NME"),
        ("ACE ALA NME", {"forcefield": ()}, "forcefield is empty"),
        ("ACE ALA NME", {"cis": (2,)}, "numbers 0 to 1 of this peptide, not 2"),
        ("ACE ALA NME", {"cis": (-1,)}, "not -1"),
        ("ACE ALA NME", {"cis": (True,)}, "not True"),
        ("ACE ALA NME", {"cis": 1}, "cis is a sequence of peptide bonds"),
        ("ACE ALA NME", {"temperature": -1}, "temperature must be a positive finite"),
        ("ACE ALA NME", {"constraints": "HBonds"}, "constraints must be"),
        ("ACE ALA NME", {"hydrogen_mass": 30}, "hydrogen_mass of 30 Da leaves nothing"),
    ],
)
def test_what_cannot_be_built_is_refused_in_one_sentence(sequence, options, message):
    with pytest.raises(InputError, match=message) as caught:
        systems.peptide(sequence, **options)
    assert "\n" not in str(caught.value)
