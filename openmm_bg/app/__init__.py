"""Boltzmann generators beside openmm.app and openmmtools."""

from __future__ import annotations

from typing import Any

from openmm_bg.app.learned_exchange import LearnedReplicaExchangeSampler
from openmm_bg.app.reporter import BoltzmannGeneratorReporter
from openmm_bg.app.sampler import BoltzmannGeneratorSampler
from openmm_bg.app.switching import SwitchingSampler

__all__ = [
    "BoltzmannGeneratorMove",
    "BoltzmannGeneratorReporter",
    "BoltzmannGeneratorSampler",
    "LearnedReplicaExchangeSampler",
    "MultiStateLearnedExchangeSampler",
    "SwitchingSampler",
]


def __getattr__(name: str) -> Any:
    # openmmtools is slow to import and prints a banner, so what derives from it waits until it is asked for.
    if name == "BoltzmannGeneratorMove":
        from openmm_bg.app.move import BoltzmannGeneratorMove

        return BoltzmannGeneratorMove
    if name == "MultiStateLearnedExchangeSampler":
        from openmm_bg.app.learned_exchange_multistate import MultiStateLearnedExchangeSampler

        return MultiStateLearnedExchangeSampler
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
