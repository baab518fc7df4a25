"""Paths of energies against autograd and finite differences; the continuity equation against exact transports."""

from __future__ import annotations

import math

import pytest
import torch

from openmm_bg import systems
from openmm_bg.errors import InputError
from openmm_bg.flows import Base, ContinuousFlow, PerceptronEnergy, PerceptronVelocity
from openmm_bg.sampling import Interpolation, continuity_residual
from openmm_bg.sampling.interpolation import PathPoint

STD = 1.6


def perturbation(dimension: int = 2, size: float = 0.4, **options) -> PerceptronEnergy:
    psi = PerceptronEnergy(dimension, 7, windows=4, **options)
    rng = torch.Generator().manual_seed(0)
    for parameter in psi.parameters():
        parameter.data += size * torch.randn(parameter.shape, generator=rng)
    return psi


def flow_of(psi: torch.nn.Module | None = None, dimension: int = 2, std: float = STD, circular=None) -> ContinuousFlow:
    base = Base([False] * dimension if circular is None else circular, std=std)
    return ContinuousFlow(base, PerceptronVelocity(dimension, 4), perturbation=psi).double()


def points(n: int = 6, dimension: int = 2, seed: int = 1) -> torch.Tensor:
    return 1.5 * torch.randn(n, dimension, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def written_out(flow: ContinuousFlow, target, rate: float, t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The same path from its formula, with nothing but the energies."""
    s = t if rate == 0 else (torch.exp(rate * t) - 1) / (math.exp(rate) - 1)
    f = (1 - s) * -flow.base.log_prob(x) + s * target(x)
    if flow.perturbation is not None:
        f = f + t * (1 - t) * flow.perturbation(t, x)
    return f


# --- the path --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.0, 3.0, -2.0])
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("batch", [False, True])
def test_value_gradient_and_rate_are_the_formula_and_its_derivatives(rate, learned, batch):
    target = systems.load("gmm2_unequal")
    flow, x = flow_of(perturbation() if learned else None), points()
    t = torch.tensor([0.01, 0.2, 0.5, 0.7, 0.93, 0.99] if batch else 0.37, dtype=torch.float64)
    point = Interpolation(flow, rate)(t, x, *target.value_and_gradient(x))
    assert not any(part.requires_grad for part in (point.value, point.gradient, point.rate))
    leaf, time = x.clone().requires_grad_(), t.expand(6).clone().requires_grad_()
    f = written_out(flow, target, rate, time, leaf)
    gradient, slope = torch.autograd.grad(f.sum(), (leaf, time))
    torch.testing.assert_close(point.value, f.detach(), atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(point.gradient, gradient, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(point.rate, slope, atol=1e-12, rtol=1e-12)
    step = 1e-5
    with torch.no_grad():
        later, earlier = (written_out(flow, target, rate, t + k * step, x) for k in (1, -1))
    torch.testing.assert_close(point.rate, (later - earlier) / (2 * step), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("rate", [0.0, 3.0])
@pytest.mark.parametrize("learned", [False, True])
def test_the_ends_are_base_and_target_exactly(rate, learned):
    target = systems.load("gmm4")
    flow, x = flow_of(perturbation() if learned else None), points()
    energy, gradient = target.value_and_gradient(x)
    path = Interpolation(flow, rate)
    start, end = (path(torch.tensor(t, dtype=torch.float64), x, energy, gradient) for t in (0.0, 1.0))
    torch.testing.assert_close(start.value, -flow.base.log_prob(x), atol=1e-15, rtol=0)
    torch.testing.assert_close(start.gradient, x / STD**2, atol=1e-15, rtol=1e-14)
    torch.testing.assert_close(end.value, energy, atol=1e-13, rtol=1e-14)
    torch.testing.assert_close(end.gradient, gradient, atol=1e-14, rtol=1e-14)


def test_schedules_run_from_zero_to_one_and_their_speed_is_their_slope():
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    for rate in (-4.0, -1e-6, 0.0, 1e-9, 1e-6, 3.0, 8.0):
        path = Interpolation(flow_of(), rate)
        s, speed = path.schedule(t)
        assert s[0] == 0 and s[-1] == pytest.approx(1, abs=1e-14) and (s.diff() > 0).all()
        step = 1e-5
        slope = (path.schedule(t + step)[0] - path.schedule(t - step)[0]) / (2 * step)
        torch.testing.assert_close(speed, slope, atol=1e-7, rtol=1e-7)
        if abs(rate) < 1e-5:
            torch.testing.assert_close(s, t, atol=1e-6, rtol=0)
    assert Interpolation(flow_of(), 3.0).schedule(torch.tensor(0.5))[0] < 0.2, "dwells where the target is weak"


def test_angles_have_a_flat_start():
    flow, x = flow_of(circular=[True, False]), points().clamp(-3, 3)
    zero = torch.zeros(6, dtype=torch.float64)
    point = Interpolation(flow)(torch.tensor(0.3, dtype=torch.float64), x, zero, torch.zeros_like(x))
    assert not point.gradient[:, 0].any()
    torch.testing.assert_close(point.gradient[:, 1], 0.7 * x[:, 1] / STD**2)


def test_parameters_get_gradients_only_where_asked_for():
    psi = perturbation()
    flow, x, target = flow_of(psi), points(), systems.load("gmm4")
    t = torch.full((6,), 0.4, dtype=torch.float64)
    energy, gradient = target.value_and_gradient(x)
    with torch.no_grad():
        point = Interpolation(flow)(t, x, energy, gradient, differentiable=True)
    for part in (point.value, point.gradient, point.rate):
        (slope,) = torch.autograd.grad(part.square().sum(), psi.trunk.weight2, retain_graph=True)
        leaf, time = x.clone().requires_grad_(), t.clone().requires_grad_()
        f = written_out(flow, target, 0.0, time, leaf)
        by_x, by_t = torch.autograd.grad(f.sum(), (leaf, time), create_graph=True)
        again = {id(point.value): f, id(point.gradient): by_x, id(point.rate): by_t}[id(part)]
        torch.testing.assert_close(part, again, atol=1e-12, rtol=1e-12)
        (expected,) = torch.autograd.grad(again.square().sum(), psi.trunk.weight2)
        torch.testing.assert_close(slope, expected, atol=1e-11, rtol=1e-11)
    assert not x.requires_grad


def test_infinite_energies_do_not_reach_the_base():
    energy = torch.tensor([1.0, math.inf, 2.0], dtype=torch.float64)
    x = points(3)
    gradient = torch.zeros_like(x)
    for psi in (None, perturbation()):
        flow = flow_of(psi)
        for rate in (0.0, 3.0):
            path = Interpolation(flow, rate)
            start = path(torch.tensor(0.0, dtype=torch.float64), x, energy, gradient)
            assert torch.isfinite(start.value).all() and torch.isfinite(start.gradient).all()
            torch.testing.assert_close(start.value, -flow.base.log_prob(x))
            mixed = path(torch.tensor([0.0, 0.0, 0.5], dtype=torch.float64), x, energy, gradient)
            assert torch.isfinite(mixed.value).all()
            for t in (1e-6, 0.5, 1.0):
                later = path(torch.tensor(t, dtype=torch.float64), x, energy, gradient)
                assert later.value[1] == math.inf and torch.isfinite(later.value[[0, 2]]).all()
                assert torch.isfinite(later.gradient).all()


@pytest.mark.parametrize("rate", [math.nan, math.inf, -math.inf])
def test_bad_rates_are_refused(rate):
    with pytest.raises(InputError, match="rate must be a finite number"):
        Interpolation(flow_of(), rate)


# --- the continuity equation -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.0, 3.0])
@pytest.mark.parametrize("dimension", [1, 3])
def test_the_residual_of_an_exact_transport_is_the_change_of_log_z(rate, dimension):
    """Between centred Gaussians the path stays Gaussian: precision (1 - s) / a^2 + s / b^2, field x v' / 2v."""
    width, shift = 0.5, 2.3
    flow, x = flow_of(dimension=dimension), points(dimension=dimension)
    path = Interpolation(flow, rate)
    energy, gradient = 0.5 * x.square().sum(-1) / width**2 + shift, x / width**2

    def precision(t):
        s, _ = path.schedule(t)
        return (1 - s) / STD**2 + s / width**2

    def log_z(t):
        s, _ = path.schedule(t)
        constant = (1 - s) * dimension * (0.5 * math.log(2 * math.pi) + math.log(STD)) + s * shift
        return 0.5 * dimension * torch.log(2 * math.pi / precision(t)) - constant

    for time in (0.0, 0.1, 0.5, 0.9, 1.0):
        t = torch.tensor(time, dtype=torch.float64, requires_grad=True)
        (change,) = torch.autograd.grad(precision(t), t)
        field = -0.5 * change / precision(t).detach()  # v' / 2v with v = 1 / precision
        (slope,) = torch.autograd.grad(log_z(t), t)
        point = path(t.detach(), x, energy, gradient)
        residual = continuity_residual(point, field * x, (dimension * field).expand(6))
        torch.testing.assert_close(residual, (-slope).expand(6), atol=1e-10, rtol=1e-10)
        wrong = continuity_residual(point, 1.2 * field * x, (1.2 * dimension * field).expand(6))
        assert wrong.std() > 0.01
        assert continuity_residual(point, 0 * x, torch.zeros(6)).std() > 0.01


def test_the_mean_of_the_residual_is_the_change_of_log_z_for_any_field():
    """Stein: <div v - <grad f, v>> = 0 under exp(-f), so any field gives minus the derivative of log Z on average."""
    flow = flow_of(perturbation(1), dimension=1)
    target = systems.load("gmm_pair", separation=2.0, weight=0.7)
    grid = torch.linspace(-15, 15, 6001, dtype=torch.float64)[:, None]
    path = Interpolation(flow, 1.0)
    energy, gradient = target.value_and_gradient(grid)
    t, step = torch.tensor(0.4, dtype=torch.float64), 1e-4
    log_z = [torch.logsumexp(-path(t + k * step, grid, energy, gradient).value, 0) for k in (-1, 1)]
    slope = float(log_z[1] - log_z[0]) / (2 * step)
    point = path(t, grid, energy, gradient)
    weights = torch.softmax(-point.value, 0)
    for velocity, divergence in ((grid.sin(), grid.cos()), (grid**3, 3 * grid**2), (0 * grid, 0 * grid)):
        residual = continuity_residual(point, velocity, divergence[:, 0])
        assert float((weights * residual).sum()) == pytest.approx(-slope, abs=1e-6)
        assert residual.std() > 0.1


def test_the_residual_is_its_formula():
    x = points(3)
    point = PathPoint(torch.zeros(3), x, torch.tensor([1.0, 2.0, 3.0]).double())
    velocity, divergence = points(3, seed=2), torch.tensor([0.5, -0.5, 4.0]).double()
    for row in range(3):
        expected = row + 1.0 - divergence[row] + x[row] @ velocity[row]
        torch.testing.assert_close(continuity_residual(point, velocity, divergence)[row], expected)
