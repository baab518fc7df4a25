"""Exchange through a map: the rule against quadrature with each of its terms left out, and the map against itself."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import openmm_bg as bg
from openmm_bg.coordinates import InternalCoordinates, ZMatrix
from openmm_bg.flows import AffineCoupling, AffineTorsions, Base, Composition, ContinuousFlow, Flow, RealNVP, SplineFlow
from openmm_bg.flows.velocity import PerceptronVelocity
from openmm_bg.sampling import GeneratorMap, log_acceptance, log_exchange_acceptance
from openmm_bg.sampling.learned_exchange import ExchangeAttempt, ExchangeStatistics


def perturbed(flow, scale, seed):
    """A flow with random weights: invertible, and right about nothing."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=random, dtype=parameter.dtype)
    return flow


def generator_of(flow):
    return bg.BoltzmannGenerator(None, flow)


def real_nvp(seed, scale=0.12):
    return generator_of(perturbed(RealNVP(2, layers=4, hidden=(8,), seed=seed).double(), scale, seed))


# -- the rule, on a tilted double well that is hot in one replica and cold in the other


def energy(x, beta):
    return beta * (5 * (x[:, 0] ** 2 - 1) ** 2 + x[:, 0] + 1.5 * (x[:, 1] - 0.5 * x[:, 0]) ** 2)


HOT, COLD = 0.4, 1.0
GRID = np.linspace(-3, 3, 6001)


def marginal(beta):
    """Density of the first coordinate on the grid, up to a constant: the second one is normal given it."""
    return np.exp(-beta * (5 * (GRID**2 - 1) ** 2 + GRID))


def exact_draws(beta, n, rng):
    cumulative = np.cumsum(marginal(beta))
    x = np.interp(rng.uniform(size=n), cumulative / cumulative[-1], GRID)
    return np.stack([x, 0.5 * x + rng.normal(size=n) / math.sqrt(3 * beta)], 1)


def moments(x):
    return np.stack([x[:, 0], x[:, 0] ** 2, x[:, 1] ** 2, x[:, 0] * x[:, 1]], 1)


def exact_moments(beta):
    weight = marginal(beta) / marginal(beta).sum()
    mean, square = weight @ GRID, weight @ GRID**2
    return np.array([mean, square, square / 4 + 1 / (3 * beta), square / 2])


def deviations(drop=(), walkers=4000, steps=30, burn=10, seed=0):
    """Standard errors between the moments of both replicas and the exact ones; acceptance.

    The hot replica is drawn from its exact distribution before every exchange; the cold one does nothing of its own.
    """
    pair = GeneratorMap(real_nvp(1), real_nvp(2))
    rng = np.random.default_rng(seed)
    cold = exact_draws(COLD, walkers, rng)
    totals, accepted = np.zeros((2, walkers, 4)), 0.0
    for step in range(steps):
        hot = exact_draws(HOT, walkers, rng)
        new_cold, log_det = (part.numpy() for part in pair.forward(torch.from_numpy(hot)))
        new_hot, log_det_inverse = (part.numpy() for part in pair.inverse(torch.from_numpy(cold)))
        terms = {
            "u_h": energy(hot, HOT), "u_t": energy(cold, COLD), "u_h'": energy(new_hot, HOT),
            "u_t'": energy(new_cold, COLD), "det": log_det, "det'": log_det_inverse,
        }  # fmt: skip
        ratio = log_exchange_acceptance(*(np.zeros(walkers) if name in drop else v for name, v in terms.items()))
        yes = -rng.standard_exponential(walkers) <= ratio
        cold[yes], hot[yes] = new_cold[yes], new_hot[yes]
        accepted += yes.mean() / steps
        if step >= burn:
            totals += np.stack([moments(hot), moments(cold)]) / (steps - burn)
    errors = totals.std(1, ddof=1) / math.sqrt(walkers)
    return (totals.mean(1) - np.stack([exact_moments(HOT), exact_moments(COLD)])) / errors, accepted


def test_both_replicas_have_exact_moments():
    found, accepted = deviations()
    assert np.abs(found).max() < 3.5
    assert 0.2 < accepted < 0.7, "an imperfect map, which still exchanges"


@pytest.mark.parametrize(
    "drop", [["u_h"], ["u_t"], ["u_h'"], ["u_t'"], ["det"], ["det'"], ["det", "det'"]], ids="+".join
)
def test_moments_are_wrong_without(drop):
    found, _ = deviations(drop)
    assert np.abs(found).max() > 10


def test_an_exchange_that_cannot_be_weighed_is_rejected_and_a_broken_replica_is_an_error():
    nan, inf = math.nan, math.inf
    new_energies, determinants = [nan, 0.0, inf, 0.0, 0.0], [0.0, 0.0, 0.0, -inf, nan]
    assert (log_exchange_acceptance(1.0, 1.0, new_energies, 0.0, determinants)[[0, 2, 3, 4]] == -inf).all()
    assert (log_exchange_acceptance(1.0, 1.0, 0.0, new_energies, 0.0, determinants)[[0, 2, 3, 4]] == -inf).all()
    assert log_exchange_acceptance(inf, 1.0, 0.0, 0.0) == inf, "a clash may go"
    for broken in (nan, -inf):
        with pytest.raises(ValueError, match="already failed"):
            log_exchange_acceptance(broken, 0.0, 0.0, 0.0)
        with pytest.raises(ValueError, match="already failed"):
            log_exchange_acceptance(0.0, broken, 0.0, 0.0)


def test_without_a_map_it_is_the_rule_of_replica_exchange():
    rng = np.random.default_rng(1)
    u, v, beta, beta_hot = rng.normal(size=100), rng.normal(size=100), 1.0, 0.4
    usual = (beta - beta_hot) * (u - v)
    np.testing.assert_allclose(
        log_exchange_acceptance(beta_hot * v, beta * u, beta_hot * u, beta * v), usual, rtol=0, atol=1e-12
    )


def test_the_map_of_one_generator_changes_nothing():
    pair = GeneratorMap(real_nvp(3), real_nvp(3))
    x = torch.randn(50, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for made, log_det in (pair.forward(x), pair.inverse(x)):
        torch.testing.assert_close(made, x, rtol=0, atol=1e-12)
        torch.testing.assert_close(log_det, torch.zeros_like(log_det), rtol=0, atol=1e-11)


# -- the map


@pytest.mark.parametrize(
    "flows",
    [
        pytest.param([RealNVP(3, layers=3, hidden=(8,), seed=s) for s in (1, 2)], id="RealNVP"),
        pytest.param([SplineFlow([True, False, True], layers=3, hidden=(8,), seed=s) for s in (1, 2)], id="splines"),
    ],
)
def test_a_map_is_inverted_and_its_determinant_is_that_of_autograd(flows):
    pair = GeneratorMap(*(generator_of(perturbed(flow.double(), 0.2, 3)) for flow in flows))
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    y, log_det = pair.forward(x)
    back, log_det_inverse = pair.inverse(y)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-9)
    torch.testing.assert_close(log_det, -log_det_inverse, rtol=0, atol=1e-9)
    assert not torch.allclose(y, x, atol=0.01)

    def plain(point):
        hot, cold = (space.generator.flow.transform for space in (pair.fast, pair.target))
        return cold(hot.inverse(point[None])[0])[0][0]

    for k in range(5):
        jacobian = torch.autograd.functional.jacobian(plain, x[k])
        assert float(torch.linalg.slogdet(jacobian)[1]) == pytest.approx(float(log_det[k]), abs=1e-9)


def test_exchange_with_noise_is_the_independence_move():
    target = real_nvp(5)
    target.defensive = 0
    pair = GeneratorMap(None, target)
    noise = pair.fast.sample(64, torch.Generator().manual_seed(6))
    current = torch.randn(64, 2, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    proposed, log_det = pair.forward(noise)
    latents, log_det_inverse = pair.inverse(current)
    u, u_new = (energy(x.numpy(), COLD) for x in (current, proposed))
    ratio = log_exchange_acceptance(
        -pair.fast.log_prob(noise), u, -pair.fast.log_prob(latents), u_new, log_det, log_det_inverse
    )
    usual = log_acceptance(u, u_new, target.log_prob(current), target.log_prob(proposed))
    np.testing.assert_allclose(ratio, usual, rtol=0, atol=1e-10)
    # and the proposals are those of the generator
    torch.testing.assert_close(proposed, target.flow.transform(noise)[0])


def chain_coordinates(half_turns=(0,)):
    return InternalCoordinates(ZMatrix((0, 1, 2), np.array([[3, 2, 1, 0]])), half_turns=half_turns, compile=False)


def chain_generator(seed, flow=None, **options):
    """Four atoms; the torsion a normal like all others, so that some maps leave its circle or the angles' domain."""
    if flow is None:
        flow = Flow(
            Base([False] * 6), Composition([AffineCoupling(torch.arange(6) % 2 == k, hidden=(8,)) for k in (0, 1)])
        )
        flow = perturbed(flow.double(), 0.05, seed)
    return bg.BoltzmannGenerator(None, flow, chain_coordinates(**options), defensive=0.1)


def test_the_determinant_of_a_molecule_is_cartesian():
    """The log-determinant of all 12 coordinates by autograd, seed frame included, and the plain densities' ratio."""
    pair = GeneratorMap(chain_generator(1), chain_generator(2))
    x = torch.tensor([[0.9, 0.2, 0.1], [0.0, 0.1, 0.0], [-0.1, 1.1, 0.2], [0.3, 1.2, 1.0]], dtype=torch.float64)
    y, log_det = pair.forward(x[None])

    def plain(flat):
        at = flat.view(1, 4, 3)
        hot, cold = (space.generator for space in (pair.fast, pair.target))
        q, _ = hot.coordinates(at)
        made = cold.flow.transform(hot.flow.transform.inverse(q)[0])[0]
        return cold.coordinates.inverse(made, hot.coordinates.frame(at))[0].flatten()

    jacobian = torch.autograd.functional.jacobian(plain, x.flatten())
    assert float(torch.linalg.slogdet(jacobian)[1]) == pytest.approx(float(log_det), abs=1e-9)
    torch.testing.assert_close(y.flatten(), plain(x.flatten()))
    for generator in (pair.fast.generator, pair.target.generator):
        generator.defensive = 0.0
    densities = pair.fast.generator.log_prob(x) - pair.target.generator.log_prob(y)
    torch.testing.assert_close(log_det, densities, rtol=0, atol=1e-10)


def test_what_has_no_image_is_said_to_have_none():
    pair = GeneratorMap(chain_generator(1, half_turns=(1,)), chain_generator(2, half_turns=(1,)))
    right = torch.tensor([[0.9, 0.2, 0.1], [0.0, 0.1, 0.0], [-0.1, 1.1, 0.2], [0.3, 1.2, 1.0]], dtype=torch.float64)
    left = right * torch.tensor([1.0, 1.0, -1.0])
    wide = pair.fast.generator.place(pair.fast.latents.forward(4 * torch.ones(1, 6).double(), torch.zeros(1, 0)))
    x = torch.stack([right, left, torch.full_like(right, math.nan), right])
    q, _ = pair.fast.generator.coordinates(x)
    usable = 0 if q[0, 5] > 0 else 1
    y, log_det = pair.forward(torch.cat([x, wide]))
    assert torch.isneginf(log_det[[1 - usable, 2]]).all() and torch.isnan(y[[1 - usable, 2]]).all()
    assert torch.isfinite(log_det).eq(torch.isfinite(y).all((1, 2))).all()


@pytest.mark.parametrize("broken", [0, 1], ids=["fast", "target"])
def test_a_map_that_does_not_lead_back_is_not_used(broken):
    flows = [perturbed(RealNVP(2, layers=4, hidden=(8,), seed=s).double(), 0.25, s) for s in (1, 2)]
    pair = GeneratorMap(*(generator_of(flow) for flow in flows))
    x = torch.randn(20, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.isfinite(pair.forward(x).log_det).all()
    forward = flows[broken].transform.forward
    flows[broken].transform.forward = lambda z, context=None: (forward(z)[0] + 1e-4 * (z[:, :1] > 0), forward(z)[1])
    defined = torch.isfinite(pair.forward(x).log_det)
    latents = flows[0].transform.inverse(x)[0]
    assert torch.equal(defined, latents[:, 0] <= 0)


@pytest.mark.parametrize("kind", ["spline", "realnvp"])
def test_rotors_and_torsions_of_a_peptide_are_mapped_one_to_one(alanine, kind):
    generators = []
    for temperature, seed in ((600, 1), (300, 2)):
        generator = bg.BoltzmannGenerator.for_molecule(
            alanine.topology,
            alanine.system,
            temperature,
            positions=alanine.positions,
            flow=kind,
            seed=seed,
            compile=False,
        )
        perturbed(generator.flow, 0.02, seed)
        generators.append(generator)
    pair = GeneratorMap(*generators)
    zmatrix = generators[0].coordinates.zmatrix
    hydrogens = [[int(zmatrix.torsions[row][0]) for row in rotor] for rotor in zmatrix.rotors]
    assert len(hydrogens) == 3
    q, _ = generators[0].sample_internal(16, torch.Generator().manual_seed(3))
    x = generators[0].place(q)
    x = x[torch.isfinite(pair.forward(x).log_det)]
    assert len(x) > 10
    images = [x]
    for turn in (1, 2):
        turned = x.clone()
        turned[:, hydrogens[0]] = x[:, hydrogens[0][turn:] + hydrogens[0][:turn]]
        images.append(turned)
    together = torch.cat(images)
    y, log_det = pair.forward(together)
    defined = torch.isfinite(log_det)
    back, log_det_inverse = pair.inverse(y[defined])
    torch.testing.assert_close(back, together[defined], rtol=0, atol=1e-9)
    torch.testing.assert_close(log_det_inverse, -log_det[defined], rtol=0, atol=1e-9)
    for generator in generators:
        generator.defensive = 0.0
    densities = generators[0].log_prob(together[defined]) - generators[1].log_prob(y[defined])
    torch.testing.assert_close(log_det[defined], densities, rtol=0, atol=1e-9)
    # three images go to three images: the first hydrogen of the rotor ends in three places
    first = hydrogens[0][0]
    a, b, c = y.view(3, len(x), -1, 3)[:, :, first]
    for one, other in ((a, b), (b, c), (a, c)):
        distance = (one - other).norm(dim=-1)
        assert (torch.isnan(distance) | (distance > 0.1)).all()
    noise = GeneratorMap(None, generators[1])
    z = noise.fast.sample(16, torch.Generator().manual_seed(4))
    if kind == "realnvp":
        assert isinstance(generators[0].flow.torsions, AffineTorsions)
        assert len(noise.fast.space.images) == 7 and len(set(z[:, -7:].flatten().tolist())) == 3
    made, log_det = noise.forward(z)
    made = made[torch.isfinite(log_det)]
    again = noise.forward(noise.inverse(made).positions).positions
    torch.testing.assert_close(again, noise.forward(noise.inverse(made).positions, noise.target.frame(again)).positions)
    torch.testing.assert_close(
        generators[1].coordinates(again)[0], generators[1].coordinates(made)[0], rtol=0, atol=1e-9
    )


def uninformed(alanine):
    return bg.BoltzmannGenerator.for_molecule(alanine.topology, alanine.system, compile=False)


@pytest.mark.parametrize(
    ("fast", "target", "said"),
    [
        (lambda: real_nvp(1), lambda: generator_of(RealNVP(3, layers=2)), "2 and 3 dimensions"),
        (lambda: real_nvp(1), lambda: generator_of(SplineFlow([False, True], layers=2)), "same noise"),
        (
            lambda: real_nvp(1),
            lambda: generator_of(Flow(Base([False] * 2, std=2.0), RealNVP(2).transform)),
            "same noise",
        ),
        (lambda: generator_of(RealNVP(6, layers=2)), lambda: chain_generator(1), "the other has none"),
        (lambda: chain_generator(1), lambda: chain_generator(1, half_turns=(1,)), "hydrogen labels"),
        (
            lambda: generator_of(ContinuousFlow(Base([False] * 2), PerceptronVelocity(2, hidden=8))),
            lambda: real_nvp(1),
            "no bijection to rounding",
        ),
    ],
)
def test_generators_that_make_no_map_are_refused(fast, target, said):
    with pytest.raises(bg.InputError, match=said):
        GeneratorMap(fast(), target())


def test_uninformed_and_single_precision_generators_are_refused(alanine):
    with pytest.raises(bg.InputError, match="neither chirality nor scales"):
        GeneratorMap(None, uninformed(alanine))
    single = real_nvp(1)
    single.flow.float()
    with pytest.raises(bg.InputError, match="float64"):
        GeneratorMap(None, single)


# -- the figures


def test_statistics_count_attempts_and_round_trips():
    statistics = ExchangeStatistics(3)
    for accepted, refused in ((True, False), (False, False), (False, True)):
        statistics.count(ExchangeAttempt((2, 0), True, accepted, refused, 0.0))
    assert statistics.attempts[0, 2] == statistics.attempts[2, 0] == 3
    assert statistics.refused[0, 2] == 1 and statistics.attempts[0, 1] == 0
    assert statistics.acceptance[0, 2] == pytest.approx(1 / 3) and math.isnan(statistics.acceptance[0, 1])
    # replica 0 goes up and down twice; replica 1 begins at the top, which is no round trip yet; replica 2 never arrives
    path = {0: [0, 1, 2, 1, 0, 2, 2, 0], 1: [2, 0, 0, 2, 1, 0, 1, 1], 2: [1, 1, 0, 0, 1, 1, 0, 1]}
    for states in zip(*path.values(), strict=True):
        statistics.visit(states)
    assert statistics.round_trips.tolist() == [2, 1, 0]
    again = ExchangeStatistics(3)
    again.load_state_dict(statistics.state_dict())
    for both in (statistics, again):
        both.visit([2, 2, 2])
        both.visit([0, 0, 0])
    assert again.round_trips.tolist() == statistics.round_trips.tolist() == [3, 2, 1]
