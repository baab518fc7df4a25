"""Learning to carry samples along a path of energies: the residual of the continuity equation as an objective."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from openmm_bg.errors import InputError
from openmm_bg.flows import ContinuousFlow
from openmm_bg.sampling.annealing import StepSizes, anneal, systematic
from openmm_bg.sampling.interpolation import Interpolation, PathPoint, continuity_residual
from openmm_bg.training.objectives import Step


@dataclass
class ContinuityResidual:
    """Make the velocity field carry exp(-f_t), on walkers that it carries itself.

    The loss is ``mean(|r| + r^2) / 2`` with ``r = d_t f - div v + <grad f, v> - C_t`` (Mate & Fleuret, 2023), f the
    linear or, where the flow has a ``perturbation``, the learned path of :class:`Interpolation`. Beyond their recipe:

    - C_t is the mean of the other terms over the weighted walkers of the same time: no network has to learn it (Tian et
      al., LFIS, 2024), and the loss is a robust variance of the residual;
    - the walkers that give the points are annealed Langevin walkers on top of the field, with Jarzynski weights
      (Albergo & Vanden-Eijnden, NETS, 2024), so that a field which has lost a mode is shown it;
    - points are kept with their energies and gradients and used for many steps (replay); times are jittered; the path
      is opened from the base towards the target (curriculum).

    Energies and gradients of the target are all that is asked of it.

    Parameters
    ----------
    rate : float
        Of the schedule; see :class:`Interpolation`.
    walkers, times : int
        Walkers of a sweep, and times at which they are looked at.
    moves, leapfrog : int
        Moves at each time, and leapfrog steps of a move: one makes it a Langevin move.
    refresh : int
        Steps between sweeps.
    memory : int
        Sweeps that are kept.
    groups : int
        Times in a batch; ``batch_size / groups`` points share a C_t.
    curriculum : float
        Share of the run after which the whole path is open; 0 opens it at once.
    explore : float
        Share of each group that is drawn from all walkers of its time rather than by their weights.
    hot : float
        Temperature, over that of the target, of the walkers of every second sweep. The residual of the exact field
        vanishes everywhere, so its points may lie anywhere; those of hot walkers hold the field in the tails, where a
        flow that brings too little density makes the largest weights. Below 2, or the first weights of the walkers,
        which start from the base as it is, have no variance.

    Examples
    --------
    >>> import openmm_bg as bg
    >>> from openmm_bg.flows import Base, ContinuousFlow, PerceptronVelocity
    >>> flow = ContinuousFlow(Base([False] * 2), PerceptronVelocity(2, 16))
    >>> generator = bg.BoltzmannGenerator(bg.systems.load("double_well"), flow, defensive=0)
    >>> objective = ContinuityResidual(rate=1.0, walkers=32, times=8, leapfrog=3)
    >>> generator.fit(steps=2, objective=objective, progress=False).evaluations > 0
    True
    """

    rate: float = 0.0
    walkers: int = 512
    times: int = 64
    moves: int = 1
    leapfrog: int = 1
    refresh: int = 50
    memory: int = 4
    groups: int = 16
    curriculum: float = 0.2
    explore: float = 0.0
    hot: float = 1.0
    resample_below: float = 0.3
    needs_data: bool = field(default=False, init=False)
    needs_energy: bool = field(default=True, init=False)
    state: dict[str, Any] = field(default_factory=dict, init=False)
    tensors: dict[str, Tensor] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        for name, least in (
            ("walkers", 2), ("times", 1), ("moves", 0), ("leapfrog", 1), ("refresh", 1), ("memory", 1), ("groups", 1),
        ):  # fmt: skip
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise InputError(f"{name} must be a whole number of at least {least}, not {value!r}.")
        if not 1 <= self.hot < 2:
            raise InputError(f"hot must be at least 1 and below 2, not {self.hot!r}.")

    def __call__(self, step: Step) -> tuple[Tensor, dict[str, float]]:
        if not isinstance(step.flow, ContinuousFlow):
            raise InputError(f"The continuity residual trains a ContinuousFlow, not a {type(step.flow).__name__}.")
        path = Interpolation(step.flow, self.rate)
        calls = int(self.state.get("calls", 0))
        numbers: dict[str, float] = {}
        if calls % self.refresh == 0:
            numbers = self._sweep(path, step)
        self.state["calls"] = calls + 1
        loss, seen = self._loss(path, step)
        return loss, numbers | seen

    def _sweep(self, path: Interpolation, step: Step) -> dict[str, float]:
        """Send new walkers down the path and remember what they saw, drawn by their weights."""
        opened = 1.0
        if self.curriculum > 0:
            opened = min(1.0, 0.1 + 0.9 * step.progress / self.curriculum)
        jitter = torch.rand(self.times, generator=step.generator, dtype=torch.float64)
        times = (torch.arange(self.times, dtype=torch.float64) + jitter) / self.times * opened
        times[-1] = opened
        sizes = StepSizes(self.tensors["sizes"].clone()) if "sizes" in self.tensors else StepSizes()
        kept: list[tuple[Tensor, ...]] = []
        effective = []
        warm = self.hot != 1 and int(self.state.get("calls", 0)) // self.refresh % 2 == 1
        for walkers in anneal(
            _Hot(path, self.hot) if warm else path, step.target.value_and_gradient, times, self.walkers, step.generator,
            moves=self.moves, leapfrog=self.leapfrog, sizes=sizes, resample_below=self.resample_below,
        ):  # fmt: skip
            share, log_weights = self._tempered(walkers.log_weights)
            effective.append(share)
            chosen = systematic(log_weights, step.generator)
            loose = int(self.explore * self.walkers)
            if loose:
                chosen[torch.randperm(self.walkers, generator=step.generator)[:loose]] = torch.randint(
                    self.walkers, (loose,), generator=step.generator
                )
            chosen = chosen[torch.randperm(self.walkers, generator=step.generator)]
            kept.append(tuple(part[chosen] for part in (walkers.x, walkers.energy, walkers.gradient)))
        fresh = {
            "t": times.to(kept[0][0].dtype)[None],
            "x": torch.stack([x for x, _, _ in kept])[None],
            "energy": torch.stack([u for _, u, _ in kept])[None],
            "gradient": torch.stack([g for _, _, g in kept])[None],
        }
        for name, new in fresh.items():
            old = self.tensors.get(name)
            self.tensors[name] = new if old is None else torch.cat([old, new])[-self.memory :]
        self.tensors["sizes"] = sizes.log_size
        return {"sweep_ess": min(effective), "opened": opened, "moves": walkers.acceptance}

    @staticmethod
    def _tempered(log_weights: Tensor, least: float = 0.3) -> tuple[float, Tensor]:
        """The effective share, and weights flattened to at least ``least`` of it: a few walkers are no batch."""
        power, share = 1.0, 0.0
        for _ in range(12):
            w = torch.softmax(power * log_weights.double(), 0)
            now = float(1 / (len(w) * w.square().sum()))
            share = share or now
            if now >= least:
                break
            power *= 0.7
        # minus infinity times a small power stays minus infinity
        return share, power * log_weights

    def _loss(self, path: Interpolation, step: Step) -> tuple[Tensor, dict[str, float]]:
        memory = self.tensors
        sweeps, times, walkers = memory["energy"].shape
        per_group = min(walkers, max(2, step.batch_size // self.groups))
        sweep = torch.randint(sweeps, (self.groups, 1), generator=step.generator)
        time = torch.randint(times, (self.groups, 1), generator=step.generator)
        row = torch.randint(walkers, (self.groups, per_group), generator=step.generator)
        t = memory["t"][sweep, time].expand(-1, per_group).reshape(-1)
        x = memory["x"][sweep, time, row].flatten(0, 1)
        energy = memory["energy"][sweep, time, row].flatten()
        gradient = memory["gradient"][sweep, time, row].flatten(0, 1)
        point = path(t, x, energy, gradient, differentiable=True)
        velocity, divergence = step.flow.velocity.with_divergence(t, x)
        residual = continuity_residual(point, velocity, divergence).view(self.groups, per_group)
        usable = torch.isfinite(residual)
        if not bool(usable.all()):
            residual = torch.where(usable, residual, 0.0)
        centre = residual.sum(1, keepdim=True) / usable.sum(1, keepdim=True).clamp(min=1)
        residual = torch.where(usable, residual - centre, 0.0)
        loss = 0.5 * (residual.abs() + residual.square()).mean()
        return loss, {"residual": float(residual.detach().square().mean().sqrt())}


class _Hot:
    """A path whose energies are divided by a temperature."""

    def __init__(self, path: Interpolation, temperature: float):
        self.path, self.flow, self.temperature = path, path.flow, temperature

    def __call__(self, t: Tensor, x: Tensor, energy: Tensor, gradient: Tensor) -> PathPoint:
        point = self.path(t, x, energy, gradient)
        return PathPoint(*(part / self.temperature for part in (point.value, point.gradient, point.rate)))
