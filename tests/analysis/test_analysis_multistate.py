"""Gaussians of several widths as one ensemble, whose free energies are known."""

from __future__ import annotations

import logging

import numpy as np
import pytest

from openmm_bg.analysis import multistate
from openmm_bg.errors import InputError

pytest.importorskip("pymbar")
WIDTHS = np.array([1.0, 1.5, 2.5])
COUNTS = np.array([3000, 2000, 2000])


@pytest.fixture(scope="module")
def energies() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    x = np.concatenate([w * rng.normal(size=n) for w, n in zip(WIDTHS, COUNTS, strict=True)])
    return x, x**2 / (2 * WIDTHS[:, None] ** 2)


@pytest.mark.parametrize("target", [0, 2])
def test_free_energies_and_weights(energies, target):
    x, u = energies
    found = multistate(u, COUNTS, target=target)
    exact = -np.log(WIDTHS) + np.log(WIDTHS[target])
    others = np.arange(3) != target
    assert found.free_energies[target] == 0 == found.errors[target]
    assert (np.abs(found.free_energies - exact)[others] < 4 * found.errors[others]).all()
    assert (found.errors[others] < 0.05).all()
    w = np.exp(found.log_weights)
    assert w.sum() == pytest.approx(1)
    assert w @ x**2 == pytest.approx(WIDTHS[target] ** 2, rel=0.06)
    # frames of the other states help
    assert 1.2 * COUNTS[target] < found.effective_frames < len(x)
    assert 0.05 < found.overlap < 0.9


def test_correlated_frames_have_larger_errors_and_the_log_stays_as_it_was(energies):
    _, u = energies
    before = logging.root.manager.disable
    one, other = multistate(u, COUNTS), multistate(u, COUNTS, inefficiency=4)
    np.testing.assert_allclose(other.errors, 2 * one.errors)
    assert logging.root.manager.disable == before


def test_states_that_do_not_overlap_say_so():
    rng = np.random.default_rng(1)
    x = np.concatenate([rng.normal(size=500), 30 + rng.normal(size=500)])
    assert multistate([x**2 / 2, (x - 30) ** 2 / 2], [500, 500]).overlap < 1e-6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"counts": [3000, 2000]}, "whole number for each state"),
        ({"counts": [3000, 2000, 1999]}, "counts add up to 6999, but there are 7000 frames"),
        ({"counts": [3000.0, 2000.0, 2000.0]}, "whole number for each state"),
        ({"target": 3}, "There is no state 3"),
        ({"inefficiency": 0.5}, "1 or more"),
        ({"reduced_energies": np.full((3, 7000), np.nan)}, "not finite"),
    ],
)
def test_inputs_are_checked(energies, change, message):
    given = {"reduced_energies": energies[1], "counts": COUNTS} | change
    with pytest.raises(InputError, match=message):
        multistate(given.pop("reduced_energies"), given.pop("counts"), **given)
