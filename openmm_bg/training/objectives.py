"""Objectives: each turns a flow, its target and a batch of data into a loss, and says what it saw.

All are estimators of a divergence between the flow q and the target p; the Boltzmann weight is ``w = p~ / q``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

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
    progress : float
        0 at the first step of the run, 1 at the last.
    generator : torch.Generator
    """

    flow: Flow
    target: Target | None
    data: Callable[[int], Tensor] | None
    batch_size: int
    progress: float
    generator: torch.Generator


class Objective(Protocol):
    """A callable that returns a scalar loss and numbers for the log.

    ``state`` and ``tensors`` are what a checkpoint must hold; a step replaces tensors and never writes into them.
    """

    needs_data: bool
    needs_energy: bool
    state: dict[str, float]
    tensors: dict[str, Tensor]

    def __call__(self, step: Step) -> tuple[Tensor, dict[str, float]]: ...


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

    def __call__(self, step: Step) -> tuple[Tensor, dict[str, float]]:
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
        return scale * loss, {"nll": float(loss.detach())}


@dataclass
class ReversePath:
    """Reverse divergences by path gradients, with the weights of basins learned by log-variance.

    For samples ``y = f(z)`` the gradient flows through the path y alone, ``c (grad log q - grad log p)(y) . dy``: its
    variance vanishes where q = p (Roeder et al., 2017; Vaitl et al., 2022). ``c = w^power`` gives the f-divergence with
    ``phi''(w) = w^(power - 2)``: 0 is reverse Kullback-Leibler, 1/2 lies between, 1 is forward.

    Path gradients cannot see the relative weights of separate basins, so for a :class:`MolecularFlow` they
    train the stiff coordinates given the torsions, and the torsions' density follows ``variance`` times the
    variance of log w (Richter et al., 2020), which is zero only where every basin has its right weight.

    Torsions are drawn from ``q^(1 - temper)``, so that rare regions are trained. A share of them has one torsion
    turned anywhere: the stiff coordinates learn what follows there, and where that proves probable (a cis peptide
    bond that the data never showed) the torsions' density grows.

    Parameters
    ----------
    power, cap
        Exponent of the weights, and the largest weight relative to their mean.
    variance : float
        Factor of the log-variance of the torsions.
    window : float
        Samples whose log-weight is further than this below the median are left out of the log-variance, those
        further above enter linearly.
    temper, explore : float
        Flattening of the torsions drawn, and the share of samples with a torsion turned anywhere, which fades
        over the run.
    reach : float
        Such samples train the stiff coordinates with at least weight ``explored_weight`` while their log-weight
        is no further than this below the median: beyond, atoms overlap.
    """

    power: float = 0.5
    cap: float = 5.0
    variance: float = 0.25
    window: float = 6.0
    temper: float = 0.4
    explore: float = 0.08
    explored_weight: float = 0.3
    reach: float = 25.0
    needs_data: bool = field(default=False, init=False)
    needs_energy: bool = field(default=True, init=False)
    state: dict[str, float] = field(default_factory=dict, init=False)
    tensors: dict[str, Tensor] = field(default_factory=dict, init=False)

    def __call__(self, step: Step) -> tuple[Tensor, dict[str, float]]:
        if isinstance(step.flow, MolecularFlow):
            return self._molecular(step.flow, step)
        y = step.flow.rsample(step.batch_size, step.generator)
        leaf = y.detach().requires_grad_()
        log_q = step.flow.log_prob(leaf)
        (score,) = torch.autograd.grad(log_q.sum(), leaf)
        u, gradient = step.target.value_and_gradient(leaf.detach())
        log_w = -u - log_q.detach()
        return self._path(y, gradient + score, log_w), _summary(log_w)

    def _molecular(self, flow: MolecularFlow, step: Step) -> tuple[Tensor, dict[str, float]]:
        t, log_q_t, explored = self._draw_torsions(flow, step)
        y, log_q_y, score = flow.draw_stiff_with_score(t, step.generator)
        leaf = y.detach().requires_grad_()
        q = flow.chart.join(t, leaf)
        u, gradient_q = step.target.value_and_gradient(q.detach())
        (gradient,) = torch.autograd.grad(q, leaf, torch.where(torch.isfinite(q), gradient_q, 0.0))
        log_w = -u - log_q_t.detach() - log_q_y
        loss = self._path(y, gradient + score, log_w, explored)
        summary = _summary(log_w[~explored])
        if flow.torsions is not None and self.variance > 0:
            # only the torsions' density carries a gradient here
            spread = self._log_variance(log_w + log_q_t.detach() - log_q_t, explored)
            summary["log_variance"] = float(spread.detach())
            loss = loss + self.variance * spread
        return loss, summary

    def _log_variance(self, log_w: Tensor, explored: Tensor) -> Tensor:
        """Variance of the log-weights about the mean of those near the median, robust on both sides."""
        finite = torch.isfinite(log_w)
        log_w, explored = log_w[finite], explored[finite]
        known = log_w.detach()
        near = (known - known.median()).abs() < self.window
        deviation = log_w - known[near].mean()
        # a heavy weight is a hole of q that must be filled, but one sample may not rule the step
        square = torch.where(deviation < self.window, deviation.square(), self.window * (2 * deviation - self.window))
        # explored samples speak where they have found a hole; elsewhere the flow's own samples know better
        kept = torch.where(explored, deviation.detach() > 2, known > known.median() - self.window)
        return square[kept].mean()

    def _draw_torsions(self, flow: MolecularFlow, step: Step) -> tuple[Tensor, Tensor, Tensor]:
        """Detached torsions ``(batch, torsions)``, their log-density with gradient, and which were turned anywhere."""
        n = step.batch_size
        explored = torch.zeros(n, dtype=torch.bool)
        if flow.torsions is None:
            t = flow.draw_torsions(n, step.generator)
            return t, t.new_zeros(n), explored
        with torch.no_grad():
            loose = round(self.explore * (1 - step.progress) * n)
            many, log_q = self._pool(flow, step)
            excess = -self.temper * (log_q - log_q[torch.isfinite(log_q)].median())
            keep = torch.where(torch.isfinite(log_q), excess.clamp(-8, 3).exp(), 0.0)
            chosen = torch.multinomial(keep, n - loose, generator=step.generator)
            t = many[chosen]
            if loose:
                # a rotor has its three places by symmetry: nothing to find
                places = (flow.torsions.multiplicity == 1).nonzero()[:, 0]
                turned = many[torch.randint(len(many), (loose,), generator=step.generator)].nan_to_num()
                if len(places):
                    place = places[torch.randint(len(places), (loose, 1), generator=step.generator)]
                    anywhere = torch.rand(loose, 1, generator=step.generator, dtype=t.dtype) * 2 - 1
                    turned = turned.scatter(1, place, math.pi * anywhere)
                t = torch.cat([t, turned])
                explored[n - loose :] = True
        return t, flow.log_prob_torsions(t), explored

    def _pool(self, flow: MolecularFlow, step: Step) -> tuple[Tensor, Tensor]:
        """Draws of the torsions' density to choose from, ``4 * batch`` of them, renewed every fourth step.

        They are drawn one torsion after the other, which costs little more for many than for few.
        """
        age = int(self.state.get("pool_age", 0))
        if age == 0 or len(self.tensors["torsions"]) != 4 * step.batch_size:
            torsions, log_density = flow.torsions.sample(4 * step.batch_size, step.generator)
            self.tensors |= {"torsions": torsions, "log_density": log_density}
        self.state["pool_age"] = (age + 1) % 4
        return self.tensors["torsions"], self.tensors["log_density"]

    def _path(self, y: Tensor, score: Tensor, log_w: Tensor, explored: Tensor | None = None) -> Tensor:
        """The surrogate whose gradient is the path gradient."""
        usable = torch.isfinite(log_w) & torch.isfinite(score).all(-1) & torch.isfinite(y).all(-1)
        if not usable.any():
            return y.sum() * math.nan
        norm = score.norm(dim=-1)
        limit = (10 * norm[usable].median()).expand(len(norm))
        if explored is not None:
            # where nobody has been forces are large: they may point the way but not rule the step
            limit = torch.where(explored, limit / 10, limit)
        score = score * (limit / norm.clamp(min=1e-30)).clamp(max=1.0)[:, None]
        # zero times NaN is NaN, in the gradient too
        score = torch.where(usable[:, None], score, 0.0)
        factor = self._factor(log_w, usable)
        if explored is not None:
            within = explored & (log_w > log_w[usable].median() - self.reach)
            factor = torch.where(within, factor.clamp(min=self.explored_weight), factor)
        work = (score * y).sum(-1)
        return (torch.where(usable, factor, 0.0) * torch.where(usable, work, 0.0)).mean()

    def _factor(self, log_w: Tensor, usable: Tensor) -> Tensor:
        if self.power == 0:
            return torch.ones_like(log_w)
        mean = self.state.get("log_mean_weight")
        now = float(torch.logsumexp(log_w[usable], 0)) - math.log(int(usable.sum()))
        if mean is None:
            mean = float(log_w[usable].median())
        else:
            # a running mean that one heavy weight cannot carry away
            mean += math.log(0.98 + 0.02 * math.exp(min(now - mean, 2.0)))
        self.state["log_mean_weight"] = mean
        return (self.power * (log_w - mean)).exp().clamp(max=self.cap)


@dataclass
class LogVariance:
    """The variance of ``log q + u``, which is zero only where the flow has the target's density.

    Points may come from anywhere, because the variance is zero under every measure: here from the flow itself and from
    data. The data need not carry the right weights and their number sets no floor, as it does for maximum likelihood:
    they only have to visit all modes, and the energies say the rest. So a few thousand annealed walkers are enough.

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
    Differential Equations and Applications 2, 48 (2021).

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
        with torch.no_grad():
            points = [step.flow.sample(own, step.generator)[0]] if own else []
        if own < step.batch_size:
            points.append(step.data(step.batch_size - own))
        x = torch.cat(points)
        usable = torch.isfinite(x).all(-1)
        u = step.target.value(x)
        usable &= torch.isfinite(u)
        deviation = step.flow.log_prob(x[usable]) + u[usable]
        finite = torch.isfinite(deviation)
        deviation = deviation[finite]
        if len(deviation) < 2:
            return u.new_full((), math.nan), {"lost": 1.0}
        near = (deviation.detach() - deviation.detach().median()).abs() < self.delta
        deviation = deviation - deviation.detach()[near].mean()
        loss = functional.huber_loss(deviation, torch.zeros_like(deviation), delta=self.delta)
        return loss, {"spread": float(deviation.detach().std()), "lost": 1 - len(deviation) / len(x)}


def _summary(log_w: Tensor) -> dict[str, float]:
    finite = log_w[torch.isfinite(log_w)]
    spread = float(finite.std()) if len(finite) > 1 else math.nan
    return {"lost": float((~torch.isfinite(log_w)).float().mean()), "spread": spread}


def check_needs(objectives: list[Objective], *, data: bool, energy: bool) -> None:
    """Refuse objectives whose needs are not met."""
    for objective in objectives:
        name = type(objective).__name__
        if objective.needs_data and not data:
            raise InputError(f"{name} needs data; pass conformations, or train on the energy alone.")
        if objective.needs_energy and not energy:
            raise InputError(f"{name} needs a generator with an energy.")
