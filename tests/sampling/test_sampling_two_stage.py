"""A scan against the chain made one step at a time, and against exact averages of the cheap energy."""

from __future__ import annotations

import math

import numpy as np
import pytest

from openmm_bg.sampling.metropolis import accept, log_acceptance
from openmm_bg.sampling.two_stage import scan

KT = 2.0


class Normals:
    """Independent draws of N(0, 1.5^2) in one dimension, as a molecule of one atom."""

    kind, state_dependent = "independent", False

    def __init__(self, seed):
        self.random = np.random.default_rng(seed)

    def take(self, n, at):
        x = np.zeros((n, 1, 3))
        x[:, 0, 0] = 1.5 * self.random.standard_normal(n)
        return x, np.array([self.log_prob(row) for row in x])

    def log_prob(self, x):
        return -0.5 * (x[0, 0] / 1.5) ** 2


class Walks(Normals):
    """Steps that are reversible with respect to N(0, 1), at most five from one place."""

    kind, state_dependent = "latent", True

    def take(self, n, at):
        x = np.zeros((min(n, 5), 1, 3))
        x[:, 0, 0] = 0.6 * at[0, 0] + 0.8 * self.random.standard_normal(len(x))
        return x, np.array([self.log_prob(row) for row in x])

    def log_prob(self, x):
        return -0.5 * x[0, 0] ** 2


def well(x):
    """A quartic well in kJ/mol; no value beyond 3 nm."""
    r = x[:, 0, 0]
    return np.where(np.abs(r) < 3, KT * (r**4 / 4 - 0.3 * r), np.nan)


def exact():
    r = np.linspace(-3, 3, 6001)
    weight = np.exp(-(r**4) / 4 + 0.3 * r)
    return np.array([(r * weight).sum(), (r**2 * weight).sum()]) / weight.sum()


@pytest.mark.parametrize("source", [Normals, Walks])
def test_scans_sample_the_cheap_energy(source):
    proposals, rng = source(1), np.random.default_rng(2)
    at, found, tried, moved = np.zeros((1, 3)), [], 0, 0
    for _ in range(2400):
        end = scan(proposals, well, KT, 7, at, rng)
        at = end.positions
        found.append([at[0, 0], at[0, 0] ** 2])
        tried, moved = tried + end.tried, moved + end.moved
        assert end.potential == well(at[None])[0] and end.log_prob == proposals.log_prob(at)
    blocks = np.reshape(found, (40, 60, 2)).mean(1)
    assert np.abs((blocks.mean(0) - exact()) / (blocks.std(0, ddof=1) / math.sqrt(40))).max() < 3.5
    assert tried == 16_800 and 0.2 * tried < moved < 0.9 * tried


def test_a_scan_of_independent_proposals_is_the_chain_of_single_steps():
    at = np.full((1, 3), 0.4)
    end = scan(Normals(1), well, KT, 50, at, np.random.default_rng(2))
    rng = np.random.default_rng(2)
    rng.standard_exponential()  # the first of a chain's numbers belongs to where it begins
    x, log_probs = Normals(1).take(50, at)
    moved = 0
    for row, log_prob in zip(x, log_probs, strict=True):
        u, u_new = well(at[None])[0] / KT, well(row[None])[0] / KT
        if accept(log_acceptance(u, u_new, Normals(0).log_prob(at), log_prob), rng):
            at, moved = row, moved + 1
    np.testing.assert_array_equal(end.positions, at)
    assert (end.moved, end.tried) == (moved, 50)


def test_what_follows_an_acceptance_is_drawn_anew():
    proposals, drawn = Walks(1), []
    take = proposals.take
    proposals.take = lambda n, at: drawn.append((n, at, *take(n, at))) or drawn[-1][2:]
    end = scan(proposals, well, KT, 60, np.zeros((1, 3)), np.random.default_rng(2))
    tried = moved = 0
    for (n, at, x, _), new in zip(drawn, [at for _, at, _, _ in drawn[1:]] + [end.positions], strict=True):
        assert n == 60 - tried
        chosen = [k for k in range(len(x)) if np.array_equal(x[k], new)]
        # either one of the batch was accepted, and the rest was not tried, or all were tried in vain
        assert chosen or np.array_equal(new, at)
        tried, moved = tried + (chosen[0] + 1 if chosen else len(x)), moved + bool(chosen)
    assert (tried, moved) == (60, end.moved) and moved > 5


def test_scans_that_cannot_begin_are_refused():
    outside = np.full((1, 3), 4.0)
    end = scan(Normals(1), well, KT, 5, outside, np.random.default_rng(2))
    assert end.refused and end.tried == end.moved == 0 and end.positions is outside

    class Nowhere(Normals):
        def log_prob(self, x):
            return -math.inf

    assert scan(Nowhere(1), well, KT, 5, np.zeros((1, 3)), np.random.default_rng(2)).refused

    class Broken(Normals):
        def log_prob(self, x):
            return math.nan

    with pytest.raises(ValueError, match="faulty"):
        scan(Broken(1), well, KT, 5, np.zeros((1, 3)), np.random.default_rng(2))
