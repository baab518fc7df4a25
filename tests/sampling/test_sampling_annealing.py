"""Annealed transport against targets with exact normalisation and moments, whatever the field."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.special import iv
from scipy.stats import norm

import openmm_bg as bg
from openmm_bg.energies import Energy
from openmm_bg.errors import InputError
from openmm_bg.flows import Base, ContinuousFlow, PerceptronEnergy, PerceptronVelocity, RealNVP, VelocityField
from openmm_bg.sampling import (
    Interpolation,
    annealed_transport,
    effective_sample_size,
    log_normalizer,
    reweighted_mean,
)
from openmm_bg.sampling.annealing import StepSizes, Walkers, anneal, systematic


class Gaussian(Energy):
    """x^2 / 2 width^2 + shift."""

    def __init__(self, dimension: int, width: float, shift: float = 0.0):
        super().__init__((dimension,))
        self.width, self.shift = width, shift

    def reduced(self, x):
        return 0.5 * x.square().sum(-1) / self.width**2 + self.shift

    @property
    def log_z(self):
        return self.event_shape[0] * (0.5 * math.log(2 * math.pi) + math.log(self.width)) - self.shift


class Walled(Gaussian):
    """The same, with nothing at negative x1."""

    def reduced(self, x):
        return torch.where(x[:, 0] > 0, super().reduced(x), math.inf)


class Exactly(VelocityField):
    """The transport along the straight path between Gaussians: x v' / 2v for a variance v of precision
    (1 - t) / std^2 + t / width^2."""

    def __init__(self, dimension: int, std: float, width: float, factor: float = 1.0):
        super().__init__(dimension)
        self.start, self.end, self.factor = std**-2, width**-2, factor

    def slope(self, t):
        return -0.5 * self.factor * (self.end - self.start) / ((1 - t) * self.start + t * self.end)

    def forward(self, t, x):
        return self.slope(t).reshape(-1, 1) * x

    def with_divergence(self, t, x):
        return self(t, x), (self.dimension * self.slope(t)).expand(len(x))


class Drawn(Base):
    """A base that is the target itself: a path on which nothing changes."""

    def __init__(self, target: Energy, draw, circular=None):
        super().__init__(circular or [False] * target.event_shape[0])
        self.target, self.draw = (target,), draw

    def sample(self, n, generator=None, *, broadened=False):
        return self.draw(n, generator)

    def log_prob(self, z, *, broadened=False):
        return -self.target[0](z)


def wrong_field(dimension: int, seed: int = 0, size: float = 0.15, **options) -> PerceptronVelocity:
    field = PerceptronVelocity(dimension, 8, windows=4, **options)
    rng = torch.Generator().manual_seed(seed)
    for parameter in field.parameters():
        parameter.data += size * torch.randn(parameter.shape, generator=rng)
    return field


def generator_of(target: Energy, field: VelocityField | None = None, std: float = 1.0, **options):
    dimension = target.event_shape[0]
    field = field or PerceptronVelocity(dimension, 4)
    base = options.pop("base", None) or Base([False] * dimension, std=std)
    return bg.BoltzmannGenerator(target, ContinuousFlow(base, field, **options))


def agrees(samples, log_z: float, observable, mean: float, *, at_least: float = 0.05, chunk: int = 0) -> None:
    """log Z and a moment within four standard errors, from weights that say something.

    Walkers resampled in chunks depend on each other, and only the chunks say how far off they are.
    """
    assert effective_sample_size(samples.log_weights).fraction > at_least
    if chunk:
        weights = (samples.log_weights - log_z).exp().view(-1, chunk)
        for values, exact in ((weights, 1.0), (weights * (observable(samples.positions).view(-1, chunk) - mean), 0.0)):
            error = values.mean(1).std() / math.sqrt(len(values))
            assert error < 0.1 and abs(values.mean() - exact) < 4 * error
        return
    estimate = log_normalizer(samples.log_weights)
    assert estimate.error < 0.1 and abs(estimate.value - log_z) < 4 * estimate.error
    moment = reweighted_mean(observable(samples.positions), samples.log_weights)
    assert abs(moment.value - mean) < 4 * moment.error


# --- exactness -------------------------------------------------------------------------------------------------------

WELL = bg.systems.load("double_well", beta=3.0)
PAIR = bg.systems.load("gmm_pair", separation=2.5, weight=0.7)
HOW = {
    "annealed importance sampling": {"transport": False},
    "untrained": {},
    "wrong field": {"field": True},
    "wrong field, no moves": {"field": True, "moves": 0, "at_least": 0.002},
    "wrong field, resampled": {"field": True, "resample_below": 0.7},
    "wrong field, curved path": {"field": True, "psi": True},
    "rate": {"rate": 2.0, "transport": False},
    "hamiltonian moves": {"leapfrog": 4, "transport": False},
    "wrong field, hamiltonian moves, resampled": {"field": True, "leapfrog": 3, "resample_below": 0.7},
    "single steps of a coarse method, many of them": {"field": True, "method": "midpoint", "substeps": 4},
}


@pytest.mark.parametrize("how", HOW, ids=list(HOW))
@pytest.mark.parametrize("target", [WELL, PAIR], ids=["well", "pair"])
def test_log_z_and_moments_are_exact_for_any_field(target, how):
    options = dict(HOW[how])
    dimension = target.event_shape[0]
    field = wrong_field(dimension) if options.pop("field", False) else None
    psi = None
    if options.pop("psi", False):
        psi = PerceptronEnergy(dimension, 6)
        for parameter in psi.parameters():
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
    at_least = options.pop("at_least", 0.05)
    kept = {"method": options.pop("method", "rk4")}
    std = 1.0 if target is WELL else 2.0
    generator = generator_of(target, field, std, perturbation=psi, **kept)
    chunk = 100 if "resample_below" in options else 0
    samples = annealed_transport(generator, 3000, steps=40, seed=3, chunk=chunk or 3000, **options)
    asked = {"at_least": at_least, "chunk": chunk}
    if target is WELL:  # the second dimension is a normal of variance 1 / beta
        agrees(samples, target.log_z, lambda x: x[:, 1].square(), 1 / 3, **asked)
    else:
        agrees(samples, 0.0, lambda x: (x[:, 0] > 0).double(), share_right(), **asked)
        agrees(samples, 0.0, lambda x: x[:, 0], 0.4 * 2.5, **asked)
    assert torch.equal(samples.reduced_energy, target(samples.positions))
    assert torch.isnan(samples.log_prob).all() and samples.positions.dtype == torch.float64


def share_right() -> float:
    """Mass of 0.7 N(2.5, 1) + 0.3 N(-2.5, 1) at x > 0."""
    right = 0.5 * (1 + math.erf(2.5 / math.sqrt(2)))
    return 0.7 * right + 0.3 * (1 - right)


def test_without_transport_a_wrong_field_has_no_say():
    """An untrained field is the identity: the same walkers as without one."""
    settings = {"steps": 5, "seed": 1, "tuning": 20}
    untrained = annealed_transport(generator_of(WELL), 50, **settings)
    none = annealed_transport(generator_of(WELL, wrong_field(2)), 50, transport=False, **settings)
    torch.testing.assert_close(untrained.positions, none.positions, atol=0, rtol=0)
    torch.testing.assert_close(untrained.log_weights, none.log_weights, atol=1e-12, rtol=0)
    moved = annealed_transport(generator_of(WELL, wrong_field(2)), 50, **settings)
    assert (moved.positions - none.positions).abs().max() > 0.01


@pytest.mark.parametrize("moves", [0, 2])
def test_an_exact_field_gives_equal_weights(moves):
    target = Gaussian(3, width=0.5, shift=1.7)
    generator = generator_of(target, Exactly(3, 2.0, 0.5), 2.0)
    samples = annealed_transport(generator, 300, steps=25, moves=moves, substeps=4, seed=0)
    torch.testing.assert_close(samples.log_weights, torch.full((300,), target.log_z).double(), atol=2e-4, rtol=0)
    assert samples.positions.square().mean() == pytest.approx(0.25, rel=0.15)
    half = generator_of(target, Exactly(3, 2.0, 0.5, factor=0.5), 2.0)
    spread = annealed_transport(half, 300, steps=25, moves=moves, substeps=4, seed=0).log_weights.std()
    assert spread > 0.1, "and half of it does not"


def test_without_moves_the_weights_are_those_of_the_flow():
    """The path drops out: log w = -u(x) - log q(x)."""
    field = wrong_field(2, size=0.3)
    generator = generator_of(WELL, field)
    samples = annealed_transport(generator, 50, steps=20, moves=0, substeps=3, seed=0)
    expected = -WELL(samples.positions) - generator.flow.log_prob(samples.positions)
    torch.testing.assert_close(samples.log_weights, expected.detach(), atol=1e-4, rtol=0)
    assert samples.log_weights.std() > 0.1


@pytest.mark.parametrize("below", [0.6, 0.95])
def test_resampling_keeps_the_mean_weight_unbiased(below):
    """Over many small populations, where a bias of resampling would be largest."""
    size, populations = 12, 200
    samples = annealed_transport(
        generator_of(PAIR, std=2.0), size * populations,
        steps=6, transport=False, resample_below=below, chunk=size, seed=5, tuning=100,
    )  # fmt: skip
    means = samples.log_weights.exp().view(populations, size).mean(1)
    error = means.std() / math.sqrt(populations)
    assert error < 0.1 and abs(means.mean() - 1) < 4 * error
    right = (samples.log_weights.exp() * (samples.positions[:, 0] > 0)).view(populations, size).mean(1)
    assert abs(right.mean() - share_right()) < 4 * right.std() / math.sqrt(populations)


def test_regions_without_an_energy_are_left_empty():
    target = Walled(2, width=1.0)
    half = target.log_z - math.log(2)
    for options in ({"transport": False}, {}, {"resample_below": 0.7}):
        field = wrong_field(2) if not options.get("transport", True) else None
        generator = generator_of(target, field, 1.5)
        samples = annealed_transport(generator, 3000, steps=15, moves=2, seed=2, **options)
        alive = torch.isfinite(samples.log_weights)
        assert not torch.isnan(samples.log_weights).any() and (samples.log_weights[~alive] == -math.inf).all()
        assert (samples.positions[alive, 0] > 0).all()
        agrees(samples, half, lambda x: x[:, 0], math.sqrt(2 / math.pi))
        if "resample_below" not in options:
            assert 0.4 < alive.double().mean() < 0.6, "half of the walkers started where there is nothing"


def test_a_target_without_any_energy_gives_no_weight_and_no_error():
    class Nowhere(Energy):
        def reduced(self, x):
            return x[:, 0] * math.nan

    for below in (0.0, 0.5):
        samples = annealed_transport(generator_of(Nowhere((1,))), 20, steps=3, resample_below=below, seed=0)
        assert (samples.log_weights == -math.inf).all() and torch.isfinite(samples.positions).all()


def test_angles():
    """A von Mises density: log Z = log 2 pi I0(kappa), <cos> = I1 / I0."""

    class VonMises(Energy):
        def reduced(self, x):
            return -2 * x[:, 0].cos() + 0.5 * x[:, 1].square()

    target = VonMises((2,))
    circular = [True, False]
    generator = generator_of(target, wrong_field(2, circular=circular), base=Base(circular), perturbation=None)
    samples = annealed_transport(generator, 3000, steps=20, seed=0)
    assert samples.positions[:, 0].abs().max() <= math.pi
    log_z = math.log(2 * math.pi * iv(0, 2.0)) + 0.5 * math.log(2 * math.pi)
    agrees(samples, log_z, lambda x: x[:, 0].cos(), iv(1, 2.0) / iv(0, 2.0))


# --- moves -----------------------------------------------------------------------------------------------------------


def moved(target: Energy, draw, size: float, moves: int, n: int = 4000, circular=None, leapfrog: int = 1) -> Walkers:
    """Exact draws after many moves of one length."""
    dimension = target.event_shape[0]
    field = PerceptronVelocity(dimension, 2, circular=circular)
    flow = ContinuousFlow(Drawn(target, draw, circular), field).double()
    sizes = StepSizes(torch.full((65,), math.log(size), dtype=torch.float64), adapting=False)
    (last,) = anneal(
        Interpolation(flow), target.value_and_gradient, torch.tensor([1.0]), n, torch.Generator().manual_seed(7),
        moves=moves, leapfrog=leapfrog, sizes=sizes, transport=False,
    )  # fmt: skip
    return last


@pytest.mark.parametrize(("leapfrog", "size", "moves"), [(1, 0.15, 60), (5, 0.05, 15)])
def test_moves_leave_their_density_as_it_is_and_uncorrected_ones_do_not(leapfrog, size, moves):
    target = bg.systems.load("double_well", beta=4.0)
    n = 4000
    last = moved(target, target.sample, size, moves, n, leapfrog=leapfrog)
    assert 0.4 < last.acceptance < 0.95
    torch.testing.assert_close(last.log_weights, torch.zeros(n).double(), atol=1e-12, rtol=0)
    start = target.sample(n, torch.Generator().manual_seed(7))
    assert (last.x - start).abs().mean() > 0.3, "they went somewhere"
    reference = target.sample(400_000, torch.Generator().manual_seed(1))
    # Langevin moves all taken
    x, rng = start, torch.Generator().manual_seed(0)
    for _ in range(60):
        x = x - 0.15 * target.value_and_gradient(x)[1]
        x = x + math.sqrt(2 * 0.15) * torch.randn(x.shape, generator=rng, dtype=x.dtype)
    worst = 0.0
    for observable in (
        lambda x: x[:, 0].square(), lambda x: x[:, 0] ** 4, lambda x: x[:, 1].square(), lambda x: x[:, 1] ** 4,
        lambda x: (x[:, 0] > 0).double(), lambda x: target(x),
    ):  # fmt: skip
        exact, error = observable(reference).mean(), observable(reference).std() / math.sqrt(n)
        assert abs(observable(last.x).mean() - exact) < 4 * error
        worst = max(worst, float(abs(observable(x).mean() - exact) / error))
    assert worst > 10
    torch.testing.assert_close(last.energy, target(last.x))
    torch.testing.assert_close(last.gradient, target.value_and_gradient(last.x)[1])


def von_mises(kappa: float):
    class Circle(Energy):
        def reduced(self, x):
            return -kappa * x[:, 0].cos()

    def draw(n, generator):
        return torch.from_numpy(np.random.default_rng(0).vonmises(0, kappa, size=(n, 1)))

    return Circle((1,)), draw, iv(1, kappa) / iv(0, kappa)


@pytest.mark.parametrize(("size", "leapfrog"), [(0.05, 1), (1.0, 1), (0.5, 4)])
def test_moves_around_a_circle_leave_their_density_as_it_is(size, leapfrog):
    target, draw, exact = von_mises(1.0)
    last = moved(target, draw, size, 40, 8000, [True], leapfrog)
    cosine = last.x[:, 0].cos()
    assert last.x.abs().max() <= math.pi and last.acceptance > 0.4
    assert abs(cosine.mean() - exact) < 4 * cosine.std() / math.sqrt(8000)


def test_moves_of_many_steps_go_farther_for_their_energies():
    """A stiff direction holds the length of moves down; the memory of the soft one after as many energies."""

    class Ravine(Energy):
        def reduced(self, x):
            return 0.5 * (x[:, 0].square() + 400 * x[:, 1].square())

    def draw(n, generator):
        return torch.randn(n, 2, generator=generator, dtype=torch.float64) * torch.tensor([1.0, 0.05])

    start = draw(4000, torch.Generator().manual_seed(7))
    left = []
    for leapfrog, moves in ((1, 48), (16, 3)):
        last = moved(Ravine((2,)), draw, 0.0012, moves, leapfrog=leapfrog)
        assert last.acceptance > 0.5
        left.append(float(torch.corrcoef(torch.stack([start[:, 0], last.x[:, 0]]))[0, 1]))
    assert left[1] < 0.8 * left[0], left


@pytest.mark.parametrize("leapfrog", [1, 3])
def test_a_wall_is_never_entered(leapfrog):
    target = Walled(2, width=1.0)

    def draw(n, generator):
        x = torch.randn(n, 2, generator=generator, dtype=torch.float64)
        return torch.stack([x[:, 0].abs(), x[:, 1]], 1)

    last = moved(target, draw, 0.3 / leapfrog, 40, leapfrog=leapfrog)
    assert (last.x[:, 0] > 0).all() and torch.isfinite(last.energy).all()
    assert 0.3 < last.acceptance < 0.9
    error = math.sqrt((1 - 2 / math.pi) / 4000)
    assert abs(last.x[:, 0].mean() - math.sqrt(2 / math.pi)) < 4 * error
    assert abs(last.x.square().mean() - 1) < 4 * math.sqrt(2 / 8000)


def test_walkers_come_at_every_time_with_weights_of_that_time():
    """The mean weight is Z_t at each, a Gaussian integral."""
    target, std = Gaussian(2, 0.6), 1.5
    flow = generator_of(target, std=std).flow
    times = torch.tensor([0.1, 0.3, 0.35, 0.8, 1.0])
    seen = []
    sweep = anneal(
        Interpolation(flow), target.value_and_gradient, times, 4000, torch.Generator().manual_seed(0), sizes=StepSizes()
    )
    for walkers in sweep:
        precision = (1 - walkers.t) / std**2 + walkers.t / 0.6**2
        normal = 2 * (0.5 * math.log(2 * math.pi) + math.log(std))
        exact = math.log(2 * math.pi / precision) - (1 - walkers.t) * normal
        estimate = log_normalizer(walkers.log_weights)
        assert abs(estimate.value + walkers.log_z - exact) < 4 * estimate.error
        spread = reweighted_mean(walkers.x.square().sum(-1), walkers.log_weights)
        assert abs(spread.value - 2 / precision) < 4 * spread.error
        torch.testing.assert_close(walkers.energy, target(walkers.x))
        seen.append(walkers.t)
    torch.testing.assert_close(torch.tensor(seen), times)


@pytest.mark.parametrize("transport", [False, True])
@pytest.mark.parametrize("moves", [0, 1])
def test_energies_stay_with_their_walkers_through_resampling(transport, moves):
    path, times = Interpolation(generator_of(PAIR, wrong_field(1), 2.0).flow), torch.linspace(0, 1, 9)[1:]
    sweep = anneal(
        path, PAIR.value_and_gradient, times, 200, torch.Generator().manual_seed(0),
        moves=moves, sizes=StepSizes(torch.zeros(65)), transport=transport, resample_below=0.999,
    )  # fmt: skip
    for walkers in sweep:
        energy, gradient = PAIR.value_and_gradient(walkers.x)
        torch.testing.assert_close(walkers.energy, energy)
        torch.testing.assert_close(walkers.gradient, gradient)
        assert not walkers.log_weights.any(), "resampled at every time"
        assert (len(walkers.x.unique()) < 200 and math.isnan(walkers.acceptance)) == (moves == 0)


# --- lengths of moves ------------------------------------------------------------------------------------------------


def test_lengths_adapt_to_an_acceptance_of_sixty_percent():
    target = Gaussian(8, width=0.2)
    flow = generator_of(target, std=1.0).flow
    path, times, rng = Interpolation(flow), torch.linspace(0, 1, 33)[1:], torch.Generator().manual_seed(0)
    sizes = StepSizes()
    settings = {"moves": 3, "sizes": sizes, "transport": False}
    for _ in range(6):
        for _ in anneal(path, target.value_and_gradient, times, 200, rng, **settings):
            pass
    sizes.adapting = False
    before = sizes.log_size.clone()
    rates = [w.acceptance for w in anneal(path, target.value_and_gradient, times, 1000, rng, **settings)]
    assert torch.equal(sizes.log_size, before)
    assert np.mean(rates) == pytest.approx(0.6, abs=0.05) and min(rates) > 0.4 and max(rates) < 0.8
    # wide at the base, narrow at the target
    assert sizes(0.05) > 3 * sizes(1.0)


@pytest.mark.parametrize(("width", "leapfrog"), [(3e-3, 1), (3e-3, 5), (30.0, 1)])
def test_lengths_far_off_are_found_within_two_sweeps(width, leapfrog):
    """The walkers start as the target has them, all along; the first length is a hundredth whatever the target."""
    target = Gaussian(20, width)

    def draw(n, generator):
        return width * torch.randn(n, 20, generator=generator, dtype=torch.float64)

    flow = ContinuousFlow(Drawn(target, draw), PerceptronVelocity(20, 2)).double()
    sizes, rng = StepSizes(), torch.Generator().manual_seed(0)
    many, few = torch.linspace(0, 1, 49)[1:], torch.tensor([0.2, 0.5, 0.8, 1.0])
    for times, n, adapting in ((many, 200, True), (many, 200, True), (few, 2000, False)):
        sizes.adapting = adapting
        sweep = anneal(
            Interpolation(flow), target.value_and_gradient, times, n, rng,
            moves=2, leapfrog=leapfrog, sizes=sizes, transport=False,
        )  # fmt: skip
        rates = [walkers.acceptance for walkers in sweep]
    assert min(rates) > 0.4 and max(rates) < 0.8, rates


def test_lengths_follow_the_law_of_their_acceptance():
    sizes = StepSizes()
    sizes.learn(0.5, 0.9)
    c = -2 * norm.ppf(0.45) / 1e-3
    assert 2 * norm.cdf(-0.5 * c * sizes(0.5) ** 1.5) == pytest.approx(0.6)
    for seen, step in ((0.0, -1.0), (1.0, 1.0)):
        before = float(sizes.log_size[40])
        sizes.learn(40 / 64, seen)
        assert sizes.log_size[40] - before == pytest.approx(step), "no more than a factor e at once"
    for _ in range(100):
        sizes.learn(0.5, 1.0)
    assert sizes(0.5) == pytest.approx(1e4), "nowhere for ever"


def test_lengths_of_neighbours_follow_and_times_outside_are_the_ends():
    sizes = StepSizes()
    start = sizes.log_size.clone()
    sizes.learn(0.5, 1.0)
    change = sizes.log_size - start
    assert change[32] == pytest.approx(1.0) and change[33] == pytest.approx(0.9) and change[31] == pytest.approx(0.5)
    assert not change[:31].any() and change[64] == pytest.approx(0.9**32), "later times are next"
    sizes.learn(0.5, 0.6)
    assert sizes.log_size[32] - start[32] == pytest.approx(1.0)
    sizes.learn(0.0, 0.1)
    assert sizes(0.0) < 1e-2 < sizes(0.5) and sizes(-0.1) == sizes(0.0) and sizes(1.1) == sizes(1.0)
    frozen = StepSizes(adapting=False)
    frozen.learn(0.5, 1.0)
    assert torch.equal(frozen.log_size, start)


# --- resampling ------------------------------------------------------------------------------------------------------


def test_systematic_resampling_gives_every_walker_its_share_to_within_one():
    rng = torch.Generator().manual_seed(0)
    for n in (1, 7, 100):
        log_weights = 2 * torch.randn(n, generator=rng, dtype=torch.float64) + 500
        expected = n * torch.softmax(log_weights, 0)
        for _ in range(20):
            chosen = systematic(log_weights, rng)
            counts = torch.bincount(chosen, minlength=n)
            assert len(chosen) == n and (chosen.diff() >= 0).all()
            assert ((counts - expected).abs() < 1).all()
    assert torch.equal(systematic(torch.zeros(9), rng), torch.arange(9))


def test_systematic_resampling_is_unbiased_and_skips_zero_weights():
    rng = torch.Generator().manual_seed(1)
    log_weights = torch.tensor([-math.inf, math.log(0.15), math.log(0.6), math.log(0.25), -math.inf])
    counts = torch.stack([torch.bincount(systematic(log_weights, rng), minlength=5) for _ in range(2000)]).double()
    assert not counts[:, [0, 4]].any()
    torch.testing.assert_close(counts.mean(0) / 5, log_weights.exp().double(), atol=0.01, rtol=0)


# --- the rest --------------------------------------------------------------------------------------------------------


def test_seeds_reproduce():
    generator = generator_of(PAIR, wrong_field(1), 2.0)
    settings = {"steps": 6, "resample_below": 0.8, "chunk": 40, "tuning": 20}
    first, again, other = (annealed_transport(generator, 100, seed=seed, **settings) for seed in (4, 4, 5))
    assert torch.equal(first.positions, again.positions) and torch.equal(first.log_weights, again.log_weights)
    assert not torch.equal(first.positions, other.positions)
    assert first.positions.shape == (100, 1) and first.log_weights.shape == (100,)
    assert len(first.positions.unique()) > 50


def test_the_global_random_state_is_left_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    annealed_transport(generator_of(PAIR), 10, steps=2, tuning=5, resample_below=0.9)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_callers_gradients_are_left_alone():
    path, sizes = Interpolation(generator_of(PAIR).flow), StepSizes()
    sweep = anneal(
        path, PAIR.value_and_gradient, torch.tensor([0.5, 1.0]), 4, torch.Generator().manual_seed(0), sizes=sizes
    )
    try:
        next(sweep)
        assert torch.is_grad_enabled()
    finally:
        sweep.close()


def test_wrong_generators_are_refused():
    flow = ContinuousFlow(Base([False] * 2), PerceptronVelocity(2, 4))
    for generator in (
        bg.BoltzmannGenerator(None, flow),
        bg.BoltzmannGenerator(WELL, RealNVP(2, layers=2, hidden=(4,))),
    ):
        with pytest.raises(InputError, match="needs a generator with an energy and a ContinuousFlow"):
            annealed_transport(generator, 10)


@pytest.mark.parametrize("wrong", [{"leapfrog": 0}, {"moves": -1}, {"steps": 2.5}, {"chunk": 0}, {"tuning": 1}])
def test_numbers_out_of_range_are_refused(wrong):
    (name,) = wrong
    with pytest.raises(InputError, match=f"{name} must be a whole number of at least"):
        annealed_transport(generator_of(WELL), 10, **wrong)


def test_an_estimated_divergence_is_refused():
    generator = generator_of(WELL, wrong_field(2), divergence="hutchinson")
    with pytest.raises(InputError, match="divergence"):
        annealed_transport(generator, 10, steps=2)
