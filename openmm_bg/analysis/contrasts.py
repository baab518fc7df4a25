"""Whether two correlated, weighted ensembles differ in a mean or a share: one p-value for each question asked.

Means of several scores at once are compared by Hotelling's T^2 on block averages; shares, which may be rare, by
Fisher's exact test on effective counts besides. Many questions are asked, so their p-values are adjusted together
(:func:`adjusted`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from openmm_bg.analysis.statistics import Array, block_sums, statistical_inefficiency

_BLOCKS_PER_INEFFICIENCY = 8
_FEWEST_BLOCKS, _MOST_BLOCKS = 4, 100
_ROUNDING = 1e-6


class Means(NamedTuple):
    """Weighted means of d scores, (d,), their covariance, (d, d), the blocks it comes from, and independent samples."""

    values: Array
    covariance: Array
    blocks: int
    size: float


def block_averages(scores: ArrayLike, weights: ArrayLike, watched: int | None = None) -> Means:
    """Means of a correlated, weighted series with their covariance.

    Blocks are eight statistical inefficiencies long, where that leaves four to a hundred of them. A block of length L
    misses the share g / 2L of the variance of an exponentially correlated series; that is put back.

    Parameters
    ----------
    scores : (n, d) array
        In the order in which they were made.
    weights : (n,) array
        That sum to one.
    watched : int, optional
        Only the first so many scores decide how long blocks are.

    Returns
    -------
    Means
        ``size`` is 0 and the covariance NaN where a score that is watched never changes.
    """
    x, w = np.asarray(scores, dtype=np.float64), np.asarray(weights, dtype=np.float64)
    n, d = x.shape
    mean = w @ x
    z = (x - mean) * w[:, None]
    slowest = max(statistical_inefficiency(column) for column in z[:, :watched].T)
    if n < 2 * _FEWEST_BLOCKS or not math.isfinite(slowest):
        return Means(mean, np.full((d, d), np.nan), 0, 0.0)
    blocks = int(np.clip(n / (_BLOCKS_PER_INEFFICIENCY * slowest), _FEWEST_BLOCKS, min(_MOST_BLOCKS, n // 2)))
    sums = block_sums(z, blocks)
    missed = min(slowest * blocks / (2 * n), 0.5)
    covariance = sums.T @ sums * blocks / (blocks - 1) / (1 - missed)
    spread = w @ (x - mean) ** 2
    sizes = (spread / np.diag(covariance))[:watched]
    return Means(mean, covariance, blocks, float(min(sizes.min(), n)))


def mean_p_value(a: Means, b: Means, d: int) -> float:
    """p-value of equal means of the first d scores.

    Hotelling's T^2 with unequal covariances and Yao's degrees of freedom, Biometrika 52, 139 (1965). NaN where a side
    has too few blocks for d scores.
    """
    gap = (b.values - a.values)[:d]
    parts = [side.covariance[:d, :d] for side in (a, b)]
    total = parts[0] + parts[1]
    if not np.isfinite(total).all():
        return math.nan
    try:
        direction = np.linalg.solve(total, gap)
    except np.linalg.LinAlgError:
        return math.nan
    squared = float(gap @ direction)
    if squared <= 0:
        return 1.0 if squared == 0 else math.nan
    inverse = sum(
        (direction @ part @ direction / squared) ** 2 / (side.blocks - 1)
        for part, side in zip(parts, (a, b), strict=True)
    )
    freedom = 1 / inverse
    rest = freedom - d + 1
    if rest < 1:
        return math.nan
    return float(stats.f.sf(squared * rest / (freedom * d), d, rest))


class Share(NamedTuple):
    """A share of an ensemble, its standard error, the independent samples that know it as well, and blocks behind it.

    The error is 0, and so are size and blocks, where the series never entered or never left.
    """

    value: float
    error: float
    size: float
    blocks: int


def share(inside: ArrayLike, weights: ArrayLike) -> Share:
    """The weighted share of frames inside, from block averages."""
    found = block_averages(np.asarray(inside, dtype=np.float64)[:, None], weights)
    value, error = float(found.values[0]), math.sqrt(found.covariance[0, 0])
    return Share(value, error, found.size, found.blocks) if found.size else Share(value, 0.0, 0.0, 0)


def share_p_value(a: Share, b: Share) -> float:
    """p-value of equal shares, two-sided; NaN where a side has no effective size.

    Two tests have to agree, so the larger p-value counts: Fisher's exact test on effective counts, which is right for
    rare states, and Welch's t-test on block averages, which knows that effective counts are themselves uncertain.

    Examples
    --------
    >>> share_p_value(Share(0.0, 0.0, 5000.0, 0), Share(0.01, 0.0014, 5000.0, 100)) < 1e-8
    True
    >>> share_p_value(Share(0.5, 0.1, 25.0, 10), Share(0.6, 0.1, 25.0, 10)) > 0.4
    True
    """
    counts = [round(side.size) for side in (a, b)]
    if not all(counts):
        return math.nan
    first, second = (round(side.value * n) for side, n in zip((a, b), counts, strict=True))
    table = stats.hypergeom(sum(counts), first + second, counts[0])
    exact = float(min(1.0, 2 * min(table.cdf(first), table.sf(first - 1))))
    squared = a.error**2 + b.error**2
    if squared == 0:
        return exact
    inverse = sum((side.error**2 / squared) ** 2 / (side.blocks - 1) for side in (a, b) if side.blocks)
    return max(exact, float(2 * stats.t.sf(abs(b.value - a.value) / math.sqrt(squared), 1 / inverse)))


def adjusted(p_values: Sequence[float], families: Sequence[str]) -> NDArray[np.float64]:
    """Adjusted p-values: none is below alpha by chance alone with a probability above alpha, however they depend.

    Each family has an equal part of alpha, so that ten questions about basins are not drowned by a thousand about
    bonds; within a family Holm's procedure applies, Scand. J. Stat. 6, 65 (1979). NaN, a question that could not be
    answered, stays NaN and costs nothing.

    Examples
    --------
    >>> adjusted([0.001, 0.02, 0.5], ["basins", "bonds", "bonds"]).tolist()
    [0.002, 0.08, 1.0]
    """
    p, of = np.asarray(p_values, dtype=np.float64), np.asarray(families)
    asked = ~np.isnan(p)
    found = np.full(len(p), np.nan)
    kinds = np.unique(of[asked])
    for kind in kinds:
        members = np.flatnonzero(asked & (of == kind))
        order = members[np.argsort(p[members], kind="stable")]
        steps = p[order] * np.arange(len(order), 0, -1) * len(kinds)
        found[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return found


# -- scores


def pooled_ranks(
    a: ArrayLike, b: ArrayLike, a_weights: ArrayLike, b_weights: ArrayLike, period: float = math.inf
) -> tuple[Array, Array]:
    """Ranks in the even mixture of both ensembles, from 0 to 1; equal values share the middle one.

    Values (nm, radians, kT) that all lie within a millionth are equal: how arithmetic rounds what never moves is a
    pattern in the frames' numbers, not a sample.
    """
    values = np.concatenate([np.asarray(a), np.asarray(b)])
    apart = values - values[0]
    if math.isfinite(period):
        apart = (apart + period / 2) % period
    if np.ptp(apart) < _ROUNDING:
        values = np.zeros(len(values))
    w = np.concatenate([np.asarray(a_weights), np.asarray(b_weights)]) / 2
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    mass = np.add.reduceat(w[order], starts)
    middle = np.cumsum(mass) - mass / 2
    ranks = np.empty(len(values))
    ranks[order] = np.repeat(middle, np.diff(np.r_[starts, len(values)]))
    return ranks[: len(np.asarray(a))], ranks[len(np.asarray(a)) :]


def linear_scores(ranks: ArrayLike) -> Array:
    """Location and spread of ranks, (n, 2): two terms of Neyman's smooth test, Skand. Aktuar. 20, 149 (1937)."""
    t = 2 * np.asarray(ranks, dtype=np.float64) - 1
    return np.stack([math.sqrt(3) * t, math.sqrt(5) * (1.5 * t * t - 0.5)], axis=1)


def circular_scores(ranks: ArrayLike, harmonics: int = 3) -> Array:
    """Ranks laid around a circle, cosines and sines, (n, 2 harmonics): Wheeler & Watson, Biometrika 51, 256 (1964)."""
    turns = 2 * np.pi * np.asarray(ranks, dtype=np.float64)[:, None] * np.arange(1, harmonics + 1)
    return np.concatenate([np.cos(turns), np.sin(turns)], axis=1)
