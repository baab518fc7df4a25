"""Free-energy profiles along an angle and populations of basins, with errors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from openmm_bg.analysis.formatting import format_value
from openmm_bg.analysis.statistics import (
    Array,
    block_count,
    block_edges,
    block_error,
    block_sums,
    normalized_weights,
    resample_blocks,
    standard_error,
    statistical_inefficiency,
)
from openmm_bg.errors import InputError


@dataclass(frozen=True)
class Profile:
    """A free energy along an angle.

    Attributes
    ----------
    centres : (bins,) array
        Radians.
    free_energy : (bins,) array
        kT, its minimum at 0; ``inf`` in bins that were never visited.
    error : (bins,) array
        kT, one standard deviation of -log p of each bin; NaN in bins that were never visited.
    blocks : int
    block_length : int
        Frames in the shortest block.
    inefficiency : float
        Of the angle, in frames: the larger of its cosine's and its sine's.
    """

    centres: Array
    free_energy: Array
    error: Array
    blocks: int
    block_length: int
    inefficiency: float

    @property
    def blocks_are_long(self) -> bool:
        """Whether a block outlives the correlation; where not, the errors are lower bounds."""
        return self.block_length > self.inefficiency


def free_energy_profile(
    angles: ArrayLike,
    weights: ArrayLike | None = None,
    *,
    bins: int = 60,
    blocks: int | None = None,
    draws: int = 200,
    seed: int = 0,
) -> Profile:
    """-log of the density along an angle, in kT, with an error band from a block bootstrap.

    Parameters
    ----------
    angles : (frames,) array
        Radians, in the order they were made.
    weights : (frames,) array, optional
    bins : int
        Over [-pi, pi).
    blocks : int, optional
        Contiguous blocks; None takes blocks four statistical inefficiencies long (4 to 100 of them).
    draws, seed : int
        Of the bootstrap.

    Examples
    --------
    >>> profile = free_energy_profile(np.random.default_rng(0).vonmises(0.0, 2.0, 4000), bins=36)
    >>> float(profile.free_energy.min())
    0.0
    """
    x = np.asarray(angles, dtype=np.float64)
    if x.ndim != 1 or not np.isfinite(x).all():
        raise InputError(f"angles must be finite numbers of shape (frames,) in radians; their shape is {x.shape}.")
    if bins < 2:
        raise InputError(f"bins must be 2 or more, not {bins}.")
    w = normalized_weights(weights, len(x))
    blocks = block_count(np.cos(x), np.sin(x)) if blocks is None else blocks
    edges = block_edges(len(x), blocks)
    cells = np.floor((x + np.pi) / (2 * np.pi) * bins).astype(np.intp) % bins
    owner = np.repeat(np.arange(blocks), np.diff(edges))
    sums = np.bincount(owner * bins + cells, w, minlength=blocks * bins).astype(np.float64).reshape(blocks, bins)
    probability = sums.sum(axis=0)
    spread = np.nanstd(resample_blocks(sums, block_sums(w, blocks), np.random.default_rng(seed), draws=draws), axis=0)
    visited = probability > 0
    free_energy = np.full(bins, np.inf)
    free_energy[visited] = -np.log(probability[visited])
    error = np.full(bins, np.nan)
    error[visited] = spread[visited] / probability[visited]
    return Profile(
        (np.arange(bins) + 0.5) / bins * 2 * np.pi - np.pi,
        free_energy - free_energy.min(),
        error,
        blocks,
        int(np.diff(edges).min()),
        max(statistical_inefficiency(np.cos(x)), statistical_inefficiency(np.sin(x))),
    )


@dataclass(frozen=True)
class Population:
    """The share of an ensemble that lies in a basin.

    ``effective_samples`` is how many independent, equally weighted samples would have the same error.
    ``error`` is NaN and ``effective_samples`` 0 where the series never entered or never left the basin: then
    no error was measured, and the value is no evidence that the basin is empty or full.
    """

    name: str
    value: float
    error: float
    effective_samples: float

    def __str__(self) -> str:
        return f"{self.name}: {format_value(100 * self.value, 100 * self.error)} %"


@dataclass(frozen=True)
class Basin:
    """A rectangle of the Ramachandran plane; an interval that ends before it begins runs over +-180 degrees.

    Attributes
    ----------
    phi, psi : (float, float)
        Degrees, [from, to).

    Examples
    --------
    >>> bool(Basin("beta", (-180, 0), (50, -120)).contains(np.radians(-100.0), np.radians(-175.0)))
    True
    """

    name: str
    phi: tuple[float, float]
    psi: tuple[float, float]

    def contains(self, phi: ArrayLike, psi: ArrayLike) -> np.ndarray:
        """Which angles (radians) lie inside."""
        return _between(phi, self.phi) & _between(psi, self.psi)


def _between(angle: ArrayLike, interval: tuple[float, float]) -> np.ndarray:
    start, stop = interval
    width = 360.0 if stop - start == 360.0 else (stop - start) % 360.0
    return (np.degrees(np.asarray(angle, dtype=np.float64)) - start) % 360.0 < width


BASINS: tuple[Basin, ...] = (
    Basin("helix (φ<0, -120°≤ψ<50°)", (150, 0), (-120, 50)),
    Basin("sheet (φ<0, other ψ)", (150, 0), (50, -120)),
    Basin("left (φ>0)", (0, 150), (-180, 180)),
)
"""The basins of a capped amino acid: right-handed helix; sheet and PII; left-handed helix and C7ax.

Every frame lies in exactly one. The strip beyond φ = 150° counts to φ < 0: the sheet leaks over ±180°, and a visit
there crosses no barrier.
"""


ROTAMERS = ("gauche+", "trans", "gauche-")
"""The wells of a bond between atoms of four neighbours, each a third of a turn."""


def rotamer(angle: ArrayLike) -> NDArray[np.intp]:
    """Which of the :data:`ROTAMERS` an angle (radians) is in, by its number."""
    return (np.asarray(angle) % (2 * np.pi) / (2 * np.pi / 3)).astype(np.intp).clip(0, 2)


def left_handed(phi: ArrayLike) -> np.ndarray:
    """The indicator φ > 0, without the strip beyond 150° that belongs to the sheet.

    What a peptide crosses most slowly. Counting the strip would call every tremor of the sheet across ±180° a
    transition.

    Parameters
    ----------
    phi : array
        Radians.

    Returns
    -------
    array of bool

    Examples
    --------
    >>> left_handed(np.radians([-60.0, 60.0, 170.0])).tolist()
    [False, True, False]
    """
    return _between(phi, (0.0, 150.0))


def populations(
    phi: ArrayLike, psi: ArrayLike, weights: ArrayLike | None = None, *, basins: Sequence[Basin] = BASINS
) -> tuple[Population, ...]:
    """The share of each basin, with an error that knows of correlation and weights.

    Parameters
    ----------
    phi, psi : (frames,) arrays
        Radians, in the order they were made.
    weights : (frames,) array, optional

    Examples
    --------
    >>> [p.value for p in populations([-1.0, -1.0, -1.0, 1.0], [0.0, 0.0, 2.0, 0.0])]
    [0.5, 0.25, 0.25]
    """
    f, s = np.asarray(phi, dtype=np.float64), np.asarray(psi, dtype=np.float64)
    if f.ndim != 1 or f.shape != s.shape or not (np.isfinite(f).all() and np.isfinite(s).all()):
        raise InputError(f"phi and psi must be finite and of one shape (frames,), not {f.shape} and {s.shape}.")
    w = normalized_weights(weights, len(f))
    return tuple(population(basin.name, basin.contains(f, s), w) for basin in basins)


def population(name: str, inside: ArrayLike, weights: ArrayLike | None = None) -> Population:
    """The share of frames that are inside, (frames,) of bool, with an error that knows of correlation and weights."""
    series = np.asarray(inside, dtype=np.float64)
    w = normalized_weights(weights, len(series))
    share, error = float(w @ series), standard_error(series, w)
    size = 0.0 if np.isnan(error) else share * (1 - share) / error**2  # n / g, with the weights' loss in it
    return Population(name, share, error, size)


def free_energy_difference(inside: ArrayLike, base: ArrayLike, weights: ArrayLike | None = None) -> tuple[float, float]:
    """Free energy of one state above another, -log(p / p_base) in kT, and its standard error from blocks.

    Parameters
    ----------
    inside, base : (frames,) arrays of bool
        Which frames lie in either, in the order they were made.
    weights : (frames,) array, optional

    Returns
    -------
    (float, float)
        Infinite where the state was never visited, with a NaN error.

    Examples
    --------
    >>> value, error = free_energy_difference([True, False, False, False] * 50, [False, True, True, False] * 50)
    >>> round(value, 4)
    0.6931
    """
    x, y = np.asarray(inside, dtype=np.float64), np.asarray(base, dtype=np.float64)
    w = normalized_weights(weights, len(x))
    p, q = float(w @ x), float(w @ y)
    if not (p > 0 and q > 0):
        return (np.inf if q > 0 else -np.inf if p > 0 else np.nan), np.nan
    # the two shares are of one series: their errors do not add up as if they were independent
    series = x / p - y / q
    blocks = block_count((series - w @ series) * w)
    return -float(np.log(p / q)), block_error(series, blocks, w)
