"""What importance weights say by themselves: their effective size, how heavy their tail is, and a smoother one."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from openmm_bg.analysis.statistics import kish_size
from openmm_bg.errors import InputError

_CLIPPED = 1e-4
_FEWEST_IN_TAIL = 5


class WeightSize(NamedTuple):
    """Kish's effective share of the draws, the same with the largest 0.01 % clipped, and log of the mean weight."""

    share: float
    clipped: float
    log_mean: float


class ParetoShape(NamedTuple):
    """k with its standard error."""

    value: float
    error: float


def weight_size(log_weights: ArrayLike) -> WeightSize:
    """Effective size of importance weights, ``(n,)``, by the conventions of ``sampling.effective_sample_size``."""
    log_w = _log_weights(log_weights)
    n, top = len(log_w), log_w.max(initial=-math.inf)
    if top == -math.inf:
        raise InputError("All weights are zero; the generator and the target do not overlap.")
    weights = np.exp(log_w - top)
    largest = min(math.ceil(_CLIPPED * n), n - 1)
    clipped = np.minimum(weights, np.partition(weights, -largest - 1)[-largest - 1])
    share = kish_size(clipped) / n if clipped.any() else 0.0
    return WeightSize(kish_size(weights) / n, share, float(top + math.log(weights.mean())))


def pareto_shape(log_weights: ArrayLike) -> ParetoShape:
    """Shape k of the generalised Pareto distribution that the largest weights follow.

    Moments of the weights exist below the order 1/k: from k = 1/2 on their variance is infinite, and above 0.7
    estimates from any affordable number of draws are unreliable [2]_. The tail is the min(n / 5, 3 sqrt(n)) largest
    weights, the fit a mean over the profile posterior of [1]_, drawn towards 1/2 by ten weights' worth.

    Parameters
    ----------
    log_weights : (n,) array
        Up to a constant; -inf is a weight of zero.

    Returns
    -------
    ParetoShape
        k and its asymptotic standard error, (1 + k) / sqrt(tail). Both are NaN where fewer than five weights make the
        tail, or most of it is equal.

    References
    ----------
    .. [1] Zhang & Stephens, Technometrics 51, 316 (2009).
    .. [2] Vehtari, Simpson, Gelman, Yao & Gabry, J. Mach. Learn. Res. 25, 72 (2024).

    Examples
    --------
    >>> uniform = np.random.default_rng(0).random(100_000)
    >>> k, error = pareto_shape(-0.5 * np.log(uniform))    # weights u^-k
    >>> bool(abs(k - 0.5) < 3 * error)
    True
    """
    fit = _fit_tail(np.sort(_log_weights(log_weights)))
    return ParetoShape(math.nan, math.nan) if fit is None else fit.shape


class SmoothedWeights(NamedTuple):
    """Log weights whose tail follows its fitted law, in the order given; and the shape of that law."""

    log_weights: NDArray[np.float64]
    shape: ParetoShape


def pareto_smooth(log_weights: ArrayLike) -> SmoothedWeights:
    """Pareto-smoothed importance weights: the largest are replaced by the expected order statistics of their law.

    That trades a little bias for much variance while k is below 0.7; above, no smoothing helps (see
    :func:`pareto_shape`, whose tail and fit these are). No weight ends above the largest one that was drawn [1]_.

    Parameters
    ----------
    log_weights : (n,) array
        Up to a constant; -inf is a weight of zero.

    Returns
    -------
    SmoothedWeights
        The weights as they were, and a NaN shape, where there is no tail to fit.

    References
    ----------
    .. [1] Vehtari, Simpson, Gelman, Yao & Gabry, J. Mach. Learn. Res. 25, 72 (2024), section 2.

    Examples
    --------
    >>> raw = 0.6 * np.random.default_rng(0).exponential(size=10_000)    # weights with k = 0.6 and mean 2.5
    >>> smooth, shape = pareto_smooth(raw)
    >>> round(shape.value, 1), bool(abs(np.exp(smooth).mean() - 2.5) < 0.1)
    (0.6, True)
    """
    log_w = _log_weights(log_weights)
    order = np.argsort(log_w, kind="stable")
    fit = _fit_tail(log_w[order])
    if fit is None:
        return SmoothedWeights(log_w, ParetoShape(math.nan, math.nan))
    top, k = log_w[order[-1]], fit.k
    quantiles = (np.arange(fit.size) + 0.5) / fit.size
    excess = fit.sigma * (np.expm1(-k * np.log1p(-quantiles)) / k if k else -np.log1p(-quantiles))
    smoothed = log_w.copy()
    smoothed[order[-fit.size :]] = np.minimum(np.log(fit.threshold + excess), 0.0) + top
    return SmoothedWeights(smoothed, fit.shape)


class _Tail(NamedTuple):
    """A generalised Pareto law of the largest ``size`` weights, in units of the largest."""

    size: int
    threshold: float
    sigma: float
    k: float
    shape: ParetoShape


def _fit_tail(log_w: NDArray[np.float64]) -> _Tail | None:
    """From log weights in rising order; None where fewer than five make the tail, or most of it is equal."""
    n = len(log_w)
    tail = math.ceil(min(n / 5, 3 * math.sqrt(n)))
    if tail < _FEWEST_IN_TAIL or np.isneginf(log_w[-1]):
        return None
    # the excess over the largest weight that is not in the tail, in units of the largest
    weights = np.exp(log_w[-tail - 1 :] - log_w[-1])
    excess = weights[1:] - weights[0]
    quartile = excess[int(tail / 4 + 0.5) - 1]
    if quartile == 0:
        return None
    points = 30 + math.isqrt(tail)
    # theta = -k / sigma on the quantiles of its prior
    theta = 1 / excess[-1] + (1 - np.sqrt(points / (np.arange(points) + 0.5))) / (3 * quartile)
    k = np.log1p(-theta[:, None] * excess).mean(1)
    profile = tail * (np.log(-theta / k) - k - 1)
    posterior = np.exp(profile - profile.max())
    mean = float(posterior @ theta / posterior.sum())
    raw = float(np.log1p(-mean * excess).mean())
    shape = (tail * raw + 10 * 0.5) / (tail + 10)
    return _Tail(tail, float(weights[0]), -raw / mean, shape, ParetoShape(shape, (1 + shape) / math.sqrt(tail)))


def _log_weights(log_weights: ArrayLike) -> NDArray[np.float64]:
    log_w = np.asarray(log_weights, dtype=np.float64)
    if log_w.ndim != 1 or np.isnan(log_w).any() or np.isposinf(log_w).any():
        raise InputError("Log weights must be one row of numbers without NaN and +inf; find the faulty energy first.")
    return log_w
