"""Clusters of identical particles that do not care where they are, how they are turned and who is who."""

from __future__ import annotations

import math

import torch
from openmm_bg.systems._helpers import normal, positive, uniform, whole
from torch import Tensor

from openmm_bg.energies import Energy

__all__ = ["DoubleWellCluster", "LennardJonesCluster"]

_LEAPFROG_STEPS = 8


class _Cluster(Energy):
    """A sum over pairs i < j of a function of the squared distance, plus springs to the centroid."""

    first: Tensor
    second: Tensor
    spring = 0.0
    start_spread = 1.0
    """Standard deviation of the coordinates from which `reference` starts, before overlaps are removed."""

    def __init__(self, particles: int, spatial_dimension: int) -> None:
        super().__init__((particles * spatial_dimension,))
        self.particles = particles
        self.spatial_dimension = spatial_dimension
        first, second = torch.triu_indices(particles, particles, offset=1)
        self.register_buffer("first", first, persistent=False)
        self.register_buffer("second", second, persistent=False)

    def pair(self, square: Tensor) -> tuple[Tensor, Tensor]:
        """Energy of a pair at the squared distance, and its derivative by the squared distance."""
        raise NotImplementedError

    def centre(self, x: Tensor) -> Tensor:
        """The same configurations with their centroid at zero, ``(n, particles * spatial_dimension)``."""
        self._check(x)
        points = self._points(x)
        return (points - points.mean(1, keepdim=True)).flatten(1)

    def reduced(self, x: Tensor) -> Tensor:
        points = self._points(x)
        u = self.pair(self._differences(points).square().sum(-1))[0].sum(-1)
        if self.spring:
            u = u + 0.5 * self.spring * (points - points.mean(1, keepdim=True)).square().sum((1, 2))
        return u

    def reduced_and_gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            points = self._points(x)
            differences = self._differences(points)
            energy, slope = self.pair(differences.square().sum(-1))
            force = 2 * slope[..., None] * differences
            gradient = torch.zeros_like(points).index_add_(1, self.first, force).index_add_(1, self.second, -force)
            u = energy.sum(-1)
            if self.spring:
                relative = points - points.mean(1, keepdim=True)
                u = u + 0.5 * self.spring * relative.square().sum((1, 2))
                gradient += self.spring * relative
        return u, gradient.flatten(1)

    def reference(
        self,
        n: int,
        generator: torch.Generator,
        walkers: int = 1000,
        burn_in: int = 300,
        thinning: int = 10,
    ) -> Tensor:
        """Reference configurations by Hamiltonian Monte Carlo: approximate, neither exact nor independent.

        Many walkers start from a Gaussian cloud, slide downhill until no two particles overlap, and then make
        `burn_in` moves of eight leapfrog steps, whose length is tuned to accept 80 %. After that the length is fixed,
        every move leaves the target as it is, and a configuration is taken from every walker each `thinning` moves.
        What remains is the memory of the start, which shrinks with `burn_in`, and the correlation between the
        configurations of one walker, which are `walkers` rows apart.

        Parameters
        ----------
        n : int
            Number of configurations.
        generator : torch.Generator
        walkers : int
            Number of independent chains; `n` if that is less.
        burn_in, thinning : int
            Moves before the first configuration is taken, and between one and the next.

        Returns
        -------
        Tensor
            ``(n, particles * spatial_dimension)`` float64, with zero centroids.
        """
        n = whole("n", n, 1)
        walkers = min(whole("walkers", walkers, 1), n)
        burn_in, thinning = whole("burn_in", burn_in, 1), whole("thinning", thinning, 1)
        x = self.centre(self.start_spread * normal(walkers, self.event_shape[0], generator=generator))
        for _ in range(200):
            # a bounded step: the force between overlapping particles has no scale
            x = self.centre(x - (0.02 * self.value_and_gradient(x)[1]).clamp(-0.05, 0.05))
        u, gradient = self.value_and_gradient(x)
        log_step, taken = math.log(0.05), []
        rounds = -(-n // walkers)
        for move in range(burn_in + (rounds - 1) * thinning):
            x, u, gradient, accepted = self._move(x, u, gradient, math.exp(log_step), generator)
            if move < burn_in:
                log_step += (0.3 if move < burn_in / 2 else 0.1) * (accepted - 0.8)
            if move >= burn_in - 1 and (move - burn_in + 1) % thinning == 0:
                taken.append(x)
        return torch.cat(taken)[:n]

    def _move(
        self, x: Tensor, u: Tensor, gradient: Tensor, step: float, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor, float]:
        """One Hamiltonian move of all walkers, and the average probability to accept it."""
        start = self.centre(normal(*x.shape, generator=generator))
        # lengths vary, or a vibration whose period divides the trajectory would never be left
        length = step * (0.6 + 0.8 * uniform(len(x), 1, generator=generator))
        momentum, new_x, new_gradient = start, x, gradient
        for _ in range(_LEAPFROG_STEPS):
            momentum = momentum - 0.5 * length * new_gradient
            new_x = new_x + length * momentum
            new_u, new_gradient = self.value_and_gradient(new_x)
            momentum = momentum - 0.5 * length * new_gradient
        change = u - new_u + 0.5 * (start.square() - momentum.square()).sum(-1)
        # a state without an energy is never entered, and one that had none at the start is always left
        chance = torch.nan_to_num(change, nan=-math.inf, posinf=0.0, neginf=-math.inf).clamp(max=0.0).exp()
        take = uniform(len(x), generator=generator) < chance
        # rounding must not let the centroid drift
        new_x = self.centre(new_x)
        rows = take[:, None]
        return (
            torch.where(rows, new_x, x),
            torch.where(take, new_u, u),
            torch.where(rows, new_gradient, gradient),
            float(chance.mean()),
        )

    def _points(self, x: Tensor) -> Tensor:
        return x.reshape(len(x), self.particles, self.spatial_dimension)

    def _differences(self, points: Tensor) -> Tensor:
        return points.index_select(1, self.first) - points.index_select(1, self.second)


class DoubleWellCluster(_Cluster):
    r"""DW-4: four particles in the plane, each pair in a double well of their distance.

    u(x) = sum_{i < j} [b (d_ij - d0)^2 + c (d_ij - d0)^4] with b = -4, c = 0.9, d0 = 4, at unit temperature: every
    pair is counted once, which is (1 / 2) sum_{i != j} of Koehler, Klein & Noe, Equivariant Flows: Exact Likelihood
    Generative Learning for Symmetric Densities (ICML 2020; their a = 0), and of the code of bgflow and DEM. Pairs
    like the distances 4 +- 1.49, with a barrier of 4.4 between.

    Because u does not change when all particles move together, exp(-u) cannot be normalised on the whole space: the
    density meant is the one on the subspace of zero centroid, of 6 dimensions, where `reference` lives and where
    `centre` takes any point. A gradient never leaves it.

    Attributes
    ----------
    event_shape : (8,)
        The coordinates x1, y1, x2, y2, ..., without a unit.
    particles, spatial_dimension : int
        4 and 2.

    Examples
    --------
    >>> cluster = DoubleWellCluster()
    >>> side = 4.0
    >>> square = torch.tensor([[0.0, 0.0, side, 0.0, side, side, 0.0, side]])
    >>> round(cluster(square).item(), 3)
    -8.397
    >>> cluster.reference(2, torch.Generator().manual_seed(0), burn_in=20).shape
    torch.Size([2, 8])
    """

    start_spread = 3.0

    def __init__(self) -> None:
        super().__init__(4, 2)

    def pair(self, square: Tensor) -> tuple[Tensor, Tensor]:
        # two particles in one place have an energy but no direction: the bound makes their force zero, not 0 / 0
        distance = square.clamp(min=1e-24).sqrt()
        d = distance - 4.0
        d2 = d * d
        return d2 * (0.9 * d2 - 4.0), d * (3.6 * d2 - 8.0) / (2 * distance)


class LennardJonesCluster(_Cluster):
    r"""LJ-13 and its kin: Lennard-Jones particles in space, held together by a spring to their centroid.

    u(x) = sum_{i < j} eps [(1 / r_ij)^12 - 2 (1 / r_ij)^6] + (1 / 2) sum_i |x_i - centroid|^2, at unit temperature and
    with the minimum of a pair at r = 1. Two conventions are in use. Here, as in Koehler, Klein & Noe (ICML 2020) and
    in the code of bgflow, every pair is counted once. The code of DEM (Akhound-Sadegh et al., ICML 2024), from which
    the published figures of iDEM and its successors come, counts every ordered pair: that is ``well_depth=2`` here,
    with the spring unchanged.

    Because u does not change when all particles move together, exp(-u) cannot be normalised on the whole space: the
    density meant is the one on the subspace of zero centroid, of 3 (particles - 1) dimensions, where `reference`
    lives and where `centre` takes any point. A gradient never leaves it.

    Parameters
    ----------
    particles : int
        At least 2.
    well_depth : float
        eps, the depth of the well of a pair in units of kT, positive. The frozen cluster melts near eps = 3.4, so at
        1 or 2 it is a liquid droplet and `reference` has no barrier to cross.

    Attributes
    ----------
    event_shape : (3 * particles,)
        The coordinates x1, y1, z1, x2, ..., in units of the distance at the minimum.
    particles, spatial_dimension : int
        `spatial_dimension` is 3.

    Examples
    --------
    >>> cluster = LennardJonesCluster(particles=2)
    >>> cluster(torch.tensor([[0.0, 0.0, 0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0, 0.0]]))
    tensor([-0.7500,     inf])
    >>> cluster.centre(torch.tensor([[0.0, 0.0, 0.0, 1.0, 0.0, 0.0]]))
    tensor([[-0.5000,  0.0000,  0.0000,  0.5000,  0.0000,  0.0000]])
    """

    spring = 1.0

    def __init__(self, particles: int = 13, well_depth: float = 1.0) -> None:
        super().__init__(whole("particles", particles, 2), 3)
        self.well_depth = positive("well_depth", well_depth)

    def pair(self, square: Tensor) -> tuple[Tensor, Tensor]:
        inverse = 1 / square
        cube = inverse**3
        # a product, not a difference of two infinities, where particles coincide
        return self.well_depth * cube * (cube - 2), 6 * self.well_depth * cube * (1 - cube) * inverse
