"""Boltzmann generators beside openmm.app and openmmtools."""

from __future__ import annotations

from typing import Any

from openmm_bg.app.sampler import BoltzmannGeneratorSampler

__all__ = ["BoltzmannGeneratorMove", "BoltzmannGeneratorSampler"]


def __getattr__(name: str) -> Any:
    # openmmtools is slow to import and prints a banner, so the move that derives from it waits until it is
    # asked for.
    if name == "BoltzmannGeneratorMove":
        from openmm_bg.app.move import BoltzmannGeneratorMove

        return BoltzmannGeneratorMove
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
