"""How much an adaptive run does, what it remembers from phase to phase, and what came of it."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from openmm_bg.errors import InputError
from openmm_bg.generator import BoltzmannGenerator
from openmm_bg.sampling.archive import load_arrays, save_arrays
from openmm_bg.sampling.dynamics import whole_number
from openmm_bg.sampling.walkers import Walkers
from openmm_bg.training.budget import Budget
from openmm_bg.training.convergence import Figures
from openmm_bg.training.reservoir import Reservoir
from openmm_bg.units import kelvin


@dataclass(frozen=True)
class AdaptiveSettings:
    """How much of everything a round does.

    Attributes
    ----------
    walkers : int
    heating_temperature : float
        K, at which all walkers first move, so that each leaves the common start.
    heating_steps, settling_steps : int
        There, and then at the temperature of the target before the first frame.
    steps, interval : int
        Time steps of each walker in a round, and between its frames. Bonds and angles forget themselves within tens of
        femtoseconds, so frequent frames are worth having.
    timestep, friction : float
        ps, 1/ps.
    proposals : int
        Generator moves that each walker tries in a round.
    likelihood_steps : int
        Maximum likelihood in the first round, and a quarter of it in rounds whose frames the generator had missed.
    training_steps, growth : int, float
        Steps on the energy in the first round, and their factor from round to round.
    closing_steps : int
        Steps of the last training.
    rounds : int
        The most; adaptation that has not converged ends there.
    draws : int
        Of the generator, to judge it by.
    capacity : int
        Frames kept for training.
    """

    walkers: int = 128
    heating_temperature: float = 1000.0
    heating_steps: int = 5000
    settling_steps: int = 4000
    steps: int = 5000
    interval: int = 50
    timestep: float = 0.001
    friction: float = 1.0
    proposals: int = 10
    likelihood_steps: int = 400
    training_steps: int = 1000
    growth: float = 1.5
    closing_steps: int = 4000
    rounds: int = 8
    draws: int = 20_000
    capacity: int = 50_000

    def __post_init__(self) -> None:
        for entry in dataclasses.fields(self):
            if entry.type == "int":
                whole_number(getattr(self, entry.name), entry.name, minimum=_LEAST.get(entry.name, 1))
        kelvin(self.heating_temperature, "heating_temperature")
        if not (math.isfinite(self.growth) and self.growth >= 1):
            raise InputError(f"growth must be at least 1, not {self.growth}.")
        if self.steps % self.interval:
            raise InputError(f"interval must divide the {self.steps} steps of a round, and {self.interval} does not.")

    @property
    def least_dynamics(self) -> int:
        """Time steps of all walkers together before the first training and after the last."""
        return self.walkers * (self.heating_steps + self.settling_steps + 2 * self.steps)

    def check_budget(self, budget: Budget) -> None:
        """Refuse a budget of evaluations of which dynamics would leave less than half to training."""
        if budget.spent(0, 2 * self.least_dynamics) >= 1:
            raise InputError(
                f"A budget of {budget.evaluations} evaluations leaves too little for training, since the first and the "
                f"last dynamics of {self.walkers} walkers take {self.least_dynamics} of them; give more, or fewer "
                "walkers or steps."
            )


_LEAST = {"likelihood_steps": 0, "heating_steps": 0, "walkers": 2, "draws": 100}


@dataclass
class AdaptiveResult:
    """How adaptation went.

    Attributes
    ----------
    converged : bool
    verdict : str
        Whether the test held, and what of it did not, in words.
    rounds : int
        Of training, the last one not counted.
    figures : Figures
        Of the final generator, on ``held_out``.
    held_out : ndarray (walkers, frames, atoms, 3)
        nm; the walkers after the last moves, never trained on.
    history : list of dict
        The records of the log.
    steps, skipped, rollbacks : int
        Of all trainings.
    evaluations : dict of str to int
        Force and energy evaluations of "dynamics", "moves", "figures" and "training".
    seconds : float
    """

    converged: bool
    verdict: str
    rounds: int
    figures: Figures
    held_out: NDArray[Any]
    history: list[dict[str, Any]]
    steps: int
    skipped: int
    rollbacks: int
    evaluations: dict[str, int]
    seconds: float


@dataclass
class AdaptiveState:
    """What an adaptive run remembers; with generator and walkers, all there is to its checkpoint.

    Attributes
    ----------
    reservoir : Reservoir
        Frames to train on.
    fresh : ndarray (walkers, frames, atoms, 3)
        Frames of the last dynamics, which training has not seen yet.
    round : int
        Rounds of training that are done.
    phase : {"explore", "learn", "close", "closed"}
        What comes next.
    passed : int
        Rounds in a row in which the convergence test has held.
    missed : bool
        Whether the forward figure of the last round was too low.
    figures : Figures or None
        Of the last dynamics.
    whitened, converged, verdict, seconds, evaluations, trained, moves, history
        What the generator has learned from data once and for all; how it went; what it cost; the log.
    """

    reservoir: Reservoir
    fresh: NDArray[Any] = field(default_factory=lambda: np.empty(0))
    figures: Figures | None = None
    round: int = 0
    phase: str = "explore"
    passed: int = 0
    missed: bool = True
    whitened: bool = False
    converged: bool = False
    verdict: str = ""
    seconds: float = 0.0
    evaluations: dict[str, int] = field(
        default_factory=lambda: {"dynamics": 0, "moves": 0, "figures": 0, "training": 0}
    )
    trained: dict[str, int] = field(default_factory=lambda: {"steps": 0, "skipped": 0, "rollbacks": 0})
    moves: dict[str, int] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)

    def save(self, path: Path, identity: dict[str, Any], walkers: Walkers, generator: BoltzmannGenerator) -> None:
        """Write a checkpoint (`.npz`, no pickle inside), replacing the file in one step."""
        header = {name: getattr(self, name) for name in _PLAIN} | {
            "identity": identity,
            "calls": walkers.calls,
            "figures": None if self.figures is None else self.figures.to_dict(),
            "provenance": generator.provenance,
        }
        save_arrays(
            path, header, positions=walkers.positions, fresh=self.fresh, frames=self.reservoir.frames,
            priorities=self.reservoir.priorities,
            **{f"flow.{name}": t.numpy(force=True) for name, t in generator.flow.state_dict().items()},
        )  # fmt: skip

    def load(self, path: Path, identity: dict[str, Any], walkers: Walkers, generator: BoltzmannGenerator) -> None:
        """Take up what a checkpoint holds, and put walkers and generator where they were.

        Raises
        ------
        InputError
            If the file is damaged or belongs to a run with another identity.
        """
        weights = generator.flow.state_dict()
        names = ("positions", "fresh", "frames", "priorities", *(f"flow.{name}" for name in weights))
        header, arrays = load_arrays(path, names)
        try:
            other = [name for name, value in identity.items() if header["identity"].get(name) != value]
            if other:
                raise InputError(
                    f"{path} belongs to a run with other {' and '.join(other)}; resume with the same, or delete it to "
                    "start anew."
                )
            for name in _PLAIN:
                setattr(self, name, header[name])
            self.figures = None if header["figures"] is None else Figures.from_dict(header["figures"])
            walkers.calls, walkers.positions = header["calls"], arrays["positions"]
            walkers.force_evaluations = self.evaluations["dynamics"]
            generator.flow.load_state_dict({name: torch.as_tensor(arrays[f"flow.{name}"]) for name in weights})
            generator.provenance = header["provenance"]
        except (LookupError, TypeError, AttributeError, RuntimeError) as error:
            raise InputError(f"{path} is not a whole checkpoint ({error}); delete it to start anew.") from None
        self.fresh, self.reservoir.frames = arrays["fresh"], arrays["frames"]
        self.reservoir.priorities = arrays["priorities"]


_PLAIN = ("round", "phase", "passed", "missed", "whitened", "converged", "verdict", "seconds", "evaluations", "trained",
          "moves", "history")  # fmt: skip
