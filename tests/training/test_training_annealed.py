"""Temperature annealing: ladders and weights in closed form, modes that reverse divergences lose, exact resumption."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from openmm_bg.systems import GaussianMixture
from small_runs import QUICK, check_resumption, cuttable, timeless

import openmm_bg as bg
from openmm_bg.errors import InputError
from openmm_bg.flows import MolecularFlow, RealNVP, SplineFlow
from openmm_bg.sampling import effective_sample_size
from openmm_bg.sampling.target import Target
from openmm_bg.training import ReversePath, Settings, TemperatureAnnealing
from openmm_bg.training.objectives import Step

LEARN = Settings(batch_size=128, learning_rate=3e-2, average=0.95, validate_every=100, validation_size=500)


class Harmonic(bg.Energy):
    """u = 2 x^2 + 11 in each of d dimensions: at the temperature 4 it is the base of a flow, N(0, 1)."""

    def __init__(self, dimension: int):
        super().__init__((dimension,))

    def reduced(self, x):
        return (2 * x.square() + 11.0).sum(-1)


def generator_of(energy: bg.Energy, flow=None) -> bg.BoltzmannGenerator:
    flow = flow or RealNVP(energy.event_shape[0], layers=2, hidden=(8,))
    return bg.BoltzmannGenerator(energy, flow, defensive=0.0)


def step_of(generator: bg.BoltzmannGenerator, n: int = 64, seed: int = 0) -> Step:
    flow = generator.flow.double()
    return Step(flow, Target(generator, torch.float64), None, n, 0.0, torch.Generator().manual_seed(seed))


# -- rungs and weights


@pytest.mark.parametrize(("share", "dimension"), [(0.5, 2), (0.75, 2), (0.3, 6), (0.5, 6)])
def test_the_ladder_costs_the_share_that_was_asked_for(share, dimension):
    """From N(0, 1), which is the target at 4, a factor r keeps (r (2 - r))^(d / 2) of the samples."""
    objective = TemperatureAnnealing(4.0, share=share, hot_steps=0, samples=20_000, clip=0.0)
    _, numbers = objective(step_of(generator_of(Harmonic(dimension))))
    factor = 1 - math.sqrt(1 - share ** (2 / dimension))
    assert numbers["temperature"] == pytest.approx(4 * factor, rel=0.02)
    assert numbers["round_ess"] == pytest.approx((factor * (2 - factor)) ** (dimension / 2), abs=0.02)
    assert numbers["target_ess"] == pytest.approx((0.25 * 1.75) ** (dimension / 2), abs=0.02)


def test_a_flow_that_is_not_there_yet_pays_for_the_step_alone():
    """N(0, 1) has a share of 0.75 under N(0, 1 / 2), the target at 2: asked for 0.8, the next has 0.6."""
    objective = TemperatureAnnealing(2.0, share=0.8, hot_steps=0, samples=50_000, clip=0.0)
    _, numbers = objective(step_of(generator_of(Harmonic(2))))
    assert numbers["temperature"] == pytest.approx(4 * (1 - math.sqrt(1 - 0.6)), rel=0.02)


def test_close_to_the_target_the_next_temperature_is_its_own():
    objective = TemperatureAnnealing(4.0, share=0.4, hot_steps=0, samples=5000)
    _, numbers = objective(step_of(generator_of(Harmonic(2))))  # 0.4375 for the whole way
    assert numbers["temperature"] == 1.0


def test_weights_are_those_of_the_next_temperature():
    """Of x under N(0, 1): exp(-2 x^2 / T + x^2 / 2)."""
    objective = TemperatureAnnealing([4.0, 2.5, 1.0], hot_steps=0, samples=2000, clip=0.0)
    objective(step_of(generator_of(Harmonic(1))))
    q, weight = objective.tensors["q"], objective.tensors["weight"]
    expected = torch.exp((0.5 - 2 / 2.5) * q[:, 0].square())
    assert torch.allclose(weight, expected / expected.sum(), rtol=1e-9)


def test_the_largest_weights_are_lowered():
    made = []
    for clip in (0.0, 0.05):
        objective = TemperatureAnnealing([4.0, 1.0], hot_steps=0, samples=1000, clip=clip)
        objective(step_of(generator_of(Harmonic(1))))
        made.append(objective.tensors["weight"])
    expected = made[0].clamp(max=made[0].sort().values[-51])
    assert torch.allclose(made[1], expected / expected.sum(), rtol=1e-6)


def small_alanine() -> bg.BoltzmannGenerator:
    return bg.BoltzmannGenerator.load(Path(__file__).parents[1] / "data" / "alanine_small.bg")


def test_the_volume_of_a_molecule_knows_no_temperature():
    """The weights are those of a generator at 330 K, on the way to 300 K."""
    small = small_alanine()
    objective = TemperatureAnnealing([1.2, 1.1, 1.0], hot_steps=0, samples=600, clip=0.0)
    step = step_of(small)
    objective(step)
    hot = bg.BoltzmannGenerator(
        bg.ForceFieldEnergy(small.system, 330, compile=False), small.flow, small.coordinates, defensive=0.0
    )
    q = objective.tensors["q"]
    log_w = -Target(hot, torch.float64).value(q) - small.flow.log_prob(q).detach()
    assert len(q) > 500
    assert torch.allclose(objective.tensors["weight"].log(), log_w.log_softmax(0), rtol=1e-6, atol=1e-6)
    assert step.target.evaluations == 600


class Walled(Harmonic):
    """Nothing left of -0.5: about a third of N(0, 1)."""

    def reduced(self, x):
        return torch.where(x[:, 0] > -0.5, super().reduced(x), math.inf)


def test_samples_without_an_energy_are_lost_and_spoil_nothing():
    generator = generator_of(Walled(2))
    objective = TemperatureAnnealing(4.0, hot_steps=0, samples=5000)
    loss, numbers = objective(step_of(generator))
    assert numbers["lost"] == pytest.approx(0.3085, abs=0.02)
    assert len(objective.tensors["q"]) == round(5000 * (1 - numbers["lost"]))
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in generator.flow.parameters())


def test_a_flow_that_never_meets_the_target_is_refused():
    class Nowhere(Harmonic):
        def reduced(self, x):
            return x[:, 0] * math.nan

    objective = TemperatureAnnealing(hot_steps=0, samples=100)
    with pytest.raises(InputError, match="do not overlap"):
        generator_of(Nowhere(2)).fit(steps=3, objective=objective, progress=False)


def test_too_few_samples_that_count_are_refused():
    """From 4 to 1 in twelve dimensions 0.4375^6 of them are left."""
    objective = TemperatureAnnealing([4.0, 1.0], hot_steps=0, samples=300)
    with pytest.raises(InputError, match="of 300 samples count at 1 times"):
        objective(step_of(generator_of(Harmonic(12))))


# -- learning


def test_the_hot_stage_is_reverse_path_on_the_hot_target():
    """Its gradient is that of the objective alone on an energy divided by the temperature."""

    class Divided(Harmonic):
        def reduced(self, x):
            return super().reduced(x) / 4

    gradients = []
    for objective, energy in (
        (TemperatureAnnealing(4.0, hot_steps=5), Harmonic(3)),
        (ReversePath(power=0.0), Divided(3)),
    ):
        generator = generator_of(energy)
        with torch.no_grad():
            for number, parameter in enumerate(generator.flow.parameters()):
                parameter.add_(0.1 * math.cos(number))
        loss, _ = objective(step_of(generator))
        gradients.append(torch.autograd.grad(loss, list(generator.flow.parameters()), allow_unused=True))
    assert any(g is not None and g.abs().max() > 1e-3 for g in gradients[0])
    for one, other in zip(*gradients, strict=True):
        assert (one is None and other is None) or torch.allclose(one, other, rtol=1e-9, atol=1e-12)


def test_a_round_teaches_the_flow_the_next_temperature():
    generator = generator_of(Harmonic(2))
    objective = TemperatureAnnealing([4.0, 2.0, 1.0], hot_steps=0, samples=4000, steps_per_round=120)
    settings = Settings(batch_size=512, learning_rate=2e-2, average=0.95)
    generator.fit(steps=120, objective=objective, settings=settings, progress=False)
    assert objective.state["temperature"] == 2.0
    samples = generator.sample(20_000, seed=2).positions
    assert samples.std(0).tolist() == pytest.approx([math.sqrt(0.5)] * 2, abs=0.03)


def test_both_modes_get_their_weight_where_reverse_divergence_alone_loses_one():
    """Two modes, 18 kT apart from what lies between them, a quarter and three quarters of the mass."""
    target = GaussianMixture([[-3.0, 0.0], [3.0, 0.0]], 0.5, [0.25, 0.75])
    populations, runs = [], []
    for objective in (
        ReversePath(power=0.0), TemperatureAnnealing(16.0, hot_steps=100, samples=2000, steps_per_round=40)
    ):  # fmt: skip
        generator = generator_of(target, SplineFlow([False] * 2, layers=2, bins=12, hidden=(8,), bound=8.0))
        steps = 150 if isinstance(objective, ReversePath) else 1000
        runs.append(generator.fit(steps=steps, objective=objective, settings=LEARN, progress=False))
        samples = generator.sample(10_000, seed=2)
        populations.append(float((samples.positions[:, 0] > 0).double().mean()))
    assert populations[0] > 0.99 or populations[0] < 0.01
    assert abs(populations[1] - 0.75) < 0.04
    assert effective_sample_size(samples.log_weights).fraction > 0.9
    rounds = objective.state["round"]
    assert objective.state["finished"] and objective.state["arrived"] == 2
    assert (runs[1].steps, runs[1].evaluations) == (100 + 40 * rounds, 100 * 128 + 2000 * rounds)
    assert runs[1].skipped == runs[1].rollbacks == 0
    temperatures = [record["temperature"] for record in runs[1].history]
    assert temperatures[0] == 16.0 and temperatures[-1] == 1.0 and temperatures == sorted(temperatures, reverse=True)


def test_a_molecule_cools_along_a_given_ladder():
    """Of 360, 330, 330 and 300 K, the last twice; its flow is one of 300 K."""
    generator = small_alanine()
    objective = TemperatureAnnealing([1.2, 1.1, 1.1, 1.0], hot_steps=6, samples=600, steps_per_round=2)
    settings = Settings(batch_size=16, validation_size=64, validate_every=1, learning_rate=1e-4)
    result = generator.fit(steps=100, objective=objective, settings=settings, progress=False)
    assert [r["temperature"] for r in result.history] == [1.2] * 6 + [1.1] * 4 + [1.0] * 4
    assert [r.get("round") for r in result.history] == [None] * 6 + [1, 1, 2, 2, 3, 3, 4, 4]
    assert (result.evaluations, result.skipped) == (6 * 16 + 4 * 600, 0)
    assert torch.isfinite(generator.sample(50, seed=0).log_prob).any()


Cut = cuttable(TemperatureAnnealing)


def molecular() -> MolecularFlow:
    """Three stiff coordinates and a torsion, whose draws are kept for four steps."""
    flow = MolecularFlow(4, torsions=[3], rotors={}, stiff_torsions=[], layers=2, hidden=8, torsion_hidden=8)
    flow.initialize(torch.randn(100, 4, generator=torch.Generator().manual_seed(0)))
    return flow


@pytest.mark.parametrize(
    ("make", "stop"),
    [(None, 7), (None, 21), (None, 27), (None, 30), (molecular, 7), (molecular, 27)],
    ids=["hot", "refill", "within", "end of round", "hot molecular", "within molecular"],
)
def test_an_interrupted_run_resumes_to_the_bit(make, stop, tmp_path, monkeypatch):
    def objective():
        return Cut(9.0, hot_steps=20, samples=300, steps_per_round=10, reverse=ReversePath())

    def generator():
        return generator_of(Harmonic(4), make() if make else None)

    last, result = check_resumption(generator, objective, Cut, stop, tmp_path, monkeypatch, steps=200)
    assert last.state["finished"] and result.steps < 200


def test_an_objective_serves_a_second_generator():
    objective = TemperatureAnnealing(4.0, hot_steps=5, samples=200, steps_per_round=5, patience=0)
    results = [
        generator_of(Harmonic(2)).fit(steps=50, objective=objective, settings=QUICK, progress=False) for _ in range(2)
    ]
    assert timeless(results[0].history) == timeless(results[1].history)


# -- input


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("samples", 99), ("samples", 1000.0), ("steps_per_round", 0), ("hot_steps", -1), ("hot_steps", True),
        ("patience", -1), ("share", 0.0), ("share", 1.0), ("clip", -0.1), ("clip", 1.0), ("clip", math.nan),
        ("temperatures", 0.5), ("temperatures", math.inf), ("temperatures", math.nan), ("temperatures", []),
        ("temperatures", [4, 2]), ("temperatures", [1, 4, 1]), ("temperatures", [[4.0, 1.0]]),
    ],
)  # fmt: skip
def test_wrong_parameters_are_refused(name, value):
    with pytest.raises(InputError, match=name):
        TemperatureAnnealing(**{name: value})


def test_a_ladder_may_be_an_array():
    assert TemperatureAnnealing(np.geomspace(4, 1, 10)).needs_energy


def test_it_needs_an_energy():
    generator = bg.BoltzmannGenerator(None, RealNVP(2, layers=2, hidden=(8,)))
    with pytest.raises(InputError):
        generator.fit(steps=1, objective=TemperatureAnnealing(), progress=False)
