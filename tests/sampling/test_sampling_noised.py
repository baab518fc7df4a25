"""Energies of noised targets against the closed form of mixtures."""

from __future__ import annotations

import math

import pytest
import torch
from openmm_bg.systems import GaussianMixture
from torch import Tensor

from openmm_bg.errors import InputError
from openmm_bg.flows import GradientFlowVelocity, PerceptronEnergy
from openmm_bg.sampling import NoisedMesh, noised_energy

STD = 3.0


def mixture(dimension: int) -> GaussianMixture:
    means = torch.randn(4, dimension, generator=torch.Generator().manual_seed(dimension), dtype=torch.float64) * 2
    return GaussianMixture(means, torch.tensor([0.6, 0.8, 1.0, 0.7]), torch.tensor([0.1, 0.2, 0.3, 0.4]))


def velocity_of(target: GaussianMixture) -> GradientFlowVelocity:
    return GradientFlowVelocity(target, PerceptronEnergy(target.event_shape[0], 4), std=STD, shortest=1e-2).double()


def exact(target: GaussianMixture, velocity: GradientFlowVelocity, t: float, n: int) -> tuple[Tensor, Tensor, Tensor]:
    theta = float(velocity.noise_time(torch.tensor(t, dtype=torch.float64))[0]) * STD**2
    noised = target.noised(theta, STD)
    x = noised.sample(n, torch.Generator().manual_seed(1)).requires_grad_()
    value = noised(x)
    (gradient,) = torch.autograd.grad(value.sum(), x)
    return x.detach(), value.detach() - target.log_z + noised.log_z, gradient


@pytest.mark.parametrize(("dimension", "points", "accuracy"), [(1, 200, 1e-9), (2, 150**2, 1e-9), (3, 50**3, 1e-4)])
def test_mesh_gives_noised_mixtures(dimension, points, accuracy):
    target = mixture(dimension)
    velocity = velocity_of(target)
    mesh = NoisedMesh.of(velocity, target, 12.0, points)
    for t in (0.05, 0.4, 0.6):
        x, value, gradient = exact(target, velocity, t, 50)
        times = torch.full((50,), t, dtype=torch.float64)
        assert mesh.resolves(velocity, times).all()
        got, bent = mesh(velocity, times, x)
        assert (got - value).abs().max() < accuracy
        assert (bent - gradient).abs().max() < 10 * accuracy


def test_mesh_knows_what_it_cannot_resolve():
    target = mixture(2)
    velocity = velocity_of(target)
    mesh = NoisedMesh.of(velocity, target, 12.0, 60**2)
    resolved = mesh.resolves(velocity, torch.linspace(0, 1, 50, dtype=torch.float64))
    assert bool(resolved[0]) and not bool(resolved[-1])
    # once lost, resolution does not come back
    assert (resolved[1:].long() <= resolved[:-1].long()).all()


def test_mesh_check_accepts_and_refuses():
    target = mixture(2)
    NoisedMesh.of(velocity_of(target), target, 12.0, 200**2).check(velocity_of(target))
    thin = GaussianMixture([[0.03, 0.01], [2.0, 1.0]], 0.02)
    with pytest.raises(InputError, match="raise mesh"):
        NoisedMesh.of(velocity_of(thin), thin, 12.0, 50**2).check(velocity_of(thin))


def test_a_coarser_mesh_serves_where_it_is_as_good():
    target = mixture(2)
    velocity = velocity_of(target)
    fine, mixed = (NoisedMesh.of(velocity, target, 12.0, 240**2) for _ in range(2))
    mixed.coarsen(velocity)
    assert len(mixed.coarser.axis) == 120
    for t in (0.05, 0.5, 0.9):
        x, _, _ = exact(target, velocity, t, 50)
        times = torch.full((50,), t, dtype=torch.float64)
        for one, other in zip(mixed(velocity, times, x), fine(velocity, times, x), strict=True):
            assert (one - other).abs().max() < 1e-4
    thin = GaussianMixture([[0.03, 0.01], [2.0, 1.0]], 0.1)
    mesh = NoisedMesh.of(velocity_of(thin), thin, 12.0, 240**2)
    mesh.coarsen(velocity_of(thin))
    assert mesh.coarser is None


def test_draws_give_noised_mixtures():
    target = mixture(2)
    velocity = velocity_of(target)

    def evaluate(y: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            y = y.detach().requires_grad_()
            u = target(y)
            return u.detach(), torch.autograd.grad(u.sum(), y)[0]

    for t, accuracy in ((0.1, 0.1), (0.5, 0.1), (0.95, 0.02)):
        x, value, gradient = exact(target, velocity, t, 50)
        times = torch.full((50,), t, dtype=torch.float64)
        got, bent = noised_energy(velocity, evaluate, times, x, 2048, torch.Generator().manual_seed(2))
        assert (got - value).std() < accuracy
        assert (bent - gradient).std() < 2 * accuracy


def test_nothing_asked_nothing_given():
    target = mixture(2)
    velocity = velocity_of(target)
    mesh = NoisedMesh.of(velocity, target, 12.0, 30**2)
    value, gradient = mesh(velocity, torch.zeros(0, dtype=torch.float64), torch.zeros(0, 2, dtype=torch.float64))
    assert value.shape == (0,) and gradient.shape == (0, 2)
    assert math.isfinite(mesh.lowest)
