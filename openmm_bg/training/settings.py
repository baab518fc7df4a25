"""What a training is told, and what it tells: its stages, how its parameters move, what it cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from openmm_bg.training.objectives import Objective

WITHOUT_END = 10**9
"""Steps of a stage that a budget ends."""


@dataclass(frozen=True)
class Stage:
    """Some steps under one weighted sum of objectives.

    Attributes
    ----------
    name : str
    steps : int
        At most: an objective that sets ``state["finished"]`` ends its stage.
    terms : sequence of (float, Objective)
    rate : float or None
        A constant learning rate. None follows the cosine that the stages without a rate of their own share.
    torsion_rate : float
        Factor of the learning rate for the density of a molecule's torsions.
    """

    name: str
    steps: int
    terms: Sequence[tuple[float, Objective]]
    rate: float | None = None
    torsion_rate: float = 1.0


@dataclass(frozen=True)
class Settings:
    """How the parameters move.

    Attributes
    ----------
    batch_size, learning_rate, betas
        Adam; the rate follows a cosine to zero over the whole run.
    torsion_rate : float
        Factor of the rate for the density of a molecule's torsions in the default recipe's stage on the energy: few
        parameters rule the weights of whole basins, and at the full rate those go up and down.
    warmup, ramp : float
        Shares of the run over which the rate rises at the start, and at the start of each later stage.
    clip : float
        Largest norm of the gradient.
    average : float
        Decay of the exponential average of the weights, which is what the generator gets.
    validate_every, validation_size : int
        Steps between validations, and samples in each. The best averaged weights of the last stage are kept.
    checkpoint_seconds : float
    dtype : torch.dtype
        Of the training arithmetic; the generator itself stays float64.
    device : str
        Where training happens, "cpu" or "cuda"; the generator stays on the CPU.
    """

    batch_size: int = 512
    learning_rate: float = 5e-3
    betas: tuple[float, float] = (0.9, 0.99)
    torsion_rate: float = 0.3
    warmup: float = 0.03
    ramp: float = 0.01
    clip: float = 20.0
    average: float = 0.998
    validate_every: int = 500
    validation_size: int = 8192
    checkpoint_seconds: float = 60.0
    dtype: torch.dtype = torch.float32
    device: str = "cpu"


@dataclass
class TrainingResult:
    """What training cost and where it ended.

    Attributes
    ----------
    history : list of dict
        The records of the log: step, seconds, stage, losses (None where not finite), and at validations ``ess``,
        ``ess_clipped``, ``acceptance``.
    steps, skipped, evaluations : int
        Steps taken, steps skipped because something was not finite, energy evaluations.
    seconds : float
    rollbacks : int
        How often training had diverged and went back to its last good state with half the learning rate.
    """

    history: list[dict[str, Any]] = field(default_factory=list)
    steps: int = 0
    skipped: int = 0
    evaluations: int = 0
    seconds: float = 0.0
    rollbacks: int = 0
