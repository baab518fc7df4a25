"""The acceptance rule against direct enumeration, the queue against itself, chain statistics against closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from openmm_bg.errors import InputError
from openmm_bg.sampling.metropolis import accept, independence_acceptance, independence_chain, log_acceptance
from openmm_bg.sampling.proposals import IndependenceProposals


class GaussianGenerator:
    """A duck-typed generator of three plain coordinates."""

    coordinates = None

    def sample_internal(self, n, generator):
        q = torch.randn(n, 3, generator=generator, dtype=torch.float64)
        return q, self.log_prob(q)

    def place(self, q, frame):
        return q

    def frame(self, x):
        return None

    def log_prob(self, x):
        return -0.5 * (x**2 + math.log(2 * math.pi)).sum(-1)


def test_detailed_balance_on_a_finite_state_space():
    """p_i q_j min(1, a_ij) must equal p_j q_i min(1, a_ji) for all pairs, for any p and q."""
    rng = np.random.default_rng(0)
    u, log_q = rng.normal(size=6), np.log(rng.dirichlet(np.ones(6)))
    a = np.exp(np.minimum(0, log_acceptance(u[:, None], u[None], log_q[:, None], log_q[None])))
    flow = np.exp(-u)[:, None] * np.exp(log_q)[None] * a
    np.testing.assert_allclose(flow, flow.T, rtol=1e-13)


def test_a_perfect_generator_is_always_accepted():
    u = np.array([3.0, -2.0, 0.5])
    assert np.abs(log_acceptance(u[:, None], u[None], -u[:, None] + 7, -u[None] + 7)).max() < 1e-15


@pytest.mark.parametrize("u_new", [math.nan, math.inf, -math.inf])
def test_a_proposal_without_a_finite_energy_is_rejected(u_new):
    assert log_acceptance(1.0, u_new, 0.0, 0.0) == -math.inf


@pytest.mark.parametrize("log_prob_new", [math.nan, -math.inf, math.inf])
def test_a_proposal_without_a_density_is_rejected(log_prob_new):
    assert log_acceptance(1.0, 0.0, 0.0, log_prob_new) == -math.inf


def test_a_current_state_outside_the_support_is_never_left():
    assert log_acceptance(1.0, -100.0, -math.inf, 0.0) == -math.inf


def test_a_clash_is_left_by_any_sound_proposal():
    assert log_acceptance(math.inf, 5.0, 0.0, 0.0) == math.inf


@pytest.mark.parametrize(
    ("u", "log_prob", "word"),
    [(math.nan, 0.0, "energy"), (-math.inf, 0.0, "energy"), (0.0, math.nan, "density"), (0.0, math.inf, "density")],
)
def test_a_broken_current_state_is_an_error(u, log_prob, word):
    with pytest.raises(ValueError, match=word):
        log_acceptance(u, 0.0, log_prob, 0.0)


def test_accept_has_the_right_frequency_and_always_uses_one_number():
    rng = np.random.default_rng(1)
    n = 40_000
    mean = np.mean([accept(math.log(0.3), rng) for _ in range(n)])
    assert abs(mean - 0.3) < 4 * math.sqrt(0.21 / n)
    a, b = np.random.default_rng(2), np.random.default_rng(2)
    assert accept(math.inf, a) and not accept(-math.inf, b)
    assert a.bit_generator.state == b.bit_generator.state


def test_queue_does_not_depend_on_how_it_is_emptied():
    at = np.zeros((1, 3))
    one, two = (IndependenceProposals(GaussianGenerator(), 5, batch_size=7) for _ in range(2))
    a = np.concatenate([one.take(1, at)[0] for _ in range(20)])
    b = np.concatenate([two.take(n, at)[0] for n in (13, 2, 5)])
    assert a.shape == (20, 1, 3)
    np.testing.assert_array_equal(a, b)
    assert len(one) == 1


def test_queue_state_continues_exactly():
    at = np.zeros((1, 3))
    queue = IndependenceProposals(GaussianGenerator(), 5, batch_size=8)
    for used in (0, 3, 5):  # untouched, in the middle of a batch, and at its end
        queue.take(used, at) if used else None
        copy = IndependenceProposals(GaussianGenerator(), 99, batch_size=8)
        copy.load_state_dict(queue.state_dict())
        for mine, theirs in zip(queue.take(8, at), copy.take(8, at), strict=True):
            np.testing.assert_array_equal(mine, theirs)


def test_queue_seeds_differ_and_density_is_the_generators():
    at = np.zeros((1, 3))
    x, log_prob = IndependenceProposals(GaussianGenerator(), 1).take(4, at)
    other, _ = IndependenceProposals(GaussianGenerator(), 2).take(4, at)
    assert not np.allclose(x, other)
    queue = IndependenceProposals(GaussianGenerator(), 1)
    np.testing.assert_allclose([queue.log_prob(row) for row in x], log_prob, rtol=1e-14)


def test_stationary_acceptance_equals_the_double_sum():
    log_w = np.random.default_rng(3).normal(size=50) * 2
    log_w[:3] = -math.inf
    w = np.exp(log_w)
    pairs = np.minimum(w[:, None], w[None])
    expected = (pairs.sum() - w.sum()) / (50 * 49) / w.mean()
    assert independence_acceptance(log_w) == pytest.approx(expected, rel=1e-12)


def test_stationary_acceptance_against_a_closed_form():
    """log w = -|x| under a Laplace proposal: the target is Laplace of half the width and the acceptance 2/3."""
    # q(t) = exp(-t), w = exp(-t) for t = |x|: E[min(w, w')] = E[exp(-max)] = 1/3 and E[w] = 1/2.
    t = np.random.default_rng(4).exponential(size=200_000)
    assert independence_acceptance(-t + 1000.0) == pytest.approx(2 / 3, abs=0.003)


def test_chain_samples_the_target_and_reports_its_acceptance():
    rng = np.random.default_rng(5)
    t = rng.exponential(size=200_000)
    chain = independence_chain(-t, rng)
    assert chain.acceptance_rate == pytest.approx(2 / 3, abs=0.005)
    assert t[chain.indices].mean() == pytest.approx(0.5, abs=0.01)


def test_chain_waits_for_the_first_possible_draw():
    chain = independence_chain([-math.inf, 0.0, -math.inf], np.random.default_rng(0))
    assert chain.indices.tolist() == [1, 1, 1]


def test_chain_climbs_from_weights_that_are_zero_beside_the_largest():
    """A strained start has a weight that only its logarithm can hold."""
    chain = independence_chain([-3000.0, -math.inf, -2000.0, -2900.0, 0.0], np.random.default_rng(0))
    assert chain.indices.tolist() == [0, 0, 2, 2, 4]


@pytest.mark.parametrize("bad", [[0.0], [0.0, math.nan], [0.0, math.inf], [-math.inf] * 2, [[0.0, 0.0]]])
def test_unusable_weights_are_refused(bad):
    with pytest.raises(InputError):
        independence_acceptance(bad)
