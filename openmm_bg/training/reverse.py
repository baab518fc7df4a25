"""Reverse divergences by path gradients, on the flow's own samples."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from openmm_bg.flows import MolecularFlow
from openmm_bg.training.masked import masked_median, masked_std
from openmm_bg.training.objectives import Step
from openmm_bg.training.past import Past, recall, remember, tempered_rows

_POOL_AGE = 8
# Log-weight above the mean from which on a sample lies in a hole of q.
_HOLE = 1.0
# By which the share of torsions from the data falls over the run.
_LESS = 0.75


@dataclass
class ReversePath:
    """Reverse divergences by path gradients, with the weights of basins learned by log-variance.

    For samples ``y = f(z)`` the gradient flows through the path y alone, ``c (grad log q - grad log p)(y) . dy``: its
    variance vanishes where q = p (Roeder et al., 2017; Vaitl et al., 2022). ``c = w^power`` gives the f-divergence with
    ``phi''(w) = w^(power - 2)``: 0 is reverse Kullback-Leibler, 1/2 lies between, 1 is forward.

    Path gradients cannot see the relative weights of separate basins, so for a :class:`MolecularFlow` they
    train the stiff coordinates given the torsions, and the torsions' density follows ``variance`` times the
    variance of log w (Richter et al., 2020), which is zero only where every basin has its right weight.

    Torsions are drawn from ``q^(1 - temper)``, so that rare regions are trained. A share of them is taken from the
    data, where there are any: a region that the flow has lost is found again, and its weight comes from the energy, as
    everywhere. Another share has one torsion turned anywhere: the stiff coordinates learn what follows there, and where
    that proves probable (a cis peptide bond that the data never showed) the torsions' density grows.

    Parameters
    ----------
    power, cap
        Exponent of the weights, and the largest weight relative to their mean.
    variance : float
        Factor of the log-variance of the torsions.
    window : float
        Log-weights further than this above the median enter the log-variance linearly, those further below with a small
        slope that grows over the run. Early, the stiff coordinates of such a sample are to blame, and its torsions must
        not pay; late, it lies where the target has nothing.
    temper, explore : float
        Flattening of the torsions drawn, which fades to a third over the run, and the share of samples with a torsion
        turned anywhere, which fades to nothing.
    familiar : float
        Share of samples with the torsions of data, which fades to a quarter over the run.
    reach : float
        Samples with a torsion turned anywhere train the stiff coordinates with at least weight ``explored_weight``
        while their log-weight is no further than this below the median: beyond, atoms overlap.
    memory, recall : int
        Batches whose torsions are kept with what was found there, and how many batches of them take part in each step's
        log-variance. They cost no energy; without them the torsions' density is what limits the effective sample size.
    recall_temper : float
        They are drawn from the memory with ``q^-recall_temper``: what is rare is seen again and again. It fades to a
        third as well: rare regions are filled early, and what is left of the run is for the bulk.
    """

    power: float = 0.5
    cap: float = 5.0
    variance: float = 0.25
    window: float = 6.0
    temper: float = 0.3
    explore: float = 0.08
    familiar: float = 0.0
    explored_weight: float = 0.3
    reach: float = 25.0
    memory: int = 64
    recall: int = 2
    recall_temper: float = 0.4
    needs_data: bool = field(default=False, init=False)
    needs_energy: bool = field(default=True, init=False)
    state: dict[str, float] = field(default_factory=dict, init=False)
    tensors: dict[str, Tensor] = field(default_factory=dict, init=False)

    def phase(self) -> Hashable:
        """What of the next step's program depends on the state: whether new torsions are drawn."""
        return int(self.state.get("pool_age", 0)) == 0

    def advance(self) -> None:
        """Count a step."""
        self.state["pool_age"] = (int(self.state.get("pool_age", 0)) + 1) % _POOL_AGE

    def __call__(self, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        if isinstance(step.flow, MolecularFlow):
            return self._molecular(step.flow, step)
        y = step.flow.rsample(step.batch_size, step.generator)
        leaf = y.detach().requires_grad_()
        log_q = step.flow.log_prob(leaf)
        (score,) = torch.autograd.grad(log_q.sum(), leaf)
        u, gradient = step.target.value_and_gradient(leaf.detach())
        log_w = -u - log_q.detach()
        return self._path(y, gradient + score, log_w), _summary(log_w)

    def _molecular(self, flow: MolecularFlow, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        t, explored = self._draw_torsions(flow, step)
        learns_torsions = flow.torsions is not None and self.variance > 0
        batches = self.recall if learns_torsions and self.memory else 0
        temper = self.recall_temper * _fade(step.progress)
        past = recall(self.tensors, t, self.memory * len(t), batches * len(t), step.generator, temper)
        log_q_t, log_q_past = flow.log_prob_torsions(torch.cat([t, past.torsions])).split([len(t), len(past.rest)])
        y, log_q_y, score = flow.draw_stiff_with_score(t, step.generator)
        leaf = y.detach().requires_grad_()
        q = flow.chart.join(t, leaf)
        u, gradient_q = step.target.value_and_gradient(q.detach())
        (gradient,) = torch.autograd.grad(q, leaf, torch.where(torch.isfinite(q), gradient_q, 0.0))
        rest = -u - log_q_y
        log_w = rest - log_q_t.detach()
        loss = self._path(y, gradient + score, log_w, explored)
        summary = _summary(log_w, ~explored)
        if learns_torsions:
            # only the torsions' density carries a gradient here; what has become less likely since counts less
            then = (log_q_past.detach() - past.log_q).clamp(max=1.0).exp().nan_to_num()
            spread, deviation = self._log_variance(
                torch.cat([rest - log_q_t, past.rest - log_q_past]),
                torch.cat([explored, past.explored]),
                torch.cat([torch.ones_like(rest), then]),
                step.progress,
            )
            if batches:
                # of what was turned anywhere, the holes alone are worth a place
                worth = ~explored | (deviation[: len(t)] > _HOLE)
                remember(self.tensors, Past(t, torch.where(worth, rest, math.nan), log_q_t.detach(), explored))
            summary["log_variance"] = spread.detach()
            loss = loss + self.variance * spread
        return loss, summary

    def _log_variance(
        self, log_w: Tensor, explored: Tensor, share: Tensor, progress: float | Tensor
    ) -> tuple[Tensor, Tensor]:
        """Variance of the log-weights about the mean of those near the median, robust on both sides; and deviations."""
        finite = torch.isfinite(log_w)
        log_w = torch.where(finite, log_w, 0.0)
        known = log_w.detach()
        near = finite & ((known - masked_median(known, finite)).abs() < self.window)
        mean = (share * torch.where(near, known, 0.0)).sum() / (share * near).sum().clamp(min=1e-30)
        deviation = log_w - mean
        # a heavy weight is a hole of q that must be filled, but one sample may not rule the step
        square = torch.where(deviation < self.window, deviation.square(), self.window * (2 * deviation - self.window))
        # a region that the target does not have must empty, but one clash does not say that it is one
        square = torch.where(deviation < -self.window, -2 * progress * deviation, square)
        # explored samples speak where they have found a hole; elsewhere the flow's own samples know better
        kept = finite & (~explored | (deviation.detach() > _HOLE))
        share = torch.where(kept, share, 0.0)
        spread = (share * torch.where(kept, square, 0.0)).sum() / share.sum().clamp(min=1e-30)
        return spread, torch.where(finite, deviation.detach(), math.nan)

    def _draw_torsions(self, flow: MolecularFlow, step: Step) -> tuple[Tensor, Tensor]:
        """Detached torsions ``(batch, torsions)``, and which were turned anywhere."""
        n = step.batch_size
        random = {"generator": step.generator, "device": step.device}
        if flow.torsions is None:
            t = flow.draw_torsions(n, step.generator)
            return t, torch.zeros(n, dtype=torch.bool, device=step.device)
        with torch.no_grad():
            many, log_q = self._pool(flow, step)
            temper = self.temper * _fade(step.progress)
            chosen = tempered_rows(log_q, torch.isfinite(log_q), temper, n, step.generator)
            explored = torch.rand(n, **random) < self.explore * (1 - step.progress)
            other = torch.where(explored, torch.randint(len(many), (n,), **random), chosen)
            t = many[other].nan_to_num()
            # a rotor has its three places by symmetry: nothing to find
            places = (flow.torsions.multiplicity == 1).to(t.dtype)
            place = (places * torch.rand(n, len(places), dtype=t.dtype, **random)).argmax(1, keepdim=True)
            turn = explored[:, None] & (places[place] > 0)
            anywhere = math.pi * (2 * torch.rand(n, 1, dtype=t.dtype, **random) - 1)
            t = t.scatter(1, place, torch.where(turn, anywhere, t.gather(1, place)))
            if self.familiar and step.data is not None:
                known = torch.rand(n, **random) < self.familiar * (1 - _LESS * step.progress)
                t = torch.where(known[:, None], flow.chart.split(step.data(n))[0], t)
                explored = explored & ~known
        return t, explored

    def _pool(self, flow: MolecularFlow, step: Step) -> tuple[Tensor, Tensor]:
        """Draws of the torsions' density to choose from, ``8 * batch`` of them, renewed every eighth step.

        They are drawn one torsion after the other, which costs little more for many than for few.
        """
        if self.phase() or len(self.tensors["torsions"]) != _POOL_AGE * step.batch_size:
            torsions, log_density = flow.torsions.sample(_POOL_AGE * step.batch_size, step.generator)
            self.tensors |= {"torsions": torsions, "log_density": log_density}
        return self.tensors["torsions"], self.tensors["log_density"]

    def _path(self, y: Tensor, score: Tensor, log_w: Tensor, explored: Tensor | None = None) -> Tensor:
        """The surrogate whose gradient is the path gradient; NaN where no sample is usable."""
        usable = torch.isfinite(log_w) & torch.isfinite(score).all(-1) & torch.isfinite(y).all(-1)
        norm = score.norm(dim=-1)
        limit = (10 * masked_median(norm, usable)).expand(len(norm))
        if explored is not None:
            # where nobody has been forces are large: they may point the way but not rule the step
            limit = torch.where(explored, limit / 10, limit)
        score = score * (limit / norm.clamp(min=1e-30)).clamp(max=1.0)[:, None]
        # zero times NaN is NaN, in the gradient too
        score = torch.where(usable[:, None], score, 0.0)
        factor = self._factor(log_w, usable)
        if explored is not None:
            within = explored & (log_w > masked_median(log_w, usable) - self.reach)
            factor = torch.where(within, factor.clamp(min=self.explored_weight), factor)
        work = (score * y).sum(-1)
        surrogate = (torch.where(usable, factor, 0.0) * torch.where(usable, work, 0.0)).mean()
        return torch.where(usable.any(), surrogate, math.nan)

    def _factor(self, log_w: Tensor, usable: Tensor) -> Tensor:
        if self.power == 0:
            return torch.ones_like(log_w)
        mean = self.tensors.get("log_mean_weight")
        if mean is None:
            mean = masked_median(log_w, usable)
        else:
            # a running mean that one heavy weight cannot carry away
            now = torch.logsumexp(torch.where(usable, log_w, -math.inf), 0) - usable.sum().log()
            moved = mean + (0.98 + 0.02 * (now - mean).clamp(max=2.0).exp()).log()
            mean = torch.where(usable.any(), moved, mean)
        self.tensors["log_mean_weight"] = mean
        return (self.power * (log_w - mean)).exp().clamp(max=self.cap)


def _fade(progress: float | Tensor) -> float | Tensor:
    return 1 - 2 / 3 * progress


def _summary(log_w: Tensor, counted: Tensor | None = None) -> dict[str, Tensor]:
    counted = torch.ones_like(log_w, dtype=torch.bool) if counted is None else counted
    finite = torch.isfinite(log_w) & counted
    return {"lost": 1 - finite.sum() / counted.sum(), "spread": masked_std(log_w, finite)}
