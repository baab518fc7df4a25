"""Peptides from their sequence: atoms and bonds from the force field's templates, a relaxed conformation by rule.

Bond lengths and angles are the equilibrium values of the force field, torsions follow from the handedness of
every centre and from a rotamer; the z-matrix places the atoms, OpenMM relaxes them, and what comes out is checked.
"""

from __future__ import annotations

import difflib
import importlib.util
import itertools
import numbers
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openmm
import torch
from openmm import app, unit
from openmm_bg.systems._stereochemistry import Rotamer, Stereochemistry, fault_of
from openmm_bg.systems.molecules import (
    IMPLICIT_FORCE_FIELD,
    Molecule,
    check_masses,
    check_options,
    create_system,
    load_force_field,
)

from openmm_bg.coordinates import InternalCoordinates, ZMatrix
from openmm_bg.errors import InputError
from openmm_bg.units import kelvin

__all__ = ["peptide"]

_ONE_LETTER = {
    "A": "ALA", "R": "ARG", "N": "ASN", "D": "ASP", "C": "CYS", "Q": "GLN", "E": "GLU", "G": "GLY", "H": "HIS",
    "I": "ILE", "L": "LEU", "K": "LYS", "M": "MET", "F": "PHE", "P": "PRO", "S": "SER", "T": "THR", "W": "TRP",
    "Y": "TYR", "V": "VAL",
}  # fmt: skip
_VARIANTS = {"HID": "HIS", "HIE": "HIS", "HIP": "HIS", "ASH": "ASP", "GLH": "GLU", "LYN": "LYS", "CYM": "CYS"}
_CAPS = ("ACE", "NME")
_KNOWN = (*_ONE_LETTER.values(), *_VARIANTS, *_CAPS)

_TOLERANCE = 1.0
"""Root mean square force in kJ/mol/nm to which conformations are relaxed."""


def peptide(
    sequence: str,
    *,
    forcefield: str | Sequence[str] = IMPLICIT_FORCE_FIELD,
    temperature: Any = 300.0,
    constraints: Any = None,
    hydrogen_mass: Any = None,
    cis: Iterable[int] = (),
    name: str | None = None,
    description: str | None = None,
) -> Molecule:
    """A peptide from its sequence, without cutoff and without periodic box, in a relaxed extended conformation.

    All amino acids are L; isoleucine is (2S,3S), threonine (2S,3R). Hydrogens and methyl groups that differ in
    their labels alone are named by the rules of IUPAC, as tleap names them. Peptide bonds are trans, those before
    proline included, unless ``cis`` names them. The same arguments give the same positions.

    Parameters
    ----------
    sequence : str
        Three-letter names with blanks between them: the twenty amino acids and their protonation variants HID, HIE,
        HIP, ASH, GLH, LYN and CYM; HIS means HIE. ACE may stand first and NME last; an end without cap is charged,
        NH3+ or COO-.
    forcefield : str or sequence of str
        Files that `openmm.app.ForceField` finds, with harmonic bonds and angles, such as those of the AMBER family.
    temperature : Quantity or float
        In K.
    constraints : None, app.HBonds, app.AllBonds or app.HAngles
        Bonds whose lengths are fixed; the positions obey them.
    hydrogen_mass : Quantity or float, optional
        In Da; what a hydrogen gains its heavy atom loses.
    cis : iterable of int
        Peptide bonds built cis, counted from 0 along the chain, caps included: in "ACE ALA NME", 0 is ACE-ALA.
    name, description : str, optional
        By default the sequence with hyphens, and a sentence made from it.

    Returns
    -------
    Molecule
        Atoms and residues have the names of the PDB, as `from_pdb` gives them.

    Raises
    ------
    InputError
        For a sequence or force field that cannot be used, and where no conformation passes the checks: handedness of
        every centre, cis and trans, bond lengths, atoms that overlap, rings that are threaded.

    Examples
    --------
    >>> serine = peptide("ACE SER NME")
    >>> serine.num_atoms, serine.name
    (23, 'ACE-SER-NME')
    """
    residues = _residues(sequence)
    bonds = _peptide_bonds(cis, len(residues) - 1)
    temperature = kelvin(temperature)
    check_options(constraints, hydrogen_mass)
    files, field = load_force_field(forcefield)
    label = "-".join(residues)
    topology = _topology(residues, field, " + ".join(map(str, files)))
    system = create_system(f"the peptide {label}", topology, field, constraints, hydrogen_mass)
    flexible = system
    if system.getNumConstraints():  # a constrained bond has no entry among the harmonic ones
        flexible = create_system(f"the peptide {label}", topology, field, None, None)
    isomer = f", peptide bond{'s' * (len(bonds) > 1)} {', '.join(map(str, bonds))} cis" if bonds else ""
    return Molecule(
        name=name or label,
        topology=topology,
        system=system,
        positions=_conformation(label, topology, flexible, system, bonds),
        temperature=temperature,
        description=description
        or f"{label} ({topology.getNumAtoms()} atoms) with {' + '.join(map(str, files))}, no cutoff{isomer}.",
        forcefield=files,
    )


def alanine_dipeptide_ff96(
    *, temperature: Any = 300.0, constraints: Any = None, hydrogen_mass: Any = None, description: str
) -> Molecule:
    """The System that openmmtools calls AlanineDipeptideImplicit, from the prmtop file it ships."""
    temperature = kelvin(temperature)
    mass = check_options(constraints, hydrogen_mass)
    # finding the package is quick, importing it is slow and noisy
    package = importlib.util.find_spec("openmmtools")
    if package is None or not package.submodule_search_locations:
        raise InputError("alanine_dipeptide_ff96 is read from the package openmmtools; install that first.")
    path = Path(package.submodule_search_locations[0], "data", "alanine-dipeptide-gbsa", "alanine-dipeptide.prmtop")
    if not path.is_file():
        raise InputError(f"The installed openmmtools lacks {path.name}, which alanine_dipeptide_ff96 is read from.")
    prmtop = app.AmberPrmtopFile(str(path))
    system, flexible = (
        prmtop.createSystem(
            nonbondedMethod=app.NoCutoff, implicitSolvent=app.OBC1, constraints=fixed, hydrogenMass=heavy
        )
        for fixed, heavy in ((constraints, None if mass is None else mass * unit.dalton), (None, None))
    )
    check_masses(prmtop.topology, system, mass)
    return Molecule(
        name="alanine_dipeptide_ff96",
        topology=prmtop.topology,
        system=system,
        positions=_conformation("ACE-ALA-NME", prmtop.topology, flexible, system, ()),
        temperature=temperature,
        description=description,
        forcefield=("amber96 (openmmtools prmtop)", "OBC1"),
    )


# The sequence


def _residues(sequence: str) -> tuple[str, ...]:
    if not isinstance(sequence, str):
        raise InputError(f'sequence is a string such as "ACE ALA NME", not {sequence!r}.')
    words = sequence.split()
    if not words:
        raise InputError('sequence is empty; give three-letter names with blanks between, such as "ACE ALA NME".')
    for word in words:
        if word in _KNOWN:
            continue
        if word in ("CYX", "CYD"):
            raise InputError(f"{word} is half of a disulfide bridge, and peptides are built without; use CYS or CYM.")
        if set(word) <= _ONE_LETTER.keys() and (len(word) != 3 or not _close(word)):
            raise InputError(
                f'"{word}" looks like one-letter codes; give three-letter names with blanks between, such as '
                f'"{" ".join(_ONE_LETTER[letter] for letter in word)}".'
            )
        if "-" in word and all(part in _KNOWN for part in word.split("-")):
            raise InputError(f'Residues are set apart by blanks, not hyphens: "{sequence.strip().replace("-", " ")}".')
        close = _close(word)
        hint = f" did you mean {close}?" if close else f" known are {', '.join(_KNOWN)}."
        raise InputError(f"There is no residue {word!r} in the three-letter code:{hint}")
    if "ACE" in words[1:]:
        raise InputError("ACE caps the start of a peptide: it can only stand first.")
    if "NME" in words[:-1]:
        raise InputError("NME caps the end of a peptide: it can only stand last.")
    if len(words) == 1:
        raise InputError(
            f'A peptide has at least two residues, caps included, not {words[0]} alone; "ACE ALA NME" is a capped '
            "amino acid."
        )
    return tuple("HIE" if word == "HIS" else word for word in words)


def _close(word: str) -> str | None:
    close = difflib.get_close_matches(word.upper(), _KNOWN, n=1)
    return close[0] if close else None


def _peptide_bonds(cis: Iterable[int], number: int) -> tuple[int, ...]:
    if isinstance(cis, str) or not isinstance(cis, Iterable):
        raise InputError(f"cis is a sequence of peptide bonds, such as (0,), not {cis!r}.")
    bonds = list(cis)
    for bond in bonds:
        if not isinstance(bond, numbers.Integral) or isinstance(bond, bool) or not 0 <= bond < number:
            raise InputError(f"cis names peptide bonds by the numbers 0 to {number - 1} of this peptide, not {bond!r}.")
    return tuple(sorted({int(bond) for bond in bonds}))


def _topology(residues: Sequence[str], field: app.ForceField, files: str) -> app.Topology:
    app.PDBFile._loadNameReplacementTables()
    topology = app.Topology()
    chain = topology.addChain("A")
    previous = None
    for place, residue in enumerate(residues):
        template = _template(residue, place == 0, place == len(residues) - 1, field, files)
        # PDB names, so that a peptide is the same before and after it was written to a file
        residue_name = _VARIANTS.get(residue, residue)
        pdb_names = app.PDBFile._atomNameReplacements.get(residue_name, {})
        added = topology.addResidue(residue_name, chain)
        atoms = [topology.addAtom(pdb_names.get(a.name, a.name), a.element, added) for a in template.atoms]
        for i, j in template.bonds:
            topology.addBond(atoms[i], atoms[j])
        by_name = {atom.name: atom for atom in atoms}
        if previous is not None:
            topology.addBond(previous, by_name["N"])
        previous = by_name.get("C")
    return topology


def _template(residue: str, first: bool, last: bool, field: app.ForceField, files: str) -> Any:
    capped = residue in _CAPS
    name = residue if capped else "N" * first + "C" * last + residue
    template = field._templates.get(name)
    links = {atom for atom, needed in (("N", not first), ("C", not last)) if needed}
    if template is not None and links <= {atom.name for atom in template.atoms}:
        return template
    if not capped and (first or last) and residue in field._templates:
        end, cap = ("start", "ACE before it") if first else ("end", "NME behind it")
        raise InputError(f"The force field {files} has no template {name} for {residue} at the {end}; put {cap}.")
    raise InputError(
        f"The force field {files} has no template {name}; peptides are built from the templates of the AMBER family, "
        "for instance those of amber99sbildn.xml or amber14-all.xml."
    )


# The conformation


def _rotamers() -> Iterator[Rotamer]:
    # polyproline, sheet and helix; the first is nearly always good
    for chi, (phi, psi) in itertools.product((-60.0, 180.0, 60.0), ((-75.0, 145.0), (-135.0, 135.0), (-63.0, -42.0))):
        yield Rotamer(phi, psi, chi)


def _conformation(
    label: str, topology: app.Topology, flexible: openmm.System, system: openmm.System, cis: Sequence[int]
) -> np.ndarray:
    """Relaxed positions in nm about their centroid; ``flexible`` is the System without constraints."""
    zmatrix = ZMatrix.from_topology(topology)
    lengths, angles = _equilibrium(label, topology, flexible, zmatrix)
    coordinates = InternalCoordinates(zmatrix)
    molecule = Stereochemistry(topology, cis)
    fault = ""
    for rotamer in _rotamers():
        torsions = np.radians([molecule.torsion(*row, rotamer) for row in zmatrix.torsions.tolist()])
        q = torch.tensor(np.concatenate([lengths[: len(zmatrix.bonds)], angles, torsions]))
        positions = coordinates.inverse(q[None])[0][0].numpy()
        if not np.isfinite(positions).all():
            fault = "three atoms in a row are collinear"
            continue
        try:
            positions = _relaxed(flexible, system, positions)
        except openmm.OpenMMException as error:
            fault = f"OpenMM could not relax it: {error}".rstrip(".")
            continue
        fault = fault_of(positions, molecule, zmatrix, lengths)
        if not fault:
            return positions - positions.mean(0)
    raise InputError(
        f"No sound conformation of {label} was found with this force field: in the last one tried, {fault}."
    )


def _equilibrium(
    label: str, topology: app.Topology, system: openmm.System, zmatrix: ZMatrix
) -> tuple[np.ndarray, np.ndarray]:
    """Lengths of the bonds of the z-matrix and then of its closures, nm, and its angles, radians."""
    lengths: dict[tuple[int, ...], float] = {}
    angles: dict[tuple[int, ...], float] = {}
    for force in system.getForces():
        if isinstance(force, openmm.HarmonicBondForce):
            for n in range(force.getNumBonds()):
                i, j, length, _ = force.getBondParameters(n)
                lengths[i, j] = lengths[j, i] = length.value_in_unit(unit.nanometer)
        elif isinstance(force, openmm.HarmonicAngleForce):
            for n in range(force.getNumAngles()):
                i, j, k, angle, _ = force.getAngleParameters(n)
                angles[i, j, k] = angles[k, j, i] = angle.value_in_unit(unit.radian)
    try:
        return (
            np.array([lengths[tuple(bond)] for bond in [*zmatrix.bonds.tolist(), *zmatrix.closures.tolist()]]),
            np.array([angles[tuple(three)] for three in zmatrix.angles.tolist()]),
        )
    except KeyError as error:
        atoms = list(topology.atoms())
        names = "-".join(atoms[index].name for index in error.args[0])
        raise InputError(
            f"The force field has no harmonic term for {names} in {label}; peptides are built from "
            "equilibrium bond lengths and angles, as the AMBER force fields have them."
        ) from None


def _relaxed(flexible: openmm.System, system: openmm.System, positions: np.ndarray) -> np.ndarray:
    # one thread and a fixed order of sums: the same positions every time
    platform = openmm.Platform.getPlatform("CPU")
    properties = {"Threads": "1", "DeterministicForces": "true"}
    for stage in (flexible, system) if system.getNumConstraints() else (flexible,):
        integrator = openmm.VerletIntegrator(0.001)
        integrator.setConstraintTolerance(1e-8)
        context = openmm.Context(stage, integrator, platform, properties)
        context.setPositions(positions)
        context.applyConstraints(1e-8)
        openmm.LocalEnergyMinimizer.minimize(context, _TOLERANCE)
        context.applyConstraints(1e-8)
        state = context.getState(positions=True)
        positions = np.array(state.getPositions(asNumpy=True).value_in_unit(unit.nanometer), dtype=np.float64)
    return positions
