"""Many wells against quadrature and published values, and their samples against both."""

import math

import pytest
import torch
from openmm_bg.systems import ManyWell, ManyWellDelta
from scipy.integrate import quad

from openmm_bg import systems
from openmm_bg.errors import InputError


def lopsided(x):
    return x**4 - 6 * x**2 - 0.5 * x


def moment(function, density, reach=5.0):
    return quad(lambda x: function(x) * density(x), -reach, reach, epsabs=0, epsrel=1e-11, limit=500, points=[0])[0]


def within(values, exact, errors=5):
    return bool((values.mean(0) - exact).abs().max() < errors * values.std(0).max() / math.sqrt(len(values)))


def test_many_well_matches_the_published_values():
    target = systems.load("many_well_8")
    assert target.log_z == pytest.approx(4 * (math.log(11784.50927) + 0.5 * math.log(2 * math.pi)), abs=1e-7)
    assert target.log_z == pytest.approx(41.174, abs=5e-4)
    assert target.entropy == pytest.approx(6.8743, abs=5e-5)
    assert target.mode_weights.tolist() == pytest.approx([0.84431] * 4, abs=5e-6)
    assert systems.load("many_well_32").log_z == pytest.approx(164.696, abs=5e-4)


@pytest.mark.parametrize(
    ("delta", "log_z", "entropy"), [(2, 0.293002, 0.872318), (3, 0.047120, 0.575942), (4, -0.108211, 0.405370)]
)
def test_many_well_delta_matches_the_published_values(delta, log_z, entropy):
    target = ManyWellDelta(5, wells=5, delta=delta)
    assert target.log_z == pytest.approx(5 * log_z, abs=5e-6)
    assert target.entropy == pytest.approx(5 * entropy, abs=5e-6)
    mixed = ManyWellDelta(7, wells=5, delta=delta)
    assert mixed.log_z - target.log_z == pytest.approx(math.log(2 * math.pi))
    assert mixed.entropy - target.entropy == pytest.approx(math.log(2 * math.pi * math.e))


def test_many_well_8_delta2():
    target = systems.load("many_well_8_delta2")
    assert target.event_shape == (8,) and target.entropy == pytest.approx(6.9785, abs=5e-5)


@pytest.mark.parametrize("delta", [0.01, 2.0, 7.6, 40.0, 1e4])
def test_many_well_delta_normalisation_for_any_delta(delta):
    law = ManyWellDelta(1, 1, delta)
    root = math.sqrt(delta)
    # in r = |x| - sqrt(delta) the well keeps its place however large delta is
    low, high = math.sqrt(max(0, delta - 7)) - root, math.sqrt(delta + 7) - root
    z = 2 * quad(lambda r: math.exp(-((r * (r + 2 * root)) ** 2)), low, high, points=[0], epsabs=0, epsrel=1e-12)[0]
    assert law.log_z == pytest.approx(math.log(z), abs=1e-9)


def test_many_well_samples_have_the_exact_moments():
    target = ManyWell(8)
    n = 200_000
    x = target.sample(n, torch.Generator().manual_seed(1))
    assert x.shape == (n, 8) and x.dtype == torch.float64
    z = moment(lambda x: 1.0, lambda x: math.exp(-lopsided(x)))
    for power in (1, 2, 3, 4):
        assert within(x[:, 0::2] ** power, moment(lambda x, k=power: x**k, lambda x: math.exp(-lopsided(x))) / z)
    assert within(x[:, 1::2], 0) and within(x[:, 1::2] ** 2, 1) and within(x[:, 1::2] ** 4, 3)
    assert within(target(x)[:, None], target.entropy - target.log_z)
    modes = target.modes(x)
    assert modes.shape == (n, 4) and modes.dtype == torch.bool
    assert within(modes.double(), target.mode_weights)
    # wells know nothing of each other
    assert abs(torch.corrcoef(modes.double().T) - torch.eye(4)).max() < 5 / math.sqrt(n)
    # and the two published moments
    assert moment(lambda x: x, lambda x: math.exp(-lopsided(x))) / z == pytest.approx(1.18796, abs=5e-6)


def test_many_well_delta_samples_have_the_exact_moments():
    target = ManyWellDelta(6, wells=4, delta=2.0)
    n = 200_000
    x = target.sample(n, torch.Generator().manual_seed(2))

    def density(x):
        return math.exp(-((x * x - 2) ** 2))

    z = moment(lambda x: 1.0, density)
    for power in (1, 2, 4):
        assert within(x[:, :4] ** power, moment(lambda x, k=power: x**k, density) / z)
    assert within(x[:, 4:] ** 2, 1)
    assert within(target(x)[:, None], target.entropy - target.log_z)
    assert target.modes(x).shape == (n, 4) and within(target.modes(x).double(), target.mode_weights)


def test_the_distribution_of_one_well_is_exact_everywhere():
    # Kolmogorov and Smirnov: sqrt(n) times the largest difference exceeds 2.2 once in 8000 cases
    n = 300_000
    x = ManyWell(2).sample(n, torch.Generator().manual_seed(3))[:, 0].sort().values
    z = moment(lambda x: 1.0, lambda x: math.exp(-lopsided(x)))
    for place in (-2.0, -1.7, -1.0, 0.0, 1.0, 1.6, 1.75, 1.9, 2.2):
        exact = (
            quad(lambda x: math.exp(-lopsided(x)), -5, place, epsrel=1e-10, limit=200, points=[-1.7, min(place, 1.7)])[
                0
            ]
            / z
        )
        assert abs(torch.searchsorted(x, torch.tensor(place).double()) / n - exact) < 2.2 / math.sqrt(n)


@pytest.mark.parametrize("name", ["many_well_8", "many_well_32", "many_well_8_delta2"])
def test_energy_by_hand_and_gradient_by_differences(name):
    target = systems.load(name)
    x = torch.randn(3, *target.event_shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    if name == "many_well_8_delta2":
        exact = ((x**2 - 2) ** 2).sum(1)
    else:
        exact = (lopsided(x[:, ::2]) + 0.5 * x[:, 1::2] ** 2).sum(1)
    u, gradient = target.value_and_gradient(x)
    assert torch.allclose(u, exact, rtol=1e-12)
    for i in range(target.event_shape[0]):
        step = torch.zeros(target.event_shape[0]).double()
        step[i] = 1e-5
        assert torch.allclose((target(x + step) - target(x - step)) / 2e-5, gradient[:, i], atol=1e-6)
    single = target(x.float())
    assert single.dtype == torch.float32 and torch.allclose(single.double(), u, rtol=1e-5)
    same = target.sample(4, torch.Generator().manual_seed(8))
    assert torch.equal(same, target.sample(4, torch.Generator().manual_seed(8)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ManyWell(7), "dimension must be even"),
        (lambda: ManyWell(0), "dimension must be a whole number of at least 2"),
        (lambda: ManyWell(4.0), "dimension must be a whole number"),
        (lambda: ManyWellDelta(3, wells=4, delta=1), "wells must be at most the dimension, 3"),
        (lambda: ManyWellDelta(3, wells=0, delta=1), "wells must be a whole number"),
        (lambda: ManyWellDelta(3, wells=1, delta=-1), "delta must be a positive"),
        (lambda: ManyWell(4).modes(torch.zeros(2, 3)), "takes the shape"),
    ],
)
def test_bad_parameters_are_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()
