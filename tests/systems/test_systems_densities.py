"""Analytic densities against quadrature and their own samples."""

import math

import pytest
import torch
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
    from openmm_bg.systems.densities import GaussianMixture

    mixture = GaussianMixture([[0.0, 0.0], [2.0, 1.0]], scale=0.7, weights=[1, 3])
    grid = torch.linspace(-8, 10, 601, dtype=torch.float64)
    x = torch.cartesian_prod(grid, grid)
    assert torch.exp(-mixture(x)).sum() * (grid[1] - grid[0]) ** 2 == pytest.approx(1, abs=1e-10)
    share = mixture.sample(50_000, torch.Generator().manual_seed(1))[:, 0].mean() / 2
    assert abs(share - 0.75) < 0.02
    with pytest.raises(InputError, match="weights must be 2"):
        GaussianMixture([[0.0, 0.0], [2.0, 1.0]], scale=0.7, weights=[1, -3])
