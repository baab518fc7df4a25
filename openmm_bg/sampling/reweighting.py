"""Weighted samples: effective size, normalisation, averages, resampling.

Everywhere ``log w = -u(x) - log_prob(x)``, in float64, with log-sum-exp. A weight may be zero (log w =
-inf: an impossible conformation that was drawn is part of the statistics and must stay in the sample). NaN
and +inf are refused.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.special import logsumexp

from openmm_bg.errors import InputError


class EffectiveSampleSize(NamedTuple):
    """Effective sample size as a fraction of `n` draws.

    Attributes
    ----------
    fraction : float
        (sum w)^2 / (n sum w^2), nothing clipped. 0 if every weight is zero.
    n : int
        Number of draws. The fraction means nothing without it: it falls with n while the largest weights
        are still unseen.
    clipped : float
        The same after the ceil(n / 10^4) largest weights were lowered to the next largest one. A large gap
        between the two says that single draws dominate.
    """

    fraction: float
    n: int
    clipped: float

    @property
    def size(self) -> float:
        """Equivalent number of equally weighted draws, n * fraction."""
        return self.n * self.fraction


class Estimate(NamedTuple):
    """A value with its standard error (both scalars, or arrays of one shape)."""

    value: float | NDArray[np.float64]
    error: float | NDArray[np.float64]


CLIPPED_FRACTION = 1e-4


def effective_sample_size(log_weights: ArrayLike | torch.Tensor) -> EffectiveSampleSize:
    """Kish's effective sample size of importance weights.

    Parameters
    ----------
    log_weights : array_like or Tensor, shape (n,)

    Returns
    -------
    EffectiveSampleSize

    Notes
    -----
    This "reverse" figure is computed on the generator's own draws and is blind to every mode the generator
    never visits; print :func:`forward_effective_sample_size` and :func:`largest_log_ratio` beside it.

    References
    ----------
    Kish, Survey Sampling (1965); the clipping convention is that of Midgley et al., arXiv:2208.01893.

    Examples
    --------
    >>> effective_sample_size([0.0, 0.0, float("-inf"), float("-inf")]).fraction
    0.5
    """
    log_w = _log_weights(log_weights)
    number = math.ceil(CLIPPED_FRACTION * len(log_w))
    clipped = log_w.copy()
    if number < len(log_w):
        order = np.argpartition(log_w, len(log_w) - number - 1)
        clipped[order[-number:]] = log_w[order[-number - 1]]
    return EffectiveSampleSize(_kish(log_w), len(log_w), _kish(clipped))


def _kish(log_w: NDArray[np.float64]) -> float:
    if np.isneginf(log_w).all():
        return 0.0
    weights = np.exp(log_w - log_w.max())
    return float(weights.sum() ** 2 / (len(weights) * np.dot(weights, weights)))


def log_normalizer(log_weights: ArrayLike | torch.Tensor) -> Estimate:
    """log Z = log E_q[w] from the generator's draws, with its standard error by the delta method.

    Z is the integral of exp(-u) over shapes (R^3N modulo rigid motion), in the measure of ``log_prob``.

    Parameters
    ----------
    log_weights : array_like or Tensor, shape (n,)

    Returns
    -------
    Estimate
        Value and error in nats (units of kT). The error is NaN for a single draw.

    Raises
    ------
    InputError
        If every weight is zero.
    """
    log_w = _log_weights(log_weights)
    _some_weight(log_w)
    n = len(log_w)
    value = float(logsumexp(log_w) - math.log(n))
    # Var(w) / E[w]^2 of the sample is 1 / fraction - 1.
    error = math.sqrt(max(0.0, 1.0 / _kish(log_w) - 1.0) / (n - 1)) if n > 1 else math.nan
    return Estimate(value, error)


def forward_effective_sample_size(reference_log_weights: ArrayLike | torch.Tensor, log_z: float) -> float:
    """1 / E_p[p/q]: the effective sample size as seen from frames of the target itself.

    With exact averages it equals the reverse figure, (E_q w)^2 / E_q[w^2]; estimated on frames of the
    target, it notices modes that the generator misses.

    p is normalised by Z, p = exp(-u) / Z, with log Z from :func:`log_normalizer` on the *generator's*
    draws. If the generator misses part of the target, that Z is too small, p/q too large, and the figure
    too low: it errs on the safe side.

    Parameters
    ----------
    reference_log_weights : array_like or Tensor, shape (n,)
        -u(x) - log_prob(x) on independent frames of the target (long MD, held out of training). +inf, a
        frame the generator cannot make, gives 0.
    log_z : float
        From ``log_normalizer(samples.log_weights).value``.

    Returns
    -------
    float
        Fraction; can exceed 1 only by the noise of the estimates.
    """
    log_ratio = _log_ratio(reference_log_weights, log_z)
    if np.isposinf(log_ratio).any():
        return 0.0
    return float(np.exp(math.log(len(log_ratio)) - logsumexp(log_ratio)))


def largest_log_ratio(reference_log_weights: ArrayLike | torch.Tensor, log_z: float) -> float:
    """Largest log p/q on held-out frames of the target.

    An independence chain that stands on a conformation with log p/q = L stays there for about exp(L)
    proposals. Neither the effective sample size nor the acceptance rate shows it.

    Parameters
    ----------
    reference_log_weights, log_z
        As in :func:`forward_effective_sample_size`.

    Returns
    -------
    float
        In nats; +inf if a frame lies outside the generator's support.
    """
    return float(_log_ratio(reference_log_weights, log_z).max())


def reweighted_mean(values: ArrayLike | torch.Tensor, log_weights: ArrayLike | torch.Tensor) -> Estimate:
    """Self-normalised average sum w f / sum w, with its standard error by the delta method.

    Parameters
    ----------
    values : array_like or Tensor, shape (n, ...)
        Observable of each draw. Rows of zero weight do not enter and may be NaN.
    log_weights : array_like or Tensor, shape (n,)

    Returns
    -------
    Estimate
        Arrays of shape (...), scalars for one number per draw. The error holds for independent draws.

    Examples
    --------
    >>> float(reweighted_mean([1.0, 3.0, 100.0], [0.0, 0.0, float("-inf")]).value)
    2.0
    """
    log_w = _log_weights(log_weights)
    f = _array(values)
    if f.ndim == 0 or len(f) != len(log_w):
        raise InputError(f"There are {len(log_w)} weights for values of shape {f.shape}; give one row per weight.")
    _some_weight(log_w)
    kept = ~np.isneginf(log_w)
    f = f[kept]
    weights = np.exp(log_w[kept] - logsumexp(log_w))
    if not np.isfinite(f).all():
        raise InputError("Values with positive weight hold NaN or infinities.")
    mean = np.tensordot(weights, f, axes=1)
    error = np.sqrt(np.tensordot(weights**2, (f - mean) ** 2, axes=1))
    return Estimate(mean[()], error[()])


def resample(log_weights: ArrayLike | torch.Tensor, n: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Indices (n,) drawn independently, with replacement, in proportion to the weights.

    Parameters
    ----------
    log_weights : array_like or Tensor, shape (m,)
    n : int
    rng : numpy.random.Generator

    Raises
    ------
    InputError
        If every weight is zero.
    """
    log_w = _log_weights(log_weights)
    _some_weight(log_w)
    if n < 0:
        raise InputError(f"Cannot draw {n} indices.")
    weights = np.exp(log_w - logsumexp(log_w))
    return rng.choice(len(weights), size=n, p=weights / weights.sum())


def _array(values: ArrayLike | torch.Tensor) -> NDArray[np.float64]:
    if isinstance(values, torch.Tensor):
        values = values.numpy(force=True)
    return np.asarray(values, dtype=np.float64)


def _log_weights(log_weights: ArrayLike | torch.Tensor) -> NDArray[np.float64]:
    log_w = _array(log_weights)
    if log_w.ndim != 1 or log_w.size == 0:
        raise InputError(f"Log weights must be one non-empty row of numbers, not of shape {log_w.shape}.")
    if np.any(np.isnan(log_w) | np.isposinf(log_w)):
        raise InputError("Log weights hold NaN or +inf; find the faulty energy or density first.")
    return log_w


def _some_weight(log_w: NDArray[np.float64]) -> None:
    if np.isneginf(log_w).all():
        raise InputError("All weights are zero; the generator and the target do not overlap.")


def _log_ratio(reference_log_weights: ArrayLike | torch.Tensor, log_z: float) -> NDArray[np.float64]:
    log_w = _array(reference_log_weights)
    if log_w.ndim != 1 or log_w.size == 0:
        raise InputError(f"Reference log weights must be one non-empty row of numbers, not of shape {log_w.shape}.")
    if np.any(np.isnan(log_w) | np.isneginf(log_w)):
        raise InputError("Reference log weights hold NaN or -inf: a frame of the target must have a finite energy.")
    if not math.isfinite(log_z):
        raise InputError(f"log_z must be a finite number, not {log_z}.")
    return log_w - log_z
