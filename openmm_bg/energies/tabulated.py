"""Tabulated functions of OpenMM's custom forces and torsion maps, as functions an expression can call.

All have `dimensions`, `smooth` (whether they have derivatives), ``evaluate(arguments, orders)`` for torch, and
``numbers()``, the same as one array for the compiled kernel (`prelude.h` says in which order).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import openmm
import torch
from scipy.interpolate import CubicSpline
from torch import Tensor

from openmm_bg.errors import InputError

_NATURAL, _PERIODIC, _DISCRETE = 0.0, 1.0, 2.0

# Coefficients of 1, t, t^2, t^3 of the cubic with values f0, f1 and slopes d0, d1 at the ends of a unit cell.
_HERMITE = np.array([[1, 0, 0, 0], [0, 0, 1, 0], [-3, 3, -2, -1], [2, -2, 1, 1]], dtype=np.float64)


class Discrete:
    """A table of numbers, looked up at the nearest whole arguments; NaN outside.

    Parameters
    ----------
    values
        ``(n1, ...)``: one axis for each argument.
    """

    smooth = False

    def __init__(self, values: np.ndarray) -> None:
        self.values = np.asarray(values, dtype=np.float64)
        self.dimensions: int = self.values.ndim

    def evaluate(self, arguments: Sequence[Tensor], orders: Sequence[int]) -> Tensor:
        """Values at arguments that broadcast against each other."""
        arguments = torch.broadcast_tensors(*arguments)
        place, valid = _nearest(arguments, self.values.shape)
        found = torch.as_tensor(self.values).to(arguments[0]).flatten()[place]
        return found.masked_fill(~valid, torch.nan) * (0.0 if any(orders) else 1.0)

    def numbers(self) -> np.ndarray:
        head = [_DISCRETE, *itertools.chain.from_iterable((n, 0.0, 1.0) for n in self.values.shape)]
        return np.concatenate((head, self.values.ravel()))


class Spline:
    """A piecewise cubic, bicubic or tricubic function on a regular grid.

    One-dimensional splines along each axis give the slopes at the grid points, and splines of those the mixed
    ones; each cell is the polynomial with these values at its corners.

    Parameters
    ----------
    values
        On the grid, one axis for each argument. In a periodic function the last point repeats the first.
    lower, upper
        The ends of the grid along each axis.
    periodic
        Whether arguments wrap around. If not, the splines are natural and the function is 0 outside.

    Attributes
    ----------
    coefficients : ndarray
        ``(*cells, 4**dimensions)``: of the powers of the place t in [0, 1] within a cell, the last argument's power
        running fastest.
    """

    smooth = True

    def __init__(self, values: np.ndarray, lower: Sequence[float], upper: Sequence[float], periodic: bool) -> None:
        values = np.asarray(values, dtype=np.float64)
        self.dimensions: int = values.ndim
        self.periodic = bool(periodic)
        self.cells: tuple[int, ...] = tuple(n - 1 for n in values.shape)
        self.lower = np.asarray(lower, dtype=np.float64)
        self.spacing = (np.asarray(upper, dtype=np.float64) - self.lower) / self.cells
        self.coefficients = _coefficients(values, self.periodic)

    def evaluate(self, arguments: Sequence[Tensor], orders: Sequence[int]) -> Tensor:
        """Values, or derivatives of the given orders, at arguments that broadcast against each other."""
        arguments = torch.broadcast_tensors(*arguments)
        valid = torch.ones_like(arguments[0], dtype=torch.bool)
        inside = torch.ones_like(valid)
        cell = torch.zeros_like(valid, dtype=torch.int64)
        powers = []
        for axis, (x, order) in enumerate(zip(arguments, orders, strict=True)):
            count, h = self.cells[axis], float(self.spacing[axis])
            position = (x - float(self.lower[axis])) / h
            valid &= torch.isfinite(position)
            position = torch.where(valid, position, 0.0)
            if self.periodic:
                position = position - count * torch.floor(position / count)
            inside &= (position >= 0) & (position <= count)
            whole = torch.floor(position).clamp(0, count - 1)
            cell = cell * count + whole.to(torch.int64)
            powers.append(_powers(position - whole, order, h))
        found = torch.as_tensor(self.coefficients).to(arguments[0]).reshape(-1, 4**self.dimensions)[cell]
        total = _contract(found, powers)
        return torch.where(inside, total, 0.0).masked_fill(~valid, torch.nan)

    def numbers(self) -> np.ndarray:
        head: list[float] = [_PERIODIC if self.periodic else _NATURAL]
        for axis in range(self.dimensions):
            head += [self.cells[axis], self.lower[axis], self.spacing[axis]]
        return np.concatenate((head, self.coefficients.ravel()))


class Maps:
    """The maps of a CMAPTorsionForce that have one size: energies of (map, angle, angle), periodic in the angles.

    Parameters
    ----------
    energies
        ``(maps, size * size)``, with the energy at angles ``a h, b h`` at index ``a + size b``, h = 2 pi / size.
    size
        Points along each angle.
    """

    dimensions = 3
    smooth = True

    def __init__(self, energies: np.ndarray, size: int) -> None:
        grids = np.asarray(energies, dtype=np.float64).reshape(-1, size, size).transpose(0, 2, 1)
        closed = np.concatenate((grids, grids[:, :1]), 1)
        closed = np.concatenate((closed, closed[:, :, :1]), 2)
        self.maps = [Spline(grid, (0, 0), (2 * math.pi, 2 * math.pi), True) for grid in closed]
        self.size = size

    def evaluate(self, arguments: Sequence[Tensor], orders: Sequence[int]) -> Tensor:
        """Energies, or derivatives, at arguments that broadcast against each other."""
        number, a, b = torch.broadcast_tensors(*arguments)
        if orders[0]:
            return torch.zeros_like(a)
        total = torch.full_like(a, torch.nan)
        for k, spline in enumerate(self.maps):
            here = number == k
            if bool(here.any()):
                total = torch.where(here, spline.evaluate((a, b), orders[1:]), total)
        return total

    def numbers(self) -> np.ndarray:
        """As one spline in three arguments, flat within each cell of the first."""
        h = 2 * math.pi / self.size
        head = [_NATURAL + 3.0, len(self.maps), 0.0, 1.0, self.size, 0.0, h, self.size, 0.0, h]
        return np.concatenate((head, *(spline.coefficients.ravel() for spline in self.maps)))


def read_functions(force: Any) -> dict[str, Discrete | Spline]:
    """The tabulated functions of a custom force, by name.

    Raises
    ------
    InputError
        If OpenMM has a kind of function that is not known here.
    """
    return {
        force.getTabulatedFunctionName(n): _read(force.getTabulatedFunction(n))
        for n in range(force.getNumTabulatedFunctions())
    }


def _read(function: openmm.TabulatedFunction) -> Discrete | Spline:
    name, parameters = type(function).__name__, list(function.getFunctionParameters())
    dimensions = int(name[-10])  # Continuous1DFunction, Discrete2DFunction, ...
    if name.startswith("Discrete"):
        if dimensions == 1:
            return Discrete(np.array(parameters))
        *sizes, values = parameters
        return Discrete(np.array(values).reshape(sizes[::-1]).T)
    if name.startswith("Continuous"):
        if dimensions == 1:
            values, low, high = parameters
            return Spline(np.array(values), (low,), (high,), function.getPeriodic())
        sizes, values, ends = parameters[:dimensions], parameters[dimensions], parameters[dimensions + 1 :]
        grid = np.array(values).reshape(sizes[::-1]).T
        return Spline(grid, ends[0::2], ends[1::2], function.getPeriodic())
    raise InputError(f"A tabulated function of the kind {name} is not known; use a Discrete or Continuous one.")


def _nearest(arguments: Sequence[Tensor], sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Row-major places of the nearest whole numbers, and whether they lie in the table."""
    place = torch.zeros_like(arguments[0], dtype=torch.int64)
    valid = torch.ones_like(place, dtype=torch.bool)
    for x, size in zip(arguments, sizes, strict=True):
        whole = torch.floor(x + 0.5)
        valid &= (whole >= 0) & (whole < size)
        place = place * size + torch.where(valid, whole, 0.0).to(torch.int64)
    return place, valid


def _powers(t: Tensor, order: int, spacing: float) -> list[Tensor | float]:
    """1, t, t^2, t^3, differentiated `order` times."""
    scale = spacing**-order
    return [0.0 if p < order else math.perm(p, order) * scale * t ** (p - order) for p in range(4)]


def _contract(found: Tensor, powers: Sequence[Sequence[Tensor | float]]) -> Tensor:
    """Sums of coefficients ``(..., 4**d)`` times one power for each argument."""
    if not powers:
        return found[..., 0]
    step = 4 ** (len(powers) - 1)
    parts = [_contract(found[..., p * step : (p + 1) * step], powers[1:]) * powers[0][p] for p in range(4)]
    return parts[0] + parts[1] + parts[2] + parts[3]


def _slopes(values: np.ndarray, axis: int, periodic: bool) -> np.ndarray:
    """First derivatives at the grid points along an axis, times the spacing."""
    if values.shape[axis] == 2 and periodic:
        return np.zeros_like(values)
    if periodic:  # the last point is the first by definition, whatever it says
        values = np.concatenate((np.delete(values, -1, axis), np.take(values, [0], axis)), axis)
    kind = "periodic" if periodic else "natural"
    spline = CubicSpline(np.arange(values.shape[axis]), values, axis=axis, bc_type=kind)
    return spline(np.arange(values.shape[axis]), 1)


def _coefficients(values: np.ndarray, periodic: bool) -> np.ndarray:
    """Tensor products of Hermite cubics: along each axis in turn, values and slopes become coefficients."""
    corners = values[..., None]  # the last axis collects what belongs to each cell
    for axis in range(values.ndim):
        slopes = _slopes(corners, axis, periodic)
        count = values.shape[axis] - 1
        ends = [np.take(a, np.arange(k, k + count), axis) for a in (corners, slopes) for k in (0, 1)]
        # (..., previous, 4) -> coefficients of the four powers, the new axis running fastest
        corners = np.einsum("pe,e...->...p", _HERMITE, np.stack(ends)).reshape(*ends[0].shape[:-1], -1)
    return corners
