"""How much a correlated, weighted series really says: autocorrelation, block errors, block bootstrap."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from openmm_bg.errors import InputError

Array = NDArray[np.float64]

_BLOCKS_PER_INEFFICIENCY = 4
_FEWEST_BLOCKS, _MOST_BLOCKS = 4, 100


def normalized_weights(weights: ArrayLike | None, n: int) -> Array:
    """Weights of n frames that sum to one; equal weights for None.

    Raises
    ------
    InputError
        Where there are not n of them, one is negative or not finite, or all vanish.
    """
    if n < 1:
        raise InputError("There are no frames to analyse; give at least one.")
    if weights is None:
        return np.full(n, 1.0 / n)
    w = np.asarray(weights, dtype=np.float64)
    if w.shape != (n,):
        raise InputError(f"weights has the shape {w.shape}; give one weight for each of the {n} frames.")
    if not np.isfinite(w).all() or (w < 0).any():
        raise InputError("weights must be finite and not negative; give exp(log_weights - max(log_weights)).")
    if not w.max() > 0:
        raise InputError("All weights are zero, so there is nothing to average; check the log weights.")
    w = w / w.max()  # before the sum, which could overflow
    return w / w.sum()


def _series(series: ArrayLike, name: str = "series") -> Array:
    x = np.asarray(series, dtype=np.float64)
    if x.ndim not in (1, 2) or x.shape[-1] < 2:
        raise InputError(f"{name} has the shape {x.shape}; give (frames,) or (chains, frames), two frames or more.")
    if not np.isfinite(x).all():
        raise InputError(f"{name} holds values that are not finite; leave those frames out and say how many.")
    return x


def autocorrelation(series: ArrayLike) -> Array:
    """Normalised autocorrelation at lags 0 ... n - 1, by FFT.

    Parameters
    ----------
    series : (n,) or (chains, n)
        Several chains are averaged about their common mean, so that chains which disagree count as
        correlated.

    Returns
    -------
    (n,) array
        1 at lag 0; every entry NaN where the series never changes.
    """
    x = _series(series)
    n = x.shape[-1]
    x = np.atleast_2d(x - x.mean())
    if not np.ptp(x) > 0:
        return np.full(n, np.nan)
    transform = np.fft.rfft(x, 2 * n, axis=1)
    covariance = np.fft.irfft(np.abs(transform) ** 2, 2 * n, axis=1)[:, :n].mean(axis=0)
    return covariance / covariance[0]


def statistical_inefficiency(series: ArrayLike) -> float:
    """g = 1 + 2 sum of the autocorrelation: how many frames make one independent one.

    The sum stops by Geyer's initial positive sequence and is made monotone [1]_: sums of adjacent pairs of a
    reversible chain's autocorrelation are positive and fall, whatever else is noise.

    Parameters
    ----------
    series : (n,) or (chains, n)
        A time series, in the order in which it was made.

    Returns
    -------
    float
        At least 1: an anticorrelated series counts as independent, so that no error bar is flattered. ``inf``
        where the series never changes: an indicator without a transition is slower than the run, by an
        unknown factor.

    References
    ----------
    .. [1] Geyer, Statistical Science 7, 473 (1992), section 3.3.

    Examples
    --------
    >>> statistical_inefficiency([0, 0, 0, 0, 1, 1, 1, 1]) > 1
    True
    >>> statistical_inefficiency([1, 1, 1, 1])
    inf
    """
    rho = autocorrelation(series)
    if np.isnan(rho[0]):
        return float("inf")
    pairs = rho[: len(rho) // 2 * 2].reshape(-1, 2).sum(axis=1)
    negative = np.flatnonzero(pairs <= 0)
    pairs = pairs[: negative[0]] if len(negative) else pairs
    return float(max(1.0, 2.0 * np.minimum.accumulate(pairs).sum() - 1.0))


def effective_sample_size(series: ArrayLike) -> float:
    """How many independent samples a correlated series is worth: n / g.

    0 where the series never changes: such a run has shown no sample of the transition, and claims none.
    See :func:`statistical_inefficiency`.

    >>> effective_sample_size([1, 1, 1, 1])
    0.0
    """
    return float(np.asarray(series).size / statistical_inefficiency(series))


def standard_error(series: ArrayLike, weights: ArrayLike | None = None) -> float:
    """Standard error of the (weighted) mean of a correlated series.

    The linearised ratio estimator: z_i = w_i (x_i - mean) with sum w = 1 carries the error of sum w x / sum
    w, and its own autocorrelation carries the correlation. NaN where the series never changes: that error was
    not measured.

    Parameters
    ----------
    series : (n,) array
    weights : (n,) array, optional
    """
    x = _series(series)
    if x.ndim != 1:
        raise InputError("standard_error takes one chain; give a series of shape (frames,).")
    w = normalized_weights(weights, len(x))
    z = w * (x - w @ x)
    if not np.ptp(x[w > 0]) > 0:
        return float("nan")
    n = len(z)
    return float(np.sqrt(n * statistical_inefficiency(z) * z.var() * n / (n - 1)))


def block_edges(n: int, blocks: int) -> NDArray[np.intp]:
    """Where n frames are cut into contiguous blocks of equal length, within one: (blocks + 1,) indices."""
    if not 2 <= blocks <= n:
        raise InputError(f"{n} frames cannot be cut into {blocks} blocks; ask for 2 to {n}.")
    return np.linspace(0, n, blocks + 1).astype(np.intp)


def block_count(*series: ArrayLike) -> int:
    """How many blocks are safe: each four times as long as the slowest series' statistical inefficiency.

    Never more than 100 and never fewer than 4: where fewer would be safe the blocks are too short and errors
    from them are lower bounds, which the caller can tell by comparing block length and statistical
    inefficiency.
    """
    n = np.asarray(series[0]).shape[-1]
    if n < _FEWEST_BLOCKS:
        raise InputError(f"{n} frames are too few for block errors; give at least {_FEWEST_BLOCKS}.")
    slowest = max(statistical_inefficiency(s) for s in series)
    return int(np.clip(n / (_BLOCKS_PER_INEFFICIENCY * slowest), _FEWEST_BLOCKS, min(_MOST_BLOCKS, n)))


def block_sums(values: ArrayLike, blocks: int) -> Array:
    """Sums over contiguous blocks along the first axis: (n, ...) -> (blocks, ...)."""
    x = np.asarray(values, dtype=np.float64)
    return np.add.reduceat(x, block_edges(len(x), blocks)[:-1], axis=0)


def block_means(series: ArrayLike, blocks: int, weights: ArrayLike | None = None) -> Array:
    """(Weighted) means of contiguous blocks; NaN in a block that carries no weight.

    >>> block_means([0.0, 2.0, 4.0, 6.0], 2).tolist()
    [1.0, 5.0]
    """
    x = np.asarray(series, dtype=np.float64)
    w = normalized_weights(weights, len(x))
    total = block_sums(w, blocks)
    return np.divide(block_sums(w * x, blocks), total, out=np.full(blocks, np.nan), where=total > 0)


def block_error(series: ArrayLike, blocks: int, weights: ArrayLike | None = None) -> float:
    """Standard error of the (weighted) mean from contiguous blocks (linearised ratio estimator)."""
    x = np.asarray(series, dtype=np.float64)
    w = normalized_weights(weights, len(x))
    deviations = block_sums(w * (x - w @ x), blocks)
    return float(np.sqrt(blocks / (blocks - 1) * np.sum(deviations**2)))


def block_bootstrap(
    values: ArrayLike,
    blocks: int,
    rng: np.random.Generator,
    *,
    weights: ArrayLike | None = None,
    draws: int = 200,
) -> Array:
    """Bootstrap draws of the (weighted) mean, resampling whole contiguous blocks.

    Parameters
    ----------
    values : (n, ...) array
        For instance one indicator column per histogram bin.
    blocks : int
        Each should be several statistical inefficiencies long: :func:`block_count`.
    rng : numpy.random.Generator
    weights : (n,) array, optional
    draws : int

    Returns
    -------
    (draws, ...) array
        Means; draws that happen to hold no weight at all are NaN.
    """
    x = np.asarray(values, dtype=np.float64)
    w = normalized_weights(weights, len(x))
    sums = block_sums(w.reshape((-1,) + (1,) * (x.ndim - 1)) * x, blocks)
    return resample_blocks(sums, block_sums(w, blocks), rng, draws=draws)


def resample_blocks(sums: Array, totals: Array, rng: np.random.Generator, *, draws: int) -> Array:
    """The core of :func:`block_bootstrap`, from block sums (blocks, ...) and block weights (blocks,)."""
    counts = rng.multinomial(len(totals), np.full(len(totals), 1.0 / len(totals)), size=draws).astype(np.float64)
    total = counts @ totals
    total[total == 0] = np.nan
    return np.tensordot(counts, sums, axes=1) / total.reshape((-1,) + (1,) * (sums.ndim - 1))


def kish_size(weights: ArrayLike) -> float:
    """(sum w)^2 / sum w^2: how many equal weights would be as good.

    >>> kish_size([1.0, 1.0, 0.0, 0.0])
    2.0
    """
    w = np.asarray(weights, dtype=np.float64)
    return float(1.0 / np.sum(normalized_weights(w, len(w)) ** 2))
