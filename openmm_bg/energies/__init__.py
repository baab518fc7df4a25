"""Energies u(x): OpenMM Systems as batched, differentiable torch functions."""

from openmm_bg.energies.base import Energy
from openmm_bg.energies.context import ContextEnergy
from openmm_bg.energies.forcefield import ForceFieldEnergy
from openmm_bg.energies.regularize import RegularizedEnergy, regularize

__all__ = ["ContextEnergy", "Energy", "ForceFieldEnergy", "RegularizedEnergy", "regularize"]
