"""How fast a series gives independent samples: per frame, per second, per force evaluation."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from openmm_bg.analysis.statistics import effective_sample_size, statistical_inefficiency
from openmm_bg.errors import InputError


def autocorrelation_time(series: ArrayLike, interval: float = 1.0) -> float:
    """Integrated autocorrelation time: the integral of the normalised autocorrelation from zero.

    Half the statistical inefficiency times the interval, by Geyer's initial sequence: see
    :func:`~openmm_bg.analysis.statistical_inefficiency`. ``inf`` where the series never changes.

    Parameters
    ----------
    series : (n,) or (chains, n)
        In the order in which it was made.
    interval : float
        Between frames, in the unit that is wanted back.

    Examples
    --------
    >>> from scipy.signal import lfilter
    >>> noise = np.random.default_rng(0).normal(size=100_000)
    >>> bool(abs(autocorrelation_time(lfilter([1], [1, -0.9], noise)) - 9.5) < 1.0)    # (1 + 0.9) / (1 - 0.9) / 2
    True
    """
    return interval * statistical_inefficiency(series) / 2


@dataclass(frozen=True)
class SamplingRate:
    """Effective samples, and for what.

    Attributes
    ----------
    effective_samples : float
    per_million_evaluations, per_second : float
        NaN where the cost was not given.
    """

    effective_samples: float
    per_million_evaluations: float = math.nan
    per_second: float = math.nan

    def __str__(self) -> str:
        parts = [f"{self.effective_samples:.4g} effective samples"]
        if not math.isnan(self.per_million_evaluations):
            parts.append(f"{self.per_million_evaluations:.3g} per million force evaluations")
        if not math.isnan(self.per_second):
            parts.append(f"{self.per_second:.3g} per second")
        return ", ".join(parts)


def sampling_rate(
    effective_samples: float | ArrayLike, *, evaluations: float | None = None, seconds: float | None = None
) -> SamplingRate:
    """Effective samples per force evaluation and per second.

    Parameters
    ----------
    effective_samples : float, or (n,) or (chains, n) series
        A series is worth :func:`~openmm_bg.analysis.effective_sample_size`.
    evaluations, seconds : float, optional
        What the whole series cost, data and training included where they should count.

    Examples
    --------
    >>> print(sampling_rate(500.0, evaluations=2e6, seconds=100))
    500 effective samples, 250 per million force evaluations, 5 per second
    """
    given = np.asarray(effective_samples, dtype=np.float64)
    size = float(given) if given.ndim == 0 else effective_sample_size(given)
    for name, cost in (("evaluations", evaluations), ("seconds", seconds)):
        if cost is not None and not (math.isfinite(cost) and cost > 0):
            raise InputError(f"{name} must be a positive finite number, not {cost}.")
    return SamplingRate(
        size, math.nan if evaluations is None else 1e6 * size / evaluations,
        math.nan if seconds is None else size / seconds,
    )  # fmt: skip
