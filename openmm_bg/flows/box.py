"""Base densities on a bounded box: uniform, or a Gaussian cut at the walls."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from openmm_bg.errors import InputError


class BoxBase(nn.Module):
    """Independent coordinates on a box, each uniform or normal and cut at its walls; exact draws, exact density.

    There is no broadened copy: a density that fills a bounded box and vanishes nowhere in it has no tails to be made
    heavier, so ``broadened`` is accepted, as :class:`openmm_bg.flows.Base` takes it, and changes nothing.

    Parameters
    ----------
    bounds : sequence of (low, high)
        The walls, one pair per dimension.
    std : float or sequence of float, optional
        Standard deviations of the normals before they are cut; None (the default) for the uniform density.
    mean : float or sequence of float
        Their centres before they are cut, inside the box.

    Raises
    ------
    InputError
        For walls in the wrong order, a std that is not positive, or a mean outside the box.

    Examples
    --------
    >>> base = BoxBase([(-1, 1), (0, 2)])
    >>> base.log_prob(torch.tensor([[0.5, 0.5], [0.5, -0.5]], dtype=torch.float64)).exp()
    tensor([0.2500, 0.0000], dtype=torch.float64)
    """

    def __init__(
        self,
        bounds: Sequence[tuple[float, float]],
        std: float | Sequence[float] | None = None,
        mean: float | Sequence[float] = 0.0,
    ):
        walls = check_bounds(bounds)
        super().__init__()
        self.register_buffer("low", walls[:, 0].clone(), persistent=False)
        self.register_buffer("high", walls[:, 1].clone(), persistent=False)
        self.uniform = std is None
        if std is None:
            return
        for name, given in (("std", std), ("mean", mean)):
            values = torch.as_tensor(given, dtype=torch.float64)
            if values.shape not in ((), (len(walls),)) or not torch.isfinite(values).all():
                raise InputError(f"{name} must be a finite number, or one per dimension, not {given}.")
            self.register_buffer(name, values.expand(len(walls)).clone(), persistent=False)
        if not (self.std > 0).all():
            raise InputError(f"std must be positive, not {std}.")
        if not ((self.mean >= self.low) & (self.mean <= self.high)).all():
            raise InputError(f"mean must lie inside the box, not at {mean}.")

    @property
    def dimension(self) -> int:
        return len(self.low)

    def _normal_cdf_at_walls(self) -> tuple[Tensor, Tensor]:
        low, high = ((wall - self.mean) / self.std for wall in (self.low, self.high))
        return torch.special.ndtr(low), torch.special.ndtr(high)

    def contains(self, z: Tensor) -> Tensor:
        """Which rows of ``(batch, dimension)`` lie in the closed box, ``(batch,)`` bool."""
        return ((z >= self.low) & (z <= self.high)).all(-1)

    def sample(self, n: int, generator: torch.Generator | None = None, *, broadened: bool = False) -> Tensor:
        """``n`` independent draws, ``(n, dimension)``, by the inverse of the cumulative distribution."""
        options = {"generator": generator, "dtype": self.low.dtype, "device": self.low.device}
        share = torch.rand(n, self.dimension, **options)
        if self.uniform:
            return self.low + share * (self.high - self.low)
        below, above = self._normal_cdf_at_walls()
        z = self.mean + self.std * torch.special.ndtri(below + share * (above - below))
        # only rounding can carry a draw past a wall
        return torch.minimum(torch.maximum(z, self.low), self.high)

    def log_prob(self, z: Tensor, *, broadened: bool = False) -> Tensor:
        """Log-density, ``(batch,)``; -inf outside the box and for values that are not finite."""
        if self.uniform:
            value = z.new_zeros(len(z)) - (self.high - self.low).log().sum()
        else:
            below, above = self._normal_cdf_at_walls()
            constant = (self.std.log() + 0.5 * math.log(2 * math.pi) + (above - below).log()).sum()
            value = -0.5 * ((z - self.mean) / self.std).square().sum(-1) - constant
        return torch.where(self.contains(z), value, -math.inf)


def check_bounds(bounds: Sequence[tuple[float, float]], dimension: int | None = None) -> Tensor:
    """The walls as a float64 tensor ``(dimension, 2)``; InputError where they make no box."""
    walls = torch.as_tensor(bounds, dtype=torch.float64)
    if walls.ndim != 2 or walls.shape[1] != 2 or not len(walls) or (dimension or len(walls)) != len(walls):
        raise InputError(f"bounds must be {dimension or 'one or more'} pairs (low, high), not {bounds}.")
    if not torch.isfinite(walls).all() or not (walls[:, 0] < walls[:, 1]).all():
        raise InputError(f"every pair of bounds must be finite with low below high, not {bounds}.")
    return walls
