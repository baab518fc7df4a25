"""Temperature annealing: learn the target where it is hot and has one basin, and cool the flow by its own weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import logsumexp
from torch import Tensor

from openmm_bg.errors import InputError
from openmm_bg.sampling.target import Target
from openmm_bg.training.objectives import Step
from openmm_bg.training.reverse import ReversePath

_CHUNK = 4096


@dataclass(frozen=True)
class _Hot:
    """The target at another temperature, as an objective sees it."""

    target: Target
    temperature: float

    def value(self, q: Tensor) -> Tensor:
        return self.target.value(q, 1 / self.temperature)

    def value_and_gradient(self, q: Tensor) -> tuple[Tensor, Tensor]:
        return self.target.value_and_gradient(q, 1 / self.temperature)


@dataclass
class TemperatureAnnealing:
    """Learn a target without data: reverse Kullback-Leibler at a high temperature, then rounds that lower it.

    Where it is hot the barriers are low, and reverse Kullback-Leibler loses no mode. In every round after that the flow
    draws ``samples``; their weights carry them to the next temperature, ``log w = log_volume - u / T - log q``; and the
    flow learns by maximum likelihood from rows drawn in proportion to them. After ``patience`` more rounds at the
    generator's own temperature the stage ends: give it ``hot_steps`` and ``steps_per_round`` for each round, or the
    flow stays as hot as it is by then. Temperatures are in units of the generator's own: 4 is 1200 K for 300 K.

    Published, for peptides at 300 K: 1200 K, and from there nine steps by a factor of 0.857
    (``temperatures=np.geomspace(4, 1, 10)``) and one more round at 300 K; 100,000 steps at 1200 K; 5 to 10 million
    samples a round with the largest 1e-4 of the weights clipped, of which 2 million are drawn and learned in 20,000 to
    30,000 steps; for hexapeptides two rounds at every temperature. Here the hot stage follows path gradients, and the
    ladder is found on the way.

    Parameters
    ----------
    temperatures : float or sequence of float
        The hottest temperature; or the whole ladder, from the hottest down to 1, where a temperature that stands twice
        gets two rounds.
    share : float
        The ladder where it is not given: the next temperature is the lowest whose effective share of the weights is
        this share of what it is at the present one. For d harmonic coordinates a factor r costs
        ``(r (2 - r))^(d / 2)``: 0.54 for the published ladder of alanine dipeptide.
    hot_steps : int
        Steps at the hottest temperature.
    samples, steps_per_round : int
        Size of the buffer, and steps of the optimiser on it. It is maximum likelihood on the samples that count: on
        alanine dipeptide 28 passes over those overfitted and the next weights fell apart, after two they improved.
    patience : int
        More rounds at the generator's temperature before the stage ends.
    clip : float
        Share of the largest weights that are lowered to the largest of the others.
    reverse : ReversePath
        What is learned at the hottest temperature; by default reverse Kullback-Leibler itself.

    Raises
    ------
    InputError
        If a parameter is out of range, if no sample of the flow has a finite energy, or if fewer samples count than the
        flow has dimensions.

    References
    ----------
    Schopmans & Friederich, Temperature-annealed Boltzmann generators, ICML 2025 (arXiv:2501.19077).

    Examples
    --------
    >>> import openmm_bg as bg
    >>> generator = bg.BoltzmannGenerator(bg.systems.load("gmm4"), bg.flows.RealNVP(2, layers=2, hidden=(8,)))
    >>> objective = TemperatureAnnealing([4, 2, 1], hot_steps=3, samples=200, steps_per_round=2, patience=0)
    >>> generator.fit(steps=100, objective=objective, progress=False).steps
    7
    >>> objective.state["temperature"]
    1.0
    """

    temperatures: float | Sequence[float] = 4.0
    share: float = 0.5
    hot_steps: int = 2000
    samples: int = 100_000
    steps_per_round: int = 200
    patience: int = 1
    clip: float = 1e-4
    reverse: ReversePath = field(default_factory=lambda: ReversePath(power=0.0))
    needs_data: bool = field(default=False, init=False)
    needs_energy: bool = field(default=True, init=False)
    state: dict[str, Any] = field(default_factory=dict, init=False)
    tensors: dict[str, Tensor] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        for name, least in (("hot_steps", 0), ("samples", 100), ("steps_per_round", 1), ("patience", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InputError(f"{name} must be a whole number of at least {least}, not {value!r}.")
        if not 0 < self.share < 1:
            raise InputError(f"share must be between 0 and 1, not {self.share}.")
        if not 0 <= self.clip < 1:
            raise InputError(f"clip must be at least 0 and below 1, not {self.clip}.")
        ladder = np.atleast_1d(np.asarray(self.temperatures, dtype=float))
        if ladder.ndim != 1 or len(ladder) == 0 or not (np.isfinite(ladder) & (ladder >= 1)).all():
            raise InputError(
                f"temperatures are in units of the generator's own and at least 1, not {self.temperatures!r}."
            )
        self._ladder = ladder.tolist() if np.ndim(self.temperatures) else None
        self._hottest = float(ladder[0])
        if self._ladder and (self._ladder[-1] != 1 or (np.diff(ladder) > 0).any()):
            raise InputError("temperatures must fall from the hottest to 1, the generator's own.")

    def __call__(self, step: Step) -> tuple[Tensor, dict[str, Any]]:
        calls = self.state["calls"] = int(self.state.get("calls", 0)) + 1
        if calls <= self.hot_steps:
            return self._hot(step, (calls - 1) / self.hot_steps)
        learned = calls - self.hot_steps
        if (learned - 1) % self.steps_per_round == 0:
            self._refill(step)
        if learned % self.steps_per_round == 0 and self.state["arrived"] > self.patience:
            self.state["finished"] = 1
        chosen = torch.multinomial(self.tensors["weight"], step.batch_size, True, generator=step.generator)
        loss = -step.flow.log_prob(self.tensors["q"][chosen]).mean()
        said = ("round", "temperature", "round_ess", "target_ess", "lost")
        return loss, {"nll": loss.detach()} | {name: self.state[name] for name in said}

    def advance(self) -> None:
        """Count a step of the hot stage."""
        if self.state["calls"] <= self.hot_steps:
            self.reverse.advance()

    def _hot(self, step: Step, progress: float) -> tuple[Tensor, dict[str, Any]]:
        # what it keeps between steps is part of a checkpoint of this objective
        self.reverse.state, self.reverse.tensors = self.state, self.tensors
        target = _Hot(step.target, self._hottest)
        loss, numbers = self.reverse(replace(step, target=target, progress=progress))
        return loss, numbers | {"temperature": self._hottest}

    @torch.no_grad()
    def _refill(self, step: Step) -> None:
        """Draw a buffer and weigh it for the next temperature."""
        parts = []
        for start in range(0, self.samples, _CHUNK):
            q, log_q = step.flow.sample(min(_CHUNK, self.samples - start), step.generator)
            clean = torch.where(torch.isfinite(q), q, 0.0)
            volume = -step.target.from_energies(clean, torch.zeros_like(log_q))
            parts.append((q, log_q, volume, step.target.value(clean) + volume))
        q, *known = (torch.cat(column) for column in zip(*parts, strict=True))
        log_q, volume, u = (a.double().numpy(force=True) for a in known)
        inside = np.isfinite(log_q) & np.isfinite(volume) & np.isfinite(u)
        if not inside.any():
            raise InputError(
                "No sample of the flow has a finite energy: the flow and the target do not overlap at all."
            )
        log_base, u = volume[inside] - log_q[inside], u[inside]

        def weights(temperature: float) -> NDArray[np.float64]:
            return self._weights(log_base - u / temperature)

        def share(temperature: float) -> float:
            """Effective share of the weights, of all that were drawn."""
            return float(1 / (self.samples * np.square(weights(temperature)).sum()))

        temperature = self._next(share)
        count = self.samples * share(temperature)
        if count <= step.flow.dimension:
            raise InputError(
                f"Only {count:.1f} of {self.samples} samples count at {temperature:.3g} times the generator's "
                f"temperature, too few for {step.flow.dimension} coordinates: raise samples or hot_steps, or lower "
                "steps_per_round."
            )
        self.tensors.clear()
        self.tensors["q"] = q[torch.as_tensor(np.flatnonzero(inside), device=q.device)]
        self.tensors["weight"] = torch.as_tensor(weights(temperature)).to(q)
        self.state |= {
            "round": self.state.get("round", 0) + 1,
            "temperature": temperature,
            "arrived": self.state.get("arrived", 0) + (temperature == 1),
            "round_ess": share(temperature),
            "target_ess": share(1.0),
            "lost": float(1 - inside.mean()),
        }

    def _weights(self, log_w: NDArray[np.float64]) -> NDArray[np.float64]:
        """Weights that sum to one, the largest of them lowered."""
        number = math.ceil(self.clip * self.samples)
        if 0 < number < len(log_w):
            log_w = np.minimum(log_w, np.partition(log_w, -number - 1)[-number - 1])
        return np.exp(log_w - logsumexp(log_w))

    def _next(self, share: Callable[[float], float]) -> float:
        """The temperature to learn now."""
        if self._ladder:
            return self._ladder[min(self.state.get("round", 0) + 1, len(self._ladder) - 1)]
        now = self.state.get("temperature", self._hottest)
        least = self.share * share(now)
        if share(1.0) >= least:
            return 1.0
        low, high = 0.0, math.log(now)
        while high - low > 1e-6:
            middle = (low + high) / 2
            low, high = (low, middle) if share(math.exp(middle)) >= least else (middle, high)
        return math.exp(high)
