"""Objectives: each turns a flow, its target and a batch of data into a loss, and says what it saw.

All are estimators of a divergence between the flow q and the target p; the Boltzmann weight is ``w = p~ / q``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from openmm_bg.errors import InputError
from openmm_bg.flows import Flow, MolecularFlow
from openmm_bg.sampling.target import Target


@dataclass
class Step:
    """What an objective may look at.

    Attributes
    ----------
    flow : Flow
    target : Target or None
    data : callable
        ``data(n)`` draws n rows of training data, ``(n, dimension)``; None where there are no data.
    batch_size : int
    progress : float or Tensor
        0 at the first step of the run, 1 at the last; a scalar Tensor where steps are recorded.
    generator : torch.Generator
        On the device of the flow.
    stored : callable, optional
        ``stored(n, gradient)`` draws n rows of training data with what the target says of them, which is found once in
        a run.
    """

    flow: Flow
    target: Target | None
    data: Callable[[int], Tensor] | None
    batch_size: int
    progress: float | Tensor
    generator: torch.Generator
    stored: Callable[[int, bool], tuple[Tensor, Tensor, Tensor | None]] | None = None

    def labelled(self, n: int, gradient: bool = False) -> tuple[Tensor, Tensor, Tensor | None]:
        """``n`` rows of training data with their energies and, if asked for, gradients."""
        if self.stored is not None:
            return self.stored(n, gradient)
        q = self.data(n)
        return (q, *self.target.value_and_gradient(q)) if gradient else (q, self.target.value(q), None)

    @property
    def device(self) -> torch.device:
        return self.generator.device


class Objective(Protocol):
    """A callable that returns a scalar loss and numbers for the log, detached scalars of any kind.

    ``state`` and ``tensors`` are what a checkpoint must hold; a step replaces tensors and never writes into them. An
    objective that also defines ``phase()`` can be recorded on a CUDA device: see
    :class:`~openmm_bg.training.replay.Replay`. ``advance()``, where it is defined, follows every step.
    """

    needs_data: bool
    needs_energy: bool
    state: dict[str, float]
    tensors: dict[str, Tensor]

    def __call__(self, step: Step) -> tuple[Tensor, dict[str, Any]]: ...


@dataclass
class MaximumLikelihood:
    """Forward Kullback-Leibler divergence: ``-mean log q(data)``.

    Parameters
    ----------
    torsions_only : bool
        Only the marginal of the free torsions: keeps the weights of basins while something else trains the rest.
    fade : bool
        Multiply by ``1 - progress``.
    """

    torsions_only: bool = False
    fade: bool = False
    needs_data: bool = field(default=True, init=False)
    needs_energy: bool = field(default=False, init=False)
    state: dict[str, float] = field(default_factory=dict, init=False)
    tensors: dict[str, Tensor] = field(default_factory=dict, init=False)

    def phase(self) -> Hashable:
        """Every step is the same program."""
        return None

    def __call__(self, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        flow = step.flow
        q = step.data(step.batch_size)
        if self.torsions_only:
            if not isinstance(flow, MolecularFlow) or flow.torsions is None:
                return q.new_zeros(()), {}
            log_prob = flow.log_prob_torsions(flow.chart.split(q)[0])
        else:
            log_prob = flow.log_prob(q)
        loss = -log_prob.mean()
        scale = 1 - step.progress if self.fade else 1.0
        return scale * loss, {"nll": loss.detach()}


@dataclass
class LogVariance:
    """The variance of ``log q + u``, which is zero only where the flow has the target's density.

    Points may come from anywhere, because the variance is zero under every measure: here from the flow itself and from
    data. The data need not carry the right weights and their number sets no floor, as it does for maximum likelihood:
    they only have to visit all modes, and the energies say the rest. So a few thousand annealed walkers are enough.
    Each row of data is evaluated once; with ``own=0`` beside :class:`MaximumLikelihood` this is the off-policy
    log-dispersion regularisation, which needs neither forces nor new energies.

    Parameters
    ----------
    own : float
        Share of points that the flow draws; the others are data. With 1 it needs no data, and forgets modes as reverse
        Kullback-Leibler does.
    delta : float
        Deviations from the mean beyond this (kT) count linearly: one hole of the flow may not rule a step.

    Raises
    ------
    InputError
        If ``own`` is not between 0 and 1 or ``delta`` is not positive.

    References
    ----------
    Richter, Boustati, Nuesken, Ruiz & Akyildiz, VarGrad, NeurIPS 2020 (arXiv:2010.10436); Nuesken & Richter, Partial
    Differential Equations and Applications 2, 48 (2021); Schopmans, von Klitzing & Friederich, arXiv:2602.03729 (2026).

    Examples
    --------
    >>> import openmm_bg as bg
    >>> target = bg.systems.load("many_well_8")
    >>> walkers = 1.7 * torch.randn(200, 8, generator=torch.Generator().manual_seed(0)).sign()
    >>> generator = bg.BoltzmannGenerator(target, bg.flows.SplineFlow([False] * 8, layers=2, hidden=(16,)))
    >>> generator.fit(walkers, likelihood_steps=5, steps=5, objective=LogVariance(), progress=False).steps
    10
    """

    own: float = 0.5
    delta: float = 3.0
    needs_data: bool = field(default=True, init=False)
    needs_energy: bool = field(default=True, init=False)
    state: dict[str, float] = field(default_factory=dict, init=False)
    tensors: dict[str, Tensor] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        if not 0 <= self.own <= 1:
            raise InputError(f"own must be between 0 and 1, not {self.own}.")
        if not self.delta > 0:
            raise InputError(f"delta must be positive, not {self.delta}.")
        self.needs_data = self.own < 1

    def __call__(self, step: Step) -> tuple[Tensor, dict[str, float]]:
        own = round(self.own * step.batch_size)
        points, energies = [], []
        if own:
            with torch.no_grad():
                points.append(step.flow.sample(own, step.generator)[0])
            energies.append(step.target.value(torch.where(torch.isfinite(points[0]), points[0], 0.0)))
        if own < step.batch_size:
            x, u, _ = step.labelled(step.batch_size - own)
            points.append(x)
            energies.append(u)
        x, u = torch.cat(points), torch.cat(energies)
        usable = torch.isfinite(x).all(-1) & torch.isfinite(u)
        deviation = step.flow.log_prob(x[usable]) + u[usable]
        finite = torch.isfinite(deviation)
        deviation = deviation[finite]
        if len(deviation) < 2:
            return u.new_full((), math.nan), {"lost": 1.0}
        near = (deviation.detach() - deviation.detach().median()).abs() < self.delta
        deviation = deviation - deviation.detach()[near].mean()
        loss = functional.huber_loss(deviation, torch.zeros_like(deviation), delta=self.delta)
        return loss, {"spread": float(deviation.detach().std()), "lost": 1 - len(deviation) / len(x)}


def check_needs(objectives: list[Objective], *, data: bool, energy: bool) -> None:
    """Refuse objectives whose needs are not met."""
    for objective in objectives:
        name = type(objective).__name__
        if objective.needs_data and not data:
            raise InputError(f"{name} needs data; pass conformations, or train on the energy alone.")
        if objective.needs_energy and not energy:
            raise InputError(f"{name} needs a generator with an energy.")
