"""The dual of constrained mass transport: its steps against exact Gaussian ones, and bounds that exclude each other."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import logsumexp
from scipy.stats import norm, qmc

from openmm_bg.errors import InputError
from openmm_bg.sampling import effective_sample_size
from openmm_bg.training import transport


def log_normal(x, deviations):
    """Log-density of N(0, diag deviations^2) at x (n, d)."""
    deviations = np.asarray(deviations, dtype=float)
    return norm.logpdf(x, scale=deviations).sum(-1)


def evenly(deviations, log2_n=16):
    """Points of N(0, diag deviations^2) that are spread evenly, and their log-density."""
    deviations = np.asarray(deviations, dtype=float)
    x = norm.ppf(qmc.Sobol(len(deviations), seed=1).random_base2(log2_n)) * deviations
    return x, log_normal(x, deviations)


def divergence(precision, variance):
    """KL(N(0, 1 / precision) || N(0, variance))."""
    ratio = precision * variance
    return 0.5 * (1 / ratio - 1 + np.log(ratio)).sum()


def entropy_drop(precision, variance):
    return 0.5 * np.log(precision * variance).sum()


def best_gaussian(variance, trust_region, entropy_bound):
    """Precisions of the Gaussian nearest to N(0, 1) within the bounds: the problem itself, without a dual."""
    bounds = []
    if trust_region is not None:
        bounds.append({"type": "ineq", "fun": lambda u: trust_region - divergence(np.exp(u), variance)})
    if entropy_bound is not None:
        bounds.append({"type": "ineq", "fun": lambda u: entropy_bound - entropy_drop(np.exp(u), variance)})
    found = minimize(
        lambda u: divergence(np.exp(u), np.ones_like(variance)), -np.log(variance), method="SLSQP", constraints=bounds,
        options={"ftol": 1e-14, "maxiter": 500},
    )  # fmt: skip
    assert found.success, found.message
    return np.exp(found.x)


@pytest.mark.parametrize(
    ("deviations", "trust_region", "entropy_bound", "binding"),
    [
        ([2.0, 1.5], None, None, ""),
        ([2.0, 1.5], 0.1, None, "trust"),
        ([5.0, 4.0], 0.3, None, "trust"),
        ([2.0, 1.5], None, 0.2, "entropy"),
        ([5.0, 4.0], None, 1.0, "entropy"),
        ([2.0, 1.5], 0.1, 0.2, "entropy"),
        ([3.0, 0.9], 0.05, 0.5, "trust"),
        ([2.0, 1.5], 0.05, 0.3, "trust entropy"),
        ([5.0, 4.0], 0.05, 0.3, "trust entropy"),
        ([3.0, 2.0, 1.2], 0.1, 0.3, "trust entropy"),
        ([3.0, 0.8], 0.1, 0.2, "trust entropy"),
        ([1.2, 0.9], 0.3, 0.4, ""),
    ],
)
def test_a_step_between_gaussians_is_the_exact_one(deviations, trust_region, entropy_bound, binding):
    """The next iterate is the Gaussian that solves the constrained problem, with precision (lambda/v + 1)/s."""
    x, log_q = evenly(deviations)
    step = transport(log_normal(x, np.ones(len(deviations))) + 7.5, log_q, trust_region, entropy_bound)
    assert (step.trust > 0, step.entropy > 0) == ("trust" in binding, "entropy" in binding)
    variance = np.square(deviations)
    precision = (step.trust / variance + 1) / (1 + step.trust + step.entropy)
    assert precision == pytest.approx(best_gaussian(variance, trust_region, entropy_bound), rel=5e-3)
    assert step.divergence == pytest.approx(divergence(precision, variance), rel=5e-3)
    assert step.entropy_drop == pytest.approx(entropy_drop(precision, variance), rel=1e-2)
    exact = log_normal(x, precision**-0.5) - log_q
    assert np.abs(step.log_ratio - exact).max() < 1e-2
    assert np.exp(step.log_ratio).mean() == pytest.approx(1.0, rel=1e-12)


@pytest.mark.parametrize(
    ("trust_region", "entropy_bound"), [(0.1, None), (None, 0.2), (0.05, 0.3), (1e-3, 1e-3), (0.05, 3.0), (3.0, 0.3)]
)
def test_a_bound_that_binds_is_met_with_equality(trust_region, entropy_bound):
    """On the very samples, and complementary: a multiplier is zero or its bound is met; none is exceeded."""
    x, log_q = evenly([2.0, 1.5], 12)
    step = transport(log_normal(x, [1.0, 1.0]), log_q, trust_region, entropy_bound)
    weights = np.exp(step.log_ratio) / len(x)
    assert step.divergence == pytest.approx(weights @ step.log_ratio, rel=1e-9)
    assert step.entropy_drop == pytest.approx(weights @ (log_q + step.log_ratio) - log_q.mean(), rel=1e-9)
    assert step.trust + step.entropy > 0
    for multiplier, value, bound in (
        (step.trust, step.divergence, trust_region),
        (step.entropy, step.entropy_drop, entropy_bound),
    ):
        if multiplier > 0:
            assert value == pytest.approx(bound, rel=1e-3, abs=1e-6)
        elif bound is not None:
            assert value < bound


def test_without_bounds_a_step_is_importance_weights():
    x, log_q = evenly([2.0, 1.5], 12)
    log_p = log_normal(x - 0.3, [1.0, 0.7]) - 40.0
    step = transport(log_p, log_q)
    assert step[:2] == (0.0, 0.0)
    log_w = log_p - log_q
    assert step.log_ratio == pytest.approx(log_w - logsumexp(log_w) + math.log(len(x)), abs=1e-12)


def dual(log_p, log_q, trust, entropy, trust_region, entropy_bound):
    scale = 1 + trust + entropy
    log_z = logsumexp((log_p - (1 + entropy) * log_q) / scale) - math.log(len(log_q))
    return -scale * log_z - trust * trust_region + entropy * (-log_q.mean() - entropy_bound)


@pytest.mark.parametrize(
    ("trust_region", "entropy_bound"), [(0.05, 0.3), (0.1, 2.0), (2.0, 0.2), (5.0, 5.0)], ids=["both", "t", "e", "none"]
)
def test_the_multipliers_maximise_the_dual_whose_slope_is_the_slack(trust_region, entropy_bound):
    """And the dual's maximum is the KL(q' || p) that is reached: no gap."""
    x, log_q = evenly([2.0, 1.5], 12)
    log_p = log_normal(x, [1.0, 1.0]) + 3.0
    step = transport(log_p, log_q, trust_region, entropy_bound)

    def value(trust, entropy):
        return dual(log_p, log_q, trust, entropy, trust_region, entropy_bound)

    at = (step.trust, step.entropy)
    h = 1e-5
    slope = [
        (value(at[0] + h, at[1]) - value(at[0] - h, at[1])) / (2 * h),
        (value(at[0], at[1] + h) - value(at[0], at[1] - h)) / (2 * h),
    ]
    slack = [step.divergence - trust_region, step.entropy_drop - entropy_bound]
    assert slope == pytest.approx(slack, abs=1e-7)
    for trust in (0.0, 0.5 * at[0], 0.98 * at[0], 1.02 * at[0], 2 * at[0] + 1):
        for entropy in (0.0, 0.5 * at[1], 0.98 * at[1], 1.02 * at[1], 2 * at[1] + 1):
            assert value(trust, entropy) <= value(*at) + 1e-8
    reached = np.exp(step.log_ratio) / len(x) @ (log_q + step.log_ratio - log_p)
    assert reached == pytest.approx(value(*at), abs=1e-5)


@pytest.mark.parametrize("constant", [7.0, -1e3, -1e5, 1e7])
@pytest.mark.parametrize("bounds", [(None, None), (0.1, None), (None, 0.2), (0.05, 0.3)], ids=["", "t", "e", "both"])
def test_a_constant_of_the_energy_changes_nothing(constant, bounds):
    """A molecule in its solvent has energies of -1e5 kT."""
    x, log_q = evenly([2.0, 1.5], 12)
    log_p = log_normal(x, [1.0, 1.0])
    plain, moved = transport(log_p, log_q, *bounds), transport(log_p + constant, log_q, *bounds)
    assert moved[:2] == pytest.approx(plain[:2], rel=2e-3, abs=1e-9)
    assert moved.log_ratio == pytest.approx(plain.log_ratio, abs=1e-3)
    assert (moved.divergence, moved.entropy_drop) == pytest.approx((plain.divergence, plain.entropy_drop), rel=1e-4)


@pytest.mark.parametrize("bounds", [(0.3, None), (None, 0.5), (0.3, 0.5), (None, None)])
def test_samples_without_a_target_density_get_no_weight(bounds):
    """A fifth of the samples lies where p = 0: -inf and NaN alike, and +inf is no weight either."""
    x, log_q = evenly([1.0], 12)
    log_p = log_normal(x, [0.5])
    lost = np.arange(len(x)) % 5 == 0
    steps = []
    for value in (-math.inf, math.nan, math.inf):
        log_p[lost] = value
        steps.append(transport(log_p, log_q, *bounds))
    for step in steps:
        assert np.isneginf(step.log_ratio[lost]).all() and np.isfinite(step.log_ratio[~lost]).all()
        assert np.exp(step.log_ratio).mean() == pytest.approx(1.0, rel=1e-12)
        assert step.divergence >= math.log(1.25)  # what giving up a fifth costs at least
        assert np.array_equal(step.log_ratio, steps[0].log_ratio)
        if bounds[0]:
            assert step.divergence <= 0.3 * (1 + 1e-4)
        if bounds[1]:
            assert step.entropy_drop <= 0.5 * (1 + 1e-4)


def test_a_target_that_cannot_be_reached_within_the_trust_region_gets_the_nearest_step():
    """Where 40 % have no density, the least divergence is -log 0.6 > 0.3: even weights on the others."""
    x, log_q = evenly([1.0], 12)
    log_p = log_normal(x, [0.5])
    lost = np.arange(len(x)) % 5 < 2
    log_p[lost] = -math.inf
    step = transport(log_p, log_q, 0.3)
    least = -math.log(np.mean(~lost))
    assert step.divergence == pytest.approx(least, rel=1e-6)
    assert step.log_ratio[~lost] == pytest.approx(np.full((~lost).sum(), least), abs=1e-4)


def test_and_with_an_entropy_bound_that_can_be_met_meets_that():
    x, log_q = evenly([1.0], 12)
    log_p = log_normal(x, [0.5])
    log_p[np.arange(len(x)) % 5 < 2] = -math.inf
    step = transport(log_p, log_q, 0.3, 0.5)
    assert step.divergence <= -math.log(0.6) + 0.01
    assert step.entropy_drop <= 0.5 + 0.02


# 1 - exp(-0.3) = 0.2592 of the samples are the most that the trust region can give up
@pytest.mark.parametrize("lost", [0.2, 0.258, 0.259, 0.26, 0.4])
@pytest.mark.parametrize("bound", [0.01, 0.3])
def test_bounds_that_exclude_each_other_end_as_near_as_can_be(lost, bound):
    """A share is lost that costs nearly all of the trust region, and its entropy more than the bound."""
    n = 4000
    x = norm.ppf((np.arange(n) + 0.5) / n)
    log_p = -2 * x**2
    log_p[np.argsort(-np.abs(x))[: int(lost * n)]] = -math.inf  # the tails
    step = transport(log_p, norm.logpdf(x), 0.3, bound)
    assert np.isfinite(step.log_ratio[np.isfinite(log_p)]).all()
    assert step.divergence <= max(0.3, -math.log(1 - lost)) + 1e-3
    assert math.isfinite(step.entropy_drop)


@pytest.mark.parametrize("bounds", [(0.3, 0.5), (0.3, None), (None, 0.5), (None, None)])
def test_at_the_target_nothing_binds_and_nothing_moves(bounds):
    _, log_q = evenly([2.0, 1.5], 10)
    step = transport(log_q - 12.0, log_q, *bounds)
    assert step[:2] == (0.0, 0.0)
    assert np.abs(step.log_ratio).max() < 1e-12
    assert abs(step.divergence) < 1e-12 and abs(step.entropy_drop) < 1e-12


@pytest.mark.parametrize("bounds", [(0.3, None), (None, 0.5), (0.3, 0.5), (0.3, 3.0)])
@pytest.mark.parametrize(
    "steepness",
    [1e3, 1e6, 1e7, 1e8, 1e12],
)
def test_far_from_the_target_the_bounds_hold_and_one_is_reached(steepness, bounds):
    """Energies of overlapping atoms: the multipliers are huge."""
    x, log_q = evenly([1.0], 12)
    step = transport(-steepness * x[:, 0] ** 2, log_q, *bounds)
    assert np.isfinite(step.log_ratio).all()
    used = [got / bound for got, bound in zip(step[3:], bounds, strict=True) if bound is not None]
    assert max(used) == pytest.approx(1.0, rel=1e-3)


def test_a_geometric_step_to_a_very_steep_target_is_its_gaussian():
    """q' = q^(l/s) p^(1/s): N(0, 1) under -1e6 x^2 has the precision (l + 2e6) / s."""
    x, log_q = evenly([1.0], 14)
    step = transport(-1e6 * x[:, 0] ** 2, log_q, 0.3)
    precision = (step.trust + 2e6) / (1 + step.trust)
    assert divergence(np.array([precision]), np.array([1.0])) == pytest.approx(0.3, rel=1e-3)
    assert np.abs(step.log_ratio - log_normal(x, [precision**-0.5]) + log_q).max() < 1e-2


@pytest.mark.parametrize("bound", [1e-4, 1e-6, 1e-9])
def test_tiny_bounds_give_tiny_steps(bound):
    """For small steps KL = Var(log p/q) / (2 lambda^2)."""
    x, log_q = evenly([1.0], 12)
    log_p = log_normal(x - 2.0, [0.5])
    step = transport(log_p, log_q, bound)
    assert step.divergence == pytest.approx(bound, rel=1e-3)
    assert step.trust == pytest.approx(np.std(log_p - log_q) / math.sqrt(2 * bound), rel=20 * math.sqrt(bound))
    step = transport(log_p, log_q, None, bound)
    assert step.entropy_drop == pytest.approx(bound, rel=1e-2, abs=1e-11)
    step = transport(log_p, log_q, bound, bound)
    assert step.divergence <= bound * 1.05 and np.abs(step.log_ratio).max() < 100 * math.sqrt(bound)


@pytest.mark.parametrize("bounds", [(None, None), (0.3, None), (None, 0.5), (0.1, 0.15)])
def test_single_precision_samples_give_the_same_step(bounds):
    x, log_q = evenly([2.0, 1.5], 12)
    log_p = log_normal(x, [1.0, 1.0]) + 3.0
    wide, narrow = transport(log_p, log_q, *bounds), transport(np.float32(log_p), np.float32(log_q), *bounds)
    assert narrow.log_ratio.dtype == np.float64
    assert narrow[:2] == pytest.approx(wide[:2], rel=1e-3, abs=1e-9)
    assert np.abs(narrow.log_ratio - wide.log_ratio).max() < 1e-3


def test_inputs_are_left_as_they_are():
    x, log_q = evenly([2.0], 8)
    log_p = log_normal(x, [1.0])
    log_p[3] = -math.inf
    before = log_p.copy(), log_q.copy()
    transport(log_p, log_q, 0.1, 0.1)
    assert np.array_equal(log_p, before[0]) and np.array_equal(log_q, before[1])


@pytest.mark.parametrize("name", ["trust_region", "entropy_bound"])
@pytest.mark.parametrize("bound", [0.0, -1.0, math.nan, math.inf])
def test_bounds_that_are_none_are_refused(name, bound):
    with pytest.raises(InputError, match=name):
        transport(np.zeros(5), np.zeros(5), **{name: bound})


@pytest.mark.parametrize("value", [-math.inf, math.nan])
def test_a_flow_that_never_meets_the_target_is_refused(value):
    for log_p, log_q in (
        (np.full(5, value), np.zeros(5)),
        (np.zeros(5), np.full(5, value)),
        (np.zeros(0), np.zeros(0)),
    ):
        with pytest.raises(InputError, match="do not overlap"):
            transport(log_p, log_q, 0.3)


@pytest.mark.parametrize(
    ("trust_region", "entropy_bound", "steps"), [(0.3, None, 22), (0.1, None, 39), (0.3, 1.8, 40)], ids=str
)
def test_a_ladder_of_exact_gaussian_steps_arrives(trust_region, entropy_bound, steps):
    """60 dimensions, 71 nats of entropy to lose: the number of steps does not grow with the dimension."""
    variance = np.repeat(np.square([2.3, 2.2, 20.0, 1.3]), [21, 20, 12, 7])
    assert 0.5 * np.log(variance).sum() == pytest.approx(71.0, abs=0.5)
    rng = np.random.default_rng(0)
    sizes, taken = [], 0
    while taken < 60:
        x = rng.normal(size=(20_000, 60)) * np.sqrt(variance)
        log_q = -0.5 * (np.square(x) / variance + np.log(2 * math.pi * variance)).sum(1)
        step = transport(-0.5 * np.square(x).sum(1) + 5.0, log_q, trust_region, entropy_bound)
        precision = (step.trust / variance + 1) / (1 + step.trust + step.entropy)
        taken += 1
        # the closed forms, by what 20,000 samples resolve
        assert divergence(precision, variance) == pytest.approx(step.divergence, abs=0.05)
        assert entropy_drop(precision, variance) == pytest.approx(step.entropy_drop, abs=0.2)
        assert step.divergence <= trust_region * (1 + 1e-3)
        assert entropy_bound is None or step.entropy_drop <= entropy_bound * (1 + 1e-3)
        if step.trust == 0 and step.entropy == 0:
            break
        sizes.append(effective_sample_size(step.log_ratio).fraction)
        variance = 1 / precision
    assert precision == pytest.approx(1.0)
    assert abs(taken - steps) <= 2
    if entropy_bound is None:
        expected = {0.3: 0.595, 0.1: 0.83}[trust_region]
        assert np.median(sizes) == pytest.approx(expected, abs=0.01)
        assert min(sizes) > expected - 0.03
    assert min(sizes) > 0.5
