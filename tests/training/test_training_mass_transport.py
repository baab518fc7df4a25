"""Constrained mass transport as an objective: the flow that learns its steps, arrives, says so and resumes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from openmm_bg.systems import GaussianMixture
from scipy.stats import norm
from small_runs import QUICK, check_resumption, cuttable

import openmm_bg as bg
from openmm_bg.errors import InputError
from openmm_bg.flows import RealNVP, SplineFlow
from openmm_bg.sampling import effective_sample_size
from openmm_bg.sampling.target import Target
from openmm_bg.training import ConstrainedMassTransport, Settings, transport
from openmm_bg.training.objectives import Step


class Narrow(bg.Energy):
    """A Gaussian of given means and widths in two dimensions, times exp(-11)."""

    means, widths = (0.8, -0.5), (0.4, 0.7)

    def __init__(self):
        super().__init__((2,))

    def reduced(self, x):
        return 0.5 * ((x - x.new_tensor(self.means)) / x.new_tensor(self.widths)).square().sum(-1) + 11.0


class Heard(ConstrainedMassTransport):
    """Keeps what was said of each round."""

    def __call__(self, step):
        loss, numbers = super().__call__(step)
        heard = self.__dict__.setdefault("heard", [])
        if len(heard) < numbers["round"]:
            heard.append(numbers)
        return loss, numbers


LEARN = Settings(batch_size=256, learning_rate=2e-2, average=0.98, validate_every=100, validation_size=500)


def generator_of(energy: bg.Energy, flow=None) -> bg.BoltzmannGenerator:
    return bg.BoltzmannGenerator(energy, flow or RealNVP(2, layers=2, hidden=(8,)), defensive=0.0)


def share(generator: bg.BoltzmannGenerator) -> float:
    return effective_sample_size(generator.sample(4000, seed=1).log_weights).fraction


@pytest.mark.parametrize("loss", ["log_variance", "likelihood"])
@pytest.mark.parametrize("bounds", [(0.3, "auto"), (0.3, None), (None, 0.5)])
def test_it_arrives_says_so_and_ends_its_stage(loss, bounds):
    generator = generator_of(Narrow())
    objective = Heard(*bounds, samples=1500, steps_per_round=40, rounds=6, patience=1, loss=loss)
    result = generator.fit(steps=2000, objective=objective, settings=LEARN, progress=False)
    rounds = objective.state["round"]
    assert objective.state["finished"] and rounds == len(objective.heard) < 20
    assert (result.steps, result.evaluations, result.skipped) == (40 * rounds, 1500 * rounds, 0)
    assert generator.provenance["training"]["stages"] == [["energy", result.steps]]
    there = [heard["lambda"] == heard["eta"] == 0 for heard in objective.heard]
    assert there[0] is False and there[-2:] == [True, True] and there[-3] is False
    for heard in objective.heard:
        assert bounds[0] is None or heard["divergence"] <= bounds[0] * 1.001
        assert bounds[1] is None or heard["entropy_drop"] <= heard["entropy_bound"] * 1.001
        assert heard["lost"] == 0
    assert objective.heard[-1]["target_ess"] > objective.heard[0]["target_ess"] + 0.3
    assert share(generator) > 0.97
    samples = generator.sample(20_000, seed=2).positions
    assert samples.mean(0).tolist() == pytest.approx(Narrow.means, abs=0.05)
    assert samples.std(0).tolist() == pytest.approx(Narrow.widths, abs=0.05)


def test_the_stage_ends_where_the_flow_comes_no_nearer():
    """One coupling leaves one coordinate as it was, so half of the samples never count."""
    target = Narrow()
    target.means, target.widths = (0.8, 0.8), (0.4, 0.4)
    generator = generator_of(target, RealNVP(2, layers=1, hidden=(8,)))
    objective = Heard(None, None, samples=1500, steps_per_round=20)
    result = generator.fit(steps=2000, objective=objective, settings=LEARN, progress=False)
    assert objective.state["finished"] and result.steps == 20 * len(objective.heard) < 800
    assert objective.state["arrived"] == 0
    shares = [heard["target_ess"] for heard in objective.heard]
    assert 0.1 < np.mean(shares[-6:]) < min(0.5, 1.05 * np.mean(shares[-12:-6]))


@pytest.mark.parametrize("loss", ["log_variance", "likelihood"])
def test_without_bounds_it_distils_its_own_importance_weights(loss):
    generator = generator_of(Narrow())
    objective = Heard(None, None, samples=3000, steps_per_round=50, patience=3, loss=loss)
    result = generator.fit(steps=1000, objective=objective, settings=LEARN, progress=False)
    assert all(heard["lambda"] == heard["eta"] == 0 for heard in objective.heard)
    # without weights that are clipped the two shares are the same
    for heard in objective.heard:
        assert heard["round_ess"] == pytest.approx(heard["target_ess"], rel=0.1)
        assert math.isnan(heard["entropy_bound"])
    # the first rounds may have less than half of the samples count
    assert 200 <= result.steps <= 300 and share(generator) > 0.97


def test_a_round_teaches_the_flow_the_next_distribution():
    """From N(0, 1), a geometric step: the flow becomes the Gaussian in closed form, not the target."""
    generator = generator_of(Narrow())
    objective = Heard(0.3, None, samples=4000, steps_per_round=150)
    settings = Settings(batch_size=512, learning_rate=2e-2, average=0.95)
    generator.fit(steps=150, objective=objective, settings=settings, progress=False)
    assert len(objective.heard) == 1
    trust = objective.heard[0]["lambda"]
    target = 1 / np.square(Narrow.widths)
    precision = (trust + target) / (1 + trust)
    mean = target * Narrow.means / (1 + trust) / precision
    samples = generator.sample(20_000, seed=2).positions
    assert samples.mean(0).tolist() == pytest.approx(mean, abs=0.04)
    assert samples.std(0).tolist() == pytest.approx(precision**-0.5, abs=0.04)


def test_both_modes_of_a_lopsided_mixture_get_their_weight():
    target = GaussianMixture([[-1.2], [1.2]], 0.4, [0.25, 0.75])
    generator = generator_of(target, SplineFlow([False], layers=2, bins=24, bound=4.0))
    objective = ConstrainedMassTransport(0.3, None, samples=4000, steps_per_round=100, patience=1)
    generator.fit(steps=2000, objective=objective, settings=LEARN, progress=False)
    assert objective.state["finished"] and share(generator) > 0.95
    positive = (generator.sample(10_000, seed=2).positions[:, 0] > 0).double().mean()
    assert abs(float(positive) - 0.75) < 0.03


def step_of(generator: bg.BoltzmannGenerator, seed: int = 0) -> Step:
    flow = generator.flow.double()
    return Step(flow, Target(generator, torch.float64), None, 64, 0.0, torch.Generator().manual_seed(seed))


def test_the_automatic_entropy_bound_is_twice_an_even_share_of_what_there_is_to_lose():
    generator = generator_of(Narrow())
    there_is = -math.log(math.prod(Narrow.widths))  # from N(0, 1)
    step = step_of(generator)
    for rounds in (4, 8):
        objective = ConstrainedMassTransport(None, samples=10_000, steps_per_round=1, rounds=rounds)
        bounds = [objective(step)[1]["entropy_bound"] for _ in range(rounds + 2)]  # the flow itself stays
        left = [max(rounds - done, rounds // 4, 1) for done in range(rounds + 2)]
        assert bounds == pytest.approx([max(2 * there_is / n, 0.3) for n in left], rel=0.15)


def test_the_automatic_entropy_bound_lets_a_flow_widen():
    """Nothing to lose: the bound is small, but does not bind."""

    class Wide(Narrow):
        widths = (1.2, 1.1)

    objective = ConstrainedMassTransport(None, "auto", samples=5000, rounds=4)
    numbers = objective(step_of(generator_of(Wide())))[1]
    assert numbers["entropy_bound"] == pytest.approx(0.3) and numbers["eta"] == 0 and numbers["entropy_drop"] < 0


class Walled(Narrow):
    """Nothing left of -0.5: about a third of N(0, 1)."""

    def reduced(self, x):
        return torch.where(x[:, 0] > -0.5, super().reduced(x), math.inf)


@pytest.mark.parametrize("loss", ["log_variance", "likelihood"])
def test_samples_without_an_energy_are_lost_and_spoil_nothing(loss):
    generator = generator_of(Walled())
    objective = ConstrainedMassTransport(1.0, None, samples=2000, steps_per_round=40, loss=loss)
    value, numbers = objective(step_of(generator))
    assert numbers["lost"] == pytest.approx(norm.cdf(-0.5), abs=0.03)
    assert len(objective.tensors["q"]) == round(2000 * (1 - numbers["lost"]))
    assert (objective.tensors["q"][:, 0] > -0.5).all()
    value.backward()
    assert all(torch.isfinite(p.grad).all() for p in generator.flow.parameters())
    for name in ("log_next", "weight"):
        assert torch.isfinite(objective.tensors[name]).all()
    assert float(objective.tensors["weight"].mean()) == pytest.approx(1.0)


@pytest.mark.parametrize(
    "bound",
    [None, 1.0, "auto"],
)
def test_an_energy_that_the_flow_never_meets_is_refused(bound):
    class Nowhere(Narrow):
        def reduced(self, x):
            return x[:, 0] * math.nan

    objective = ConstrainedMassTransport(entropy_bound=bound, samples=100)
    with pytest.raises(InputError, match="do not overlap"):
        generator_of(Nowhere()).fit(steps=3, objective=objective, progress=False)


def test_the_losses_are_their_formulas():
    """Likelihood: weights times minus the log-density. Log-variance: zero, with no slope, for the next distribution."""
    objective = ConstrainedMassTransport(0.3, None, samples=500, loss="likelihood", clip=0.0)
    generator = generator_of(Narrow())
    step = step_of(generator)
    value = float(objective(step)[0].detach())
    kept = objective.tensors
    rows = torch.randint(500, (64,), generator=_replayed(step_of(generator), 500))
    expected = -(kept["weight"][rows] * generator.flow.log_prob(kept["q"][rows])).mean()
    assert value == pytest.approx(float(expected.detach()), rel=1e-6)
    log_q = generator.flow.log_prob(kept["q"]).detach()
    step_back = transport(-Narrow()(kept["q"]).numpy(), log_q.numpy(), 0.3)
    assert kept["weight"].numpy() == pytest.approx(np.exp(step_back.log_ratio), rel=1e-6)
    assert (kept["log_next"] - log_q).numpy() == pytest.approx(step_back.log_ratio, rel=1e-6, abs=1e-6)

    objective = ConstrainedMassTransport(0.3, None, samples=500)
    objective(step_of(generator))
    objective.tensors = objective.tensors | {"log_next": generator.flow.log_prob(objective.tensors["q"]).detach() + 5.0}
    loss, numbers = objective(step_of(generator))
    loss.backward()
    assert float(loss.detach()) < 1e-12 and numbers["spread"] < 1e-6
    assert all(p.grad is None or p.grad.abs().max() < 1e-6 for p in generator.flow.parameters())


def _replayed(step: Step, samples: int) -> torch.Generator:
    """The generator as it is once the samples are drawn."""
    step.flow.sample(samples, step.generator)
    return step.generator


def test_the_largest_weights_are_lowered():
    plain = ConstrainedMassTransport(None, None, samples=1000, clip=0.0)
    clipped = ConstrainedMassTransport(None, None, samples=1000, clip=0.05)
    generator = generator_of(Narrow())
    for objective in (plain, clipped):
        objective(step_of(generator))
    order = plain.tensors["weight"].sort().values
    expected = plain.tensors["weight"].clamp(max=order[-51])
    assert torch.allclose(clipped.tensors["weight"], expected / expected.mean(), rtol=1e-6)


Cut = cuttable(ConstrainedMassTransport)


@pytest.mark.parametrize("loss", ["log_variance", "likelihood"])
@pytest.mark.parametrize("stop", [21, 27, 40], ids=["refill", "within", "end of round"])
def test_a_run_interrupted_within_a_round_resumes_to_the_bit(loss, stop, tmp_path, monkeypatch):
    def objective():
        return Cut(1.0, None, samples=300, steps_per_round=20, patience=1, loss=loss)

    last, result = check_resumption(
        lambda: generator_of(Narrow()), objective, Cut, stop, tmp_path, monkeypatch, steps=200
    )
    assert last.state["finished"] and result.steps < 200


def test_rounds_are_what_the_evaluations_count():
    objective = ConstrainedMassTransport(0.05, None, samples=700, steps_per_round=7)
    result = generator_of(Narrow()).fit(steps=25, objective=objective, settings=QUICK, progress=False)
    assert (objective.state["round"], result.steps, result.evaluations) == (4, 25, 2800)


def test_an_objective_serves_a_second_generator():
    objective = ConstrainedMassTransport(None, None, samples=200, steps_per_round=5, patience=0)
    results = [
        generator_of(Narrow()).fit(steps=50, objective=objective, settings=QUICK, progress=False) for _ in range(2)
    ]
    figures = [[(r["step"], r.get("loss")) for r in result.history] for result in results]
    assert figures[0] == figures[1] and results[0].evaluations == results[1].evaluations == 2000


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("samples", 99), ("samples", 1000.0), ("samples", True), ("steps_per_round", 0), ("rounds", 0),
        ("patience", -1), ("patience", 0.5), ("loss", "forward"), ("clip", -0.1), ("clip", 1.0), ("clip", math.nan),
        ("entropy_bound", "automatic"), ("entropy_bound", 0.0), ("trust_region", 0.0), ("trust_region", -1.0),
        ("trust_region", "auto"), ("delta", 0.0), ("delta", -1.0),
    ],
)  # fmt: skip
def test_wrong_parameters_are_refused(name, value):
    with pytest.raises(InputError, match=name):
        ConstrainedMassTransport(**{name: value})


def test_nearly_all_weights_may_be_clipped():
    objective = ConstrainedMassTransport(None, None, samples=100, clip=0.999)
    objective(step_of(generator_of(Narrow())))


def test_it_needs_an_energy():
    generator = bg.BoltzmannGenerator(None, RealNVP(2, layers=2, hidden=(8,)))
    with pytest.raises(InputError):
        generator.fit(steps=1, objective=ConstrainedMassTransport(), progress=False)
