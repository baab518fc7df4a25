"""Molecules: a topology, an OpenMM System and positions under one name."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openmm
from openmm import app, unit

from openmm_bg.errors import InputError
from openmm_bg.units import kelvin

__all__ = ["IMPLICIT_FORCE_FIELD", "Molecule", "from_pdb"]

IMPLICIT_FORCE_FIELD = ("amber99sbildn.xml", "amber99_obc.xml")
_CONSTRAINTS = (None, app.HBonds, app.AllBonds, app.HAngles)


@dataclass(frozen=True)
class Molecule:
    """A named molecular target.

    Attributes
    ----------
    name : str
    topology : openmm.app.Topology
    system : openmm.System
    positions : ndarray (atoms, 3), float64
        In nm.
    temperature : float
        In K; the temperature the target is meant for.
    description : str
        One sentence.
    forcefield : tuple of str
        The OpenMM force field files that made the System.
    """

    name: str
    topology: app.Topology
    system: openmm.System
    positions: np.ndarray
    temperature: float
    description: str
    forcefield: tuple[str, ...]

    @property
    def num_atoms(self) -> int:
        return len(self.positions)


def from_pdb(
    path: str | os.PathLike[str],
    *,
    forcefield: str | Sequence[str] = IMPLICIT_FORCE_FIELD,
    temperature: Any = 300.0,
    constraints: Any = None,
    hydrogen_mass: Any = None,
    name: str | None = None,
    description: str | None = None,
) -> Molecule:
    """A molecule from a PDB file and force field files, without cutoff and without periodic box.

    Parameters
    ----------
    path : path
        A PDB file with all hydrogens. Of several models the first is read; a CRYST1 record is ignored.
    forcefield : str or sequence of str
        Files that `openmm.app.ForceField` finds.
    temperature : Quantity or float
        In K.
    constraints : None, app.HBonds, app.AllBonds or app.HAngles
        Bonds whose lengths are fixed. They get these lengths at once, which a PDB file rounds.
    hydrogen_mass : Quantity or float, optional
        In Da; what a hydrogen gains its heavy atom loses.
    name, description : str, optional
        By default the file's name, and a sentence made from it.

    Returns
    -------
    Molecule

    Raises
    ------
    InputError
        For a file that is missing, is no PDB file or holds no atoms; an unknown force field file; a residue
        without a template; missing hydrogens; coordinates or a temperature that are not finite; constraints that
        the coordinates are too far from.

    Examples
    --------
    >>> import openmm_bg.systems
    >>> from pathlib import Path
    >>> path = Path(openmm_bg.systems.__file__).with_name("alanine_dipeptide.pdb")
    >>> from_pdb(path, temperature=310).num_atoms
    22
    """
    path = Path(path)
    temperature = kelvin(temperature)
    topology, positions = _read(path)
    files, field = load_force_field(forcefield)
    system = create_system(str(path), topology, field, constraints, hydrogen_mass)
    if system.getNumConstraints():
        positions = _constrained(path, system, positions)
    return Molecule(
        name=name or path.stem,
        topology=topology,
        system=system,
        positions=positions,
        temperature=temperature,
        description=description or f"{path.name} with {' + '.join(files)}, no cutoff.",
        forcefield=files,
    )


def _read(path: Path) -> tuple[app.Topology, np.ndarray]:
    if not path.is_file():
        raise InputError(f"There is no PDB file {path}.")
    records = path.read_text(errors="replace").splitlines()
    if not any(line.startswith(("ATOM", "HETATM")) for line in records):
        raise InputError(f"{path} holds no atoms; a PDB file with ATOM or HETATM records is needed.")
    try:
        pdb = app.PDBFile(str(path))
        positions = np.array(pdb.getPositions(asNumpy=True).value_in_unit(unit.nanometer), dtype=np.float64)
    except (ValueError, IndexError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} could not be read as a PDB file: {_sentence(error)}") from error
    bad = np.flatnonzero(~np.isfinite(positions).all(axis=1))
    if len(bad):
        atom = list(pdb.topology.atoms())[bad[0]]
        raise InputError(
            f"{path} gives atom {atom.name} of residue {_label(atom.residue)} coordinates that are not finite "
            "numbers; repair the file."
        )
    return pdb.topology, positions


def _constrained(path: Path, system: openmm.System, positions: np.ndarray) -> np.ndarray:
    """The nearest positions (nm) whose constrained distances are right."""
    context = openmm.Context(system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatform("Reference"))
    context.setPositions(positions)
    try:
        context.applyConstraints(1e-8)
        nearest = context.getState(positions=True).getPositions(asNumpy=True).value_in_unit(unit.nanometer)
    except openmm.OpenMMException as error:
        raise _far_from_constraints(path) from error
    for index in range(system.getNumConstraints()):
        i, j, length = system.getConstraintParameters(index)
        if not abs(np.linalg.norm(nearest[i] - nearest[j]) / length.value_in_unit(unit.nanometer) - 1) < 1e-6:
            raise _far_from_constraints(path)
    return np.array(nearest, dtype=np.float64)


def _far_from_constraints(path: Path) -> InputError:
    return InputError(
        f"The coordinates of {path} are too far from the constrained bond lengths; minimise them without constraints "
        "first."
    )


def load_force_field(forcefield: str | Sequence[str]) -> tuple[tuple[str, ...], app.ForceField]:
    """The files of a force field, and what OpenMM reads from them."""
    files = (forcefield,) if isinstance(forcefield, str) else tuple(forcefield)
    if not files:
        raise InputError("forcefield is empty; name an OpenMM force field file, such as amber99sbildn.xml.")
    try:
        return files, app.ForceField(*files)
    except Exception as error:  # OpenMM wraps what it cannot parse in a bare Exception
        named = " + ".join(map(str, files))
        raise InputError(f"The force field {named} cannot be loaded: {_sentence(error)}") from error


def create_system(
    source: str, topology: app.Topology, forcefield: app.ForceField, constraints: Any, hydrogen_mass: Any
) -> openmm.System:
    """The System of a topology without cutoff; ``source`` names the molecule where it has to be refused."""
    mass = check_options(constraints, hydrogen_mass)
    unmatched = forcefield.getUnmatchedResidues(topology)
    try:
        system = forcefield.createSystem(
            topology, nonbondedMethod=app.NoCutoff, constraints=constraints, hydrogenMass=mass
        )
    except Exception as error:  # OpenMM raises bare Exceptions for some templates
        if not unmatched:
            raise InputError(f"The force field cannot describe {source}: {_sentence(error)}") from error
        residue = unmatched[0]
        if "addHydrogens" in str(error):
            raise InputError(
                f"Residue {_label(residue)} of {source} lacks hydrogens: add them first, for instance with "
                "openmm.app.Modeller.addHydrogens or PDBFixer."
            ) from error
        reason = str(error).split(").", 1)[-1].split("For more information")[0].strip()
        raise InputError(
            f"The force field has no template for residue {_label(residue)} of {source}: {_sentence(reason)}"
        ) from error
    check_masses(topology, system, mass)
    return system


def check_options(constraints: Any, hydrogen_mass: Any) -> float | None:
    """Refuse constraints that OpenMM does not know; the hydrogen mass in Da."""
    if not any(constraints is known for known in _CONSTRAINTS):
        raise InputError(f"constraints must be None or HBonds, AllBonds or HAngles of openmm.app, not {constraints!r}.")
    return None if hydrogen_mass is None else _daltons(hydrogen_mass)


def check_masses(topology: app.Topology, system: openmm.System, mass: float | None) -> None:
    """Refuse a hydrogen mass that leaves an atom without mass."""
    for atom in topology.atoms() if mass is not None else ():
        # Repartitioning takes from the heavy atom whatever the hydrogens are given, below zero too.
        if atom.element is not None and system.getParticleMass(atom.index)._value <= 0:
            raise InputError(
                f"hydrogen_mass of {mass:g} Da leaves nothing to atom {atom.name} of residue "
                f"{_label(atom.residue)}; choose a smaller one (up to 4 Da is usual)."
            )


def _daltons(hydrogen_mass: Any) -> float:
    try:
        mass = float(hydrogen_mass.value_in_unit(unit.dalton) if unit.is_quantity(hydrogen_mass) else hydrogen_mass)
    except (TypeError, ValueError):
        raise InputError(f"hydrogen_mass must be a number of Da, not {hydrogen_mass!r}.") from None
    if not (math.isfinite(mass) and mass > 0):
        raise InputError(f"hydrogen_mass must be a positive finite number of Da, not {mass}.")
    return mass


def _label(residue: Any) -> str:
    return f"{residue.name} {residue.id}".strip()


def _sentence(reason: object) -> str:
    text = " ".join(str(reason).split()) or type(reason).__name__
    return text if text.endswith((".", "?")) else text + "."
