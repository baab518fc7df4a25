"""Why a generator loses effective samples, in words: the tail of its weights, missed basins, coordinates.

Kish's effective sample size says how much is lost, not where. Four questions are answered from weights alone: how much;
whether the figure can be believed; which basin of frames of the target the generator makes too rarely; and on which
coordinates the weights still depend.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from openmm_bg.analysis.formatting import format_value
from openmm_bg.analysis.statistics import Array, block_count, block_error
from openmm_bg.analysis.weights import pareto_shape, weight_size
from openmm_bg.errors import InputError

_SIGMA = 3.0
_BINS, _LEAST_IN_BIN = 20, 20
_LEAST_EXPLAINED, _NAMED = 0.01, 5
_FEWEST_CHAINS, _FEWEST_FRAMES = 4, 4
# A weight of exp(-5) of the mean counts as lost: how far below it lies costs nothing more.
_LOST = 5.0


@dataclass(frozen=True)
class Region:
    """A part of conformation space, in the draws and in held-out frames of the target.

    Attributes
    ----------
    name : str
    share, share_error : float
        Of the held-out frames.
    drawn, drawn_error : float
        Share of the draws, unweighted.
    ratio, ratio_error, elsewhere : float
        Mean p/q over the held-out frames in the region that the generator can make, and over those outside; NaN where
        there are none.
    """

    name: str
    share: float
    share_error: float
    drawn: float
    drawn_error: float
    ratio: float
    ratio_error: float
    elsewhere: float

    @property
    def is_measured(self) -> bool:
        """Whether enough independent visits are among the held-out frames to judge."""
        return self.share > 2 * self.share_error

    @property
    def is_thin(self) -> bool:
        """Whether the generator goes there less than half as often as the target."""
        return self.drawn < self.share / 2

    @property
    def is_missed(self) -> bool:
        """Whether draws and densities at the held-out frames show that beyond three errors.

        A generator that is poor everywhere misses nothing in particular: p/q is held against that of other frames.
        """
        ratio = self.ratio - _SIGMA * self.ratio_error
        is_dense = ratio > 2 and ratio > 2 * self.elsewhere
        return self.is_measured and (is_dense or (self._is_short and not self._is_fair))

    @property
    def is_doubtful(self) -> bool:
        """Whether the held-out frames cannot be in equilibrium: as p/q is right, they go there far too often.

        The mean p/q in a region is at least the target's share over the generator's.
        """
        return self.is_measured and self._is_short and self._is_fair

    @property
    def _is_short(self) -> bool:
        apart = self.share - self.drawn > _SIGMA * math.hypot(self.share_error, self.drawn_error)
        return self.is_thin and apart

    @property
    def _is_fair(self) -> bool:
        return self.ratio + _SIGMA * self.ratio_error < 2

    def __str__(self) -> str:
        share, drawn = (
            format_value(100 * value, 100 * error)
            for value, error in ((self.share, self.share_error), (self.drawn, self.drawn_error))
        )
        return (
            f"{self.name} ({share} % of the held-out frames, {drawn} % of the draws, mean p/q there "
            f"{format_value(self.ratio, self.ratio_error)})"
        )


@dataclass(frozen=True)
class Dependence:
    """How much of the variance of log w one coordinate explains.

    Attributes
    ----------
    name : str
    explained, error : float
        Variance of the mean of log w given the coordinate, as a share of the variance of log w, noise taken out.
    thinnest : float
        Where the mean of log w is largest, so that the generator goes there too rarely: degrees or nm.
    unit : str
    """

    name: str
    explained: float
    error: float
    thinnest: float
    unit: str

    def __str__(self) -> str:
        place = f"{self.thinnest:.0f}°" if self.unit == "degrees" else f"{self.thinnest:.4f} {self.unit}"
        share = f"{100 * self.explained:.{0 if self.explained > 0.1 else 1}f}"
        return f"{self.name} ({share} % of its variance, drawn too rarely near {place})"


@dataclass(frozen=True)
class Diagnosis:
    """What :func:`diagnose` found.

    Attributes
    ----------
    ess, ess_clipped : float
        Kish's effective share of the draws, and the same with the largest 0.01 % of the weights clipped.
    n : int
        Draws.
    outside : int
        Draws outside the support; they count.
    pareto_k, pareto_k_error : float
        See :func:`~openmm_bg.analysis.pareto_shape`.
    regions : tuple of Region
    unreachable, held_out : int
        Held-out frames that the generator cannot make, of how many.
    dependences : tuple of Dependence
        The largest first.
    """

    ess: float
    ess_clipped: float
    n: int
    outside: int
    pareto_k: float
    pareto_k_error: float
    regions: tuple[Region, ...]
    unreachable: int
    held_out: int
    dependences: tuple[Dependence, ...]

    @property
    def findings(self) -> dict[str, str]:
        """What a person reads, by subject."""
        lost = f"; {self.outside:,} draws fell outside the support" if self.outside else ""
        found = {
            "effective sample size": f"The effective sample size is {100 * self.ess:.1f} % of {self.n:,} draws, "
            f"{100 * self.ess_clipped:.1f} % with the largest 0.01 % of the weights clipped{lost}.",
            "tail of the weights": self._tail(),
            "basins": " ".join(self._basins()),
            "coordinates": self._coordinates(),
        }
        return {subject: finding for subject, finding in found.items() if finding}

    def _tail(self) -> str:
        if not math.isfinite(self.pareto_k):
            return "The largest weights are too few, or too equal, to tell how heavy their tail is."
        shape = f"The largest weights fall off with a Pareto k of {format_value(self.pareto_k, self.pareto_k_error)}: "
        if self.pareto_k >= 0.7:
            return shape + "their variance is infinite, and neither this figure nor reweighted averages can be trusted."
        if self.pareto_k >= 0.5:
            return shape + "their variance is infinite, so the figure falls as draws are added."
        return shape + "their variance is finite, and the figure holds for more draws."

    def _basins(self) -> list[str]:
        found = []
        if self.unreachable:
            found.append(f"{self.unreachable} of {self.held_out} held-out frames lie outside the generator's support.")
        missed = [str(region) for region in self.regions if region.is_missed]
        unclear = [str(region) for region in self.regions if region.is_thin and not region.is_measured]
        doubtful = [str(region) for region in self.regions if region.is_doubtful]
        if missed:
            found.append(f"Missed: {'; '.join(missed)}.")
        elif self.regions:
            found.append("No basin that the held-out frames visit often is missed.")
        if doubtful:
            found.append(f"The held-out frames are not in equilibrium, p/q contradicts them: {'; '.join(doubtful)}.")
        if unclear:
            found.append(f"Visited too rarely by the held-out frames to say: {'; '.join(unclear)}.")
        return found

    def _coordinates(self) -> str:
        if not self.dependences:
            return ""
        most = [d for d in self.dependences if d.explained > max(_LEAST_EXPLAINED, _SIGMA * d.error)][:_NAMED]
        if not most:
            return "No single coordinate explains a percent of the variance of log w."
        return f"log w still depends most on {'; '.join(map(str, most))}."

    def to_dict(self) -> dict[str, Any]:
        """The findings, and the numbers behind them (of dependences the largest), ready for JSON."""
        numbers = asdict(self) | {"dependences": [asdict(d) for d in self.dependences[: 2 * _NAMED]]}
        return jsonable({"findings": self.findings, **numbers})


def diagnose(
    log_weights: ArrayLike,
    held_out_log_weights: ArrayLike,
    *,
    regions: Mapping[str, tuple[ArrayLike, ArrayLike]] | None = None,
    chains: int = 1,
    coordinates: ArrayLike | None = None,
    names: Sequence[str] = (),
    angular: ArrayLike | None = None,
) -> Diagnosis:
    """Where a generator loses its effective samples.

    Parameters
    ----------
    log_weights : (n,) array
        -u - log_prob of independent draws; -inf outside the support.
    held_out_log_weights : (m,) array
        The same of frames of the target that training never saw; +inf where the generator cannot make them.
    regions : mapping of str to ((n,) bool, (m,) bool), optional
        Which draws and which held-out frames lie in each named region: basins of the target.
    chains : int
        Independent chains of equal length that the held-out frames consist of, one after the other: errors come from
        their spread, where they are at least four, else from blocks.
    coordinates : (n, d) array, optional
        Of the draws: angles in radians, lengths in nm. Rows of draws outside the support may be NaN.
    names : sequence of str
        Of the coordinates.
    angular : (d,) bool, optional
        Which of them are angles; None for all.

    Raises
    ------
    InputError
        For arrays that do not belong together, fewer than four held-out frames, or weights that all vanish.

    Notes
    -----
    How much of the variance of log w a coordinate explains is the squared correlation ratio over twenty bins of equally
    many draws, less its expectation for a coordinate that explains nothing (Kelley, PNAS 21, 554 (1935)).

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> psi = rng.uniform(-np.pi, np.pi, 5000)
    >>> found = diagnose(
    ...     0.8 * np.cos(psi) + 0.1 * rng.standard_normal(5000), np.zeros(50), coordinates=psi[:, None], names=["ψ"]
    ... )
    >>> found.findings["coordinates"]
    'log w still depends most on ψ (96 % of its variance, drawn too rarely near -11°).'
    """
    log_w, held = (np.asarray(values, dtype=np.float64) for values in (log_weights, held_out_log_weights))
    ess, clipped, log_z = weight_size(log_w)
    if held.ndim != 1 or len(held) < _FEWEST_FRAMES or chains < 1 or len(held) % chains:
        raise InputError(
            f"held_out_log_weights has the shape {held.shape}; give one for each frame, at least {_FEWEST_FRAMES}, the "
            f"same number from each of {chains} chains."
        )
    if np.isnan(held).any() or np.isneginf(held).any():
        raise InputError("Log weights of held-out frames hold NaN or -inf: a frame of the target has a finite energy.")
    reachable = np.isfinite(held)
    ratio = np.exp(np.where(reachable, held - log_z, 0.0))
    return Diagnosis(
        ess, clipped, len(log_w), int(np.isneginf(log_w).sum()), *pareto_shape(log_w),
        tuple(_region(name, *pair, ratio, reachable, chains, len(log_w)) for name, pair in (regions or {}).items()),
        int((~reachable).sum()), len(held), _dependences(log_w, log_z, coordinates, names, angular),
    )  # fmt: skip


def _region(
    name: str, draws: ArrayLike, frames: ArrayLike, ratio: Array, reachable: np.ndarray, chains: int, n: int
) -> Region:
    drawn, inside = np.asarray(draws, dtype=bool), np.asarray(frames, dtype=bool)
    if drawn.shape != (n,) or inside.shape != ratio.shape:
        raise InputError(f"The region {name!r} must say of each draw and of each held-out frame whether it lies in it.")
    indicator = inside.astype(np.float64)
    blocks = chains if chains >= _FEWEST_CHAINS else block_count(indicator)
    there = indicator * reachable
    mean, elsewhere = (float(w @ ratio / w.sum()) if w.any() else math.nan for w in (there, reachable - there))
    spread = block_error(ratio, blocks, there) if there.any() else math.nan
    hits = int(drawn.sum())
    even = (hits + 1) / (n + 2)  # so that no hit at all is not a share without error
    return Region(
        name, float(indicator.mean()), block_error(indicator, blocks), hits / n, math.sqrt(even * (1 - even) / n), mean,
        spread, elsewhere,
    )  # fmt: skip


def _dependences(
    log_w: Array, log_z: float, coordinates: ArrayLike | None, names: Sequence[str], angular: ArrayLike | None
) -> tuple[Dependence, ...]:
    if coordinates is None:
        return ()
    x = np.asarray(coordinates, dtype=np.float64)
    if x.ndim != 2 or x.shape != (len(log_w), len(names)):
        raise InputError(
            f"coordinates has the shape {x.shape}; give {len(names)} named ones of each of {len(log_w)} draws."
        )
    turns = np.ones(len(names), dtype=bool) if angular is None else np.asarray(angular, dtype=bool)
    inside = np.isfinite(log_w)
    x, values = x[inside], np.maximum(log_w[inside], log_z - _LOST)
    if not np.isfinite(x).all():
        raise InputError("coordinates hold values that are not finite in draws that carry weight.")
    n, bins = len(values), min(_BINS, len(values) // _LEAST_IN_BIN)
    total = float(((values - values.mean()) ** 2).sum())
    if bins < 2 or total == 0:
        return ()
    edges = np.linspace(0, n, bins + 1).astype(np.intp)
    found = []
    for column, name, turn in zip(x.T, names, turns, strict=True):
        order = np.argsort(column)
        means = np.add.reduceat(values[order], edges[:-1]) / np.diff(edges)
        between = float((np.diff(edges) * (means - values.mean()) ** 2).sum())
        share = (between - (bins - 1) * (total - between) / (n - bins)) / total
        error = math.sqrt(2 * (bins - 1) / n**2 + 4 * max(share, 0.0) * (1 - share) ** 2 / n)
        top = int(means.argmax())
        place = float(np.median(column[order[edges[top] : edges[top + 1]]]))
        unit = "degrees" if turn else "nm"
        found.append(Dependence(name, share, error, math.degrees(place) if turn else place, unit))
    return tuple(sorted(found, key=lambda d: -d.explained))


def jsonable(value: Any) -> Any:
    """JSON knows neither NaN nor infinity: None."""
    if isinstance(value, dict):
        return {key: jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
