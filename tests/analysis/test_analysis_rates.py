"""Autocorrelation times of chains with known ones, and rates by arithmetic."""

from __future__ import annotations

import math

import numpy as np
import pytest
from chains import autoregressive

from openmm_bg.analysis import autocorrelation_time, effective_sample_size, sampling_rate
from openmm_bg.errors import InputError


def test_the_time_of_an_autoregressive_chain():
    x = autoregressive(200_000, 20.0, np.random.default_rng(0))
    r = math.exp(-1 / 20)
    assert autocorrelation_time(x, 0.5) == pytest.approx(0.5 * (1 + r) / (1 - r) / 2, rel=0.1)
    assert autocorrelation_time(np.ones(50)) == math.inf


def test_rates():
    x = autoregressive(5000, 5.0, np.random.default_rng(1))
    rate = sampling_rate(x, evaluations=1e6, seconds=20)
    assert rate.effective_samples == effective_sample_size(x) == rate.per_million_evaluations
    assert rate.per_second == rate.effective_samples / 20
    assert str(sampling_rate(12.5)) == "12.5 effective samples"
    for wrong in ({"seconds": 0.0}, {"evaluations": math.nan}):
        with pytest.raises(InputError, match="positive finite number"):
            sampling_rate(1.0, **wrong)
