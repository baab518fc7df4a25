"""The gradient flow against Ornstein-Uhlenbeck processes with closed forms, and its formulas against autograd."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from openmm_bg import systems
from openmm_bg.errors import InputError
from openmm_bg.flows import Base, ContinuousFlow, ContinuousTransform, GradientFlowVelocity, PerceptronEnergy
from openmm_bg.flows.gradient_flow import laplacian
from openmm_bg.sampling.interpolation import PathPoint, continuity_residual

TIMES = {
    "scalar": torch.tensor(0.4, dtype=torch.float64),
    "batch": torch.tensor([0.0, 0.3, 0.6, 0.9, 1.0], dtype=torch.float64),
}


def double_well(x):
    return (x[:, 0].square() - 1).square() / 4 + 0.5 * x[:, 1].square() + 0.3 * x.prod(-1)


def learned(std: float = 1.3, **options) -> GradientFlowVelocity:
    network = PerceptronEnergy(2, 7, windows=4)
    rng = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        parameter.data += 0.4 * torch.randn(parameter.shape, generator=rng)
    field = GradientFlowVelocity(double_well, network, std=std, **options).double()
    field.height.rows.data += torch.randn(field.height.rows.shape, generator=rng)
    return field


def points(n: int = 5, seed: int = 1) -> torch.Tensor:
    return 1.5 * torch.randn(n, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Melting(PerceptronEnergy):
    """Stands for a network that has learned everything: f becomes -log of the exact marginal of the process."""

    def __init__(self, mean: torch.Tensor, sigma: float, std: float):
        super().__init__(len(mean), 1)
        self.mean, self.sigma, self.std = mean, sigma, std

    def moments(self, theta):
        """Of the marginal at theta / std^2."""
        keep = torch.exp(-theta)
        variance = keep.square() * self.sigma**2 + self.std**2 * (1 - keep.square())
        return keep.reshape(-1, 1) * self.mean, variance

    def exact(self, theta, x):
        mean, variance = self.moments(theta)
        return 0.5 * (x - mean).square().sum(-1) / variance + 0.5 * x.shape[1] * torch.log(2 * math.pi * variance)

    def target(self, x):
        return self.exact(x.new_zeros(()), x)

    def forward(self, t, x):
        rest = self.owner[0].rest(t).clamp(min=1e-14)
        theta, _ = self.owner[0].noise_time(t)
        whole = x * self.std
        known = self.owner[0].share(t) * self.target(whole) + self.owner[0].envelope(t) * 0.5 * x.square().sum(-1)
        return (self.exact(theta, whole) - known) / rest

    def derivatives(self, t, x):
        return laplacian(lambda v: self(t, v), x)


def melting(sigma: float = 0.4, std: float = 1.5, **options) -> tuple[GradientFlowVelocity, Melting]:
    network = Melting(torch.tensor([1.2, -0.7], dtype=torch.float64), sigma, std).double()
    field = GradientFlowVelocity(network.target, network, std=std, **options).double()
    network.owner = (field,)
    return field, network


# --- the process -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("std", [1.0, 3.0])
def test_exact_marginals_of_a_mixture_leave_no_residual(std):
    """grad (f - f_Z) carries the marginals of the process, here of 40 Gaussians."""
    mixture = systems.load("gmm40")
    step = 1e-3
    for theta in (0.05, 0.5, 1.5, 3.0, 5.0):
        theta *= std**2
        now = mixture.noised(theta, std)
        x = now.sample(100, torch.Generator().manual_seed(0)).requires_grad_()
        around = {k: mixture.noised(theta + k * step, std).reduced(x.detach()) for k in (-2, -1, 1, 2)}
        drift = (8 * (around[1] - around[-1]) - (around[2] - around[-2])) / (12 * step)
        (gradient,) = torch.autograd.grad(now.reduced(x).sum(), x, create_graph=True)
        # from noise to target theta falls
        v = -(gradient - x / std**2)
        divergence = sum(torch.autograd.grad(v[:, i].sum(), x, retain_graph=True)[0][:, i] for i in range(2))
        point = PathPoint(now.reduced(x).detach(), gradient.detach(), -drift)
        residual = continuity_residual(point, v.detach(), divergence)
        assert residual.std() < 1e-5 and residual.mean().abs() < 1e-5, "normalised at every time: the constant is 0"
        assert point.rate.std() > 1e-4
        # the check can fail: the other direction of time
        assert continuity_residual(point, -v.detach(), -divergence).std() > 1e-3


def test_times_of_the_noise():
    field = learned(horizon=3.0, shortest=1e-3)
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    theta, speed = field.noise_time(t)
    assert theta[0] == pytest.approx(3.0) and theta[-1] == 0 and (theta.diff() < 0).all()
    step = 1e-6
    slope = (field.noise_time(t + step)[0] - field.noise_time(t - step)[0]) / (2 * step)
    torch.testing.assert_close(speed, slope, atol=1e-8, rtol=1e-7)
    # logarithmic: a decade of theta takes about the same share of the time wherever it lies
    assert theta[2] / theta[4] == pytest.approx(float(theta[4] / theta[6]), rel=0.1)
    share = field.share(t)
    assert share[0] < 1e-100 and share[-1] == 1 and (share.diff() >= 0).all()


def test_an_exact_network_gives_the_exact_map():
    """Between Gaussians the flow is linear: y = m_1 + (s_1 / s_0) (z - m_0)."""
    field, network = melting(horizon=2.0, shortest=0.05)
    z = points()
    (start, before), (end, after) = (network.moments(field.noise_time(TIMES["batch"][i])[0]) for i in (0, -1))
    ratio = (after / before).sqrt()
    with torch.no_grad():
        y, log_det = ContinuousTransform(field, steps=60)(z)
    torch.testing.assert_close(y, end + ratio * (z - start), atol=1e-6, rtol=0)
    torch.testing.assert_close(log_det, (2 * ratio.log()).expand(5), atol=1e-6, rtol=0)
    assert ratio < 0.5


def test_with_a_long_horizon_the_flow_is_the_target():
    field, network = melting(horizon=9.0, shortest=0.05)
    flow = ContinuousFlow(Base([False] * 2, std=1.5), field, steps=80).double()
    x = network.mean + 0.4 * points()
    torch.testing.assert_close(flow.log_prob(x), -network.target(x), atol=1e-3, rtol=0)
    y, log_prob = flow.sample(200, torch.Generator().manual_seed(0))
    torch.testing.assert_close(log_prob, -network.target(y), atol=1e-3, rtol=0)


# --- the formulas ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("times", TIMES, ids=list(TIMES))
def test_energy_and_velocity_are_their_definitions(times):
    field, x, t = learned(), points(), TIMES[times]
    value, gradient, second = field.derivatives(t, x)
    v, divergence = field.with_divergence(t, x)
    torch.testing.assert_close(v, field(t, x), atol=0, rtol=0)
    each = t.expand(5)
    for row in range(5):

        def f(point, time=each[row]):
            return field.energy(time, point[None])[0]

        torch.testing.assert_close(value[row], f(x[row]), atol=1e-12, rtol=0)
        slope = torch.autograd.functional.jacobian(f, x[row])
        trace = torch.autograd.functional.hessian(f, x[row]).trace()
        torch.testing.assert_close(gradient[row], slope, atol=1e-10, rtol=1e-10)
        torch.testing.assert_close(second[row], trace, atol=1e-10, rtol=1e-10)
        # theta in the units of x^2
        step = 1e-6
        theta = [field.noise_time(each[row] + k * step)[0] for k in (-1, 1)]
        speed = (theta[1] - theta[0]) / (2 * step) * 1.3**2
        torch.testing.assert_close(v[row], speed * (slope - x[row] / 1.3**2), atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(divergence[row], speed * (trace - 2 / 1.3**2), atol=1e-6, rtol=1e-6)


def test_the_ends_are_target_and_network():
    field, x = learned(), points()
    end, start = torch.tensor(1.0).double(), torch.tensor(0.0).double()
    assert torch.equal(field.energy(end, x), double_well(x))
    prior = field.envelope(start) * 0.5 * (x / 1.3).square().sum(-1)
    assert field.share(start) < 1e-12 and field.envelope(start) > 0.99
    rest = field.height(start)[0][:, 0] + field.rest(start) * field.network(start, x / 1.3)
    torch.testing.assert_close(field.energy(start, x), prior + rest, atol=1e-12, rtol=0)
    assert field.rest(start) == pytest.approx(math.exp(-3.0)) and field.rest(end) == 0
    torch.testing.assert_close(field.derivatives(end, x)[1], laplacian(double_well, x)[1], atol=1e-14, rtol=0)


def test_known_energies_of_the_target_are_not_asked_for_again():
    field, x, t = learned(), points(), TIMES["batch"]
    known = laplacian(double_well, x)
    fresh, energy = field.derivatives(t, x), field.energy(t, x)

    def never(x):
        raise AssertionError("asked for")

    field._energy = (never,)
    for one, other in zip(field.derivatives(t, x, known), fresh, strict=True):
        assert torch.equal(one, other)
    assert torch.equal(field.energy(t, x, known[0]), energy)


def test_gradients_reach_network_and_width():
    field = learned()
    v, divergence = field.with_divergence(TIMES["batch"], points())
    (v.square().sum() + divergence.square().sum()).backward()
    for name, parameter in field.named_parameters():
        if name in ("network.outer.rows", "height.rows"):  # functions of time alone have no gradient in x
            continue
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    # the width of the wells, by finite differences
    energy = field.energy(TIMES["batch"], points()).sum()
    (slope,) = torch.autograd.grad(energy, field.log_width)
    ends = []
    for shift in (-1e-5, 1e-5):
        moved = copy.deepcopy(field)
        moved.log_width.data += shift
        ends.append(moved.energy(TIMES["batch"], points()).sum())
    torch.testing.assert_close(slope, (ends[1] - ends[0]) / 2e-5, atol=1e-6, rtol=1e-6)


def test_laplacians_are_traces_of_hessians():
    x = points()
    value, gradient, second = laplacian(double_well, x)
    torch.testing.assert_close(value, double_well(x))
    for row in range(5):
        hessian = torch.autograd.functional.hessian(lambda v: double_well(v[None])[0], x[row])
        torch.testing.assert_close(second[row], hessian.trace())
    expected = [x[:, 0] ** 3 - x[:, 0] + 0.3 * x[:, 1], x[:, 1] + 0.3 * x[:, 0]]
    torch.testing.assert_close(gradient, torch.stack(expected, 1))
    assert not any(part.requires_grad for part in (value, gradient, second)) and not x.requires_grad
    with torch.no_grad():
        assert torch.equal(laplacian(double_well, x)[2], second)


def test_the_target_is_no_part_of_what_is_saved():
    mixture = systems.load("gmm40")
    field = GradientFlowVelocity(mixture, PerceptronEnergy(2, 4))
    assert not any("means" in name for name in field.state_dict())
    assert field.target is mixture
    field.float()
    assert mixture.means.dtype == torch.float64
    assert torch.equal(copy.deepcopy(field).target(points()), mixture(points()))


@pytest.mark.parametrize("name", ["std", "horizon", "shortest"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_bad_numbers_are_refused(name, value):
    with pytest.raises(InputError, match=f"{name} must be a positive finite number"):
        GradientFlowVelocity(double_well, PerceptronEnergy(2, 4), **{name: value})
