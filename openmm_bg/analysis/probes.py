"""The questions of a comparison, each about something a person can name: a basin, a bond, the energy, a stereocentre.

A probe holds its observable on both sides and can be asked again under other weights, which is how causes are told
from what follows from them (:mod:`openmm_bg.analysis.causes`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from openmm_bg.analysis.contrasts import (
    Share,
    block_averages,
    circular_scores,
    linear_scores,
    mean_p_value,
    pooled_ranks,
    share,
    share_p_value,
)
from openmm_bg.analysis.formatting import format_value
from openmm_bg.analysis.statistics import Array, kish_size

ALPHA = 0.01
"""Family-wise error of everything that is tested in one comparison."""
POPULATIONS, ENERGY, TORSIONS, GEOMETRY = "populations", "energy and strain", "torsions", "bonds and angles"
_FEWEST = 20  # effective samples of either side, below which a question counts as not answered
_SECTORS = 12
_TAIL = 0.005

Sides = tuple[Array, Array]
Sizes = tuple[float, float]


@dataclass(frozen=True)
class Contrast:
    """One observable on both sides.

    Attributes
    ----------
    family : str
    name : str
    reference, samples : float
        Mean, or share between 0 and 1.
    error : float
        Standard error of their difference.
    unit : str
        "nm", "degrees", "kT"; empty for a share.
    reference_size, sample_size : float
        Effective samples behind either; 0 where that side never moved.
    p_value : float
        Of this question alone; NaN where it cannot be answered.
    adjusted : float
        Among all questions of its comparison: :func:`~openmm_bg.analysis.contrasts.adjusted`.
    spread : float
        Standard deviation of the samples in units of that of the reference; NaN for a share.
    where : str
        Which part of a torsion's range a share is about.
    """

    family: str
    name: str
    reference: float
    samples: float
    error: float
    unit: str
    reference_size: float
    sample_size: float
    p_value: float
    adjusted: float = math.nan
    spread: float = math.nan
    where: str = ""

    @property
    def difference(self) -> float:
        return self.samples - self.reference

    @property
    def differs(self) -> bool:
        return self.adjusted <= ALPHA

    @property
    def is_measured(self) -> bool:
        """Whether either side holds enough independent samples for the question to have an answer."""
        return self.differs or (not math.isnan(self.p_value) and min(self.reference_size, self.sample_size) >= _FEWEST)

    def __str__(self) -> str:
        scale, unit = (1.0, f" {self.unit}") if self.unit else (100.0, " %")
        if self.unit:
            change = format_value(scale * self.difference, scale * self.error)
            text = f"{self.name} ({'+' if self.difference > 0 else ''}{change}{unit}"
            if abs(self.difference) < 3 * self.error and math.isfinite(self.spread):
                text += f", spread {100 * (self.spread - 1):+.1f} %"
            return text + ")"
        decimals = 2 if max(self.samples, self.reference) < 0.02 else 1
        text = f"{100 * self.samples:.{decimals}f} % instead of {100 * self.reference:.{decimals}f} %"
        return f"{self.name} ({self.where + ': ' if self.where else ''}{text})"


class Probe(Protocol):
    """A question: :class:`Contrast` under given weights, each side's sum being one."""

    family: str
    name: str

    def ask(self, weights: Sides, typical: Sizes) -> Contrast: ...


@dataclass(frozen=True)
class Linear:
    """Location and spread of a number: a bond, an angle, an energy."""

    family: str
    name: str
    reference: NDArray[np.floating]
    samples: NDArray[np.floating]
    unit: str
    scale: float = 1.0

    def ask(self, weights: Sides, typical: Sizes) -> Contrast:
        ranks = pooled_ranks(self.reference, self.samples, *weights)
        sides, spreads = [], []
        for values, rank, w in zip((self.reference, self.samples), ranks, weights, strict=True):
            used = w > 0
            x = np.where(used, values, 0.0).astype(np.float64) * self.scale
            mean = w @ x
            spreads.append(math.sqrt(w[used] @ (x[used] - mean) ** 2))
            # the value itself rides along, for its error
            sides.append(block_averages(np.column_stack([linear_scores(rank), x]), w, watched=2))
        a, b = sides
        error = math.sqrt(a.covariance[2, 2] + b.covariance[2, 2])
        return Contrast(
            self.family, self.name, float(a.values[2]), float(b.values[2]), error, self.unit, a.size, b.size,
            mean_p_value(a, b, 2), spread=spreads[1] / spreads[0] if spreads[0] > 0 else math.inf,
        )  # fmt: skip


@dataclass(frozen=True)
class Circular:
    """The distribution of an angle, on the circle."""

    family: str
    name: str
    reference: NDArray[np.floating]
    samples: NDArray[np.floating]
    fold: int = 1

    def ask(self, weights: Sides, typical: Sizes) -> Contrast:
        ranks = pooled_ranks(self.reference, self.samples, *weights, period=2 * np.pi)
        scores = [circular_scores(rank) for rank in ranks]
        a, b = (block_averages(score, w) for score, w in zip(scores, weights, strict=True))
        sectors = [
            np.bincount(np.floor((x + np.pi) / (2 * np.pi) * _SECTORS).astype(np.intp) % _SECTORS, w, _SECTORS)
            for x, w in zip((self.reference, self.samples), weights, strict=True)
        ]
        k = int(np.abs(sectors[1] - sectors[0]).argmax())
        p, q = float(sectors[0][k]), float(sectors[1][k])
        even = min((p + q) / 2, 1.0)  # above one by rounding only
        error = math.sqrt(even * (1 - even) * (1 / a.size + 1 / b.size)) if min(a.size, b.size) > 0 else math.inf
        width = 360 / _SECTORS
        edges = [(-180 + width * (k + side)) / self.fold for side in (0, 1)]
        return Contrast(
            self.family, self.name, p, q, error, "", a.size, b.size, mean_p_value(a, b, scores[0].shape[1]),
            where=f"{edges[0]:.0f}° to {edges[1]:.0f}°",
        )  # fmt: skip


@dataclass(frozen=True)
class Coupling:
    """How two angles go together, beyond what each does by itself."""

    family: str
    name: str
    reference: tuple[NDArray[np.floating], NDArray[np.floating]]
    samples: tuple[NDArray[np.floating], NDArray[np.floating]]

    def ask(self, weights: Sides, typical: Sizes) -> Contrast:
        pairs = zip(self.reference, self.samples, strict=True)
        turns = [pooled_ranks(x, y, *weights, period=2 * np.pi) for x, y in pairs]
        sides = []
        for k, w in enumerate(weights):
            u, v = (2 * np.pi * ranks[k] for ranks in turns)
            sides.append(block_averages(np.column_stack([f(u + s * v) for s in (1, -1) for f in (np.cos, np.sin)]), w))
        a, b = sides
        gap = b.values - a.values
        k = int(np.abs(gap).argmax())
        error = math.sqrt(a.covariance[k, k] + b.covariance[k, k])
        return Contrast(
            self.family, self.name, float(a.values[k]), float(b.values[k]), error, "of 1", a.size, b.size,
            mean_p_value(a, b, 4),
        )  # fmt: skip


@dataclass(frozen=True)
class Inside:
    """The share of frames in a state.

    A side that was never seen to enter or leave has no time scale of its own: its typical effective size counts, or,
    where the state is one that dynamics cannot leave (``fixed``), the number of its frames.
    """

    family: str
    name: str
    reference: NDArray[np.bool_]
    samples: NDArray[np.bool_]
    fixed: bool = False

    def ask(self, weights: Sides, typical: Sizes) -> Contrast:
        found = [share(x, w) for x, w in zip((self.reference, self.samples), weights, strict=True)]
        still = [s.size == 0 for s in found]
        if self.fixed and any(still):
            # frames count, whatever their order
            found = sides = [Share(s.value, 0.0, kish_size(w), 0) for s, w in zip(found, weights, strict=True)]
        else:
            sides = [
                s._replace(size=size) if quiet else s for s, quiet, size in zip(found, still, typical, strict=True)
            ]
        unasked = all(still) and found[0].value == found[1].value  # a state that neither side left is no question
        return Contrast(
            self.family, self.name, found[0].value, found[1].value, math.hypot(*(s.error for s in found)), "",
            *(s.size for s in found), math.nan if unasked else share_p_value(*sides),
        )  # fmt: skip


def tail(name: str, reference: Array, samples: Array, weights: Sides) -> Inside:
    """The share of a side among the largest half percent of both."""
    values = np.concatenate([reference, samples])
    order = np.argsort(values, kind="stable")
    mass = np.cumsum(np.concatenate(weights)[order]) / 2
    limit = values[order[min(np.searchsorted(mass, 1 - _TAIL), len(order) - 1)]]
    return Inside(ENERGY, name, reference > limit, samples > limit)


def ask_all(
    probes: Sequence[Probe], weights: Sides, progress: Callable[[Iterable[Any]], Iterable[Any]] = iter
) -> tuple[list[Contrast], Sizes]:
    """Every answer, in the order of the probes; and the effective size of either side where it moves most slowly."""
    means = [k for k, probe in enumerate(probes) if not isinstance(probe, Inside)]
    shares = [k for k, probe in enumerate(probes) if isinstance(probe, Inside)]
    answers = {k: probes[k].ask(weights, (0.0, 0.0)) for k in progress(means)}
    typical = cast(
        Sizes,
        tuple(
            min((size for size in (getattr(c, side) for c in answers.values()) if size > 0), default=0.0)
            for side in ("reference_size", "sample_size")
        ),
    )
    answers |= {k: probes[k].ask(weights, typical) for k in shares}
    return [answers[k] for k in range(len(probes))], typical
