"""Boltzmann generators for OpenMM: exact Monte Carlo moves that propose whole conformations."""

from __future__ import annotations

from typing import Any

from openmm_bg import flows, systems
from openmm_bg.analysis import compare, report
from openmm_bg.app import (
    BoltzmannGeneratorReporter,
    BoltzmannGeneratorSampler,
    LearnedReplicaExchangeSampler,
    SwitchingSampler,
)
from openmm_bg.coordinates import InternalCoordinates, ZMatrix
from openmm_bg.energies import ContextEnergy, Energy, ForceFieldEnergy, ThresholdSchedule, python_force, regularize
from openmm_bg.errors import InputError
from openmm_bg.generator import BoltzmannGenerator, Samples
from openmm_bg.sampling import Trajectory, annealed_transport, bursts, replica_exchange, simulate
from openmm_bg.training import AdaptiveTraining, fit
from openmm_bg.version import __version__

__all__ = [
    "AdaptiveTraining",
    "BoltzmannGenerator",
    "BoltzmannGeneratorMove",
    "BoltzmannGeneratorReporter",
    "BoltzmannGeneratorSampler",
    "ContextEnergy",
    "Energy",
    "ForceFieldEnergy",
    "InputError",
    "InternalCoordinates",
    "LearnedReplicaExchangeSampler",
    "MultiStateLearnedExchangeSampler",
    "Samples",
    "SwitchingSampler",
    "ThresholdSchedule",
    "Trajectory",
    "ZMatrix",
    "__version__",
    "annealed_transport",
    "bursts",
    "compare",
    "fit",
    "flows",
    "python_force",
    "regularize",
    "replica_exchange",
    "report",
    "simulate",
    "systems",
]


def __getattr__(name: str) -> Any:
    # openmmtools is slow to import and prints: only who asks for what derives from it pays
    if name in ("BoltzmannGeneratorMove", "MultiStateLearnedExchangeSampler"):
        from openmm_bg import app

        return getattr(app, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
