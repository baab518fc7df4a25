"""Analytic densities against quadrature and their own samples."""

import math

import pytest
import torch
from openmm_bg.systems import GaussianMixture
from scipy.integrate import quad

from openmm_bg import systems
from openmm_bg.errors import InputError


@pytest.mark.parametrize("beta", [0.1, 1.0, 10.0, 1000.0])
def test_double_well_normalisation_and_samples(beta):
    well = systems.load("double_well", beta=beta)

    def moment(power):
        return quad(
            lambda x: 2 * abs(x) ** power * math.exp(-beta * (x * x - 1) ** 2 / 4),
            *(0, 8),
            points=[1],
            limit=500,
            epsabs=0,
            epsrel=1e-11,
        )[0]

    z1 = moment(0)
    assert well.log_z == pytest.approx(math.log(z1 * math.sqrt(2 * math.pi / beta)), abs=1e-9)
    n = 200_000
    x = well.sample(n, torch.Generator().manual_seed(3))
    assert x.shape == (n, 2) and x.dtype == torch.float64
    for power in (2, 4, 6):
        exact = moment(power) / z1
        error = math.sqrt(moment(2 * power) / z1 - exact**2) / math.sqrt(n)
        assert abs((x[:, 0].abs() ** power).mean() - exact) < 4 * error
    assert abs((x[:, 0] > 0).double().mean() - 0.5) < 4 * 0.5 / math.sqrt(n)
    assert abs(beta * (x[:, 1] ** 2).mean() - 1) < 4 * math.sqrt(2 / n)
    assert torch.equal(x[:10], well.sample(n, torch.Generator().manual_seed(3))[:10])


def test_double_well_energy_and_gradient():
    well = systems.load("double_well", beta=2)
    x = torch.tensor([[0.3, -0.7], [math.nan, 0.0], [-1.0, 0.0]], dtype=torch.float64)
    u, gradient = well.value_and_gradient(x)
    assert u[0] == pytest.approx(2 * ((0.09 - 1) ** 2 / 4 + 0.49 / 2))
    assert gradient[0].tolist() == pytest.approx([2 * 0.3 * (0.09 - 1), 2 * -0.7])
    assert u[1] == math.inf and not gradient[1].any()
    assert u[2] == 0 and not gradient[2].any()


@pytest.mark.parametrize("beta", [0, -1, math.nan, math.inf])
def test_double_well_refuses_bad_beta(beta):
    with pytest.raises(InputError, match="beta must be"):
        systems.load("double_well", beta=beta)


def test_gmm40_is_the_published_mixture():
    mixture = systems.load("gmm40")
    # The first means of torch.manual_seed(0); torch.rand(40, 2), mapped to [-40, 40].
    assert mixture.means.shape == (40, 2)
    assert mixture.means[0].tolist() == pytest.approx([-0.2995, 21.4577], abs=1e-3)
    x = mixture.sample(200_000, torch.Generator().manual_seed(1))
    u = mixture(x)
    # Differential entropy 6.8590 by quadrature.
    assert abs(u.mean() - 6.8590) < 4 * u.std() / math.sqrt(len(u))
    assert mixture.log_z == 0


def test_gaussian_mixture_integrates_to_one():
    mixture = GaussianMixture([[0.0, 0.0], [2.0, 1.0]], scale=0.7, weights=[1, 3])
    grid = torch.linspace(-8, 10, 601, dtype=torch.float64)
    x = torch.cartesian_prod(grid, grid)
    assert torch.exp(-mixture(x)).sum() * (grid[1] - grid[0]) ** 2 == pytest.approx(1, abs=1e-10)
    share = mixture.sample(50_000, torch.Generator().manual_seed(1))[:, 0].mean() / 2
    assert abs(share - 0.75) < 0.02
    with pytest.raises(InputError, match="weights must be 2"):
        GaussianMixture([[0.0, 0.0], [2.0, 1.0]], scale=0.7, weights=[1, -3])


UNEVEN = {"means": [[-2.0, 0.5], [1.0, 1.0], [0.0, -2.0]], "scale": [0.3, 1.0, 0.6], "weights": [5, 2, 3]}


def test_gaussian_mixture_of_unequal_scales_has_the_weights_of_its_sampler():
    mixture = GaussianMixture(**UNEVEN)
    grid = torch.linspace(-7, 7, 701, dtype=torch.float64)
    x = torch.cartesian_prod(grid, grid)
    mass = torch.exp(-mixture(x)) * (grid[1] - grid[0]) ** 2
    assert mass.sum() == pytest.approx(1, abs=1e-9)
    assert mixture.weights.tolist() == pytest.approx([0.5, 0.2, 0.3])
    # the density's own mass in every region of nearest_mode against the sampler's share of that region
    region = torch.bincount(mixture.nearest_mode(x), weights=mass, minlength=3)
    n = 400_000
    drawn = mixture.sample(n, torch.Generator().manual_seed(2))
    share = torch.bincount(mixture.nearest_mode(drawn), minlength=3) / n
    assert ((share - region).abs() < 5 * torch.sqrt(region * (1 - region) / n) + 1e-3 * region).all()
    mean = mixture.weights @ mixture.means
    assert ((drawn.mean(0) - mean).abs() < 5 * drawn.std(0) / math.sqrt(n)).all()
    # E|x|^2 = sum of weight (|mu|^2 + d sigma^2)
    square = mixture.weights @ (mixture.means.square().sum(1) + 2 * mixture.scales.square())
    sizes = drawn.square().sum(1)
    assert abs(sizes.mean() - square) < 5 * sizes.std() / math.sqrt(n)


def test_nearest_mode_is_the_most_responsible_one():
    mixture = GaussianMixture([[0.0], [4.0]], scale=[2.0, 0.1], weights=[1, 1])
    # 3.4 is nearer to the mean at 4, yet six of its standard deviations away
    assert mixture.nearest_mode(torch.tensor([[0.0], [3.4], [4.0], [9.0]])).tolist() == [0, 0, 1, 0]
    assert mixture.nearest_mode(torch.tensor([[4.0]])).dtype == torch.int64


@pytest.mark.parametrize(
    ("name", "modes", "dimension", "mean_square"),
    [("gmm4", 4, 2, 130), ("gmm2_unequal", 2, 2, 2 + 32 / 3 + 256 / 3), ("gmm9", 9, 2, 0.024 + 4 / 3)],
)
def test_named_mixtures(name, modes, dimension, mean_square):
    mixture = systems.load(name)
    assert mixture.means.shape == (modes, dimension) and mixture.log_z == 0
    x = mixture.sample(100_000, torch.Generator().manual_seed(4))
    square = x.square().sum(1)
    assert abs(square.mean() - mean_square) < 5 * square.std() / math.sqrt(len(x))
    heaviest = mixture.means[mixture.weights.argmax()]
    # at a mode that stands alone the density is weight / (2 pi sigma^2)
    alone = mixture.weights.max() / (2 * math.pi * mixture.scales[0] ** 2)
    assert torch.exp(-mixture(heaviest[None]))[0] == pytest.approx(alone.item(), rel=1e-6)


def test_gmm_pair_is_the_written_density():
    mixture = systems.load("gmm_pair", separation=3.0, weight=0.7)
    x = torch.linspace(-5, 5, 11, dtype=torch.float64)
    bells = 0.7 * torch.exp(-0.5 * (x - 3) ** 2) + 0.3 * torch.exp(-0.5 * (x + 3) ** 2)
    assert torch.allclose(torch.exp(-mixture(x[:, None])), bells / math.sqrt(2 * math.pi), rtol=1e-12)
    assert (mixture.sample(100_000, torch.Generator().manual_seed(5)) > 0).double().mean() == pytest.approx(
        0.7, abs=0.01
    )


@pytest.mark.parametrize("prior_scale", [1.0, 3.0])
@pytest.mark.parametrize("time", [0.05, 0.5, 1.5])
@pytest.mark.parametrize("name", ["uneven", "gmm40"])
def test_noised_solves_the_fokker_planck_equation(name, time, prior_scale):
    mixture = GaussianMixture(**UNEVEN) if name == "uneven" else systems.load("gmm40")
    generator = torch.Generator().manual_seed(6)
    x = mixture.noised(time, prior_scale).sample(20, generator).requires_grad_()
    f = mixture.noised(time, prior_scale)(x)
    (gradient,) = torch.autograd.grad(f.sum(), x, create_graph=True)
    laplacian = sum(torch.autograd.grad(gradient[:, i].sum(), x, retain_graph=True)[0][:, i] for i in range(2))
    h = 1e-3 * time

    def at(k):
        return mixture.noised(time + k * h, prior_scale)(x)

    # sixth order: d_t f would otherwise be the largest error
    rate = (45 * (at(1) - at(-1)) - 9 * (at(2) - at(-2)) + (at(3) - at(-3))) / (60 * h)
    # d_t f + <grad f, grad(f - f_Z)> - Lap(f - f_Z) = 0 with f_Z = |x|^2 / (2 s^2)
    drift = gradient - x / prior_scale**2
    residual = rate + (gradient * drift).sum(1) - laplacian + 2 / prior_scale**2
    assert residual.abs().max() < 1e-6


def test_noised_ends():
    mixture = GaussianMixture(**UNEVEN)
    x = torch.randn(10, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(mixture.noised(0.0)(x), mixture(x), rtol=1e-14)
    limit = 0.5 * (x / 2).square().sum(1) + math.log(2 * math.pi * 4)
    assert torch.allclose(mixture.noised(400.0, prior_scale=2.0)(x), limit, rtol=1e-12)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GaussianMixture([0.0, 1.0], 1.0), "means must be"),
        (lambda: GaussianMixture([[math.nan]], 1.0), "means must be"),
        (lambda: GaussianMixture([[0.0], [1.0]], [1.0, -1.0]), "scale must be a positive"),
        (lambda: GaussianMixture([[0.0], [1.0]], [1.0, 1.0, 1.0]), "scale must be one number or 2"),
        (lambda: GaussianMixture([[0.0]], 0.0), "scale must be a positive"),
        (lambda: GaussianMixture([[0.0]], 1.0).noised(-1), "time must be"),
        (lambda: GaussianMixture([[0.0]], 1.0).noised(1, prior_scale=0), "prior_scale must be"),
        (lambda: GaussianMixture([[0.0]], 1.0).nearest_mode(torch.zeros(3, 2)), "takes the shape"),
        (lambda: systems.load("gmm_pair", weight=1.0), "weight must lie between 0 and 1"),
        (lambda: systems.load("gmm_pair", separation=-1.0), "separation must be"),
        (lambda: systems.load("gmm4", separation=1.0), "takes none"),
    ],
)
def test_mixtures_refuse_bad_parameters(make, message):
    with pytest.raises(InputError, match=message):
        make()
