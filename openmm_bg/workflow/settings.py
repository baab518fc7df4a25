"""How much of everything a run does."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import numpy as np

from openmm_bg.errors import InputError
from openmm_bg.training import Budget
from openmm_bg.units import kelvin

# Fewer frames than this cannot be cut into the blocks that every error and every floor is measured from.
_FEWEST_FRAMES = 20
_LARGEST_SEED = 2**31 - 16  # OpenMM's seeds are 32-bit, and every part of a run takes one of its own

# Training on the energy by where data come from: the last one of an adaptive run, or the only one.
TRAINING_STEPS = {"adaptive": 4000, "exchange": 11_000}
# The data of a molecule, where nothing else is asked for. Each torsion is one more thing to learn and to wait for.
LADDERS = 16
EXCHANGE_STEPS = 250
ITERATIONS_PER_TORSION = 15
HEATING_STEPS_PER_TORSION = 700
# Neighbours exchange in 35 percent of the tries: energies fluctuate like the square root of the number of atoms.
REPLICAS_PER_ROOT_ATOM = 1.28
EQUILIBRATION = 0.2
# The same by OpenMM, one ladder alone.
SINGLE_ITERATIONS, SINGLE_STEPS, SINGLE_REPLICAS, SINGLE_EQUILIBRATION = 2400, 500, 6, 0.02
# Walkers that run as a batch, and those that OpenMM runs one after the other.
WALKERS, SINGLE_WALKERS = 128, 32
# What belongs to one source of data alone.
_OF = {
    "adaptive": ("walkers", "rounds", "round_steps", "round_training_steps", "frame_interval", "settling_steps"),
    "exchange": ("ladders", "replicas", "exchange_iterations", "exchange_steps", "equilibration_iterations"),
}


@dataclass(frozen=True)
class RunSettings:
    """How much of everything a run does.

    Attributes
    ----------
    temperature : float or None
        K; None for the molecule's own.
    flow : str
        "spline" or "realnvp".
    data : {"adaptive", "exchange"}
        Where the data come from: walkers that the generator moves while it learns from them, or replica exchange before
        all training. None below stands for what fits data and molecule (:meth:`for_molecule`).
    highest_temperature : float
        K, of the replica exchange, and at which walkers start.
    heating_steps : int or None
        Steps of all walkers there before everything else.
    walkers, rounds, round_steps, frame_interval, settling_steps, round_training_steps : int or None
        Adaptive: how many walkers; at most so many rounds of so many steps of each walker, with a frame every so many;
        steps discarded after heating; training steps of the first round. See
        :class:`~openmm_bg.training.AdaptiveSettings`.
    ladders, replicas, exchange_iterations, exchange_steps, equilibration_iterations : int or None
        Exchange: how many ladders of how many temperatures side by side, and in each so many iterations of so many
        steps, each a frame, after so many that are discarded.
    held_out : float
        Exchange: share of the frames, the last ones of each ladder, that training never sees.
    bursts : int
        Exchange: short runs from every training frame.
    likelihood_steps, training_steps : int
        On the data, then on the energy; of an adaptive run these are the steps of its last training.
    budget : str or None
        What training may cost in place of ``training_steps``, with its walkers in an adaptive run: "10min" or "1e7"
        evaluations (:meth:`openmm_bg.training.Budget.parse`).
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
    data: str = "adaptive"
    highest_temperature: float = 1000.0
    heating_steps: int | None = None
    walkers: int | None = None
    rounds: int | None = None
    round_steps: int | None = None
    frame_interval: int | None = None
    settling_steps: int | None = None
    round_training_steps: int | None = None
    ladders: int | None = None
    replicas: int | None = None
    exchange_iterations: int | None = None
    exchange_steps: int | None = None
    equilibration_iterations: int | None = None
    held_out: float = 0.2
    bursts: int = 16
    likelihood_steps: int = 400
    training_steps: int | None = None
    budget: str | None = None
    md_steps: int = 2_000_000
    production_steps: int = 1_000_000
    steps_per_iteration: int = 500
    proposals_per_iteration: int = 10
    samples: int = 100_000
    seed: int = 2026

    @classmethod
    def rehearsal(cls, data: str = "adaptive") -> RunSettings:
        """Every step in well under a minute: to see that all works. Its numbers mean little."""
        source: dict[str, int] = {
            "adaptive": dict(walkers=32, rounds=2, round_steps=200, frame_interval=20, settling_steps=200,
                             round_training_steps=30),
            "exchange": dict(ladders=4, exchange_iterations=40, exchange_steps=100, replicas=4),
        }.get(data, {})  # fmt: skip
        return cls(
            data=data, **source, heating_steps=500, likelihood_steps=60, training_steps=60, md_steps=20_000,
            production_steps=5_000, steps_per_iteration=100, proposals_per_iteration=5, samples=2_000,
        )  # fmt: skip

    def for_molecule(self, torsions: int, atoms: int, *, batched: bool) -> RunSettings:
        """The same with numbers for everything that was left to data and molecule.

        Parameters
        ----------
        torsions : int
            Free ones, rotors included.
        atoms : int
        batched : bool
            Whether many walkers or ladders can run as one batch. Where not, fewer walkers or one ladder run on OpenMM.

        Examples
        --------
        >>> alanine_dipeptide = RunSettings().for_molecule(7, 22, batched=True)
        >>> alanine_dipeptide.walkers, alanine_dipeptide.heating_steps, alanine_dipeptide.ladders
        (128, 4900, None)
        >>> alanine_dipeptide = RunSettings(data="exchange").for_molecule(7, 22, batched=True)
        >>> alanine_dipeptide.ladders, alanine_dipeptide.replicas, alanine_dipeptide.exchange_iterations
        (16, 6, 105)
        """
        usual = self._usual_exchange(torsions, atoms, batched) if self.data == "exchange" else {
            "walkers": WALKERS if batched else SINGLE_WALKERS,
            "rounds": 8,
            "round_steps": 5000,
            "frame_interval": 50,
            "settling_steps": 4000,
            "round_training_steps": 1000,
            "heating_steps": HEATING_STEPS_PER_TORSION * torsions,
        }  # fmt: skip
        usual["training_steps"] = TRAINING_STEPS[self.data]
        left = {name: value for name, value in usual.items() if getattr(self, name) is None}
        return dataclasses.replace(self, **left)

    def _usual_exchange(self, torsions: int, atoms: int, batched: bool) -> dict[str, int]:
        ladders = (LADDERS if batched else 1) if self.ladders is None else self.ladders
        many = ladders > 1
        iterations = self.exchange_iterations
        if iterations is None:
            iterations = max(_FEWEST_FRAMES, ITERATIONS_PER_TORSION * torsions) if many else SINGLE_ITERATIONS
        return {
            "ladders": ladders,
            "exchange_iterations": iterations,
            "replicas": max(4, round(REPLICAS_PER_ROOT_ATOM * math.sqrt(atoms))) if many else SINGLE_REPLICAS,
            "exchange_steps": EXCHANGE_STEPS if many else SINGLE_STEPS,
            "heating_steps": HEATING_STEPS_PER_TORSION * torsions if many else 0,
            "equilibration_iterations": max(2, int((EQUILIBRATION if many else SINGLE_EQUILIBRATION) * iterations)),
        }

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type == "int" or (field.type == "int | None" and value is not None):
                least = _LEAST.get(field.name, 1)
                if isinstance(value, bool) or not isinstance(value, int) or value < least:
                    raise InputError(f"{field.name} must be a whole number of at least {least}, not {value!r}.")
        if self.seed > _LARGEST_SEED:
            raise InputError(f"seed must be at most {_LARGEST_SEED}, not {self.seed}.")
        if self.temperature is not None:
            object.__setattr__(self, "temperature", kelvin(self.temperature))
        object.__setattr__(self, "highest_temperature", kelvin(self.highest_temperature, "highest_temperature"))
        for name, allowed in (("flow", ("spline", "realnvp")), ("data", tuple(_OF))):
            if getattr(self, name) not in allowed:
                raise InputError(f"{name} must be '{allowed[0]}' or '{allowed[1]}', not {getattr(self, name)!r}.")
        for data, names in _OF.items():
            astray = [name for name in names if data != self.data and getattr(self, name) is not None]
            if astray:
                raise InputError(
                    f"{astray[0]} is of the data '{data}', and these are '{self.data}'; leave it out, or choose those."
                )
        for name in ("md_steps", "production_steps"):
            if getattr(self, name) < _FEWEST_FRAMES * self.steps_per_iteration:
                raise InputError(
                    f"{name} must be at least {_FEWEST_FRAMES * self.steps_per_iteration}, {_FEWEST_FRAMES} iterations "
                    f"of {self.steps_per_iteration} steps, not {getattr(self, name)}."
                )
        if isinstance(self.held_out, bool) or not isinstance(self.held_out, float) or not 0 < self.held_out < 1:
            raise InputError(f"held_out must be a number between 0 and 1, not {self.held_out!r}.")
        if self.budget is not None:
            Budget.parse(self.budget)
        if self.exchange_iterations is not None:
            split_frames(np.arange(self.exchange_iterations), self.held_out)

    @property
    def training_conformations(self) -> int:
        """Ends of bursts, or frames of walkers, that the first training will have."""
        if self.data == "adaptive":
            return self.walkers * (self.round_steps // self.frame_interval)
        return self.bursts * len(self.split(np.arange(self.ladders * self.exchange_iterations))[0])

    @property
    def chains(self) -> int:
        """Independent chains that the held-out frames consist of, one after the other: walkers or ladders."""
        return self.walkers if self.data == "adaptive" else self.ladders

    def split(self, frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Training frames and held-out ones of the exchange, ``(ladders * iterations, ...)``."""
        return split_frames(frames, self.held_out, self.ladders)

    def differences(self, asked: RunSettings) -> list[str]:
        """What is set otherwise here than was asked for: "seed 1, not 2". What was left open (None) is the same."""
        mine, theirs = dataclasses.asdict(self), dataclasses.asdict(asked)
        differ = [name for name in mine if theirs[name] is not None and mine[name] != theirs[name]]
        return [f"{name} {mine[name]}, not {theirs[name]}" for name in differ]


_LEAST = {
    "exchange_iterations": _FEWEST_FRAMES, "replicas": 2, "heating_steps": 0, "equilibration_iterations": 0,
    "likelihood_steps": 0, "samples": 100, "seed": 0, "walkers": 2,
}  # fmt: skip


def split_frames(frames: np.ndarray, held_out: float, ladders: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Training frames and held-out ones, which end each ladder, with a gap of five percent between them.

    All ladders give to both: whole ladders held out would be few, and miss the basins that few ladders visit.
    """
    by_ladder = frames.reshape(ladders, -1, *frames.shape[1:])
    length = by_ladder.shape[1]
    cut, gap = max(1, int(length * (1 - held_out))), length // 20
    if cut + gap >= length:
        raise InputError(f"{length} frames are too few to hold {100 * held_out:g} percent of them out.")
    training, rest = by_ladder[:, :cut], by_ladder[:, cut + gap :]
    return training.reshape(-1, *frames.shape[1:]), rest.reshape(-1, *frames.shape[1:])
