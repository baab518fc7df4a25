"""TICA against its eigenproblem, distances against closed forms."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from chains import autoregressive
from scipy.linalg import eigh

from openmm_bg.analysis import jensen_shannon, tica, tica_projection
from openmm_bg.analysis.tica import planar_w2
from openmm_bg.errors import InputError


def test_the_slowest_direction_is_that_of_the_eigenproblem():
    pytest.importorskip("deeptime")
    rng = np.random.default_rng(0)
    slow, fast = autoregressive(20_000, 50, rng), rng.normal(size=20_000)
    angles = np.stack([0.3 * fast + 0.2 * slow, 0.4 * fast - 0.1 * slow], axis=1)
    a, b = tica_projection(angles, angles[:50], lag=5)
    assert a.shape == (20_000, 2) and abs(np.corrcoef(a[:, 0], slow)[0, 1]) > 0.95
    np.testing.assert_allclose(a[:50], b)
    np.testing.assert_allclose(a.std(0), 1)
    x = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
    past, future = x[:-5], x[5:]
    mean = (past.mean(0) + future.mean(0)) / 2
    past, future = past - mean, future - mean
    lagged = (past.T @ future + future.T @ past) / (2 * len(past))
    instant = (past.T @ past + future.T @ future) / (2 * len(past))
    _, vectors = eigh(lagged, instant)
    ours = (x - mean) @ vectors[:, ::-1][:, :2]
    for k in range(2):
        assert abs(np.corrcoef(ours[:, k], a[:, k])[0, 1]) == pytest.approx(1, abs=1e-3)


def test_what_tica_needs_is_said(monkeypatch):
    angles = np.zeros((10, 1))
    monkeypatch.setitem(sys.modules, "deeptime", None)
    monkeypatch.setattr(tica, "tica_is_there", lambda: False)
    with pytest.raises(InputError, match="pip install deeptime"):
        tica_projection(angles, angles)
    monkeypatch.setattr(tica, "tica_is_there", lambda: True)
    with pytest.raises(InputError, match="lag of 9 frames needs more than 10"):
        tica_projection(angles, angles, lag=9)


def test_jensen_shannon_of_known_histograms():
    a, b = np.zeros((100, 2)), np.ones((50, 2))
    assert jensen_shannon(a, a) == 0
    assert jensen_shannon(a, b) == pytest.approx(1)
    half = np.concatenate([a, np.ones((100, 2))])
    # (H(3/4, 1/4) - H(1/2, 1/2) / 2) bits
    divergence = -0.75 * np.log2(0.75) - 0.25 * np.log2(0.25) - 0.5
    assert jensen_shannon(half, a) == pytest.approx(np.sqrt(divergence))


def test_w2_of_a_shift_is_the_shift():
    points = np.random.default_rng(1).normal(size=(200, 2))
    assert planar_w2(points, points[::-1] + [3.0, 4.0]) == pytest.approx(5.0)
