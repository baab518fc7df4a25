"""Distances between ensembles, each beside its floor.

An empirical distance is never zero: two samples of the same ensemble differ too. So every distance comes with
the same distance between two halves of the reference at the same number of points, and with what is left once
that is taken off.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from openmm_bg.analysis.formatting import format_value
from openmm_bg.analysis.statistics import Array, block_edges, normalized_weights
from openmm_bg.errors import InputError

Metric = Callable[[Array, Array], float]

_SIGMA = 3.0  # how many errors above the floor a distance has to be to count


@dataclass(frozen=True)
class Distance:
    """A distance with its floor.

    Attributes
    ----------
    name, unit : str
    value, error : float
        Mean and standard deviation over random subsamples: ``error`` is the spread
        of one measurement at this n.
    floor, floor_error : float
        The same between two halves of the reference.
    n : int
        Points on either side of each measurement.
    """

    name: str
    value: float
    error: float
    floor: float
    floor_error: float
    n: int
    unit: str

    @property
    def excess(self) -> float:
        """value^2 - floor^2, signed: negative where the samples lie closer than the halves do."""
        return self.value**2 - self.floor**2

    @property
    def debiased(self) -> float:
        """The distance without its floor: the root of :attr:`excess` with its sign, not clamped at zero."""
        return math.copysign(math.sqrt(abs(self.excess)), self.excess)

    @property
    def within_floor(self) -> bool:
        """Whether the distance is at most three errors above what two halves of the reference show."""
        return self.value - self.floor <= _SIGMA * math.hypot(self.error, self.floor_error)

    def to_dict(self) -> dict[str, float | int | str | bool]:
        return {
            "name": self.name,
            "value": self.value,
            "error": self.error,
            "floor": self.floor,
            "floor_error": self.floor_error,
            "debiased": self.debiased,
            "excess": self.excess,
            "within_floor": self.within_floor,
            "n": self.n,
            "unit": self.unit,
        }

    def __str__(self) -> str:
        unit = f" {self.unit}" if self.unit else ""
        verdict = "within its floor" if self.within_floor else "above its floor"
        return (
            f"{self.name}: {format_value(self.value, self.error)}{unit}, floor "
            f"{format_value(self.floor, self.floor_error)}{unit}, debiased "
            f"{format_value(self.debiased, self.error, show_error=False)}{unit} (n = {self.n}, {verdict})"
        )


def _angles(values: ArrayLike, name: str) -> Array:
    x = np.asarray(values, dtype=np.float64)
    if x.ndim == 1:
        x = x[:, None]
    if x.ndim != 2 or not len(x):
        raise InputError(f"{name} has the shape {x.shape}; give (frames, angles) in radians.")
    if not np.isfinite(x).all():
        raise InputError(f"{name} holds angles that are not finite; leave those frames out and say how many.")
    return x


def torus_w2(
    a: ArrayLike, b: ArrayLike, *, a_weights: ArrayLike | None = None, b_weights: ArrayLike | None = None
) -> float:
    """Wasserstein-2 distance between two sets of angles on the torus, exact for the points given.

    The cost is periodic, sum_k min(|d_k|, 360 - |d_k|)^2, so that a cut at +-180 degrees cuts nothing in two.

    Parameters
    ----------
    a, b : (n, d) and (m, d) arrays
        Radians. The cost matrix holds n m numbers; beyond some thousand points subsample (:func:`measure`).
    a_weights, b_weights : (n,) and (m,) arrays, optional

    Returns
    -------
    float
        Degrees.

    Examples
    --------
    >>> round(torus_w2([[np.radians(179)]], [[np.radians(-179)]]), 6)
    2.0
    """
    x, y = _angles(a, "a"), _angles(b, "b")
    if x.shape[1] != y.shape[1]:
        raise InputError(f"a has {x.shape[1]} angles and b has {y.shape[1]}; compare the same torsions.")
    cost = np.zeros((len(x), len(y)))
    for k in range(x.shape[1]):  # one angle at a time keeps the memory at one matrix
        difference = np.degrees(np.subtract.outer(x[:, k], y[:, k]))
        cost += (difference - 360.0 * np.round(difference / 360.0)) ** 2
    return transport(cost, a_weights, b_weights)


def transport(cost: Array, a_weights: ArrayLike | None = None, b_weights: ArrayLike | None = None) -> float:
    """Root of the least mean cost of moving one set of points onto another: W2 where (n, m) costs are squares."""
    import ot

    wa, wb = normalized_weights(a_weights, cost.shape[0]), normalized_weights(b_weights, cost.shape[1])
    squared, log = ot.emd2(wa, wb, cost, numItermax=10_000_000, log=True)
    if log["warning"] is not None:
        raise RuntimeError(f"The optimal transport did not converge: {log['warning']}")
    return math.sqrt(max(float(squared), 0.0))  # a sum of squares: below zero by rounding only


def energy_w2(
    a: ArrayLike, b: ArrayLike, *, a_weights: ArrayLike | None = None, b_weights: ArrayLike | None = None
) -> float:
    """Wasserstein-2 distance between two sets of numbers, exact, in their own unit (kT for reduced energies).

    Parameters
    ----------
    a, b : (n,) and (m,) arrays
    a_weights, b_weights : (n,) and (m,) arrays, optional

    Examples
    --------
    >>> energy_w2([0.0, 1.0], [3.0, 4.0])
    3.0
    """
    x, wx = _sorted(a, a_weights, "a")
    y, wy = _sorted(b, b_weights, "b")
    cx, cy = np.cumsum(wx), np.cumsum(wy)
    edges = np.sort(np.concatenate([cx[:-1], cy[:-1], [1.0]]))  # between two edges both quantile functions are constant
    widths = np.diff(edges, prepend=0.0)
    middle = edges - widths / 2
    gap = x[np.searchsorted(cx[:-1], middle)] - y[np.searchsorted(cy[:-1], middle)]
    return math.sqrt(float(np.sum(widths * gap**2)))


def _sorted(values: ArrayLike, weights: ArrayLike | None, name: str) -> tuple[Array, Array]:
    x = np.asarray(values, dtype=np.float64).ravel()
    w = normalized_weights(weights, len(x))
    x, w = x[w > 0], w[w > 0]  # what carries no weight may be infinite
    if not np.isfinite(x).all():
        raise InputError(f"{name} holds energies that are not finite; leave those frames out and say how many.")
    order = np.argsort(x, kind="stable")
    return x[order], w[order]


def total_variation(
    a: ArrayLike,
    b: ArrayLike,
    *,
    bins: int = 24,
    a_weights: ArrayLike | None = None,
    b_weights: ArrayLike | None = None,
) -> float:
    """Half the summed difference of two histograms on the torus: 0 for equal ones, 1 for disjoint ones.

    Parameters
    ----------
    a, b : (n, d) and (m, d) arrays
        Radians.
    bins : int
        Per angle. 24 makes bins of 15 degrees.
    """
    x, y = _angles(a, "a"), _angles(b, "b")
    return float(0.5 * np.abs(torus_histogram(x, bins, a_weights) - torus_histogram(y, bins, b_weights)).sum())


def torus_histogram(angles: ArrayLike, bins: int, weights: ArrayLike | None = None) -> Array:
    """Probability of each of the bins^d cells of the torus, [-pi, pi) in each angle: (bins, ..., bins)."""
    x = _angles(angles, "angles")
    cells = np.floor((x + np.pi) / (2 * np.pi) * bins).astype(np.intp) % bins
    flat = np.ravel_multi_index(tuple(cells.T), (bins,) * x.shape[1])
    counts = np.bincount(flat, normalized_weights(weights, len(x)), minlength=bins ** x.shape[1])
    return counts.reshape((bins,) * x.shape[1])


def measure(
    name: str,
    metric: Metric,
    reference: ArrayLike,
    samples: ArrayLike,
    rng: np.random.Generator,
    *,
    weights: ArrayLike | None = None,
    reference_weights: ArrayLike | None = None,
    n: int | None = None,
    repeats: int = 5,
    blocks: int = 10,
    unit: str = "",
) -> Distance:
    """A distance with its floor, at one and the same number of points.

    In every repeat the reference, in the order it was made, is cut into contiguous blocks and a random half
    of them becomes A, the rest B; then n points of A are held against n of the samples (the value) and
    against n of B (the floor). Whole blocks keep correlated frames together: halves drawn frame by frame
    would flatter a slow reference.

    Parameters
    ----------
    name, unit : str
    metric : callable
        Two arrays of points to a float, such as :func:`torus_w2`.
    reference, samples : (N, ...) and (M, ...) arrays
    rng : numpy.random.Generator
    weights : (M,) array, optional
        Of the samples, which are then resampled systematically. Weights that leave few effective samples
        repeat points, and that shows as distance, as it should.
    reference_weights : (N,) array, optional
    n : int, optional
        At most half the reference and all samples, which is also what None means; ``Distance.n`` is the
        number used.
    repeats : int
        At least two, for the spread.
    blocks : int
        Even.
    """
    ref, new = np.asarray(reference, dtype=np.float64), np.asarray(samples, dtype=np.float64)
    if repeats < 2:
        raise InputError("repeats must be 2 or more: a distance without its spread cannot be judged.")
    if blocks < 2 or blocks % 2:
        raise InputError(f"blocks must be even and at least 2, to make two halves, not {blocks}.")
    if len(ref) < 2 * blocks or len(new) < 2:
        raise InputError(f"{len(ref)} reference frames and {len(new)} samples are too few; give {2 * blocks} and 2.")
    w = None if weights is None else normalized_weights(weights, len(new))
    v = None if reference_weights is None else normalized_weights(reference_weights, len(ref))
    most = min(len(ref) // blocks * (blocks // 2), len(new))
    if n is not None and n < 2:
        raise InputError(f"n must be 2 or more, not {n}.")
    n = most if n is None else min(n, most)
    values, floors = np.empty(repeats), np.empty(repeats)
    for k in range(repeats):
        half, other = _halves(len(ref), blocks, rng)
        first = ref[_draw(half, n, v, rng)]
        values[k] = metric(first, new[_draw(np.arange(len(new)), n, w, rng)])
        floors[k] = metric(first, ref[_draw(other, n, v, rng)])
    return Distance(
        name,
        float(values.mean()),
        float(values.std(ddof=1)),
        float(floors.mean()),
        float(floors.std(ddof=1)),
        n,
        unit,
    )


def _halves(n: int, blocks: int, rng: np.random.Generator) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    edges = block_edges(n, blocks)
    order = rng.permutation(blocks)
    pieces = [np.arange(edges[b], edges[b + 1]) for b in order]
    return np.concatenate(pieces[: blocks // 2]), np.concatenate(pieces[blocks // 2 :])


def _draw(frames: NDArray[np.intp], n: int, weights: Array | None, rng: np.random.Generator) -> NDArray[np.intp]:
    """So many of some frames, systematically by weight."""
    if weights is None:
        return rng.choice(frames, n, replace=False)
    cumulative = np.cumsum(weights[frames])
    if not cumulative[-1] > 0:
        raise InputError("Half of the reference carries no weight at all; its weights cannot serve as a reference.")
    return frames[np.searchsorted(cumulative / cumulative[-1], (rng.random() + np.arange(n)) / n, side="right")]
