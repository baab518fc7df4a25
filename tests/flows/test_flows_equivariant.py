"""Symmetries of the fields of identical particles, their exact divergence, and the normal on zero centroids."""

from __future__ import annotations

import math

import pytest
import torch
from torch.func import jacrev, vmap

from openmm_bg.errors import InputError
from openmm_bg.flows.continuous import ContinuousFlow
from openmm_bg.flows.equivariant import CentredBase, PairEnergy, PairVelocity
from openmm_bg.flows.velocity import VelocityField

SYSTEMS = {"plane": (4, 2, 6.0), "space": (6, 3, 4.0), "line": (3, 1, 5.0)}
DENSITIES = (0, 3)


def disturbed(module: torch.nn.Module, seed: int = 0, size: float = 0.3) -> torch.nn.Module:
    module = module.double()
    rng = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data += size * torch.randn(parameter.shape, generator=rng, dtype=parameter.dtype)
    return module


def points(n: int, dimension: int, seed: int = 1) -> torch.Tensor:
    return 1.5 * torch.randn(n, dimension, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthogonal(dimension: int, proper: bool, seed: int = 2) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(dimension, dimension, generator=rng, dtype=torch.float64))[0]
    if (torch.det(q) > 0) != proper:
        q[:, 0] = -q[:, 0]
    return q


def centred_basis(particles: int, spatial_dimension: int) -> torch.Tensor:
    """Orthonormal columns that span the configurations of zero centroid, (N D, (N - 1) D)."""
    translations = torch.eye(spatial_dimension, dtype=torch.float64).repeat(particles, 1)
    return torch.linalg.svd(translations)[0][:, spatial_dimension:]


@pytest.fixture(params=[(system, densities) for system in SYSTEMS for densities in DENSITIES], ids=str)
def case(request):
    system, densities = request.param
    particles, dim, reach = SYSTEMS[system]
    options = {"features": 12, "densities": densities, "hidden": (16, 16), "windows": 4}
    field = disturbed(PairVelocity(particles, dim, reach, **options))
    energy = disturbed(PairEnergy(particles, dim, reach, **options))
    t = torch.tensor([0.0, 0.2, 0.5, 0.9, 1.0], dtype=torch.float64)
    return particles, dim, field, energy, t, points(5, particles * dim)


def test_untrained_networks_are_zero():
    x = torch.randn(3, 12, generator=torch.Generator().manual_seed(0))
    v, divergence = PairVelocity(4, 3, 5.0).with_divergence(torch.tensor(0.3), x)
    assert not v.any() and not divergence.any()
    assert not PairEnergy(4, 3, 5.0)(torch.tensor(0.3), x).any()


def test_particles_that_change_places_take_the_field_with_them(case):
    particles, dim, field, energy, t, x = case
    order = torch.randperm(particles, generator=torch.Generator().manual_seed(3))
    moved = x.view(-1, particles, dim)[:, order].flatten(1)
    v, divergence = field.with_divergence(t, x)
    w, same = field.with_divergence(t, moved)
    torch.testing.assert_close(w, v.view(-1, particles, dim)[:, order].flatten(1), atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(same, divergence, atol=1e-11, rtol=1e-11)
    torch.testing.assert_close(energy(t, moved), energy(t, x), atol=1e-12, rtol=1e-12)
    assert v.abs().max() > 0.1, "a disturbed field must move something"


@pytest.mark.parametrize("proper", [True, False])
def test_turning_and_reflecting_turns_and_reflects_the_field(case, proper):
    particles, dim, field, energy, t, x = case
    q = orthogonal(dim, proper)

    def turn(z):
        return (z.view(-1, particles, dim) @ q.T).flatten(1)

    v, divergence = field.with_divergence(t, x)
    w, same = field.with_divergence(t, turn(x))
    torch.testing.assert_close(w, turn(v), atol=1e-11, rtol=1e-11)
    torch.testing.assert_close(same, divergence, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(energy(t, turn(x)), energy(t, x), atol=1e-11, rtol=1e-11)


def test_the_field_ignores_translations_and_leaves_the_centroid(case):
    particles, dim, field, energy, t, x = case
    shift = points(5, dim, seed=4).repeat(1, particles)
    v, divergence = field.with_divergence(t, x)
    w, same = field.with_divergence(t, x + shift)
    torch.testing.assert_close(w, v, atol=1e-11, rtol=1e-11)
    torch.testing.assert_close(same, divergence, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(energy(t, x + shift), energy(t, x), atol=1e-11, rtol=1e-11)
    assert v.view(-1, particles, dim).sum(1).abs().max() < 1e-11


def test_divergence_is_autograds_in_the_whole_space_and_on_the_subspace(case):
    particles, dim, field, _, t, x = case
    v, divergence = field.with_divergence(t, x)
    torch.testing.assert_close(v, field(t, x), atol=1e-13, rtol=1e-13)
    reference, traced = VelocityField.with_divergence(field, t, x)
    torch.testing.assert_close(v, reference, atol=1e-13, rtol=1e-13)
    torch.testing.assert_close(divergence, traced, atol=1e-10, rtol=1e-10)
    jacobian = vmap(jacrev(lambda t, x: field(t[None], x[None])[0], argnums=1))(t, x)
    basis = centred_basis(particles, dim)
    inner = (basis.T @ jacobian @ basis).diagonal(dim1=1, dim2=2).sum(1)
    torch.testing.assert_close(divergence, inner, atol=1e-10, rtol=1e-10)


def test_one_time_serves_all_rows(case):
    _, _, field, energy, _, x = case
    one, many = torch.tensor(0.4, dtype=x.dtype), torch.full((5,), 0.4, dtype=x.dtype)
    for left, right in zip(field.with_divergence(one, x), field.with_divergence(many, x), strict=True):
        torch.testing.assert_close(left, right)
    torch.testing.assert_close(energy(one, x), energy(many, x))


@pytest.mark.parametrize("densities", DENSITIES)
def test_velocity_and_divergence_can_be_differentiated_twice(densities):
    field = disturbed(PairVelocity(3, 2, 4.0, features=6, densities=densities, hidden=(5,), windows=3))
    t = torch.tensor([0.2, 0.7], dtype=torch.float64, requires_grad=True)
    x = points(2, 6).requires_grad_()
    assert torch.autograd.gradcheck(field.with_divergence, (t, x))
    assert torch.autograd.gradgradcheck(field.with_divergence, (t, x))


@pytest.mark.parametrize("densities", DENSITIES)
def test_the_energy_can_be_differentiated_twice(densities):
    energy = disturbed(PairEnergy(3, 2, 4.0, features=6, densities=densities, hidden=(5,), windows=3))
    t = torch.tensor([0.2, 0.7], dtype=torch.float64, requires_grad=True)
    x = points(2, 6).requires_grad_()
    assert torch.autograd.gradcheck(energy, (t, x))
    assert torch.autograd.gradgradcheck(energy, (t, x))


def test_gradients_through_the_divergence_reach_every_parameter(case):
    _, _, field, energy, t, x = case
    v, divergence = field.with_divergence(t, x)
    (v.square().sum() + divergence.square().sum()).backward()
    energy(t, x).square().sum().backward()
    for name, parameter in [*field.named_parameters(), *energy.named_parameters()]:
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().max() > 0, name


def test_densities_make_a_pair_depend_on_a_third_particle():
    x = torch.tensor([[0.0, 0.0, 1.0, 0.0, 0.0, 1.5], [0.0, 0.0, 1.0, 0.0, 0.5, 1.5]], dtype=torch.float64)
    for densities in DENSITIES:
        network = disturbed(PairVelocity(3, 2, 4.0, densities=densities)).network
        first_pair = network(torch.tensor(0.5, dtype=torch.float64), network.differences(x)[1])[:, 0]
        assert (abs(first_pair[0] - first_pair[1]) > 1e-3) == (densities > 0)


def test_particles_in_one_place_have_finite_velocities_and_gradients():
    field = disturbed(PairVelocity(3, 2, 4.0))
    x = torch.tensor([[1.0, 1.0, 1.0, 1.0, -2.0, -2.0]], dtype=torch.float64, requires_grad=True)
    v, divergence = field.with_divergence(torch.tensor(0.5, dtype=torch.float64), x)
    torch.testing.assert_close(v[0, :2], v[0, 2:4])
    (gradient,) = torch.autograd.grad(v.square().sum() + divergence.sum(), x)
    assert all(torch.isfinite(part).all() for part in (v, divergence, gradient))


def test_the_density_follows_the_flow():
    """Euler steps of the continuity equation against the log-determinant of the whole map on the subspace."""
    field = disturbed(PairVelocity(3, 2, 4.0, features=6, densities=2, hidden=(8,), windows=3), size=0.2)
    basis = centred_basis(3, 2)
    start = points(1, 6)[0] @ basis

    def flow(y):
        z, total = (y @ basis.T)[None], 0.0
        for step in range(400):
            t = torch.tensor((step + 0.5) / 400, dtype=torch.float64)
            middle = z + field(t, z) / 800
            v, divergence = field.with_divergence(t, middle)
            z, total = z + v / 400, total + divergence / 400
        return z[0] @ basis, total[0]

    jacobian = torch.autograd.functional.jacobian(lambda y: flow(y)[0], start)
    assert abs(torch.linalg.slogdet(jacobian)[1] - flow(start)[1]) < 1e-4


def test_a_continuous_flow_knows_the_density_of_its_draws():
    velocity = disturbed(PairVelocity(3, 2, 4.0, features=6, densities=2, hidden=(8,), windows=3), size=0.2)
    flow = ContinuousFlow(CentredBase(3, 2, 1.2), velocity, steps=30).double()
    for broadened in (False, True):
        y, log_prob = flow.sample(50, torch.Generator().manual_seed(0), broadened=broadened)
        torch.testing.assert_close(flow.log_probs(y)[int(broadened)], log_prob, atol=1e-6, rtol=0)
    assert y.view(50, 3, 2).mean(1).abs().max() < 1e-12
    assert (flow.log_prob(y + 1) == -math.inf).all()


def test_config_rebuilds_field_energy_and_base():
    for module in (PairVelocity(4, 2, 6.0, densities=2, hidden=[8]), PairEnergy(4, 2, 6.0), CentredBase(4, 2, 3.0)):
        again = type(module)(**module.config())
        assert again.config() == module.config()
        for left, right in zip(module.parameters(), again.parameters(), strict=True):
            assert torch.equal(left, right)


@pytest.mark.parametrize(
    "wrong", [{"particles": 1}, {"reach": 0.0}, {"features": 1}, {"densities": -1}, {"hidden": ()}]
)
def test_impossible_networks_are_refused(wrong):
    with pytest.raises(InputError):
        PairVelocity(**{"particles": 4, "spatial_dimension": 2, "reach": 5.0, **wrong})


@pytest.mark.parametrize("broadened", [False, True])
def test_base_density_is_that_of_a_normal_on_an_orthonormal_basis(broadened):
    base, basis = CentredBase(4, 2, 1.7).double(), centred_basis(4, 2)
    y = points(20, 6)
    value = torch.distributions.Normal(0.0, 1.7).log_prob(y).sum(1)
    if broadened:
        wide = torch.distributions.Normal(0.0, 1.7 * base.wider).log_prob(y).sum(1)
        value = ((1 - base.share) * value.exp() + base.share * wide.exp()).log()
    torch.testing.assert_close(base.log_prob(y @ basis.T, broadened=broadened), value)


@pytest.mark.parametrize("broadened", [False, True])
def test_base_density_integrates_to_one(broadened):
    base, basis = CentredBase(3, 1, 0.8).double(), centred_basis(3, 1)
    axis = torch.linspace(-9, 9, 401, dtype=torch.float64)
    density = base.log_prob(torch.cartesian_prod(axis, axis) @ basis.T, broadened=broadened).exp()
    assert abs(density.sum() * (axis[1] - axis[0]) ** 2 - 1) < 1e-6


def test_base_draws_have_the_moments_of_the_density():
    n, base = 200_000, CentredBase(3, 2, 1.3).double()
    z = base.sample(n, torch.Generator().manual_seed(0))
    covariance = 1.3**2 * centred_basis(3, 2) @ centred_basis(3, 2).T
    assert z.view(n, 3, 2).mean(1).abs().max() < 1e-12
    assert z.mean(0).abs().max() < 5 * 1.3 / math.sqrt(n)
    assert (z.T @ z / n - covariance).abs().max() < 5 * 1.3**2 * math.sqrt(2 / n)
    entropy = 0.5 * 4 * math.log(2 * math.pi * math.e * 1.3**2)
    assert abs(base.log_prob(z).mean() + entropy) < 5 * math.sqrt(2 / n)


def test_broadened_draws_follow_the_broadened_density():
    base = CentredBase(3, 2).double()
    z = base.sample(200_000, torch.Generator().manual_seed(0), broadened=True)
    mean = 4 * (1 - base.share + base.share * base.wider**2)
    square = z.square().sum(1)
    assert abs(square.mean() - mean) < 5 * square.std() / math.sqrt(len(z))
    ratio = (base.log_prob(z) - base.log_prob(z, broadened=True)).exp()
    assert abs(ratio.mean() - 1) < 5 * ratio.std() / math.sqrt(len(z))


def test_base_has_no_density_off_the_subspace():
    base = CentredBase(4, 3)
    z = base.sample(4, torch.Generator().manual_seed(0))
    z[1] += 0.1
    z[2, 0] = math.nan
    z[3, 0] = math.inf
    value = base.log_prob(z)
    assert math.isfinite(value[0]) and (value[1:] == -math.inf).all()
    assert torch.isfinite(base.log_prob(base.centre(z[:2]))).all()


def test_a_seed_reproduces_draws_and_dtypes_follow():
    base = CentredBase(4, 3)
    draws = [base.sample(5, torch.Generator().manual_seed(seed)) for seed in (7, 7, 8)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert draws[0].dtype == torch.float32 and base.double().sample(2).dtype == torch.float64
