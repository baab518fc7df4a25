"""How much of everything a run does."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from openmm_bg.errors import InputError
from openmm_bg.units import kelvin

# Fewer frames than this cannot be cut into the blocks that every error and every floor is measured from.
_FEWEST_FRAMES = 20
_LARGEST_SEED = 2**31 - 16  # OpenMM's seeds are 32-bit, and every part of a run takes one of its own


@dataclass(frozen=True)
class RunSettings:
    """How much of everything a run does.

    Attributes
    ----------
    temperature : float or None
        K; None for the molecule's own.
    flow : str
        "spline" or "realnvp".
    exchange_iterations, replicas, highest_temperature
        Replica exchange for the training data: iterations of 500 steps, each a frame, on a ladder of temperatures.
    held_out : float
        Share of the exchange's frames, the last ones, that training never sees.
    bursts : int
        Short runs from every training frame.
    likelihood_steps, training_steps : int
        On the data, then on the energy.
    md_steps : int
        Plain MD to compare with, 1 fs each.
    production_steps, steps_per_iteration, proposals_per_iteration
        MD with moves.
    samples : int
        Independent draws of the generator.
    seed : int

    Raises
    ------
    InputError
        For a value that no run could use; so nothing is found out after an hour of simulation.
    """

    temperature: float | None = None
    flow: str = "spline"
    exchange_iterations: int = 2400
    replicas: int = 6
    highest_temperature: float = 1000.0
    held_out: float = 0.2
    bursts: int = 16
    likelihood_steps: int = 400
    training_steps: int = 8000
    md_steps: int = 2_000_000
    production_steps: int = 1_000_000
    steps_per_iteration: int = 500
    proposals_per_iteration: int = 10
    samples: int = 100_000
    seed: int = 2026

    @classmethod
    def rehearsal(cls) -> RunSettings:
        """Every step in well under a minute: to see that all works. Its numbers mean little."""
        return cls(
            exchange_iterations=40, replicas=4, likelihood_steps=60, training_steps=60, md_steps=20_000,
            production_steps=5_000, steps_per_iteration=100, proposals_per_iteration=5, samples=2_000,
        )  # fmt: skip

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type == "int":
                least = _LEAST.get(field.name, 1)
                if isinstance(value, bool) or not isinstance(value, int) or value < least:
                    raise InputError(f"{field.name} must be a whole number of at least {least}, not {value!r}.")
        if self.seed > _LARGEST_SEED:
            raise InputError(f"seed must be at most {_LARGEST_SEED}, not {self.seed}.")
        if self.temperature is not None:
            object.__setattr__(self, "temperature", kelvin(self.temperature))
        object.__setattr__(self, "highest_temperature", kelvin(self.highest_temperature, "highest_temperature"))
        if self.flow not in ("spline", "realnvp"):
            raise InputError(f"flow must be 'spline' or 'realnvp', not {self.flow!r}.")
        for name in ("md_steps", "production_steps"):
            if getattr(self, name) < _FEWEST_FRAMES * self.steps_per_iteration:
                raise InputError(
                    f"{name} must be at least {_FEWEST_FRAMES * self.steps_per_iteration}, {_FEWEST_FRAMES} iterations "
                    f"of {self.steps_per_iteration} steps, not {getattr(self, name)}."
                )
        if isinstance(self.held_out, bool) or not isinstance(self.held_out, float) or not 0 < self.held_out < 1:
            raise InputError(f"held_out must be a number between 0 and 1, not {self.held_out!r}.")
        split_frames(np.arange(self.exchange_iterations), self.held_out)

    @property
    def training_conformations(self) -> int:
        """Ends of bursts that training will have."""
        return self.bursts * len(split_frames(np.arange(self.exchange_iterations), self.held_out)[0])

    def differences(self, other: RunSettings) -> list[str]:
        """What is set otherwise here than in ``other``: "seed 1, not 2"."""
        mine, theirs = dataclasses.asdict(self), dataclasses.asdict(other)
        return [f"{name} {mine[name]}, not {theirs[name]}" for name in mine if mine[name] != theirs[name]]


_LEAST = {"exchange_iterations": _FEWEST_FRAMES, "replicas": 2, "likelihood_steps": 0, "samples": 100, "seed": 0}


def split_frames(frames: np.ndarray, held_out: float) -> tuple[np.ndarray, np.ndarray]:
    """Training frames and, from the end of the trajectory, held-out ones, with a gap of two percent between them."""
    cut = max(1, int(len(frames) * (1 - held_out)))
    gap = len(frames) // 50
    if cut + gap >= len(frames):
        raise InputError(f"{len(frames)} frames are too few to hold {100 * held_out:g} percent of them out.")
    return frames[:cut], frames[cut + gap :]
