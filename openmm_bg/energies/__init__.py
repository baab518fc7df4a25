"""Energies u(x): OpenMM Systems as batched, differentiable torch functions."""

from openmm_bg.energies.base import Energy
from openmm_bg.energies.bridge import python_force
from openmm_bg.energies.context import ContextEnergy
from openmm_bg.energies.forcefield import ForceFieldEnergy
from openmm_bg.energies.regularize import (
    PairwiseRegularizedEnergy,
    RegularizedEnergy,
    ThresholdSchedule,
    regularize,
)

__all__ = [
    "ContextEnergy",
    "Energy",
    "ForceFieldEnergy",
    "PairwiseRegularizedEnergy",
    "RegularizedEnergy",
    "ThresholdSchedule",
    "python_force",
    "regularize",
]
