"""OpenMM forces read into formulas and tables: one reader for each force class."""

from __future__ import annotations

import openmm

from openmm_bg.energies.model import NotNative
from openmm_bg.energies.readers import bonded, born, custom_bonded, custom_nonbonded, nonbonded  # noqa: F401 (they register)
from openmm_bg.energies.readers.registry import REGISTRY, Contribution

__all__ = ["Contribution", "read"]


def read(force: openmm.Force, system: openmm.System) -> Contribution:
    """The formulas and tables of a force.

    Parameters
    ----------
    force
        One of the forces of `system`.
    system
        Gives the number of particles.

    Raises
    ------
    NotNative
        If the force must be left to OpenMM; the message says why, in a few words.
    """
    if type(force) not in REGISTRY:
        raise NotNative("no torch formula")
    if force.usesPeriodicBoundaryConditions():
        raise NotNative("periodic")
    return REGISTRY[type(force)](force, system)
