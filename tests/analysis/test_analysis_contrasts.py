"""Tests of means and shares: right p-values for correlated series, and the classical ones where those apply."""

from __future__ import annotations

import math

import numpy as np
import pytest
from chains import autoregressive
from scipy import stats

from openmm_bg.analysis.contrasts import (
    Share,
    adjusted,
    block_averages,
    circular_scores,
    linear_scores,
    mean_p_value,
    pooled_ranks,
    share,
    share_p_value,
)


def even(n: int) -> np.ndarray:
    return np.full(n, 1 / n)


def test_the_covariance_of_means_is_that_of_an_autoregressive_chain():
    rng = np.random.default_rng(0)
    n, memory, mixing = 4000, 4.0, np.array([[1.0, 0.6], [0.0, 0.8]])
    r = math.exp(-1 / memory)
    inefficiency = (1 + r) / (1 - r)
    found = [
        block_averages(np.column_stack([autoregressive(n, memory, rng) for _ in range(2)]) @ mixing, even(n))
        for _ in range(60)
    ]
    exact = mixing.T @ mixing * inefficiency / n
    np.testing.assert_allclose(np.mean([m.covariance for m in found], 0), exact, rtol=0.1)
    assert np.mean([m.size for m in found]) == pytest.approx(n / inefficiency, rel=0.15)
    # means of chains spread as they are said to
    assert np.var([m.values[0] for m in found]) == pytest.approx(exact[0, 0], rel=0.5)


def test_weights_count():
    rng = np.random.default_rng(1)
    x, w = rng.normal(size=20_000), rng.lognormal(0, 1, 20_000)
    w /= w.sum()
    found = block_averages(x[:, None], w)
    # independent of the values: the variance grows by Kish's factor
    assert found.covariance[0, 0] == pytest.approx((w**2).sum(), rel=0.3)
    assert found.size == pytest.approx(1 / (w**2).sum(), rel=0.3)
    assert found.values[0] == pytest.approx(w @ x)


def test_a_series_that_never_moves_has_no_size():
    assert block_averages(np.ones((100, 1)), even(100)).size == 0
    assert share(np.zeros(50, dtype=bool), even(50)) == Share(0.0, 0.0, 0.0, 0)


@pytest.mark.parametrize(("n", "memory"), [(1500, 0.0), (1500, 3.0), (1000, 20.0)])
def test_p_values_are_uniform_where_nothing_differs(n, memory):
    rng = np.random.default_rng(2)
    found = []
    for _ in range(150):
        a, b = autoregressive(n, memory, rng), autoregressive(n // 2, memory, rng)
        weights = even(n), even(n // 2)
        ranks = pooled_ranks(a, b, *weights)
        means = [block_averages(linear_scores(r), w) for r, w in zip(ranks, weights, strict=True)]
        shares = [share(x > 1.2, w) for x, w in zip((a, b), weights, strict=True)]
        found.append((mean_p_value(*means, 2), share_p_value(*shares)))
    p = np.array(found)
    # 150 draws: 1 % is 1.5 +- 1.2, 10 % is 15 +- 3.7
    assert (p[:, 0] < 0.01).sum() <= 6 and 4 <= (p[:, 0] < 0.1).sum() <= 28
    assert (p[:, 1] < 0.01).sum() <= 6 and (p[:, 1] < 0.1).sum() <= 28  # an exact test of counts is conservative


def test_independent_samples_are_compared_as_by_students_test():
    rng = np.random.default_rng(3)
    a, b = rng.normal(size=4000), rng.normal(0.06, 1, size=4000)
    ours = mean_p_value(block_averages(a[:, None], even(4000)), block_averages(b[:, None], even(4000)), 1)
    assert math.log10(ours) == pytest.approx(math.log10(stats.ttest_ind(a, b).pvalue), abs=0.7)


def test_several_scores_are_compared_at_once():
    rng = np.random.default_rng(4)
    a, b = rng.normal(size=(2, 5000, 3)) @ np.array([[1, 0.9, 0], [0, 0.2, 0], [0, 0, 1]])
    means = [block_averages(x, even(5000)) for x in (a, b + [0, 0.03, 0])]
    # a shift against the correlation, which no score shows by itself
    assert mean_p_value(*means, 3) < 1e-3
    single = (
        mean_p_value(*(m._replace(values=m.values[k:], covariance=m.covariance[k:, k:]) for m in means), 1)
        for k in range(3)
    )
    assert min(single) > 1e-3


def test_shares_are_compared_as_by_fishers_test():
    a, b = Share(0.02, 0.0, 500.0, 0), Share(0.06, 0.0, 300.0, 0)
    exact = stats.fisher_exact([[10, 490], [18, 282]]).pvalue
    assert share_p_value(a, b) == pytest.approx(exact, rel=1.2)
    assert math.isnan(share_p_value(a, Share(0.0, 0.0, 0.0, 0)))
    # fifty of five thousand against none
    assert share_p_value(Share(0.0, 0.0, 5000.0, 0), Share(0.01, 0.0, 5000.0, 0)) == pytest.approx(2 * 0.5**50, rel=0.5)


def test_ranks_are_those_of_scipy_with_ties_shared():
    rng = np.random.default_rng(5)
    values = rng.integers(0, 6, 60).astype(float)
    a, b = pooled_ranks(values[:30], values[30:], even(30), even(30))
    np.testing.assert_allclose(np.r_[a, b], (stats.rankdata(values) - 0.5) / 60)
    # a weight of two is two frames
    w = np.r_[2.0, np.ones(28)] / 30
    c, _ = pooled_ranks(values[:29], values[30:], w, even(30))
    d, _ = pooled_ranks(np.r_[values[0], values[:29]], values[30:], even(30), even(30))
    np.testing.assert_allclose(c, d[1:])


def test_what_only_rounding_moves_has_one_rank():
    """An angle of 180 degrees that every second frame calls -180, and every third misses by the last digit."""
    flat = np.where(np.arange(60) % 2, np.pi, -np.pi) + 1e-15 * (np.arange(60) % 3)
    a, b = pooled_ranks(flat[:30], flat[30:], even(30), even(30), period=2 * np.pi)
    assert set(a) | set(b) == {0.5}
    a, b = pooled_ranks(flat[:30], flat[30:], even(30), even(30))
    assert len(set(a) | set(b)) > 1, "without a period these are two places"
    moves = np.r_[flat[:-1], 3.1]
    assert len(set(pooled_ranks(moves[:30], moves[30:], even(30), even(30), period=2 * np.pi)[1])) > 1


def test_scores_are_orthonormal():
    ranks = (np.arange(100_000) + 0.5) / 100_000
    for scores, scale in ((linear_scores(ranks), 1.0), (circular_scores(ranks), 0.5)):
        np.testing.assert_allclose(scores.mean(0), 0, atol=1e-6)
        np.testing.assert_allclose(scores.T @ scores / len(ranks), scale * np.eye(scores.shape[1]), atol=1e-6)


def test_adjusted_p_values_keep_the_family_wise_error():
    rng = np.random.default_rng(6)
    families = ["few"] * 3 + ["many"] * 60
    least = [adjusted(rng.random(63), families).min() for _ in range(4000)]
    assert np.mean(np.array(least) <= 0.05) == pytest.approx(0.05, abs=0.012)
    # Holm within a family, Bonferroni between families; what was not asked costs nothing
    assert adjusted([0.01, 0.02, math.nan], ["a", "a", "b"]).tolist()[:2] == [0.02, 0.02]
    assert math.isnan(adjusted([math.nan], ["a"])[0])
