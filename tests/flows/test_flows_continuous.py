"""Continuous flows against flow maps with closed forms, autograd, and their own orders of convergence."""

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
from openmm_bg.flows import (
    Base,
    ContinuousFlow,
    ContinuousTransform,
    PerceptronEnergy,
    PerceptronVelocity,
    VelocityField,
    wrap,
)

MATRIX = torch.tensor([[0.6, -1.1, 0.2], [0.9, -0.3, 0.5], [-0.4, 0.7, 0.4]], dtype=torch.float64)


class Linear(VelocityField):
    """x' = 2 t A x, whose flow map from 0 to t is expm(t^2 A), with the log-determinant t^2 tr A."""

    def __init__(self, matrix: torch.Tensor = MATRIX):
        super().__init__(len(matrix))
        self.matrix = torch.nn.Parameter(matrix.clone())

    def forward(self, t, x):
        return 2 * t.reshape(-1, 1) * (x @ self.matrix.T)


class Pendulum(VelocityField):
    """phi' = rate + sin(phi) on circles: for rate 0, tan(phi_t / 2) = e^t tan(phi_0 / 2)."""

    def __init__(self, dimension: int = 1, rate: float = 0.0):
        super().__init__(dimension)
        self.rate = rate

    def forward(self, t, x):
        return self.rate + x.sin()


def disturb(module: torch.nn.Module, seed: int = 0, size: float = 0.4) -> torch.nn.Module:
    rng = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data += size * torch.randn(parameter.shape, generator=rng, dtype=parameter.dtype)
    return module


def perceptron(dimension: int = 3, **options) -> PerceptronVelocity:
    return disturb(PerceptronVelocity(dimension, 8, windows=4, **options).double())


def points(n: int = 6, dimension: int = 3, seed: int = 1) -> torch.Tensor:
    return torch.randn(n, dimension, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- the flow map ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"steps": 80}, {"method": "dopri5", "rtol": 1e-9, "atol": 1e-9}])
def test_linear_fields_have_their_exponentials(options):
    transform, z = ContinuousTransform(Linear(), **options), points()
    map_ = torch.linalg.matrix_exp(MATRIX)
    y, log_det = transform(z)
    torch.testing.assert_close(y, z @ map_.T, atol=2e-7, rtol=0)
    torch.testing.assert_close(log_det, MATRIX.trace().expand(6), atol=1e-9, rtol=0)
    back, inverse = transform.inverse(y)
    torch.testing.assert_close(back, y @ torch.linalg.inv(map_).T, atol=1e-6, rtol=0)
    torch.testing.assert_close(inverse, -MATRIX.trace().expand(6), atol=1e-9, rtol=0)
    # a stretch of the way, in both directions
    part = torch.linalg.matrix_exp((0.7**2 - 0.2**2) * MATRIX)
    torch.testing.assert_close(transform.integrate(z, 0.2, 0.7)[0], z @ part.T, atol=2e-7, rtol=0)
    there, log_det = transform.integrate(z, 0.7, 0.2)
    torch.testing.assert_close(there, z @ torch.linalg.inv(part).T, atol=1e-6, rtol=0)
    torch.testing.assert_close(log_det, -0.45 * MATRIX.trace().expand(6), atol=1e-9, rtol=0)


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("midpoint", 2), ("rk4", 4)])
def test_errors_fall_with_the_order_of_the_method(method, order):
    z = 2 * points(40)
    exact = z @ torch.linalg.matrix_exp(MATRIX).T
    errors, gaps = [], []
    for steps in (16, 32, 64):
        with torch.no_grad():
            transform = ContinuousTransform(Linear(), method=method, steps=steps)
            y, _ = transform(z)
            back, _ = transform.inverse(y)
        errors.append(float((y - exact).abs().max()))
        gaps.append(float((back - z).abs().max()))
    for coarse, fine in itertools.pairwise(errors):
        assert coarse / fine == pytest.approx(2**order, rel=0.15)
    for coarse, fine in itertools.pairwise(gaps):
        assert coarse / fine > 0.7 * 2**order


def test_the_log_determinant_converges_with_the_map():
    """sin x on the circle: the determinant has a closed form that is not constant."""
    z = torch.linspace(-2.5, 2.5, 21, dtype=torch.float64)[:, None]
    half = z / 2
    exact = 2 * torch.atan(math.e * half.tan())
    slope = math.e / (half.cos().square() + math.e**2 * half.sin().square())
    errors = []
    for steps in (10, 20, 40):
        y, log_det = ContinuousTransform(Pendulum(), steps=steps)(z)
        errors.append([(y - exact).abs().max().item(), (log_det - slope[:, 0].log()).abs().max().item()])
    errors = np.array(errors)
    assert (errors[-1] < 1e-7).all() and (errors[:-1] / errors[1:] > 12).all()
    y, log_det = ContinuousTransform(Pendulum(), method="dopri5", rtol=1e-9, atol=1e-9)(z)
    torch.testing.assert_close(y, exact, atol=1e-7, rtol=0)
    torch.testing.assert_close(log_det, slope[:, 0].log(), atol=1e-7, rtol=0)


@pytest.mark.parametrize("method", ["bosh3", "dopri5", "dopri8"])
def test_adaptive_and_fixed_steps_agree_on_a_network(method):
    field, z = perceptron(), points()
    with torch.no_grad():
        fixed = ContinuousTransform(field, steps=100)(z)
        adaptive = ContinuousTransform(field, method=method, rtol=1e-8, atol=1e-8)(z)
    for one, other in zip(fixed, adaptive, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6 if method == "dopri5" else 5e-5, rtol=0)
    assert (fixed[0] - z).abs().max() > 0.1


@pytest.mark.parametrize("odd", [False, True])
def test_log_determinant_is_that_of_the_numerical_map(odd):
    transform = ContinuousTransform(perceptron(odd=odd), steps=60)
    z = points(3)
    y, log_det = transform(z)
    back, inverse = transform.inverse(y)
    assert (back - z).abs().max() < 1e-7 and (log_det + inverse).abs().max() < 1e-7
    for row in range(3):
        jacobian = torch.autograd.functional.jacobian(lambda v: transform(v[None])[0][0], z[row])
        torch.testing.assert_close(log_det[row], torch.linalg.slogdet(jacobian)[1], atol=1e-6, rtol=0)
    assert log_det.detach().std() > 0.01


def test_rows_do_not_see_each_other_with_fixed_steps():
    transform, z = ContinuousTransform(perceptron(), steps=5), points()
    y, log_det = transform(z)
    alone = [transform(row[None]) for row in z]
    torch.testing.assert_close(torch.cat([a for a, _ in alone]), y, atol=1e-13, rtol=0)
    torch.testing.assert_close(torch.cat([b for _, b in alone]), log_det, atol=1e-13, rtol=0)


def test_steps_are_counted():
    class Counting(Linear):
        calls = 0

        def forward(self, t, x):
            self.calls += 1
            return x

        def with_divergence(self, t, x):
            return self(t, x), x.sum(-1)

    field, z = Counting(), points(2)
    for steps, start, end, given, expected in (
        (40, 0.0, 1.0, None, 40), (40, 1.0, 0.0, None, 40), (7, 0.0, 1.0, None, 7), (10, 0.25, 0.75, None, 5),
        (40, 0.3, 0.3001, None, 1), (40, 0.1, 0.2, 3, 3), (49, 0.0, 1.0, None, 49), (40, 0.3, 0.4, 25, 25),
    ):  # fmt: skip
        field.calls = 0
        ContinuousTransform(field, method="euler", steps=steps).integrate(z, start, end, given)
        assert field.calls == expected, (steps, start, end)
        field.calls = 0
        ContinuousTransform(field, method="euler", steps=steps).integrate(z.float(), start, end, given)
        assert field.calls == expected, "in single precision"


def test_gradients_go_through_the_solver():
    field = Linear()
    z = points()
    y, log_det = ContinuousTransform(field, steps=60)(z)
    weights = points(seed=5)
    (gradient,) = torch.autograd.grad((y * weights).sum() + log_det.sum(), field.matrix)
    matrix = MATRIX.clone().requires_grad_()
    exact = (z @ torch.linalg.matrix_exp(matrix).T * weights).sum() + 6 * matrix.trace()
    torch.testing.assert_close(gradient, torch.autograd.grad(exact, matrix)[0], atol=1e-5, rtol=1e-5)


def test_no_rows():
    y, log_det = ContinuousTransform(Linear())(points(0))
    assert y.shape == (0, 3) and log_det.shape == (0,)


# --- circles ---------------------------------------------------------------------------------------------------------


def test_angles_come_out_wrapped_and_other_coordinates_do_not():
    transform = ContinuousTransform(
        Pendulum(2, rate=9.0), circular=torch.tensor([True, False]), method="rk4", steps=200
    )
    z = 3 * points(dimension=2).clamp(-1, 1)
    y, log_det = transform(z)
    free, same = ContinuousTransform(Pendulum(2, rate=9.0), steps=200)(z)
    assert free[:, 0].abs().max() > math.pi and y[:, 0].abs().max() <= math.pi
    torch.testing.assert_close(y[:, 0], wrap(free[:, 0]), atol=1e-12, rtol=0)
    assert torch.equal(y[:, 1], free[:, 1]) and torch.equal(log_det, same)
    back, inverse = transform.inverse(y)
    assert wrap(back - z)[:, 0].abs().max() < 1e-6 and (back - z)[:, 1].abs().max() < 1e-6
    assert (log_det + inverse).abs().max() < 1e-6


def test_a_rotation_keeps_the_uniform_density_and_no_field_changes_its_integral():
    grid = torch.linspace(-math.pi, math.pi, 2001, dtype=torch.float64)[:-1, None]
    cell = 2 * math.pi / 2000
    turning = ContinuousFlow(Base([True]), PerceptronVelocity(1, 4, circular=[True])).double()
    turning.velocity.outer.rows.data[:] = 3.0
    torch.testing.assert_close(turning.log_prob(grid), torch.full((2000,), -math.log(2 * math.pi)).double())
    bent = ContinuousFlow(Base([True]), disturb(PerceptronVelocity(1, 6, circular=[True]), size=0.25)).double()
    with torch.no_grad():
        density = bent.log_prob(grid).exp()
    assert float(density.sum() * cell) == pytest.approx(1, abs=1e-6)
    assert density.max() > 1.2 / (2 * math.pi)


# --- the density -----------------------------------------------------------------------------------------------------

FLOWS = {
    "real": lambda **o: ContinuousFlow(Base([False] * 2, std=2.0), perceptron(2), **o),
    "adaptive": lambda **o: ContinuousFlow(
        Base([False] * 2), perceptron(2, odd=True), method="dopri5", rtol=1e-8, atol=1e-8, **o
    ),
    "mixed": lambda **o: ContinuousFlow(
        Base([False, True], std=0.7), perceptron(2, circular=[False, True]), perturbation=PerceptronEnergy(2, 6), **o
    ),
    "lattice": lambda **o: ContinuousFlow(Base([False] * 2), perceptron(2, circulant=True, odd=True), steps=25, **o),
}


@pytest.mark.parametrize("name", FLOWS, ids=list(FLOWS))
def test_sample_and_log_prob_agree(name):
    flow = FLOWS[name]().double()
    for broadened in (False, True):
        y, log_prob = flow.sample(200, torch.Generator().manual_seed(0), broadened=broadened)
        assert not y.requires_grad and y.dtype == torch.float64
        torch.testing.assert_close(flow.log_probs(y)[int(broadened)], log_prob, atol=2e-5, rtol=0)
        torch.testing.assert_close(flow.rsample(200, torch.Generator().manual_seed(0), broadened=broadened), y)


def test_the_density_integrates_to_one():
    flow = FLOWS["mixed"]().double()
    axes = [torch.linspace(-r, r, 121, dtype=torch.float64)[:-1] + r / 120 for r in (12.0, math.pi)]
    with torch.no_grad():
        density = flow.log_prob(torch.cartesian_prod(*axes)).exp()
    assert float(density.sum()) * 4 * 12 * math.pi / 120**2 == pytest.approx(1, abs=2e-3)


def test_a_linear_flow_of_a_gaussian_is_a_gaussian():
    flow = ContinuousFlow(Base([False] * 3, std=1.7), Linear(), steps=60).double()
    map_ = torch.linalg.matrix_exp(MATRIX)
    y = points(seed=8)
    exact = torch.distributions.MultivariateNormal(torch.zeros(3).double(), 1.7**2 * map_ @ map_.T).log_prob(y)
    torch.testing.assert_close(flow.log_prob(y), exact, atol=1e-5, rtol=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_have_no_density(bad):
    for make in FLOWS.values():
        flow = make().double()
        y, log_prob = flow.sample(4, torch.Generator().manual_seed(0))
        y[2, 0] = bad
        got = flow.log_prob(y)
        assert got[2] == -math.inf
        torch.testing.assert_close(got[[0, 1, 3]], log_prob[[0, 1, 3]], atol=2e-5, rtol=0)


def test_angles_outside_one_turn_have_no_density_in_the_base():
    base = Base([True, False])
    z = torch.tensor([[3.2, 0.0], [3.1, 0.0]])
    assert base.log_prob(z)[0] == -math.inf and torch.isfinite(base.log_prob(z)[1])


def test_deep_copies_and_dtypes():
    flow = FLOWS["real"]().double()
    y, log_prob = flow.sample(20, torch.Generator().manual_seed(0))
    copied = copy.deepcopy(flow)
    assert torch.equal(copied.log_prob(y), flow.log_prob(y))
    assert (copied.float().log_prob(y.float()).double() - log_prob).abs().max() < 1e-3


# --- the standard deviation of the base ------------------------------------------------------------------------------


@pytest.mark.parametrize("std", [0.3, 1.0, 2.5])
def test_the_base_is_the_normal_of_its_standard_deviation(std):
    base = Base([False, True, False], std=std).double()
    z = points(50) * std
    z[:, 1] = wrap(z[:, 1])
    narrow = stats.norm.logpdf(z[:, [0, 2]], scale=std).sum(1) - math.log(2 * math.pi)
    torch.testing.assert_close(base.log_prob(z), torch.tensor(narrow), atol=1e-7, rtol=0)
    mixed = 0.98 * stats.norm.pdf(z[:, [0, 2]], scale=std) + 0.02 * stats.norm.pdf(z[:, [0, 2]], scale=4 * std)
    wide = np.log(mixed).sum(1) - math.log(2 * math.pi)
    torch.testing.assert_close(base.log_prob(z, broadened=True), torch.tensor(wide), atol=1e-7, rtol=0)
    real = Base([False] * 2, std=std).double().log_prob(z[:, [0, 2]])
    torch.testing.assert_close(real, torch.tensor(narrow) + math.log(2 * math.pi), atol=1e-12, rtol=0)
    for broadened, variance in ((False, 1.0), (True, 0.98 + 0.02 * 16)):
        x = base.sample(40_000, torch.Generator().manual_seed(2), broadened=broadened)
        kurtosis = 3 * (0.98 + 0.02 * 256) if broadened else 3
        error = std**2 * math.sqrt((kurtosis - variance**2) / 40_000)
        for column in (0, 2):
            assert abs(float(x[:, column].square().mean()) - variance * std**2) < 4 * error
        assert float(x[:, 1].square().mean()) == pytest.approx(math.pi**2 / 3, rel=0.03)
    total = integrate.quad(
        lambda v: float(Base([False], std=std).double().log_prob(torch.tensor([[v]]).double(), broadened=True).exp()),
        -60 * std, 60 * std, points=[0.0], limit=200,
    )[0]  # fmt: skip
    assert total == pytest.approx(1, abs=1e-6)


def test_the_unit_base_draws_what_it_always_drew():
    for broadened in (False, True):
        z = Base([False] * 3).sample(5, torch.Generator().manual_seed(0), broadened=broadened)
        wide = Base([False] * 3, std=3.0).sample(5, torch.Generator().manual_seed(0), broadened=broadened)
        torch.testing.assert_close(wide, 3 * z)
    rng = torch.Generator().manual_seed(0)
    assert torch.equal(Base([False] * 3).sample(5, torch.Generator().manual_seed(0)), torch.randn(5, 3, generator=rng))


# --- estimated divergences -------------------------------------------------------------------------------------------


def test_estimates_are_unbiased_over_seeds_and_exact_over_all_signs():
    """For a linear field the log-determinant is the form probe . A probe."""
    z = points(2000)
    y, log_det = ContinuousTransform(Linear(), divergence="hutchinson", steps=4, seed=3)(z)
    torch.testing.assert_close(y, ContinuousTransform(Linear(), steps=4)(z)[0])
    error = log_det.detach().std() / math.sqrt(2000)
    assert 0.001 < error < 0.1 and abs(log_det.mean() - MATRIX.trace()) < 4 * error
    signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=3)), dtype=torch.float64)
    forms = torch.einsum("ni,ij,nj->n", signs, MATRIX, signs)
    assert (log_det[:, None] - forms).abs().min(1).values.max() < 1e-9
    again = ContinuousTransform(Linear(), divergence="hutchinson", steps=4, seed=3)(z)[1]
    other = ContinuousTransform(Linear(), divergence="hutchinson", steps=4, seed=4)(z)[1]
    assert torch.equal(again, log_det) and not torch.equal(other, log_det)


def test_estimates_are_no_density_outside_training():
    flow = FLOWS["real"](divergence="hutchinson").double()
    y, _ = flow.train().sample(5, torch.Generator().manual_seed(0))
    assert torch.isfinite(flow.log_prob(y)).all()
    flow.eval()
    for refused in (lambda: flow.sample(5), lambda: flow.log_prob(y), lambda: flow.log_probs(y)):
        with pytest.raises(InputError, match="estimated divergence is noise"):
            refused()
    generator = bg.BoltzmannGenerator(bg.systems.load("double_well"), flow)
    with pytest.raises(InputError, match="estimated divergence is noise"):
        generator.sample(5, seed=0)
    flow.transform.divergence = "exact"
    assert torch.isfinite(flow.log_prob(y)).all()


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FLOWS, ids=list(FLOWS))
def test_configuration_and_file_rebuild_the_flow(name, tmp_path):
    flow = disturb(FLOWS[name]().double(), seed=5, size=0.1)
    again = ContinuousFlow.from_config(flow.config()).double()
    assert again.config() == flow.config()
    again.load_state_dict(flow.state_dict())
    y, log_prob = flow.sample(20, torch.Generator().manual_seed(0))
    assert torch.equal(again.log_prob(y), flow.log_prob(y))
    assert torch.equal(again.sample(20, torch.Generator().manual_seed(0))[1], log_prob)
    well = bg.systems.load("double_well")
    generator = bg.BoltzmannGenerator(well, flow)
    fingerprint = generator.save(tmp_path / "flow.bg")
    loaded = bg.BoltzmannGenerator.load(tmp_path / "flow.bg", energy=well)
    assert loaded.fingerprint == fingerprint
    assert torch.equal(loaded.log_prob(y), generator.log_prob(y))
    assert torch.equal(loaded.flow.log_prob(y), flow.log_prob(y))
    one, other = generator.sample(10, seed=1), loaded.sample(10, seed=1)
    assert torch.equal(one.log_weights, other.log_weights) and torch.equal(one.positions, other.positions)
    if flow.perturbation is not None:
        t = torch.tensor(0.3, dtype=torch.float64)
        assert torch.equal(loaded.flow.perturbation(t, y), flow.perturbation(t, y))


def test_flows_that_no_file_can_hold_are_refused(tmp_path):
    class OwnBase(Base):
        pass

    for flow, name in (
        (ContinuousFlow(Base([False] * 3), Linear()), "Linear"),
        (ContinuousFlow(OwnBase([False] * 2), PerceptronVelocity(2, 4)), "OwnBase"),
        (ContinuousFlow(Base([False] * 2), PerceptronVelocity(2, 4), perturbation=torch.nn.Linear(2, 1)), "Linear"),
    ):
        with pytest.raises(InputError, match=f"{name}.* cannot be saved"):
            bg.BoltzmannGenerator(None, flow).save(tmp_path / "flow.bg")
    assert not list(tmp_path.iterdir())


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"method": "rk5"}, "There is no method 'rk5'; choose one of euler, midpoint, rk4, bosh3"),
        ({"divergence": "none"}, "must be 'exact' or 'hutchinson', not 'none'"),
        ({"steps": 0}, "steps must be a positive whole number, not 0"),
        ({"steps": 2.5}, "steps must be a positive whole number, not 2.5"),
        ({"rtol": 0.0}, "rtol and atol must be positive"),
        ({"atol": -1.0}, "rtol and atol must be positive"),
        ({"rtol": math.nan}, "rtol and atol must be positive"),
    ],
)
def test_bad_settings_are_refused(options, sentence):
    with pytest.raises(InputError, match=sentence):
        ContinuousFlow(Base([False] * 2), PerceptronVelocity(2, 4), **options)


def test_other_bad_input_is_refused():
    for std in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(InputError, match="std must be a positive finite number"):
            Base([False], std=std)
    with pytest.raises(ValueError, match="base has 3 dimensions and the transform 2"):
        ContinuousFlow(Base([False] * 3), PerceptronVelocity(2, 4))
