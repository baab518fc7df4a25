"""The Moser map against the densities it joins, against closed forms, and against autograd."""

from __future__ import annotations

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats

import openmm_bg as bg
from openmm_bg.errors import InputError
from openmm_bg.flows import BoxBase, MoserFlow, MoserTransform

BOXES = {1.0: [(-2.5, 2.5), (-3.0, 3.0)], 5.0: [(-1.9, 1.9), (-1.5, 1.5)]}


def moser(beta: float, **options) -> MoserFlow:
    well = bg.systems.load("double_well", beta=beta)
    return MoserFlow(lambda x: -well(x), BOXES[beta], std=1.0, **options)


@pytest.fixture(scope="module", params=BOXES, ids=lambda beta: f"beta {beta:g}")
def case(request):
    """A flow, its beta, and 1000 latents."""
    flow = moser(request.param)
    return flow, request.param, flow.base.sample(1000, torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def flow():
    """A coarse one, for what does not depend on the accuracy."""
    return moser(1.0, grid=24, steps=24)


# --- does it transport? ---------------------------------------------------------------------------------------------


def test_effective_sample_size_and_divergence(case):
    flow, beta, _ = case
    y, log_prob = flow.sample(2000, torch.Generator().manual_seed(0))
    log_weights = -bg.systems.load("double_well", beta=beta)(y) - log_prob
    weights = (log_weights - log_weights.max()).exp()
    assert weights.sum() ** 2 / (len(y) * weights.square().sum()) > 0.9999
    # normalised by quadrature of another kind
    (a, b), (c, d) = BOXES[beta]
    mass = integrate.quad(lambda x: math.exp(-beta * (x * x - 1) ** 2 / 4), a, b)[0]
    mass *= math.sqrt(2 * math.pi / beta) * (stats.norm.cdf(d * beta**0.5) - stats.norm.cdf(c * beta**0.5))
    assert abs((log_weights - math.log(mass)).mean()) < 2e-4
    assert flow.transform.log_masses[1] == pytest.approx(math.log(mass), abs=1e-10)


def test_error_falls_fourfold_with_every_doubling(case):
    _, beta, z = case
    z = z[:200]
    steps = 24 if beta == 1 else 48
    points = {n: moser(beta, grid=n, steps=steps).transform.jacobian(z)[0] for n in (16, 32, 64, 128, 256)}
    errors = [(points[n] - points[256]).square().sum(-1).mean().sqrt().item() for n in (16, 32, 64, 128)]
    ratios = [a / b for a, b in itertools.pairwise(errors)]
    assert all(2.7 < ratio < 6 for ratio in ratios), (errors, ratios)
    assert errors[-1] < 1e-4


def test_draws_fill_the_cells_of_the_target(case):
    flow, beta, _ = case
    y = flow.sample(3000, torch.Generator().manual_seed(5))[0]
    reference = bg.systems.load("double_well", beta=beta).sample(400000, torch.Generator().manual_seed(6))
    reference = reference[flow.base.contains(reference)]
    edges = [np.linspace(low, high, 9) for low, high in BOXES[beta]]
    found = np.histogram2d(*y.T.numpy(), edges)[0].ravel()
    expected = np.histogram2d(*reference.T.numpy(), edges)[0].ravel()
    expected *= found.sum() / expected.sum()
    keep = expected > 10
    assert found.sum() == len(y)
    chi_square = ((found - expected)[keep] ** 2 / expected[keep]).sum()
    assert stats.chi2.sf(chi_square, keep.sum()) > 1e-3


def test_map_of_one_coordinate_is_the_monotone_rearrangement():
    """Densities of x alone: T(x) = F1^-1(F0(x)), y stays."""

    def target(p):
        return -3 * (p[:, 0].square() - 1).square() / 4 + 0.4 * p[:, 0]

    transform = MoserTransform(lambda p: -0.2 * p[:, 0].square(), target, [(-2.0, 2.0), (0.0, 1.0)], grid=(128, 8))
    x = np.linspace(-2, 2, 400001)
    cumulative = []
    for log_density in (-0.2 * x**2, -3 * (x**2 - 1) ** 2 / 4 + 0.4 * x):
        integral = integrate.cumulative_simpson(np.exp(log_density), x=x, initial=0)
        cumulative.append(integral / integral[-1])
    start = torch.linspace(-2, 2, 41, dtype=torch.float64)
    z = torch.stack([start, torch.linspace(0, 1, 41, dtype=torch.float64)], -1)
    y, log_det = transform(z)
    exact = np.interp(np.interp(start.numpy(), x, cumulative[0]), cumulative[1], x)
    np.testing.assert_allclose(y[:, 0].numpy(), exact, atol=2e-4)
    np.testing.assert_allclose(y[:, 1].numpy(), z[:, 1].numpy(), atol=1e-14)
    ratio = np.log(np.gradient(exact, start.numpy()))[5:-5]  # finite differences, coarse
    np.testing.assert_allclose(log_det.numpy()[5:-5], ratio, atol=0.05)


def test_equal_densities_move_nothing():
    transform = MoserTransform(lambda p: -p.square().sum(-1), lambda p: 7 - p.square().sum(-1), BOXES[5.0], grid=16)
    z = BoxBase(BOXES[5.0]).sample(50, torch.Generator().manual_seed(0))
    y, log_det = transform(z)
    torch.testing.assert_close(y, z, atol=1e-12, rtol=0)
    torch.testing.assert_close(log_det, torch.zeros(50).double(), atol=1e-12, rtol=0)


def test_gradient_solves_the_poisson_problem_of_a_cosine():
    """-Lap u = cos(pi x) cos(2 pi y) on the unit square has u = cos(pi x) cos(2 pi y) / (5 pi^2)."""
    pi = math.pi

    def density(p):
        return torch.log1p(0.5 * torch.cos(pi * p[:, 0]) * torch.cos(2 * pi * p[:, 1]))

    transform = MoserTransform(lambda p: 0 * p[:, 0], density, [(0.0, 1.0), (0.0, 1.0)], grid=64)
    p = torch.rand(100, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    p[0] = torch.tensor([0.0, 1.0])
    gradient, hessian = transform._gradient(p)
    sx, cx, sy, cy = (pi * p[:, 0]).sin(), (pi * p[:, 0]).cos(), (2 * pi * p[:, 1]).sin(), (2 * pi * p[:, 1]).cos()
    exact = torch.stack([-pi * sx * cy, -2 * pi * cx * sy], -1) * 0.5 / (5 * pi**2)
    torch.testing.assert_close(gradient, exact, atol=1e-7, rtol=0)
    assert gradient[0].abs().max() < 1e-16, "no flux through the walls, exactly"
    torch.testing.assert_close(-hessian.diagonal(dim1=1, dim2=2).sum(-1), 0.5 * cx * cy, atol=2e-4, rtol=0)


# --- is it a bijection with the right determinant? ------------------------------------------------------------------


def test_round_trip(case):
    flow, _, z = case
    y, forward = flow.transform(z[:300])
    back, inverse = flow.transform.inverse(y)
    assert (back - z[:300]).abs().max() < 1e-11
    assert (forward + inverse).abs().max() < 1e-9


def test_round_trip_from_the_whole_target_box(case):
    """Draws see little of the corners, where rho1 is 1e-6."""
    flow, beta, _ = case
    axes = [torch.linspace(low, high, 13, dtype=torch.float64)[1:-1] for low, high in BOXES[beta]]
    y = torch.cartesian_prod(*axes)
    z, inverse = flow.transform.inverse(y)
    again, forward = flow.transform(z)
    assert (again - y).abs().max() < 1e-10
    assert (forward + inverse).abs().max() < 1e-9


def test_log_determinant_is_autograds_both_ways(flow):
    z = flow.base.sample(1, torch.Generator().manual_seed(1))
    corner = flow.transform.high * torch.tensor([1.0, -1.0]).double()
    for start in (z[0], corner):
        end = flow.transform(start[None])[0][0]
        for method, point in ((flow.transform, start), (flow.transform.inverse, end)):
            jacobian = torch.autograd.functional.jacobian(lambda v, method=method: method(v[None])[0][0], point)
            expected = torch.linalg.slogdet(jacobian)[1]
            torch.testing.assert_close(method(point[None])[1][0], expected, atol=1e-8, rtol=1e-8)


def test_jacobian_and_the_gradient_of_the_density_are_those_of_differences(flow):
    z = flow.base.sample(20, torch.Generator().manual_seed(2))
    y, jacobian = flow.transform.jacobian(z)
    shifts = 1e-5 * torch.tensor([[1, 0], [0, 1], [-1, 0], [0, -1]]).double()

    def differences(function, points):
        values = function((points[:, None] + shifts).flatten(0, 1)).unflatten(0, (20, 4))
        return (values[:, :2] - values[:, 2:]) / 2e-5

    expected = differences(lambda p: flow.transform.jacobian(p)[0], z).transpose(1, 2)
    torch.testing.assert_close(jacobian, expected, atol=1e-7, rtol=1e-6)
    points = y.clone().requires_grad_()
    (slope,) = torch.autograd.grad(flow.log_prob(points).sum(), points)
    torch.testing.assert_close(slope, differences(flow.log_prob, y), atol=1e-6, rtol=1e-5)


def test_walls_and_corners_stay(flow):
    low, high = flow.transform.low, flow.transform.high
    z = torch.stack([low, high, torch.stack([low[0], high[1]]), torch.stack([low[0], high[1] / 7])])
    y, _ = flow.transform(z)
    assert torch.equal(y[:3], z[:3]) and y[3, 0] == low[0] and y[3, 1] != z[3, 1]
    assert flow.base.contains(flow.transform.inverse(z)[0]).all()


def test_density_integrates_to_one():
    flow = moser(1.0, grid=16, steps=24)  # whatever the grid
    low, high = flow.base.low, flow.base.high
    axes = [a + (torch.arange(40) + 0.5) * (b - a) / 40 for a, b in zip(low, high, strict=True)]
    total = flow.log_prob(torch.cartesian_prod(*axes)).exp().sum() * (high - low).prod() / 40**2
    assert abs(total - 1) < 2e-3


# --- the interface of a flow ----------------------------------------------------------------------------------------


def test_sample_log_prob_and_seeds(flow):
    y, log_prob = flow.sample(200, torch.Generator().manual_seed(0))
    for value in flow.log_probs(y):
        torch.testing.assert_close(value, log_prob, atol=1e-9, rtol=0)
    assert torch.equal(flow.rsample(200, torch.Generator().manual_seed(0)), y)
    assert torch.equal(copy.deepcopy(flow).log_prob(y), flow.log_prob(y))
    assert not torch.equal(flow.sample(200, torch.Generator().manual_seed(1))[0], y)
    assert flow.dimension == 2


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 2.5000001])
def test_no_density_outside_the_box(flow, bad):
    y, log_prob = flow.sample(4, torch.Generator().manual_seed(0))
    y[1, 0] = bad
    got = flow.log_prob(y)
    assert got[1] == -math.inf
    torch.testing.assert_close(got[[0, 2, 3]], log_prob[[0, 2, 3]], atol=1e-9, rtol=0)
    moved, log_det = flow.transform(y)
    assert moved[1].isnan().all() and log_det[1].isnan() and moved[0].isfinite().all()


def test_single_precision(flow):
    y, log_prob = flow.sample(50, torch.Generator().manual_seed(0))
    single = copy.deepcopy(flow).float()
    value = single.log_prob(y.float())
    assert value.dtype == torch.float32 and (value.double() - log_prob).abs().max() < 2e-3
    assert single.sample(5, torch.Generator().manual_seed(0))[0].dtype == torch.float32


@pytest.mark.parametrize("std, mean", [(None, 0.0), (0.7, 0.3), ((0.5, 2.0), (0.9, 0.0))])
def test_base_on_a_box(std, mean):
    base = BoxBase([(-1.0, 1.5), (-0.5, 0.5)], std, mean)
    z = base.sample(20000, torch.Generator().manual_seed(0))
    assert z.dtype == torch.float64 and torch.isfinite(base.log_prob(z)).all()
    assert base.log_prob(torch.tensor([[1.6, 0.0], [math.nan, 0.0]])).tolist() == [-math.inf] * 2
    total = 0.0
    for k, (low, high) in enumerate([(-1.0, 1.5), (-0.5, 0.5)]):
        if std is None:
            law = stats.uniform(low, high - low)
        else:
            s, m = (np.broadcast_to(v, 2)[k] for v in (std, mean))
            law = stats.truncnorm((low - m) / s, (high - m) / s, m, s)
        assert stats.kstest(z[:, k].numpy(), law.cdf).pvalue > 1e-3
        total = total + law.logpdf(z[:, k].numpy())
    np.testing.assert_allclose(base.log_prob(z).numpy(), total, atol=1e-10)


# --- what is refused ------------------------------------------------------------------------------------------------


def FLAT(p):
    return 0 * p[:, 0]


UNIT = [(0.0, 1.0), (0.0, 1.0)]


@pytest.mark.parametrize(
    "target, bounds, options, message",
    [
        (lambda p: torch.log(p[:, 0] - 0.5), UNIT, {}, "not finite at"),
        (lambda p: -1e4 * p[:, 0], UNIT, {}, "spans more than 600"),
        (lambda p: -((p[:, 0] - 0.5) / 4e-3).square().clamp(max=500), UNIT, {}, "masses cannot be matched"),
        (lambda p: p, UNIT, {}, r"log-densities \(n,\)"),
        (lambda p: 1.0, UNIT, {}, r"log-densities \(n,\)"),
        (FLAT, [(0.0, 1.0)], {}, "bounds must be 2 pairs"),
        (FLAT, [(0.0, 1.0), (1.0, 0.0)], {}, "low below high"),
        (FLAT, [(0.0, 1.0), (0.0, math.inf)], {}, "finite"),
        (FLAT, UNIT, {"grid": 2}, "grid must be"),
        (FLAT, UNIT, {"grid": (8, 8, 8)}, "grid must be"),
        (FLAT, UNIT, {"steps": 0}, "steps must be"),
        (lambda p: -25 * p[:, 0].square(), UNIT, {"steps": 2}, "folds over itself"),
        (FLAT, UNIT, {"std": 0.0}, "std must be positive"),
        (FLAT, UNIT, {"std": (1.0, 1.0, 1.0)}, "one per dimension"),
        (FLAT, UNIT, {"std": 1.0, "mean": 2.0}, "inside the box"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(target, bounds, options, message):
    with pytest.raises(InputError, match=message) as error:
        MoserFlow(target, bounds, **options)
    assert "\n" not in str(error.value)


def test_points_of_a_wrong_shape_are_refused(flow):
    with pytest.raises(InputError, match=r"\(batch, 2\)"):
        flow.transform(torch.zeros(3, 3))
