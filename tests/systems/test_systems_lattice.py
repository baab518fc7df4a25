"""The lattice double well against tabulated values, brute-force quadrature and its own samples."""

import math

import numpy as np
import pytest
import torch
from openmm_bg.systems import LatticeDoubleWell

from openmm_bg import systems
from openmm_bg.errors import InputError

# sites, m, log Z, mean square, probability of one sign: computed independently, with 600 and 900 grid points
TABLE = [
    (4, 1.5, 3.65815, 1.06522, 0.7388),
    (4, 3.0, 8.64912, 2.77654, 0.9988),
    (4, 4.5, 19.02497, 4.36370, 1.0),
    (4, 6.0, 34.18019, 5.90013, 1.0),
    (8, 1.5, 3.66639, 1.02585, 0.6403),
    (8, 3.0, 7.23250, 2.74640, 0.9981),
    (8, 4.5, 16.78760, 4.34391, None),
    (8, 6.0, 31.36414, 5.88533, None),
    (16, 1.5, 1.05092, 1.01284, 0.5707),
    (16, 3.0, 1.83444, 2.73651, 0.9974),
    (16, 4.5, 9.76523, 4.33738, None),
    (16, 6.0, 23.19023, 5.88043, None),
    (32, 1.5, -9.67801, 1.00923, None),
    (32, 3.0, -14.44209, 2.73381, None),
    (32, 4.5, -9.75560, 4.33560, None),
    (32, 6.0, 1.36776, 5.87910, None),
    (64, 1.5, -42.21313, 1.00829, None),
    (64, 3.0, -58.06816, 2.73312, None),
    (64, 4.5, -59.86925, 4.33515, None),
    (64, 6.0, -53.34885, 5.87875, None),
]


@pytest.mark.parametrize(("sites", "m", "log_z", "mean_square", "same_sign"), TABLE)
def test_tabulated_values(sites, m, log_z, mean_square, same_sign):
    lattice = LatticeDoubleWell(sites, m)
    assert lattice.log_z == pytest.approx(log_z, abs=1e-4)
    assert lattice.mean_square == pytest.approx(mean_square, abs=1e-4)
    if same_sign is not None:
        assert lattice.same_sign_probability == pytest.approx(same_sign, abs=1e-4)


def brute_force(lattice, reach, points):
    """Sum of exp(-S), written out from the definition, over a grid of all three sites."""
    grid = torch.linspace(-reach, reach, points, dtype=torch.float64)
    x = torch.cartesian_prod(grid, grid, grid)
    a, m, coupling = lattice.total_time / 3, lattice.m, lattice.coupling
    action = torch.zeros(len(x)).double()
    for i in range(3):
        velocity = (x[:, i] - x[:, i - 1]) / a
        action += a * (m / 2 * velocity**2 + coupling / 4 * x[:, i] ** 4 - m / 2 * x[:, i] ** 2)
    return x, action, (grid[1] - grid[0]) ** 3


@pytest.mark.parametrize(
    ("m", "total_time", "coupling", "reach"), [(1.5, 2.0, 1.0, 4.0), (0.4, 5.0, 0.3, 6.0), (3.0, 6.0, 2.0, 3.4)]
)
def test_three_sites_by_brute_force(m, total_time, coupling, reach):
    lattice = LatticeDoubleWell(3, m, total_time, coupling)
    x, action, cell = brute_force(lattice, reach, 121)
    assert torch.allclose(lattice(x[::1000]), action[::1000], rtol=1e-12, atol=1e-12)
    weight = torch.exp(-action) * cell
    assert lattice.log_z == pytest.approx(weight.sum().log().item(), abs=1e-8)
    assert lattice.mean_square == pytest.approx(((weight @ x[:, 0] ** 2) / weight.sum()).item(), abs=1e-8)


def test_nothing_overflows():
    lattice = LatticeDoubleWell(64, 40.0)
    # harmonic about the two wells: T m^2 / 4 minus the determinant of the quadratic form, and ln 2
    a = lattice.spacing
    stiffness = [4 * 40 / a * math.sin(math.pi * k / 64) ** 2 + 2 * 40 * a for k in range(64)]
    harmonic = 4 * 40**2 / 4 + math.log(2) + 0.5 * sum(math.log(2 * math.pi / s) for s in stiffness)
    assert lattice.log_z == pytest.approx(harmonic, abs=0.05)
    assert lattice.same_sign_probability == pytest.approx(1, abs=1e-12)


def neighbours(lattice):
    """Exact average of (x_i - x_{i-1})^2, from a transfer matrix on another grid."""
    a, m, c = lattice.spacing, lattice.m, lattice.coupling
    x = np.linspace(-6, 6, 500)
    v = c * x**4 / 4 - m * x**2 / 2 + m**2 / (4 * c)
    square = (x[:, None] - x) ** 2
    kernel = np.exp(-a * (v[:, None] + v) / 2 - m * square / (2 * a))
    rest = np.linalg.matrix_power(kernel / kernel.sum(1).max(), lattice.sites - 1)
    return (kernel * square * rest.T).sum() / (kernel * rest.T).sum()


@pytest.mark.parametrize(
    ("sites", "m", "total_time", "n"),
    [
        (16, 1.5, 4.0, 40_000),
        (16, 6.0, 4.0, 20_000),
        (7, 1.5, 4.0, 40_000),
        (2, 1.0, 4.0, 60_000),
        (4, 3.0, 9.0, 40_000),
    ],
)
def test_samples_have_the_exact_averages(sites, m, total_time, n):
    lattice = LatticeDoubleWell(sites, m, total_time)
    x = lattice.sample(n, torch.Generator().manual_seed(11))
    assert x.shape == (n, sites) and x.dtype == torch.float64

    def check(values, exact):
        assert abs(values.mean() - exact) < 5 * values.std() / math.sqrt(n)

    for site in {0, 1, sites - 1}:
        check(x[:, site] ** 2, lattice.mean_square)
        check((x[:, site] > 0).double(), 0.5)
        check((x[:, site] - x[:, site - 1]) ** 2, neighbours(lattice))
    if lattice.same_sign_probability < 0.999:
        check(((x > 0).all(1) | (x < 0).all(1)).double(), lattice.same_sign_probability)
    # Schwinger and Dyson: integrating by parts gives the average of x . grad S and of (dS / dx)^2
    _, gradient = lattice.value_and_gradient(x)
    check((x * gradient).sum(1), sites)
    a = lattice.spacing
    check((gradient**2 - (2 * m / a + a * (3 * x**2 - m))).mean(1), 0)


def test_samples_are_continuous_and_independent_of_the_grid():
    lattice = LatticeDoubleWell(5, 1.5)
    x = lattice.sample(20_000, torch.Generator().manual_seed(12))
    assert len(x.flatten().unique()) == x.numel()
    cell = 2 * lattice._edge / (lattice._points - 1)
    phase = 2 * math.pi * x / cell
    assert torch.cos(phase).mean(0).abs().max() < 5 / math.sqrt(2 * len(x))
    assert torch.sin(phase).mean(0).abs().max() < 5 / math.sqrt(2 * len(x))
    assert torch.equal(x[:1], lattice.sample(20_000, torch.Generator().manual_seed(12))[:1])


@pytest.mark.parametrize("spacing", [0.25, 1.0, 3.0])
def test_one_site_between_its_neighbours(spacing):
    lattice = LatticeDoubleWell(4, 2.0, 4 * spacing)
    grid = torch.linspace(-6, 6, 4001, dtype=torch.float64)
    for middle in (0.0, 0.4, -2.5):
        u = lattice.m / spacing * (grid - middle) ** 2 + spacing * (grid**4 / 4 - lattice.m / 2 * grid**2)
        p = torch.softmax(-u, 0)
        n = 40_000
        x = lattice._between(torch.full((n,), middle, dtype=torch.float64), torch.Generator().manual_seed(13))
        for power in (1, 2, 4):
            values = x**power
            assert abs(values.mean() - p @ grid**power) < 5 * values.std() / math.sqrt(n)


def test_gradient_symmetry_and_precision():
    lattice = systems.load("lattice_double_well", sites=6, m=3.0)
    assert systems.load("lattice_double_well").event_shape == (16,)
    x = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    u, gradient = lattice.value_and_gradient(x)
    for i in range(6):
        step = torch.zeros(6).double()
        step[i] = 1e-5
        assert torch.allclose((lattice(x + step) - lattice(x - step)) / 2e-5, gradient[:, i], atol=1e-6)
    for same in (-x, x.roll(1, dims=1), x.flip(1)):
        assert torch.allclose(lattice(same), u, rtol=1e-12)
    assert torch.allclose(lattice(x.float()).double(), u, rtol=1e-5) and lattice(x.float()).dtype == torch.float32


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sites": 1}, "sites must be a whole number of at least 2"),
        ({"sites": 2.5}, "sites must be"),
        ({"m": 0}, "m must be a positive"),
        ({"m": math.nan}, "m must be a positive"),
        ({"total_time": -4}, "total_time must be"),
        ({"coupling": 0}, "coupling must be"),
        ({"sites": 20_000}, "take fewer sites"),
    ],
)
def test_bad_parameters_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        LatticeDoubleWell(**settings)
