"""Velocity fields: divergences, gradients and Laplacians against autograd, symmetries, determinism."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from openmm_bg.errors import InputError
from openmm_bg.flows import PerceptronEnergy, PerceptronVelocity, VelocityField
from openmm_bg.flows.velocity import TimeWindows

DIMENSION = 4
ANGLES = [False, True, True, False]

# what a network may be told to be; every field is tested with every time
OPTIONS = {
    "plain": {},
    "sines": {"first": "sin", "bandwidth": 2.0},
    "angles": {"circular": ANGLES},
    "angles, sines, one multiple": {"circular": ANGLES, "first": "sin", "order": 1},
    "all angles": {"circular": [True] * 4, "order": 2},
    "circulant": {"circulant": True},
    "circulant, sines": {"circulant": True, "first": "sin"},
}
SYMMETRIC = {
    **OPTIONS,
    **{f"{name}, symmetric": {**options, "symmetric": True} for name, options in OPTIONS.items()},
}
TIMES = {
    "scalar": torch.tensor(0.37, dtype=torch.float64),
    "one": torch.tensor([0.37], dtype=torch.float64),
    "batch": torch.tensor([0.0, 0.2, 0.55, 0.8, 1.0], dtype=torch.float64),
}


def disturb(module: torch.nn.Module, seed: int = 0, size: float = 0.4) -> torch.nn.Module:
    rng = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data += size * torch.randn(parameter.shape, generator=rng, dtype=parameter.dtype)
    return module


def velocity(symmetric: bool = False, **options) -> PerceptronVelocity:
    return disturb(PerceptronVelocity(DIMENSION, 7, windows=4, odd=symmetric, **options).double())


def scalar(symmetric: bool = False, **options) -> PerceptronEnergy:
    return disturb(PerceptronEnergy(DIMENSION, 7, windows=4, even=symmetric, **options).double())


def points(n: int = 5, seed: int = 1, dimension: int = DIMENSION) -> torch.Tensor:
    return 1.5 * torch.randn(n, dimension, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def jacobians(field: VelocityField, t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Row by row, so that rows which see each other would be found out."""
    times = t.expand(len(x)) if t.ndim == 0 or len(t) == 1 else t
    return torch.stack(
        [
            torch.autograd.functional.jacobian(lambda v, s=s: field(s, v[None])[0], row)
            for s, row in zip(times, x, strict=True)
        ]
    )


# --- the perceptron --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("times", TIMES, ids=list(TIMES))
@pytest.mark.parametrize("name", SYMMETRIC, ids=list(SYMMETRIC))
def test_divergence_is_the_trace_of_the_jacobian(name, times):
    field, x, t = velocity(**SYMMETRIC[name]), points(), TIMES[times]
    v, divergence = field.with_divergence(t, x)
    assert v.shape == x.shape and divergence.shape == (5,)
    torch.testing.assert_close(v, field(t, x), atol=1e-12, rtol=0)
    expected = jacobians(field, t, x).diagonal(dim1=1, dim2=2).sum(-1)
    torch.testing.assert_close(divergence, expected, atol=1e-11, rtol=1e-11)
    assert divergence.detach().std() > 0.01, "a field of constant divergence tests nothing"
    # the inherited way, one backward pass per dimension
    torch.testing.assert_close(VelocityField.with_divergence(field, t, x)[1], expected, atol=1e-11, rtol=1e-11)


def test_gradients_of_the_divergence_reach_every_parameter():
    for name, options in SYMMETRIC.items():
        field = velocity(**options)
        t, x = TIMES["batch"], points()
        v, divergence = field.with_divergence(t, x)
        closed = torch.autograd.grad((v.sum(-1) * divergence).sum(), list(field.parameters()), allow_unused=True)
        v, divergence = VelocityField.with_divergence(field, t, x)
        slow = torch.autograd.grad((v.sum(-1) * divergence).sum(), list(field.parameters()), allow_unused=True)
        for (parameter, _), one, other in zip(field.named_parameters(), closed, slow, strict=True):
            # an odd field of angles alone has no linear part
            dead = name == "all angles, symmetric" and parameter == "outer.rows"
            assert dead or one.abs().max() > 0, (name, parameter)
            torch.testing.assert_close(one, other, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("name", OPTIONS, ids=list(OPTIONS))
def test_odd_fields_are_odd_and_others_are_not(name):
    t, x = TIMES["batch"], points()
    field = velocity(symmetric=True, **OPTIONS[name])
    v, divergence = field.with_divergence(t, x)
    mirrored, there = field.with_divergence(t, -x)
    torch.testing.assert_close(mirrored, -v, atol=1e-13, rtol=0)
    torch.testing.assert_close(there, divergence, atol=1e-13, rtol=0)
    plain = velocity(**OPTIONS[name])
    assert (plain(t, -x) + plain(t, x)).abs().max() > 0.1


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("first", ["silu", "sin"])
def test_circulant_networks_commute_with_shifts(first, symmetric):
    t, x = TIMES["batch"], points()
    field = velocity(symmetric=symmetric, circulant=True, first=first)
    v, divergence = field.with_divergence(t, x)
    energy = scalar(symmetric=symmetric, circulant=True, first=first)
    for shift in range(1, DIMENSION):
        moved, there = field.with_divergence(t, x.roll(shift, 1))
        torch.testing.assert_close(moved, v.roll(shift, 1), atol=1e-13, rtol=0)
        torch.testing.assert_close(there, divergence, atol=1e-13, rtol=0)
        torch.testing.assert_close(energy(t, x.roll(shift, 1)), energy(t, x), atol=1e-13, rtol=0)
    # shifts, but not any permutation: neighbours matter
    swap = [1, 0, 2, 3]
    assert (field(t, x[:, swap]) - v[:, swap]).abs().max() > 0.01
    assert (energy(t, x[:, swap]) - energy(t, x)).abs().max() > 0.001
    plain = velocity()
    assert (plain(t, x.roll(1, 1)) - plain(t, x).roll(1, 1)).abs().max() > 0.1


@pytest.mark.parametrize("symmetric", [False, True])
def test_angles_are_periodic_and_nothing_else_is(symmetric):
    t, x = TIMES["batch"], points()
    field, energy = (make(symmetric=symmetric, circular=ANGLES) for make in (velocity, scalar))
    v, divergence = field.with_divergence(t, x)
    turned = x + 2 * math.pi * torch.tensor([0.0, 1.0, -2.0, 0.0], dtype=torch.float64)
    again, there = field.with_divergence(t, turned)
    torch.testing.assert_close(again, v, atol=1e-12, rtol=0)
    torch.testing.assert_close(there, divergence, atol=1e-12, rtol=0)
    torch.testing.assert_close(energy(t, turned), energy(t, x), atol=1e-12, rtol=0)
    shifted = x + 2 * math.pi * torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    assert (field(t, shifted) - v).abs().max() > 0.1
    assert (energy(t, shifted) - energy(t, x)).abs().max() > 0.01


@pytest.mark.parametrize("name", SYMMETRIC, ids=list(SYMMETRIC))
def test_untrained_networks_are_zero(name):
    options = dict(SYMMETRIC[name])
    symmetric = options.pop("symmetric", False)
    field = PerceptronVelocity(DIMENSION, 7, odd=symmetric, **options)
    energy = PerceptronEnergy(DIMENSION, 7, even=symmetric, **options)
    t, x = TIMES["batch"].float(), points().float()
    assert not any(part.any() for part in field.with_divergence(t, x)) and not energy(t, x).any()
    # and leave zero: the last layer has a gradient at once
    field.with_divergence(t, x)[0][:, 0].sum().backward()
    assert field.trunk.weight3.grad.abs().max() > 0


def test_the_field_changes_with_time_and_single_precision_follows():
    field, x = velocity(circular=ANGLES), points()
    v = [field(torch.tensor(t, dtype=torch.float64), x) for t in (0.0, 0.5, 1.0)]
    assert (v[0] - v[1]).abs().max() > 0.1 and (v[1] - v[2]).abs().max() > 0.1
    double = field.with_divergence(TIMES["batch"], x)
    single = field.float().with_divergence(TIMES["batch"].float(), x.float())
    for one, other in zip(single, double, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one.double(), other, atol=1e-4, rtol=1e-4)


def test_windows_of_time_sum_to_one_and_are_smooth():
    windows = TimeWindows(5, [2, 1]).double()
    first, second = windows(torch.linspace(0, 1, 7, dtype=torch.float64))
    assert first.shape == (7, 2) and second.shape == (7, 1) and not first.any() and not second.any()
    windows.rows.data[:] = 3.0
    t = torch.linspace(0, 1, 401, dtype=torch.float64)
    torch.testing.assert_close(windows(t)[1], torch.full((401, 1), 3.0, dtype=torch.float64))
    # as independent Gaussians of the stated width
    windows.rows.data[:] = torch.arange(15.0).view(5, 3)
    weights = torch.exp(-0.5 * ((t[:, None] - torch.linspace(0, 1, 5)) / 0.25) ** 2)
    expected = (weights / weights.sum(1, keepdim=True)) @ windows.rows[:, 2]
    torch.testing.assert_close(windows(t)[1][:, 0], expected)


def test_seeds_reproduce_and_configurations_rebuild():
    for make in (PerceptronVelocity, PerceptronEnergy):
        first, again, other = (make(3, 5, seed=seed) for seed in (4, 4, 5))
        states = [module.state_dict() for module in (first, again, other)]
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
        assert not torch.equal(states[0]["trunk.weight1"], states[2]["trunk.weight1"])
        for options in OPTIONS.values():
            module = disturb(make(DIMENSION, 5, windows=3, seed=2, **options).double())
            rebuilt = make(**module.config()).double()
            rebuilt.load_state_dict(module.state_dict())
            t, x = TIMES["batch"], points()
            assert torch.equal(rebuilt(t, x), module(t, x)) and rebuilt.config() == module.config()


def test_one_dimension():
    x, t = points(dimension=1), TIMES["batch"]
    for options in ({}, {"circulant": True}, {"circular": [True]}):
        field = disturb(PerceptronVelocity(1, 6, **options).double())
        expected = jacobians(field, t, x)[:, 0, 0]
        torch.testing.assert_close(field.with_divergence(t, x)[1], expected, atol=1e-11, rtol=1e-11)
        assert disturb(PerceptronEnergy(1, 6, **options).double())(t, x).shape == (5,)


def test_bad_input_is_refused_with_a_sentence():
    for make in (PerceptronVelocity, PerceptronEnergy):
        with pytest.raises(InputError, match="circular must have 3 entries, one per dimension, not 2"):
            make(3, circular=[True, False])
        with pytest.raises(InputError, match="circulant network takes no angles"):
            make(3, circulant=True, circular=[True, False, False])
    with pytest.raises(NotImplementedError, match="VelocityField must define forward"):
        VelocityField(2)(torch.tensor(0.0), torch.zeros(1, 2))


# --- estimates of the divergence -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain", "angles, symmetric", "circulant, sines"])
def test_the_mean_over_all_probes_is_the_trace(name):
    """Over all 2^d vectors of signs the estimate of Hutchinson averages to the trace exactly."""
    field, x, t = velocity(**SYMMETRIC[name]), points(), TIMES["batch"]
    v, divergence = field.with_divergence(t, x)
    estimates = []
    for signs in itertools.product([-1.0, 1.0], repeat=DIMENSION):
        same, estimate = field.hutchinson(t, x, torch.tensor(signs, dtype=x.dtype).expand_as(x))
        torch.testing.assert_close(same, v, atol=1e-12, rtol=0)
        estimates.append(estimate)
    estimates = torch.stack(estimates)
    torch.testing.assert_close(estimates.mean(0), divergence, atol=1e-11, rtol=1e-11)
    assert estimates.detach().std(0).min() > 1e-3, "and single probes are noisy"
    # one probe, against the quadratic form of the Jacobian
    probe = points(seed=6)
    expected = torch.einsum("ni,nij,nj->n", probe, jacobians(field, t, x), probe)
    torch.testing.assert_close(field.hutchinson(t, x, probe)[1], expected, atol=1e-11, rtol=1e-11)


def test_estimates_keep_their_graph_only_where_gradients_are_asked_for():
    field, x, t = velocity(), points(), TIMES["batch"]
    for method in (
        lambda: field.hutchinson(t, x, torch.ones_like(x)),
        lambda: VelocityField.with_divergence(field, t, x),
    ):
        (gradient,) = torch.autograd.grad(method()[1].sum(), field.trunk.weight2)
        assert gradient.abs().max() > 0
        with torch.no_grad():
            assert not any(part.requires_grad for part in method())
    assert not x.requires_grad


# --- the energy ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("times", TIMES, ids=list(TIMES))
@pytest.mark.parametrize("name", [name for name in SYMMETRIC if "angles" not in name])
def test_derivatives_of_the_energy_are_autograds(name, times):
    energy, x, t = scalar(**SYMMETRIC[name]), points(), TIMES[times]
    value, gradient, laplacian = energy.derivatives(t, x)
    torch.testing.assert_close(value, energy(t, x), atol=1e-12, rtol=0)
    for row in range(5):
        time = t if t.ndim == 0 else t[row % len(t)]

        def one(v, time=time):
            return energy(time, v[None])[0]

        torch.testing.assert_close(
            gradient[row], torch.autograd.functional.jacobian(one, x[row]), atol=1e-11, rtol=1e-11
        )
        hessian = torch.autograd.functional.hessian(one, x[row])
        torch.testing.assert_close(laplacian[row], hessian.trace(), atol=1e-11, rtol=1e-11)
    assert laplacian.detach().abs().max() > 0.01


@pytest.mark.parametrize("name", OPTIONS, ids=list(OPTIONS))
def test_even_energies_are_even_and_others_are_not(name):
    t, x = TIMES["batch"], points()
    even = scalar(symmetric=True, **OPTIONS[name])
    torch.testing.assert_close(even(t, -x), even(t, x), atol=1e-13, rtol=0)
    plain = scalar(**OPTIONS[name])
    assert (plain(t, -x) - plain(t, x)).abs().max() > 0.01
    # the even part of the same network, where the part that knows only time counts once
    torch.testing.assert_close(even(t, x), 0.5 * (plain(t, x) + plain(t, -x)), atol=1e-12, rtol=0)


def test_gradients_of_the_derivatives_reach_the_parameters():
    energy, x, t = scalar(), points(), TIMES["batch"]
    _, gradient, laplacian = energy.derivatives(t, x)
    closed = torch.autograd.grad((gradient.square().sum(-1) * laplacian).sum(), energy.trunk.weight2)[0]
    leaf = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(energy(t, leaf).sum(), leaf, create_graph=True)
    second = sum(torch.autograd.grad(slope[:, i].sum(), leaf, create_graph=True)[0][:, i] for i in range(DIMENSION))
    expected = torch.autograd.grad((slope.square().sum(-1) * second).sum(), energy.trunk.weight2)[0]
    torch.testing.assert_close(closed, expected, atol=1e-9, rtol=1e-9)


def test_there_is_no_closed_laplacian_with_angles():
    with pytest.raises(InputError, match="networks without angles"):
        scalar(circular=ANGLES).derivatives(TIMES["scalar"], points())
