"""Velocities, energies and a base density for identical particles, which know no labels, no direction and no origin.

The velocity of a particle is a sum over the others of a coefficient times the vector between the two. The coefficient
is a network of their distance and of the densities of neighbours around both, so the field is more than a sum of pair
terms, and yet its divergence is exact at the price of two evaluations: the derivatives that the trace of the Jacobian
collects from a pair are one directional derivative of the network.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from openmm_bg.errors import InputError
from openmm_bg.flows.velocity import TimeWindows, VelocityField, activate

_TINY = 1e-24


class PairNetwork(nn.Module):
    """One number per pair of particles, from its distance, its surroundings and the time; zero at initialisation.

    Distances enter through Gaussians on a regular grid. The densities of particle i are s_i = sum_k psi(d_ik) /
    sqrt(N - 1), with `densities` learnable combinations psi of the same Gaussians; a pair sees s_i + s_j and s_i s_j,
    which do not depend on who is first.

    Parameters
    ----------
    particles, spatial_dimension : int
    reach : float
        Where the grid of Gaussians ends, in the unit of the coordinates. Beyond it a pair is a constant.
    features : int
        Gaussians on [0, reach], as wide as their spacing.
    densities : int
        0 for a function of distance and time alone.
    hidden : sequence of int
        Units of each hidden layer, at least one.
    windows : int
        Of :class:`~openmm_bg.flows.velocity.TimeWindows`, which move the biases of all layers, the last weights and a
        constant: what is left beyond `reach`.
    seed : int
        Of the initial weights.
    """

    def __init__(
        self,
        particles: int,
        spatial_dimension: int,
        reach: float,
        *,
        features: int = 24,
        densities: int = 8,
        hidden: Sequence[int] = (48, 48),
        windows: int = 12,
        seed: int = 0,
    ):
        super().__init__()
        if particles < 2 or spatial_dimension < 1:
            raise InputError(f"{particles} particles in {spatial_dimension} dimensions have no pairs; give at least 2.")
        if not reach > 0 or features < 2 or densities < 0 or not hidden:
            raise InputError("reach must be positive, features at least 2, densities not negative, hidden not empty.")
        self._config = {
            "particles": particles, "spatial_dimension": spatial_dimension, "reach": float(reach),
            "features": features, "densities": densities, "hidden": list(hidden), "windows": windows, "seed": seed,
        }  # fmt: skip
        self.particles, self.spatial_dimension, self.densities = particles, spatial_dimension, densities
        first, second = torch.triu_indices(particles, particles, offset=1)
        self.register_buffer("first", first, persistent=False)
        self.register_buffer("second", second, persistent=False)
        one = torch.eye(particles)
        # (particles, pairs): sums over the pairs of a particle, plainly and along the vector from second to first
        self.register_buffer("touches", one[:, first] + one[:, second], persistent=False)
        self.register_buffer("points_to", one[:, first] - one[:, second], persistent=False)
        self.register_buffer("centre", torch.linspace(0, reach, features), persistent=False)
        self.width = reach / (features - 1)
        rng = torch.Generator().manual_seed(seed)

        def normal(rows: int, columns: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(rows, columns, generator=rng) / math.sqrt(max(1, columns)))

        # one or two Gaussians are of order one at any distance, so these are not divided by the root of their number
        self.embed = nn.Parameter(0.5 * torch.randn(features, densities, generator=rng)) if densities else None
        sizes = [features + 2 * densities, *hidden]
        self.weights = nn.ParameterList(normal(after, before) for before, after in itertools.pairwise(sizes))
        with torch.no_grad():
            self.weights[0] *= math.sqrt(sizes[0] / 3)
        self.biases = nn.ParameterList(
            nn.Parameter(0.5 * torch.randn(size, generator=rng) * (number == 0)) for number, size in enumerate(hidden)
        )
        self.last = nn.Parameter(torch.zeros(hidden[-1]))
        self.time = TimeWindows(windows, [*hidden, hidden[-1], 1])

    def config(self) -> dict[str, Any]:
        return dict(self._config)

    def differences(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors from the second to the first particle of every pair, ``(batch, pairs, dim)``, and their lengths."""
        points = x.reshape(len(x), self.particles, self.spatial_dimension)
        vector = points.index_select(1, self.first) - points.index_select(1, self.second)
        # two particles in one place have a distance but no direction: the bound makes the slope zero, not 0 / 0
        return vector, vector.square().sum(-1).clamp(min=_TINY).sqrt()

    def forward(self, t: Tensor, distance: Tensor) -> Tensor:
        """Values ``(batch, pairs)`` at times ``()`` or ``(batch,)`` and distances ``(batch, pairs)``."""
        gaussians = self._gaussians(distance)
        inputs = gaussians
        if self.embed is not None:
            s = self.touches @ self._embedded(gaussians)
            one, other = s.index_select(1, self.first), s.index_select(1, self.second)
            inputs = torch.cat([gaussians, one + other, one * other], -1)
        biases, last, constant = self._at(t)
        z = inputs
        for weight, bias in zip(self.weights, biases, strict=True):
            z = nn.functional.silu(z @ weight.T + bias)
        return (z @ last)[..., 0] + constant

    def with_trace(self, t: Tensor, vector: Tensor, distance: Tensor) -> tuple[Tensor, Tensor]:
        """Values phi and sums over both particles of vector . gradient of phi, each ``(batch, pairs)``.

        With r = x_i - x_j of pair (i, j) the second is r . (grad_i - grad_j) phi.
        """
        gaussians = self._gaussians(distance)
        d = distance[..., None]
        # distance times derivative by distance
        change = -d * (d - self.centre) / self.width**2 * gaussians
        inputs, tangent = gaussians, 2 * change
        if self.embed is not None:
            s = self.touches @ self._embedded(gaussians)
            slope = self._embedded(change)
            # gradient of the densities of a particle by its own place, (batch, particles, densities, dim)
            by_pair = (slope / d.square())[..., None] * vector[..., None, :]
            gradient = (self.points_to @ by_pair.flatten(2)).unflatten(2, by_pair.shape[2:])
            along = vector[..., None, :]
            one, other = s.index_select(1, self.first), s.index_select(1, self.second)
            one_dot = slope + (gradient.index_select(1, self.first) * along).sum(-1)
            other_dot = slope - (gradient.index_select(1, self.second) * along).sum(-1)
            inputs = torch.cat([gaussians, one + other, one * other], -1)
            tangent = torch.cat([tangent, one_dot + other_dot, one_dot * other + one * other_dot], -1)
        biases, last, constant = self._at(t)
        z, dot = inputs, tangent
        for weight, bias in zip(self.weights, biases, strict=True):
            z, slope = activate(z @ weight.T + bias, "silu")
            dot = (dot @ weight.T) * slope
        return (z @ last)[..., 0] + constant, (dot @ last)[..., 0]

    def _at(self, t: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        """Biases of the hidden layers, last weights and constant at a time, for ``(1 or batch, pairs, ...)``."""
        *biases, gain, constant = self.time(t)
        fixed = [row[:, None] + bias for row, bias in zip(biases, self.biases, strict=True)]
        return fixed, ((1 + gain) * self.last)[..., None], constant

    def _gaussians(self, distance: Tensor) -> Tensor:
        return (-0.5 * ((distance[..., None] - self.centre) / self.width).square()).exp()

    def _embedded(self, gaussians: Tensor) -> Tensor:
        return gaussians @ self.embed / math.sqrt(self.particles - 1)


class PairVelocity(VelocityField):
    r"""An equivariant velocity field of identical particles with an exact divergence; zero at initialisation.

    v_i = (1 / N) sum_j phi(d_ij, s_i, s_j, t) (x_i - x_j), with phi symmetric in i and j: particles that change places,
    turn, are reflected or move all together take the field with them. The densities s_i = sum_k psi(d_ik) are those of
    the embedded-atom method (Daw & Baskes, Phys. Rev. B 29, 6443, 1984) and make the field one of many bodies.

    *Divergence.* A pair contributes 2 D phi + (x_i - x_j) . (grad_i - grad_j) phi, D being the spatial dimension, and
    the second term is one directional derivative of the network, along (2 d, r . grad_i s_i + d psi', -r . grad_j s_j +
    d psi') in (d, s_i, s_j). All of it is O(N^2).

    *Subspace.* Because phi is symmetric the v_i sum to zero and the centroid never moves; because the field knows
    differences alone it does not change under translations. So the Jacobian vanishes on translations from both sides,
    and its trace on R^(N D), which is what :meth:`with_divergence` returns, equals the trace on the (N - 1) D
    dimensions of zero centroid, where :class:`CentredBase` and the density of the particles live.

    Parameters
    ----------
    particles, spatial_dimension : int
    reach : float
        Distances up to here are resolved; farther pairs share one coefficient, which depends on time alone where the
        particles are alone. About the largest distance of base and target.
    features : int
        Gaussians of the distance on [0, reach]: the resolution is about ``reach / features``.
    densities : int
        0 for a field of pairs.
    hidden : sequence of int
    windows : int
        Time resolution, as in :class:`~openmm_bg.flows.velocity.PerceptronVelocity`.
    seed : int
        Of the initial weights.

    Examples
    --------
    >>> field = PairVelocity(13, 3, reach=5.0)
    >>> v, divergence = field.with_divergence(torch.tensor(0.3), torch.randn(5, 39))
    >>> v.shape, divergence.shape
    (torch.Size([5, 39]), torch.Size([5]))
    """

    def __init__(
        self,
        particles: int,
        spatial_dimension: int,
        reach: float,
        *,
        features: int = 24,
        densities: int = 8,
        hidden: Sequence[int] = (48, 48),
        windows: int = 12,
        seed: int = 0,
    ):
        super().__init__(particles * spatial_dimension)
        self.network = PairNetwork(
            particles, spatial_dimension, reach, features=features, densities=densities, hidden=hidden,
            windows=windows, seed=seed,
        )  # fmt: skip

    def config(self) -> dict[str, Any]:
        return self.network.config()

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        vector, distance = self.network.differences(x)
        return self._summed(self.network(t, distance), vector)

    def with_divergence(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Velocities and their exact divergences ``(batch,)``, in the whole space and in that of zero centroid."""
        vector, distance = self.network.differences(x)
        phi, trace = self.network.with_trace(t, vector, distance)
        divergence = (2 * self.network.spatial_dimension * phi + trace).sum(-1) / self.network.particles
        return self._summed(phi, vector), divergence

    def _summed(self, phi: Tensor, vector: Tensor) -> Tensor:
        return (self.network.points_to @ (phi[..., None] * vector)).flatten(1) / self.network.particles


class PairEnergy(nn.Module):
    """A scalar network of identical particles and time, f(t, x), zero at initialisation: what a learned path adds.

    The average over pairs of a network of distance, densities and time (:class:`PairNetwork`): invariant under
    permutations, rotations, reflections and translations, and smooth wherever no two particles coincide.

    Parameters
    ----------
    particles, spatial_dimension, reach, features, densities, hidden, windows, seed
        As in :class:`PairVelocity`.

    Examples
    --------
    >>> PairEnergy(4, 2, reach=10.0)(torch.tensor(0.5), torch.randn(3, 8)).shape
    torch.Size([3])
    """

    def __init__(
        self,
        particles: int,
        spatial_dimension: int,
        reach: float,
        *,
        features: int = 24,
        densities: int = 8,
        hidden: Sequence[int] = (48, 48),
        windows: int = 12,
        seed: int = 1,
    ):
        super().__init__()
        self.dimension = particles * spatial_dimension
        self.network = PairNetwork(
            particles, spatial_dimension, reach, features=features, densities=densities, hidden=hidden,
            windows=windows, seed=seed,
        )  # fmt: skip

    def config(self) -> dict[str, Any]:
        return self.network.config()

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """Values ``(batch,)`` at times ``()`` or ``(batch,)`` and points ``(batch, dimension)``."""
        return self.network(t, self.network.differences(x)[1]).mean(-1)


class CentredBase(nn.Module):
    """A normal of identical particles on the subspace of zero centroid.

    The density is the one with respect to Lebesgue measure on that subspace of (particles - 1) * spatial_dimension
    dimensions: exp(-|z|^2 / (2 scale^2)) over (2 pi scale^2) to half that number.

    The *broadened* copy is ``(1 - share)`` of it and ``share`` of one that is ``wider`` times as wide in all directions
    at once, since a tail of single coordinates would single out axes and labels.

    Parameters
    ----------
    particles, spatial_dimension : int
    scale : float
        Standard deviation along every direction of the subspace.

    Attributes
    ----------
    dimension : int
        particles * spatial_dimension, the length of a row.
    degrees_of_freedom : int
        (particles - 1) * spatial_dimension.

    Examples
    --------
    >>> base = CentredBase(13, 3, scale=0.8)
    >>> z = base.sample(4, torch.Generator().manual_seed(0))
    >>> bool(z.view(4, 13, 3).mean(1).abs().max() < 1e-6)
    True
    >>> base.log_prob(z).shape
    torch.Size([4])
    """

    share = 0.02
    wider = 1.5

    def __init__(self, particles: int, spatial_dimension: int, scale: float = 1.0):
        super().__init__()
        if particles < 2 or spatial_dimension < 1 or not scale > 0:
            raise InputError("A centred normal needs at least 2 particles, 1 dimension and a positive scale.")
        self.particles, self.spatial_dimension, self.scale = particles, spatial_dimension, float(scale)
        self.dimension = particles * spatial_dimension
        self.degrees_of_freedom = (particles - 1) * spatial_dimension
        # follows the module through .to(dtype)
        self.register_buffer("_like", torch.zeros(1), persistent=False)

    def config(self) -> dict[str, Any]:
        return {"particles": self.particles, "spatial_dimension": self.spatial_dimension, "scale": self.scale}

    def sample(self, n: int, generator: torch.Generator | None = None, *, broadened: bool = False) -> Tensor:
        """``n`` independent draws, ``(n, dimension)``, in the dtype of the module."""
        options = {"generator": generator, "dtype": self._like.dtype, "device": self._like.device}
        z = self.scale * torch.randn(n, self.dimension, **options)
        if broadened:
            wide = torch.rand(n, 1, **options) < self.share
            z = torch.where(wide, self.wider * z, z)
        return self.centre(z)

    def centre(self, z: Tensor) -> Tensor:
        """The same configurations with their centroid at zero."""
        points = z.reshape(len(z), self.particles, self.spatial_dimension)
        return (points - points.mean(1, keepdim=True)).flatten(1)

    def log_prob(self, z: Tensor, *, broadened: bool = False) -> Tensor:
        """Log-density on the subspace, ``(batch,)``; -inf off it and for values that are not finite.

        A centroid counts as zero up to ten times the root of the rounding error of a coordinate, which is more than an
        integration in that precision loses.
        """
        points = z.reshape(len(z), self.particles, self.spatial_dimension)
        centroid = points.mean(1, keepdim=True)
        square = (points - centroid).square().sum((1, 2)) / self.scale**2
        value = self._normal(square, self.scale)
        if broadened:
            wide = self._normal(square / self.wider**2, self.wider * self.scale)
            value = torch.logaddexp(value + math.log1p(-self.share), wide + math.log(self.share))
        size = self.scale + points.abs().amax((1, 2))
        inside = centroid.abs().amax((1, 2)) <= 10 * math.sqrt(torch.finfo(z.dtype).eps) * size
        return torch.where(inside & torch.isfinite(z).all(-1), value, -math.inf)

    def _normal(self, square: Tensor, scale: float) -> Tensor:
        return -0.5 * square - self.degrees_of_freedom * (0.5 * math.log(2 * math.pi) + math.log(scale))
