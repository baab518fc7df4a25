"""Two ways to learn the energy of the gradient flow: the residual of its equation, and its known noised averages."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import huber_loss

from openmm_bg.errors import InputError
from openmm_bg.flows import ContinuousFlow, GradientFlowVelocity
from openmm_bg.flows.gradient_flow import laplacian
from openmm_bg.sampling.interpolation import PathPoint, continuity_residual
from openmm_bg.sampling.noised import NoisedMesh, noised_energy
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
        t = lowest + (1 - lowest) * _uniform(velocity, step.batch_size, generator=step.generator)
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
    computed once for a set of points and then learned: in up to three dimensions by sums over a mesh on which the
    target is evaluated once (:class:`~openmm_bg.sampling.NoisedMesh`); otherwise, or where the noise is finer than the
    mesh, by quasi-random numbers drawn where the normal meets the prior. In few dimensions this replaces the
    differential equation by ordinary regression; in many no number of draws is enough.

    Parameters
    ----------
    box : float
        Half the edge of the box that holds the target; see :class:`GradientFlowResidual`.
    points, draws : int
        Points with labels, and energies of the target in each label that the mesh does not give.
    mesh : int
        Points of the mesh in all; 0 does without.
    height : float
        Weight of f itself, beside one for its gradient. An error of f that is the same all along a trajectory changes
        the weights of modes and is seen neither by gradient nor residual.
    residual : float
        Weight of the residual of :class:`GradientFlowResidual`, at the same points: it holds neighbours in time
        together, which labels with noise of their own cannot.
    late : float
        Times of the points are uniform numbers to this power; below 1 there are more of late ones, where structure is
        fine.

    References
    ----------
    The estimator is that of Akhound-Sadegh et al., Iterated Denoising Energy Matching, ICML 2024.
    """

    box: float
    points: int = 160_000
    draws: int = 256
    mesh: int = 2**18
    height: float = 20.0
    residual: float = 4.0
    late: float = 0.6
    softness: float = 0.05
    needs_data: bool = field(default=False, init=False)
    needs_energy: bool = field(default=True, init=False)
    state: dict[str, Any] = field(default_factory=dict, init=False)
    tensors: dict[str, Tensor] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        for name, least in (("points", 1), ("draws", 1), ("mesh", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise InputError(f"{name} must be a whole number of at least {least}, not {value!r}.")
        for name in ("height", "residual"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise InputError(f"{name} must be a finite number of at least 0, not {value!r}.")
        if not 0 < self.late < math.inf:
            raise InputError(f"late must be a positive finite number, not {self.late!r}.")

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
        loss = weight * (self.height * _huber(wrong) + _huber(bent).sum(-1))
        if self.residual > 0:
            # large residuals are few, at the creases between modes, but most of the variance of the weights
            loss = loss + self.residual * _huber(weight.square() * residual, beyond=10.0)
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
        mesh = None
        if self.mesh and velocity.dimension <= NoisedMesh.most:
            mesh = NoisedMesh.of(velocity, lambda y: evaluate(y)[0], 1.25 * self.box, self.mesh)
            mesh.check(velocity)
            mesh.coarsen(velocity)

        t = _uniform(velocity, 4 * self.points, generator=random) ** self.late
        # wider than the density: what starts in the tails has far to go, and too few points there lose it on the way
        x = noised_box(velocity, t, 1.2 * self.box, random, widened=1.5)
        value, gradient = torch.empty_like(t), torch.empty_like(x)
        known = mesh.resolves(velocity, t) if mesh else torch.zeros_like(t, dtype=torch.bool)
        if mesh:
            value[known], gradient[known] = (part.to(x.dtype) for part in mesh(velocity, t[known], x[known]))
        # a first look with few draws, to choose the points
        few = max(16, self.draws // 16)
        value[~known], gradient[~known] = noised_energy(velocity, evaluate, t[~known], x[~known], few, random)
        above = (value - _average_energy(t, value)).clamp(min=0)
        chosen = torch.multinomial(torch.exp(-0.3 * above) + 1e-3, self.points, generator=random)
        t, x, above, value, gradient, known = (part[chosen] for part in (t, x, above, value, gradient, known))
        value[~known], gradient[~known] = noised_energy(velocity, evaluate, t[~known], x[~known], self.draws, random)
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
        self._calibrate(velocity)

    def _calibrate(self, velocity: GradientFlowVelocity, iterations: int = 60) -> None:
        """Fit the height of f, which depends on time alone and which the network would be long in finding."""
        t, x, label, above, energy = (self.tensors[name] for name in ("t", "x", "value", "above", "energy"))
        weight = torch.exp(-above)
        optimizer = torch.optim.LBFGS([velocity.height.rows], max_iter=iterations, line_search_fn="strong_wolfe")
        with torch.no_grad():
            missing = label - velocity.energy(t, x, energy)

        def closure() -> Tensor:
            optimizer.zero_grad()
            height = (1 - t) * velocity.height(t)[0][:, 0]
            loss = (weight * _huber(height - missing)).mean()
            loss.backward()
            return loss

        with torch.enable_grad():
            optimizer.step(closure)
        optimizer.zero_grad()


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


def _huber(x: Tensor, beyond: float = 1.0) -> Tensor:
    """Half of the square up to ``beyond``, linear from there."""
    return huber_loss(x, torch.zeros_like(x), reduction="none", delta=beyond)


def gradient_flow_of(step: Step) -> GradientFlowVelocity:
    """The velocity of the flow, refused unless it is a gradient flow."""
    if not isinstance(step.flow, ContinuousFlow) or not isinstance(step.flow.velocity, GradientFlowVelocity):
        raise InputError("This objective trains a ContinuousFlow with a GradientFlowVelocity.")
    return step.flow.velocity


def _uniform(velocity: GradientFlowVelocity, *shape: int, generator: torch.Generator) -> Tensor:
    return torch.rand(*shape, generator=generator, dtype=velocity.log_width.dtype)


def noised_box(
    velocity: GradientFlowVelocity, t: Tensor, box: float, generator: torch.Generator, widened: float = 1.0
) -> Tensor:
    """Points of the box after noise, ``(n, dimension)``, at times ``(n,)``; the noise may be ``widened``."""
    kept = torch.exp(-velocity.noise_time(t)[0]).detach()[:, None]
    inside = box * (2 * _uniform(velocity, len(t), velocity.dimension, generator=generator) - 1)
    noise = velocity.std * torch.randn(len(t), velocity.dimension, generator=generator, dtype=inside.dtype)
    return kept * inside + widened * torch.sqrt(1 - kept.square()) * noise


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
