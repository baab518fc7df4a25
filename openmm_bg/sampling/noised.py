"""The energy of a target after noise, by quadrature: on a mesh in few dimensions, by quasi-Monte Carlo beyond."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from openmm_bg.errors import InputError
from openmm_bg.flows import GradientFlowVelocity

_CHUNK = 2**13


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
    generator : torch.Generator
        Scrambles and shifts the quasi-random points.

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


@dataclass
class NoisedMesh:
    """The noised target by sums over a regular mesh: the kernel of the noise is a product, one factor per dimension.

    For smooth integrands that die out before the boundary such sums converge faster than any power of the spacing
    (Trefethen & Weideman, SIAM Review 56, 385, 2014). Made by :meth:`of`; called like :func:`noised_energy`.

    Attributes
    ----------
    axis : Tensor, (m,)
        Places along every dimension, float64.
    density : Tensor, (m, ..., m)
        exp(lowest - f_D) times the volume of a cell, at all combinations of them.
    lowest : float
    coarser : NoisedMesh, optional
        What is used where it resolves the noise; made by :meth:`coarsen`.
    """

    axis: Tensor
    density: Tensor
    lowest: float
    coarser: NoisedMesh | None = None
    #: the number of dimensions up to which a mesh is worth its points
    most: ClassVar[int] = 3

    @classmethod
    def of(
        cls, velocity: GradientFlowVelocity, energy: Callable[[Tensor], Tensor], half: float, points: int
    ) -> NoisedMesh:
        """Evaluate the target on a mesh of about ``points`` in [-half, half]^d.

        Parameters
        ----------
        velocity : GradientFlowVelocity
            For its dimension, its noise and its precision.
        energy : callable
            Reduced energies ``(n,)`` of points ``(n, dimension)``.
        half : float
            Half the edge of the mesh, in the unit of the points; the target has to die out inside.
        points : int
            In all: their d-th root along every dimension, at least 8.

        Examples
        --------
        >>> import openmm_bg as bg
        >>> from openmm_bg.flows import PerceptronEnergy
        >>> target = bg.systems.load("gmm4")
        >>> velocity = GradientFlowVelocity(target, PerceptronEnergy(2, 8), std=5.0)
        >>> mesh = NoisedMesh.of(velocity, target, 16.0, 200**2)
        >>> value, gradient = mesh(velocity, torch.full((3,), 0.5), torch.zeros(3, 2))
        >>> value.shape, gradient.shape
        (torch.Size([3]), torch.Size([3, 2]))
        """
        dimension = velocity.dimension
        edge = max(8, round(points ** (1 / dimension)))
        axis = torch.linspace(-half, half, edge, dtype=torch.float64)
        places = torch.cartesian_prod(*[axis] * dimension).view(-1, dimension)
        dtype = velocity.log_width.dtype
        values = torch.cat([energy(part.to(dtype)).double() for part in places.split(_CHUNK)])
        lowest = float(values.min())
        density = torch.exp(lowest - values) * float(axis[1] - axis[0]) ** dimension
        return cls(axis, density.view([edge] * dimension), lowest)

    def resolves(self, velocity: GradientFlowVelocity, t: Tensor) -> Tensor:
        """Where the noise is wide enough for the mesh, ``(n,)``."""
        return self._spread(velocity, t)[1] > 1.5 * float(self.axis[1] - self.axis[0])

    def check(self, velocity: GradientFlowVelocity, allowed: float = 0.02) -> None:
        """Refuse a mesh that misses structure: every second point has to give the same noised energies.

        Raises
        ------
        InputError
            If they differ by more than ``allowed`` kT at the heaviest points.
        """
        off = self._difference(velocity, self._half())
        if not off < allowed:
            raise InputError(
                f"A mesh of {self.density.numel():,} points is too coarse for this target (half of it in each "
                f"dimension is {off:.2g} kT off); raise mesh, or set mesh=0 to draw points instead."
            )

    def coarsen(self, velocity: GradientFlowVelocity, allowed: float = 1e-5) -> None:
        """Use every second point, every fourth, ... where the noise is wide enough for them, and they agree."""
        half = self._half()
        if len(half.axis) >= 8 and self._difference(velocity, half) < allowed:
            half.coarsen(velocity, allowed)
            self.coarser = half

    def _half(self) -> NoisedMesh:
        every_second = (slice(None, None, 2),) * self.density.ndim
        return NoisedMesh(self.axis[::2], self.density[every_second] * 2**self.density.ndim, self.lowest)

    def _difference(self, velocity: GradientFlowVelocity, coarse: NoisedMesh) -> float:
        """The largest disagreement at the heaviest points, after the least noise that the coarse one resolves."""
        t = torch.linspace(0, 1, 65, dtype=torch.float64)
        t = t[coarse.resolves(velocity, t)][-1:].repeat(256)
        heavy = self.density.flatten().topk(min(256, self.density.numel())).indices
        index = torch.stack(torch.unravel_index(heavy, self.density.shape), -1)
        t = t[: len(index)]
        x = self.axis[index[: len(t)]] * torch.exp(-self._spread(velocity, t)[0])[:, None]
        if not len(t):
            return math.inf
        return float((self(velocity, t, x)[0] - coarse(velocity, t, x)[0]).abs().max())

    def _spread(self, velocity: GradientFlowVelocity, t: Tensor) -> tuple[Tensor, Tensor]:
        theta = velocity.noise_time(t.double())[0]
        return theta, velocity.std * torch.sqrt(torch.expm1(2 * theta))

    @torch.no_grad()
    def __call__(self, velocity: GradientFlowVelocity, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """As :func:`noised_energy`, in float64; infinite where the density is below what float64 holds."""
        if self.coarser is None:
            return self._evaluate(velocity, t, x)
        value, gradient = t.new_empty(len(t), dtype=torch.float64), torch.empty_like(x, dtype=torch.float64)
        coarse = self.coarser.resolves(velocity, t)
        value[coarse], gradient[coarse] = self.coarser(velocity, t[coarse], x[coarse])
        value[~coarse], gradient[~coarse] = self._evaluate(velocity, t[~coarse], x[~coarse])
        return value, gradient

    def _evaluate(self, velocity: GradientFlowVelocity, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        values, gradients = [], []
        for time, place in zip(t.split(_CHUNK // 4), x.double().split(_CHUNK // 4), strict=True):
            theta, spread = self._spread(velocity, time)
            grown = torch.exp(theta)
            # (n, dimension, m)
            away = (self.axis - (grown[:, None] * place)[..., None]) / spread[:, None, None]
            kernel = torch.exp(-0.5 * away.square()) / (math.sqrt(2 * math.pi) * spread[:, None, None])
            total = self._sum(kernel)
            gradient = torch.empty_like(place)
            for i in range(place.shape[1]):
                bent = kernel.clone()
                bent[:, i] *= away[:, i]
                gradient[:, i] = -grown / spread * self._sum(bent) / total
            values.append(self.lowest - torch.log(total) - place.shape[1] * theta)
            gradients.append(gradient)
        return torch.cat(values), torch.cat(gradients)

    def _sum(self, factors: Tensor) -> Tensor:
        """The sum over the mesh of the density times a product of factors ``(n, dimension, m)``: ``(n,)``."""
        rest = (factors[:, 0] @ self.density.flatten(1)) if self.density.ndim > 1 else factors[:, 0] * self.density
        edge, dimension = len(self.axis), self.density.ndim
        for i in range(1, dimension):
            rest = rest.view(len(rest), edge, edge ** (dimension - 1 - i))
            rest = torch.einsum("nm,nmk->nk", factors[:, i], rest)
        return rest.sum(-1)
