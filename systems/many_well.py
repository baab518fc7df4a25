"""Many wells: products of one-dimensional double wells and Gaussians, whose every property is known exactly."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from openmm_bg.systems._helpers import normal, positive, uniform, whole
from torch import Tensor

from openmm_bg.energies import Energy
from openmm_bg.errors import InputError

__all__ = ["ManyWell", "ManyWellDelta"]

_GAUSSIAN_LOG_Z = 0.5 * math.log(2 * math.pi)
_GAUSSIAN_ENTROPY = _GAUSSIAN_LOG_Z + 0.5


class ManyWell(Energy):
    r"""Pairs (x, y) of a lopsided double well and a Gaussian: u = sum (-0.5 x - 6 x^2 + x^4 + 0.5 y^2).

    The coordinates alternate, x1, y1, x2, y2, ..., so the wells are the even indices. Every well has its deep minimum
    near x = 1.75 and the other near -1.71, which makes 2^(dimension / 2) modes. Target of Midgley et al., Flow
    Annealed Importance Sampling Bootstrap (ICLR 2023), who use 32 dimensions.

    Parameters
    ----------
    dimension : int
        Even, at least 2.

    Attributes
    ----------
    wells : int
        dimension / 2.
    log_z : float
        log of the integral of exp(-u), by quadrature to 10 digits.

    Examples
    --------
    >>> target = ManyWell(8)
    >>> round(target.log_z, 3), round(target.entropy, 4)
    (41.174, 6.8743)
    >>> x = target.sample(5, torch.Generator().manual_seed(0))
    >>> x.shape, target.modes(x).shape
    (torch.Size([5, 8]), torch.Size([5, 4]))
    """

    def __init__(self, dimension: int) -> None:
        dimension = whole("dimension", dimension, 2)
        if dimension % 2:
            raise InputError(f"dimension must be even, as the coordinates come in pairs, not {dimension}.")
        super().__init__((dimension,))
        self.wells = dimension // 2
        # exp(-u) has fallen by more than exp(-80) at the ends
        self._law = _Law(_lopsided_well, -3.5, 3.5)
        self.log_z = self.wells * (self._law.log_z + _GAUSSIAN_LOG_Z)

    def reduced(self, x: Tensor) -> Tensor:
        y = x[:, 1::2]
        return (_lopsided_well(x[:, 0::2]) + 0.5 * y * y).sum(-1)

    @property
    def entropy(self) -> float:
        """Differential entropy of the normalised density."""
        return self.wells * (self._law.entropy + _GAUSSIAN_ENTROPY)

    @property
    def mode_weights(self) -> Tensor:
        """Probability of x_i > 0 in every well, (wells,) float64."""
        return torch.full((self.wells,), self._law.above_zero, dtype=torch.float64)

    def modes(self, x: Tensor) -> Tensor:
        """Which side of every well a point is on: (n, dimension) to (n, wells), true where x_i > 0."""
        self._check(x)
        return x[:, 0::2] > 0

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """Independent samples, (n, dimension) float64.

        Wells are drawn by inverting a distribution function tabulated on 65 537 points and linear in between; it is
        wrong by less than 1e-8, which no sample of less than 1e15 points could show.
        """
        pairs = normal(n, self.wells, 2, generator=generator)
        pairs[..., 0] = self._law.sample(n, self.wells, generator=generator)
        return pairs.flatten(1)


class ManyWellDelta(Energy):
    r"""Symmetric double wells and Gaussians: u = sum_{i <= wells} (x_i^2 - delta)^2 + 0.5 sum_{i > wells} x_i^2.

    The wells are the first coordinates; each has minima at +-sqrt(delta) and a barrier of delta^2, which makes
    2^wells modes of equal weight. Target of Richter & Berner, Improved Sampling via Learned Diffusions (ICLR 2024),
    with (dimension, wells, delta) = (5, 5, 4) and (50, 5, 2).

    Parameters
    ----------
    dimension : int
    wells : int
        At least 1, at most `dimension`.
    delta : float
        Positive.

    Attributes
    ----------
    log_z : float
        log of the integral of exp(-u), by quadrature to 10 digits.

    Examples
    --------
    >>> target = ManyWellDelta(8, wells=8, delta=2.0)
    >>> round(target.log_z, 5), round(target.entropy, 4)
    (2.34401, 6.9785)
    >>> target.sample(5, torch.Generator().manual_seed(0)).shape
    torch.Size([5, 8])
    """

    def __init__(self, dimension: int, wells: int, delta: float) -> None:
        dimension = whole("dimension", dimension, 1)
        wells = whole("wells", wells, 1)
        if wells > dimension:
            raise InputError(f"wells must be at most the dimension, {dimension}, not {wells}.")
        super().__init__((dimension,))
        self.wells = wells
        self.delta = positive("delta", delta)
        # only |x| is tabulated, where exp(-u) > exp(-56): the grid stays fine however large delta is
        ends = math.sqrt(max(0.0, self.delta - 7.5)), math.sqrt(self.delta + 7.5)
        self._law = _Law(self._well, *ends)
        self.log_z = wells * (self._law.log_z + math.log(2)) + (dimension - wells) * _GAUSSIAN_LOG_Z

    def reduced(self, x: Tensor) -> Tensor:
        rest = x[:, self.wells :]
        return self._well(x[:, : self.wells]).sum(-1) + 0.5 * (rest * rest).sum(-1)

    @property
    def entropy(self) -> float:
        """Differential entropy of the normalised density."""
        rest = self.event_shape[0] - self.wells
        return self.wells * (self._law.entropy + math.log(2)) + rest * _GAUSSIAN_ENTROPY

    @property
    def mode_weights(self) -> Tensor:
        """Probability of x_i > 0 in every well, (wells,) float64: one half."""
        return torch.full((self.wells,), 0.5, dtype=torch.float64)

    def modes(self, x: Tensor) -> Tensor:
        """Which side of every well a point is on: (n, dimension) to (n, wells), true where x_i > 0."""
        self._check(x)
        return x[:, : self.wells] > 0

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """Independent samples, (n, dimension) float64, as exact as those of `ManyWell`."""
        x = normal(n, self.event_shape[0], generator=generator)
        size = self._law.sample(n, self.wells, generator=generator)
        x[:, : self.wells] = torch.where(uniform(n, self.wells, generator=generator) < 0.5, -size, size)
        return x

    def _well(self, x: Tensor) -> Tensor:
        return (x * x - self.delta).square()


class _Law:
    """The density exp(-energy) on an interval, from a table."""

    def __init__(self, energy: Callable[[Tensor], Tensor], lower: float, upper: float, points: int = 2**16 + 1) -> None:
        self.x = torch.linspace(lower, upper, points, dtype=torch.float64)
        u = energy(self.x)
        weight = torch.exp(u.min() - u)
        step = (upper - lower) / (points - 1)
        cumulative = torch.zeros_like(weight)
        cumulative[1:] = 0.5 * step * torch.cumsum(weight[1:] + weight[:-1], 0)
        self.cdf = cumulative / cumulative[-1]
        self.log_z = float(cumulative[-1].log() - u.min())
        self.entropy = self.log_z + float(torch.trapezoid(weight * u, dx=step) / cumulative[-1])
        self.above_zero = 1 - float(self.cdf[(self.x > -step / 2).nonzero()[0, 0]])

    def sample(self, *shape: int, generator: torch.Generator) -> Tensor:
        u = uniform(*shape, generator=generator)
        x, cdf = self.x.to(u.device), self.cdf.to(u.device)
        right = torch.searchsorted(cdf, u).clamp(1, len(cdf) - 1)
        left = right - 1
        return x[left] + (x[right] - x[left]) * (u - cdf[left]) / (cdf[right] - cdf[left])


def _lopsided_well(x: Tensor) -> Tensor:
    square = x * x
    return square * (square - 6) - 0.5 * x
