"""What a run is asked for: a name, a sequence of residues or a PDB file."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from openmm_bg import systems
from openmm_bg.errors import InputError
from openmm_bg.systems import Molecule


def load_molecule(source: str, forcefield: tuple[str, ...] | None, temperature: float | None) -> Molecule:
    """The molecule of a run.

    Parameters
    ----------
    source : str
        A name that `openmm-bg systems` lists, residues in three-letter code with blanks between, or a PDB file.
    forcefield : tuple of str or None
        For a sequence or a PDB file; None for the usual one.
    temperature : float or None
        K; None for the molecule's own.

    Raises
    ------
    InputError
        For what is none of the three, for an analytic density, and where a name is given another force field.

    Examples
    --------
    >>> load_molecule("ACE SER NME", None, 310).num_atoms
    23
    """
    if is_file(source):
        molecule = systems.from_pdb(source, forcefield=forcefield or systems.IMPLICIT_FORCE_FIELD)
    elif is_sequence(source):
        molecule = systems.peptide(source, forcefield=forcefield or systems.IMPLICIT_FORCE_FIELD)
    else:
        molecule = systems.load(source)
        if not isinstance(molecule, Molecule):
            raise InputError(f"{source} is an analytic density, not a molecule; openmm-bg runs molecules.")
        if forcefield is not None:
            raise InputError(f"{source} has a force field of its own; choose one only with a sequence or a PDB file.")
    return molecule if temperature is None else dataclasses.replace(molecule, temperature=temperature)


def is_file(source: str) -> bool:
    return source.lower().endswith(".pdb") or os.sep in source or Path(source).is_file()


def is_sequence(source: str) -> bool:
    """Whether this is meant for residues: several words, or capitals as no name has them."""
    return not is_file(source) and (len(source.split()) > 1 or source.isupper())


def canonical(source: str) -> str:
    """The same text for the same thing, for a run that is resumed."""
    if is_file(source):
        return str(Path(source).resolve())
    return " ".join(source.split()) if is_sequence(source) else source


def folder_name(source: str) -> str:
    """What a run's folder is called where nobody names it."""
    return "-".join(source.split()) if is_sequence(source) else Path(source).stem
