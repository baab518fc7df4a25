"""Monotone rational-quadratic splines, on an interval with identity tails and on the circle.

The spline carries samples to latents: widths lie on the sample's axis, heights on the latent's, so that a bin's height
is (up to 2 pi) the probability it holds. Samples lie in columns and the numbers of a spline above each other: ``(...,
numbers, batch)``, so that no operation runs along a short last dimension. Formulas: Durkan et al., Neural Spline Flows
(2019), section 3.1; the circle: Rezende et al., Normalizing Flows on Tori and Spheres (2020).
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
    x: Tensor, bins: Tensor, slopes: Tensor, bound: float, *, inverse: bool = False
) -> tuple[Tensor, Tensor]:
    """A monotone spline of [-bound, bound] onto itself.

    Parameters
    ----------
    x : Tensor, (..., batch)
        Values inside the interval.
    bins : Tensor, (..., 2, bins, batch)
        Widths and heights, unnormalised; a softmax gives the bins.
    slopes : Tensor, (..., bins + 1, batch) or (..., bins, batch)
        Unnormalised derivatives at the knots; zero means a derivative of 1. Where the last is not given it is the
        first: a period.
    bound : float
    inverse : bool
        Go from the height axis to the width axis.

    Returns
    -------
    y, log_derivative : Tensor, (..., batch)
    """
    count = bins.shape[-2]
    shares = functional.softmax(bins, -2)
    minimum = MIN_HEIGHT if inverse else MIN_WIDTH
    with torch.no_grad():
        axis = minimum + (1 - minimum * count) * shares[..., 1 if inverse else 0, :-1, :]
        # bins are told apart by their inner edges only: every x falls in exactly one, whatever the rounding
        edges = axis.new_ones(count - 1, count - 1).tril() @ axis
        index = (((x + bound) / (2 * bound))[..., None, :] >= edges).sum(-2, keepdim=True)
        below = (torch.arange(count, device=x.device)[:, None] < index).to(x.dtype)
        following = (index + 1) % slopes.shape[-2]
    own = shares.gather(-2, index[..., None, :, :].expand(*shares.shape[:-2], 1, -1))
    share_w, share_h = own.squeeze(-2).unbind(-2)
    left, low = (below[..., None, :, :] * shares).sum(-2).unbind(-2)
    picked = slopes.gather(-2, torch.cat([index, following], -2))
    d0, d1 = (MIN_SLOPE + functional.softplus(picked + _UNIT_SLOPE)).unbind(-2)
    before = index.squeeze(-2).to(x.dtype)

    def lengths(share: Tensor, bins: Tensor | int, minimum: float) -> Tensor:
        return 2 * bound * (bins * minimum + (1 - minimum * count) * share)

    w, x0 = lengths(share_w, 1, MIN_WIDTH), lengths(left, before, MIN_WIDTH) - bound
    h, y0 = lengths(share_h, 1, MIN_HEIGHT), lengths(low, before, MIN_HEIGHT) - bound
    s = h / w
    curvature = d0 + d1 - 2 * s
    if inverse:
        rise = x - y0
        a = h * (s - d0) + rise * curvature
        b = h * d0 - rise * curvature
        c = -s * rise
        # a root exists by monotonicity; rounding may push the discriminant of a double root below zero
        root = (b.square() - 4 * a * c).clamp(min=0).sqrt()
        t = 2 * c / (-b - root)
    else:
        t = (x - x0) / w
    mixed = t * (1 - t)
    denominator = s + curvature * mixed
    y = x0 + w * t if inverse else y0 + h * (s * t.square() + d0 * mixed) / denominator
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
    x : Tensor, (d, batch)
        Angles in [-pi, pi].
    parameters : Tensor, (d, 3 * bins, batch)
    multiplicity : Tensor, (d, 1)
        Whole numbers, in the dtype of x.
    inverse : bool

    Returns
    -------
    y, log_derivative : Tensor, (d, batch)
    """
    turned = x * multiplicity
    turns = torch.floor((turned.detach() + math.pi) / (2 * math.pi))
    inner = turned - 2 * math.pi * turns
    bins = parameters.shape[-2] // 3
    widths_and_heights, slopes = parameters.split([2 * bins, bins], -2)
    y, log_derivative = rational_quadratic(
        inner, widths_and_heights.unflatten(-2, (2, bins)), slopes, math.pi, inverse=inverse
    )
    return (y + 2 * math.pi * turns) / multiplicity, log_derivative


def interval_parameters(bins: int) -> int:
    """Numbers per dimension of :func:`interval_spline`."""
    return 3 * bins - 1


def interval_spline(x: Tensor, parameters: Tensor, bound: float, *, inverse: bool = False) -> tuple[Tensor, Tensor]:
    """A diffeomorphism of the real line: a spline on [-bound, bound], the identity outside.

    Parameters
    ----------
    x : Tensor, (d, batch)
    parameters : Tensor, (d, 3 * bins - 1, batch)
    bound : float
    inverse : bool

    Returns
    -------
    y, log_derivative : Tensor, (d, batch)
    """
    bins = (parameters.shape[-2] + 1) // 3
    widths_and_heights, slopes = parameters.split([2 * bins, bins - 1], -2)
    # zero, the unit slope, at both ends: the tails join smoothly
    slopes = functional.pad(slopes, (0, 0, 1, 1))
    inside = x.abs() <= bound
    y, log_derivative = rational_quadratic(
        torch.where(inside, x, 0.0), widths_and_heights.unflatten(-2, (2, bins)), slopes, bound, inverse=inverse
    )
    return torch.where(inside, y, x), torch.where(inside, log_derivative, 0.0)
