"""The gradient flow of Chemseddine et al.: a fixed form of velocity, a learned energy.

An Ornstein-Uhlenbeck process ``dX = -X / s^2 d theta + sqrt(2) dW`` turns the target (theta = 0) into N(0, s^2) (theta
to infinity). If exp(-f_theta) is its density at theta, the field ``grad (f_theta - f_Z)``, f_Z = |x|^2 / (2 s^2),
carries that density along, and running it backwards makes samples of the target.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from openmm_bg.errors import InputError
from openmm_bg.flows.velocity import PerceptronEnergy, TimeWindows, VelocityField


class GradientFlowVelocity(VelocityField):
    """``v = (d theta / dt) grad (f - f_Z)`` with ``f = g f_D + h f_Z + (1 - t) (e^-theta psi(t, x / s) + c(t))``.

    Flow time t runs from the prior, t = 0, theta = ``horizon`` s^2, to the target, t = 1, theta = 0, where f is f_D
    exactly: ``theta = shortest s^2 (e^(L (1 - t)) - 1)``, logarithmic because structure of every size melts in its own
    decade.
    The factor ``g = exp(-theta / theta_0)`` of the target's energy, with theta_0 learned, lets go of its finest
    structure as fast as the noise does, ``h = 1 - exp(-2 theta)`` is the share of the prior, and c a height that
    depends on time alone. The network counts less and less towards the prior, as what is missing there does: the field
    is a small difference of large gradients by then.

    Parameters
    ----------
    energy : callable
        f_D, a differentiable function of points: ``(n, dimension)`` to ``(n,)``; an Energy. Its Laplacian enters the
        divergence, by one backward pass per dimension.
    network : PerceptronEnergy
        psi, of x / s.
    std : float
        s, the standard deviation of the prior.
    horizon : float
        In units of s^2: what the prior does not match of the target dies like exp(-2 horizon) in its mean square.
    shortest : float
        Where the logarithmic times become linear, in the same unit: below the square of the finest structure over s.

    References
    ----------
    Chemseddine, Wald, Duong & Steidl, Neural Sampling from Boltzmann Densities, ICLR 2025 (arXiv:2410.03282).
    """

    def __init__(
        self,
        energy: Callable[[Tensor], Tensor],
        network: PerceptronEnergy,
        *,
        std: float = 1.0,
        horizon: float = 3.0,
        shortest: float = 1e-3,
    ):
        super().__init__(network.dimension)
        for name, value in (("std", std), ("horizon", horizon), ("shortest", shortest)):
            if not 0 < value < math.inf:
                raise InputError(f"{name} must be a positive finite number, not {value}.")
        # kept out of the module's own state: the target has no part in what is learned or saved
        self._energy = (energy,)
        self.network = network
        self.std, self.horizon, self.shortest = float(std), float(horizon), float(shortest)
        # the structure that is finest goes first
        self.log_width = nn.Parameter(torch.tensor(math.log(3 * shortest)))
        self.height = TimeWindows(len(network.outer.centre), [1])

    @property
    def target(self) -> Callable[[Tensor], Tensor]:
        return self._energy[0]

    def noise_time(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """theta / s^2 and its (negative) derivative by flow time."""
        length = math.log1p(self.horizon / self.shortest)
        theta = self.shortest * torch.expm1(length * (1 - t))
        return theta, -length * (theta + self.shortest)

    def share(self, t: Tensor) -> Tensor:
        """g(t), the part of the target's energy."""
        return torch.exp(-self.noise_time(t)[0] * torch.exp(-self.log_width))

    def envelope(self, t: Tensor) -> Tensor:
        """h(t), the part of the prior's energy |x|^2 / (2 s^2)."""
        return -torch.expm1(-2 * self.noise_time(t)[0])

    def energy(self, t: Tensor, x: Tensor, target: Tensor | None = None) -> Tensor:
        """f ``(batch,)`` at times ``()`` or ``(batch,)``; ``target`` are energies at x where they are known."""
        f_target = self.target(x) if target is None else target
        share = self.share(t)
        # at the prior the target has no say, however large
        known = torch.where(share == 0, 0.0, share * f_target)
        prior = self.envelope(t) * 0.5 * (x / self.std).square().sum(-1)
        height = (1 - t) * self.height(t)[0][:, 0]
        return known + prior + height + self.rest(t) * self.network(t, x / self.std)

    def rest(self, t: Tensor) -> Tensor:
        """The part of the network: nothing at the target, and e^-theta towards the prior, as f comes near it."""
        return (1 - t) * torch.exp(-self.noise_time(t)[0])

    def derivatives(
        self, t: Tensor, x: Tensor, target: tuple[Tensor, Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """f, its gradient and its Laplacian; ``target`` the same three of f_D at x where they are known."""
        value_d, gradient_d, laplacian_d = laplacian(self.target, x) if target is None else target
        share, rest = self.share(t), self.rest(t)
        value, gradient, second = self.network.derivatives(t, x / self.std)
        prior = self.envelope(t)
        column, rest_column, prior_column = share.reshape(-1, 1), rest.reshape(-1, 1), prior.reshape(-1, 1)
        unit = x / self.std
        return (
            torch.where(share == 0, 0.0, share * value_d)
            + prior * 0.5 * unit.square().sum(-1)
            + (1 - t) * self.height(t)[0][:, 0]
            + rest * value,
            column * gradient_d + prior_column * unit / self.std + rest_column * gradient / self.std,
            share * laplacian_d + (prior * self.dimension + rest * second) / self.std**2,
        )

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return self.with_divergence(t, x)[0]

    def with_divergence(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        _, gradient, second = self.derivatives(t, x)
        speed = self.noise_time(t)[1] * self.std**2
        v = speed.reshape(-1, 1) * (gradient - x / self.std**2)
        return v, speed * (second - self.dimension / self.std**2)


def laplacian(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Values ``(n,)``, gradients ``(n, dimension)`` and Laplacians ``(n,)``; detached unless x carries a graph."""
    keep = torch.is_grad_enabled() and x.requires_grad
    with torch.enable_grad():
        x = x if keep else x.detach().requires_grad_()
        value = function(x)
        (gradient,) = torch.autograd.grad(value.sum(), x, create_graph=True)
        second = torch.zeros_like(value)
        for i in range(x.shape[1]):
            (row,) = torch.autograd.grad(gradient[:, i].sum(), x, create_graph=keep, retain_graph=True)
            second = second + row[:, i]
    if keep:
        return value, gradient, second
    return value.detach(), gradient.detach(), second.detach()
