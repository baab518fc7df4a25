"""Paths of energies from the base of a flow to a target, and what the continuity equation leaves over on them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from openmm_bg.errors import InputError
from openmm_bg.flows import ContinuousFlow, GradientFlowVelocity


@dataclass
class PathPoint:
    """A path of energies at some points: value ``(n,)``, gradient ``(n, dimension)``, derivative by time ``(n,)``."""

    value: Tensor
    gradient: Tensor
    rate: Tensor


class Interpolation:
    """f_t = (1 - s) f_0 + s f_1 + t (1 - t) psi(t, x), from the base of a flow to a target.

    f_0 is minus the log-density of the base, f_1 the reduced energy of the target, psi the flow's ``perturbation``
    (none for the linear path) and s a schedule. exp(-f_t) is not normalised, but f_0 is: the log of its integral runs
    from 0 to log Z of the target.

    The target enters with its energies and gradients alone, which the caller gives; they are constants to training.

    Parameters
    ----------
    flow : ContinuousFlow
    rate : float
        s = (e^(rate t) - 1) / (e^rate - 1): 0 is the straight line, positive rates dwell where the target is weak, as
        one must where its modes lie far apart or its energies are steep.

    References
    ----------
    Mate & Fleuret, Learning Interpolations between Boltzmann Densities, TMLR 2023.
    """

    def __init__(self, flow: ContinuousFlow, rate: float = 0.0):
        if not math.isfinite(rate):
            raise InputError(f"rate must be a finite number, not {rate}.")
        self.flow = flow
        self.rate = float(rate)

    def schedule(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """s(t) and its derivative."""
        if abs(self.rate) < 1e-8:
            return t, torch.ones_like(t)
        span = math.expm1(self.rate)
        return torch.expm1(self.rate * t) / span, self.rate * torch.exp(self.rate * t) / span

    def __call__(
        self, t: Tensor, x: Tensor, energy: Tensor, gradient: Tensor, *, differentiable: bool = False
    ) -> PathPoint:
        """The path at times ``()`` or ``(n,)`` and points ``(n, dimension)``.

        Parameters
        ----------
        energy, gradient : Tensor, (n,) and (n, dimension)
            Of the target at x.
        differentiable : bool
            Keep the graph to the parameters of psi.
        """
        x = x.detach()
        t = t.expand(len(x))
        with torch.enable_grad():
            leaf = x.clone().requires_grad_()
            start = -self.flow.base.log_prob(leaf)
            (start_gradient,) = torch.autograd.grad(start.sum(), leaf)
        start = start.detach()
        s, speed = self.schedule(t)
        column = s[:, None]
        # at the base the target has no say, however large
        value = (1 - s) * start + torch.where(s == 0, 0.0, s * energy)
        slope = (1 - column) * start_gradient + column * gradient
        rate = speed * (energy - start)
        psi = self.flow.perturbation
        if psi is not None:
            with torch.enable_grad():
                leaf, time = x.clone().requires_grad_(), t.clone().requires_grad_()
                extra = psi(time, leaf)
                by_x, by_t = torch.autograd.grad(extra.sum(), (leaf, time), create_graph=differentiable)
                share = t * (1 - t)
                value = value + share * extra
                slope = slope + share[:, None] * by_x
                rate = rate + (1 - 2 * t) * extra + share * by_t
            if not differentiable:
                value, slope, rate = value.detach(), slope.detach(), rate.detach()
        return PathPoint(value, slope, rate)


class GradientFlowPath:
    """The learned energies of a gradient flow, as a path from its prior to its target.

    Unlike an :class:`Interpolation` it starts only near the base; walkers on it begin with the weights that take them
    there. Derivatives by time, which those walkers do not need, are NaN.

    Parameters
    ----------
    flow : ContinuousFlow
        With a :class:`~openmm_bg.flows.GradientFlowVelocity`.
    """

    def __init__(self, flow: ContinuousFlow):
        if not isinstance(flow.velocity, GradientFlowVelocity):
            raise InputError(f"A {type(flow.velocity).__name__} is no gradient flow.")
        self.flow = flow

    def __call__(
        self, t: Tensor, x: Tensor, energy: Tensor, gradient: Tensor, *, differentiable: bool = False
    ) -> PathPoint:
        """As of :class:`Interpolation`."""
        velocity = self.flow.velocity
        known = (energy, gradient, torch.zeros_like(energy))
        value, slope, _ = velocity.derivatives(t.expand(len(x)), x, known)
        if not differentiable:
            value, slope = value.detach(), slope.detach()
        return PathPoint(value, slope, torch.full_like(value, math.nan))


def continuity_residual(point: PathPoint, velocity: Tensor, divergence: Tensor) -> Tensor:
    """r = d_t f - div v + <grad f, v>, which is constant in x where v carries exp(-f_t) along its path: ``(n,)``.

    That constant is minus the derivative of log Z_t, the average of d_t f; along a trajectory of v the log-weight
    changes at the rate -r.

    Parameters
    ----------
    point : PathPoint
        f, its gradient and its rate d_t f at n points.
    velocity, divergence : Tensor, (n, dimension) and (n,)
        v and div v there.
    """
    return point.rate - divergence + (point.gradient * velocity).sum(-1)
