"""The named targets: molecules with their force fields, and analytic densities with exact references."""

from openmm_bg.systems.clusters import DoubleWellCluster, LennardJonesCluster
from openmm_bg.systems.densities import DoubleWell, GaussianMixture
from openmm_bg.systems.lattice import LatticeDoubleWell
from openmm_bg.systems.many_well import ManyWell, ManyWellDelta
from openmm_bg.systems.molecules import IMPLICIT_FORCE_FIELD, Molecule, from_pdb
from openmm_bg.systems.peptides import peptide
from openmm_bg.systems.registry import describe, load, names

__all__ = [
    "IMPLICIT_FORCE_FIELD",
    "DoubleWell",
    "DoubleWellCluster",
    "GaussianMixture",
    "LatticeDoubleWell",
    "LennardJonesCluster",
    "ManyWell",
    "ManyWellDelta",
    "Molecule",
    "describe",
    "from_pdb",
    "load",
    "names",
    "peptide",
]
