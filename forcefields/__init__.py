"""OpenMM ForceField files of this package, found by ``openmm.app.ForceField`` by name."""

from __future__ import annotations

from pathlib import Path


def directory() -> str:
    """The folder that OpenMM searches for force field files (entry point ``openmm.forcefielddir``)."""
    return str(Path(__file__).parent)
