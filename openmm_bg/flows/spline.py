"""Monotone rational-quadratic splines, on an interval with identity tails and on the circle.

The spline carries samples to latents: widths lie on the sample's axis, heights on the latent's, so that a bin's height
is (up to 2 pi) the probability it holds. Formulas: Durkan et al., Neural Spline Flows (2019), section 3.1; the circle:
Rezende et al., Normalizing Flows on Tori and Spheres (2020).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

MIN_WIDTH = 1e-3
MIN_HEIGHT = 1e-5
MIN_SLOPE = 1e-4
# softplus(_UNIT_SLOPE) + MIN_SLOPE = 1: zero parameters are the identity
_UNIT_SLOPE = math.log(math.expm1(1 - MIN_SLOPE))


def rational_quadratic(
    x: Tensor, widths: Tensor, heights: Tensor, slopes: Tensor, bound: float, *, inverse: bool = False
) -> tuple[Tensor, Tensor]:
    """A monotone spline of [-bound, bound] onto itself.

    Parameters
    ----------
    x : Tensor, (...)
        Values inside the interval.
    widths, heights : Tensor, (..., bins)
        Unnormalised; a softmax gives the bins.
    slopes : Tensor, (..., bins + 1)
        Unnormalised derivatives at the knots; zero means a derivative of 1.
    bound : float
    inverse : bool
        Go from the height axis to the width axis.

    Returns
    -------
    y, log_derivative : Tensor, (...)
    """
    bins = widths.shape[-1]
    # bins go first in memory: a softmax over a short last dimension is tens of times slower on a CPU
    widths, heights, slopes = (p.movedim(-1, 0).contiguous() for p in (widths, heights, slopes))
    width = 2 * bound * (MIN_WIDTH + (1 - MIN_WIDTH * bins) * functional.softmax(widths, 0))
    height = 2 * bound * (MIN_HEIGHT + (1 - MIN_HEIGHT * bins) * functional.softmax(heights, 0))
    slope = MIN_SLOPE + functional.softplus(slopes + _UNIT_SLOPE)
    left, low = width.cumsum(0) - bound, height.cumsum(0) - bound
    # bins are told apart by their inner edges only: every x falls in exactly one, whatever the rounding
    edges = (low if inverse else left)[:-1].detach()
    index = (x.detach() >= edges).sum(0, keepdim=True)

    def pick(values: Tensor) -> Tensor:
        return values.gather(0, index).squeeze(0)

    w, h, d0, d1 = pick(width), pick(height), pick(slope[:-1]), pick(slope[1:])
    x0, y0 = pick(left) - w, pick(low) - h
    s = h / w
    if inverse:
        rise = x - y0
        curvature = d0 + d1 - 2 * s
        a = h * (s - d0) + rise * curvature
        b = h * d0 - rise * curvature
        c = -s * rise
        # a root exists by monotonicity; rounding may push the discriminant of a double root below zero
        root = (b.square() - 4 * a * c).clamp(min=0).sqrt()
        t = 2 * c / (-b - root)
        y = x0 + w * t
    else:
        t = (x - x0) / w
        y = y0 + h * (s * t.square() + d0 * t * (1 - t)) / (s + (d0 + d1 - 2 * s) * t * (1 - t))
    mixed = t * (1 - t)
    denominator = s + (d0 + d1 - 2 * s) * mixed
    derivative = s.square() * (d1 * t.square() + 2 * s * mixed + d0 * (1 - t).square()) / denominator.square()
    log_derivative = derivative.log()
    return y, -log_derivative if inverse else log_derivative


def circular_parameters(bins: int) -> int:
    """Numbers per dimension of :func:`circular_spline`."""
    return 3 * bins


def circular_spline(
    x: Tensor, parameters: Tensor, multiplicity: Tensor, *, inverse: bool = False
) -> tuple[Tensor, Tensor]:
    """A smooth diffeomorphism of the circle that commutes with turns by 2 pi / multiplicity.

    With multiplicity m the map is ``x -> (S(m x) + 2 pi k) / m`` where S is the spline on [-pi, pi) and k counts the
    turns of m x: a density with the symmetry of an m-fold rotor, still one bijection of the circle.

    Parameters
    ----------
    x : Tensor, (batch, d)
        Angles in [-pi, pi].
    parameters : Tensor, (batch, d, 3 * bins)
    multiplicity : Tensor, (d,)
        Whole numbers, in the dtype of x.
    inverse : bool

    Returns
    -------
    y, log_derivative : Tensor, (batch, d)
    """
    turned = x * multiplicity
    turns = torch.floor((turned.detach() + math.pi) / (2 * math.pi))
    inner = turned - 2 * math.pi * turns
    widths, heights, slopes = parameters.chunk(3, -1)
    slopes = torch.cat([slopes, slopes[..., :1]], -1)
    y, log_derivative = rational_quadratic(inner, widths, heights, slopes, math.pi, inverse=inverse)
    return (y + 2 * math.pi * turns) / multiplicity, log_derivative


def interval_parameters(bins: int) -> int:
    """Numbers per dimension of :func:`interval_spline`."""
    return 3 * bins - 1


def interval_spline(x: Tensor, parameters: Tensor, bound: float, *, inverse: bool = False) -> tuple[Tensor, Tensor]:
    """A diffeomorphism of the real line: a spline on [-bound, bound], the identity outside.

    Parameters
    ----------
    x : Tensor, (batch, d)
    parameters : Tensor, (batch, d, 3 * bins - 1)
    bound : float
    inverse : bool

    Returns
    -------
    y, log_derivative : Tensor, (batch, d)
    """
    bins = (parameters.shape[-1] + 1) // 3
    widths, heights, slopes = parameters.split([bins, bins, bins - 1], -1)
    # zero, the unit slope, at both ends: the tails join smoothly
    slopes = functional.pad(slopes, (1, 1))
    inside = x.abs() <= bound
    y, log_derivative = rational_quadratic(torch.where(inside, x, 0.0), widths, heights, slopes, bound, inverse=inverse)
    return torch.where(inside, y, x), torch.where(inside, log_derivative, 0.0)
