"""The named targets: molecules with their force fields, and analytic densities with exact references."""

from openmm_bg.systems.molecules import IMPLICIT_FORCE_FIELD, Molecule, from_pdb
from openmm_bg.systems.registry import describe, load, names

__all__ = ["IMPLICIT_FORCE_FIELD", "Molecule", "describe", "from_pdb", "load", "names"]
