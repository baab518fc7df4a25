"""Two ways to learn the energy of the gradient flow: the residual of its equation, and its known noised averages."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import huber_loss

from openmm_bg.errors import InputError
from openmm_bg.flows import ContinuousFlow, GradientFlowVelocity
from openmm_bg.flows.gradient_flow import laplacian
from openmm_bg.sampling.interpolation import PathPoint, continuity_residual
from openmm_bg.training.objectives import Step

_CHUNK = 2**13


@dataclass
class GradientFlowResidual:
    """The residual of Chemseddine et al. on noised points of a box.

    ``r = d_t f - div v + <grad f, v>`` with ``v = theta' grad (f - f_Z)`` is the equation of the noising process for f,
    nonlinear and of second order; f carries its own normalisation, so there is no C_t. Points are
    ``x = e^-theta u + sqrt(1 - e^-2theta) s z`` with u uniform in the box and z normal.

    Parameters
    ----------
    box : float
        Half the edge of the box [-box, box]^d that holds the target.
    curriculum : float
        Share of the run over which the path is opened, from the target, where f is known, to the prior.
    softness : float
        A residual at a point whose f lies E above the lowest of the batch is divided by (1 + softness E)^2: where
        there is no density the terms of r are huge and do not matter.

    References
    ----------
    Chemseddine, Wald, Duong & Steidl, Neural Sampling from Boltzmann Densities, ICLR 2025 (arXiv:2410.03282).
    """

    box: float
    curriculum: float = 0.4
    softness: float = 0.05
    needs_data: bool = field(default=False, init=False)
    needs_energy: bool = field(default=True, init=False)
    state: dict[str, Any] = field(default_factory=dict, init=False)
    tensors: dict[str, Tensor] = field(default_factory=dict, init=False)

    def __call__(self, step: Step) -> tuple[Tensor, dict[str, float]]:
        velocity = gradient_flow_of(step)
        lowest = max(0.0, 1 - step.progress / self.curriculum) if self.curriculum > 0 else 0.0
        t = lowest + (1 - lowest) * torch.rand(step.batch_size, generator=step.generator)
        x = noised_box(velocity, t, self.box, step.generator)
        target = laplacian(step.target.energy, x)
        step.target.evaluations += len(x)
        residual, value, _ = _residual(velocity, t, x, target)
        above = (value - value.min()).detach()
        residual = torch.where(torch.isfinite(residual), residual / (1 + self.softness * above) ** 2, 0.0)
        return _huber(residual).mean(), {"residual": float(residual.detach().square().mean().sqrt())}


@dataclass
class NoisedEnergy:
    """Regress f on the energies of the noised target, which are averages over the target's own energy.

    The noising process is Gaussian, so its density at theta is known as an integral,
    ``exp(-f(x)) = e^(d theta) E[exp(-f_D(y))]`` with y normal around e^theta x, and so is its gradient. Both are
    estimated once for a set of points, by quasi-random numbers drawn where the normal meets the prior, and then
    learned. In few dimensions this replaces the differential equation by ordinary regression; in many no number of
    draws is enough.

    Parameters
    ----------
    box : float
        Half the edge of the box that holds the target; see :class:`GradientFlowResidual`.
    points, draws : int
        Points with labels, and energies of the target in each label.
    residual : float
        Weight of the residual of :class:`GradientFlowResidual`, at the same points: it holds neighbours in time
        together, which labels with noise of their own cannot.

    References
    ----------
    The estimator is that of Akhound-Sadegh et al., Iterated Denoising Energy Matching, ICML 2024.
    """

    box: float
    points: int = 40_000
    draws: int = 256
    residual: float = 2.0
    softness: float = 0.05
    needs_data: bool = field(default=False, init=False)
    needs_energy: bool = field(default=True, init=False)
    state: dict[str, Any] = field(default_factory=dict, init=False)
    tensors: dict[str, Tensor] = field(default_factory=dict, init=False)

    def __call__(self, step: Step) -> tuple[Tensor, dict[str, float]]:
        velocity = gradient_flow_of(step)
        if not self.tensors:
            self._label(velocity, step)
        rows = torch.randint(len(self.tensors["t"]), (step.batch_size,), generator=step.generator)
        t, x, label, label_gradient, above, energy, force, curve = (
            self.tensors[name][rows]
            for name in ("t", "x", "value", "gradient", "above", "energy", "force", "laplacian")
        )
        residual, value, gradient = _residual(velocity, t, x, (energy, force, curve))
        wrong = value - label
        # a gradient counts over the width of what the noise has left
        width = velocity.std * torch.sqrt(velocity.envelope(t) + velocity.shortest)[:, None]
        bent = width * (gradient - label_gradient)
        weight = 1 / (1 + self.softness * above)
        loss = weight * (_huber(wrong) + _huber(bent).sum(-1))
        if self.residual > 0:
            loss = loss + self.residual * _huber(weight.square() * residual)
        near = above < 5
        return loss.mean(), {
            "error": float(wrong.detach()[near].std()),
            "bend": float(bent.detach()[near].std()),
            "residual": float(residual.detach()[near].std()),
        }

    def _label(self, velocity: GradientFlowVelocity, step: Step) -> None:
        """Points where there is density, a few where there is none, and what f and its gradient are there."""
        evaluate = step.target.value_and_gradient
        random = step.generator
        t = torch.rand(4 * self.points, generator=random)
        x = noised_box(velocity, t, self.box, random)
        rough, _ = noised_energy(velocity, evaluate, t, x, max(16, self.draws // 16), random)
        above = (rough - _average_energy(t, rough)).clamp(min=0)
        chosen = torch.multinomial(torch.exp(-0.3 * above) + 0.02, self.points, generator=random)
        t, x, above = t[chosen], x[chosen], above[chosen]
        value, gradient = noised_energy(velocity, evaluate, t, x, self.draws, random)
        energy, force, curve = (
            torch.cat(part) for part in zip(*(laplacian(step.target.energy, p) for p in x.split(_CHUNK)), strict=True)
        )
        step.target.evaluations += len(x)
        usable = torch.isfinite(value) & torch.isfinite(gradient).all(-1) & torch.isfinite(energy)
        for name, part in {
            "t": t, "x": x, "value": value, "gradient": gradient, "above": above, "energy": energy, "force": force,
            "laplacian": curve,
        }.items():  # fmt: skip
            self.tensors[name] = part[usable]


def _residual(
    velocity: GradientFlowVelocity, t: Tensor, x: Tensor, target: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """The residual of the continuity equation at points, f and its gradient, with graphs to the network."""
    time = t.clone().requires_grad_()
    value, gradient, second = velocity.derivatives(time, x, target)
    (rate,) = torch.autograd.grad(value.sum(), time, create_graph=True)
    speed = velocity.noise_time(t)[1] * velocity.std**2
    v = speed[:, None] * (gradient - x / velocity.std**2)
    divergence = speed * (second - velocity.dimension / velocity.std**2)
    return continuity_residual(PathPoint(value, gradient, rate), v, divergence), value, gradient


def _huber(x: Tensor) -> Tensor:
    return huber_loss(x, torch.zeros_like(x), reduction="none")


def gradient_flow_of(step: Step) -> GradientFlowVelocity:
    """The velocity of the flow, refused unless it is a gradient flow."""
    if not isinstance(step.flow, ContinuousFlow) or not isinstance(step.flow.velocity, GradientFlowVelocity):
        raise InputError("This objective trains a ContinuousFlow with a GradientFlowVelocity.")
    return step.flow.velocity


def noised_box(velocity: GradientFlowVelocity, t: Tensor, box: float, generator: torch.Generator) -> Tensor:
    """Points of the box after noise, ``(n, dimension)``, at times ``(n,)``."""
    kept = torch.exp(-velocity.noise_time(t)[0]).detach()[:, None]
    inside = box * (2 * torch.rand(len(t), velocity.dimension, generator=generator) - 1)
    noise = velocity.std * torch.randn(len(t), velocity.dimension, generator=generator)
    return kept * inside + torch.sqrt(1 - kept.square()) * noise


@torch.no_grad()
def noised_energy(
    velocity: GradientFlowVelocity,
    target: Callable[[Tensor], tuple[Tensor, Tensor]],
    t: Tensor,
    x: Tensor,
    draws: int,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Minus the log of the noised target's density, up to the target's log Z, and its gradient, by quasi-Monte Carlo.

    Parameters
    ----------
    velocity : GradientFlowVelocity
        For its noise.
    target : callable
        Energies and gradients of the target.
    t, x : Tensor, (n,) and (n, dimension)
    draws : int
        Energies per point.

    Returns
    -------
    value, gradient : Tensor, (n,) and (n, dimension)
    """
    dimension, std = velocity.dimension, velocity.std
    # two numbers from one seed of the generator keep the sequence reproducible
    seed = int(torch.randint(2**31, (1,), generator=generator))
    points = torch.quasirandom.SobolEngine(dimension, scramble=True, seed=seed).draw(draws).to(x.dtype)
    values, gradients = [], []
    for time, place in zip(t.split(max(1, _CHUNK // draws)), x.split(max(1, _CHUNK // draws)), strict=True):
        theta = velocity.noise_time(time)[0][:, None]
        grown, spread = torch.exp(theta), std * torch.sqrt(torch.expm1(2 * theta)).clamp(min=1e-6)
        centre = grown * place
        # where the normal is wider than the target, draws around the prior's part of it alone can meet the target
        wide = 1.5 * std
        narrow = (spread**-2 + wide**-2) ** -0.5
        middle = centre * (narrow / spread) ** 2
        shifted = (points + torch.rand(len(place), 1, dimension, generator=generator, dtype=x.dtype)) % 1
        normal = math.sqrt(2) * torch.erfinv((2 * shifted - 1).clamp(-1 + 1e-6, 1 - 1e-6))
        y = middle[:, None] + narrow[:, None] * normal
        energy, force = target(y.flatten(0, 1))
        energy, force = energy.view(len(place), draws), force.view(len(place), draws, dimension)
        away = (y - centre[:, None]) / spread[:, None]
        log_ratio = 0.5 * (normal.square() - away.square()).sum(-1) + dimension * torch.log(narrow / spread)
        log_weights = log_ratio - energy
        values.append(-torch.logsumexp(log_weights, 1) + math.log(draws) - dimension * theta[:, 0])
        share = torch.softmax(log_weights, 1)[..., None]
        by_target = grown * (share * force).sum(1)
        by_noise = -grown * (share * away).sum(1) / spread
        # the target's forces are the quieter estimate while the noise is narrower than its structure
        gradients.append(torch.where(spread < std * math.sqrt(3 * velocity.shortest), by_target, by_noise))
    return torch.cat(values), torch.cat(gradients)


def _average_energy(t: Tensor, value: Tensor, bins: int = 16) -> Tensor:
    """The thermal average of f at each time, from points and their f, by bins of time: ``(n,)``."""
    index = (t * bins).long().clamp(max=bins - 1)
    average = torch.zeros_like(value)
    for k in range(bins):
        inside = index == k
        if inside.any():
            f = value[inside]
            finite = torch.isfinite(f)
            average[inside] = (torch.softmax(-f[finite], 0) * f[finite]).sum() if finite.any() else 0.0
    return average
