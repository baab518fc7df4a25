"""The gradient flow learned on a small mixture, and its labels against the closed form."""

from __future__ import annotations

import math

import pytest
import torch
from openmm_bg.systems import GaussianMixture

import openmm_bg as bg
from openmm_bg.errors import InputError
from openmm_bg.flows import Base, ContinuousFlow, GradientFlowVelocity, PerceptronEnergy, PerceptronVelocity
from openmm_bg.sampling import effective_sample_size
from openmm_bg.sampling.target import Target
from openmm_bg.training import GradientFlowResidual, NoisedEnergy, Settings
from openmm_bg.training.objectives import Step

STD = 2.0


def mixture() -> GaussianMixture:
    return GaussianMixture([[-2.0, 0.5], [2.0, -0.5]], 0.6, [0.3, 0.7])


def generator_of(target: bg.Energy, hidden: int = 32) -> bg.BoltzmannGenerator:
    network = PerceptronEnergy(2, hidden, windows=12, first="sin", bandwidth=6.0)
    velocity = GradientFlowVelocity(target, network, std=STD, horizon=5.0, shortest=1e-2)
    return bg.BoltzmannGenerator(target, ContinuousFlow(Base([False] * 2, std=STD), velocity, steps=12), defensive=0.0)


def step_of(generator: bg.BoltzmannGenerator) -> Step:
    target = Target(generator, torch.float64)
    return Step(generator.flow, target, None, 64, 0.5, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("mesh", [0, 100**2])
def test_labels_are_those_of_the_noised_mixture(mesh):
    target = mixture()
    generator = generator_of(target)
    objective = NoisedEnergy(5.0, points=400, draws=1024, mesh=mesh)
    objective(step_of(generator))
    kept = objective.tensors
    near = kept["above"] < 4
    assert near.sum() > 200
    worst = []
    for t, x, value in zip(kept["t"][near], kept["x"][near], kept["value"][near], strict=True):
        theta = float(generator.flow.velocity.noise_time(t)[0]) * STD**2
        noised = target.noised(theta, STD)
        worst.append(float(value) - float(noised(x[None].double())) + target.log_z - noised.log_z)
    worst = torch.tensor(worst)
    assert worst.abs().median() < (0.02 if mesh else 0.05)
    assert worst.std() < 0.1


def test_f_starts_at_the_right_height():
    target = mixture()
    generator = generator_of(target)
    velocity = generator.flow.velocity
    NoisedEnergy(5.0, points=2000, mesh=100**2)(step_of(generator))
    for t in (0.1, 0.5, 0.9):
        time = torch.tensor(t, dtype=torch.float64)
        noised = target.noised(float(velocity.noise_time(time)[0]) * STD**2, STD)
        x = noised.sample(500, torch.Generator().manual_seed(1))
        with torch.no_grad():
            wrong = velocity.energy(time, x) - (noised(x) + noised.log_z - target.log_z)
        assert wrong.mean().abs() < 0.7


def test_late_times_may_have_more_points():
    times = []
    for late in (1.0, 0.4):
        objective = NoisedEnergy(5.0, points=2000, mesh=60**2, late=late)
        objective(step_of(generator_of(mixture())))
        times.append(objective.tensors["t"])
    assert (times[1] > 0.8).double().mean() > 1.3 * (times[0] > 0.8).double().mean()


def test_height_weighs_f_itself():
    losses = []
    for height in (0.0, 1.0, 2.0):
        objective = NoisedEnergy(5.0, points=500, mesh=60**2, height=height)
        losses.append(float(objective(step_of(generator_of(mixture())))[0].detach()))
    assert losses[1] > losses[0] + 1e-3
    assert losses[2] - losses[1] == pytest.approx(losses[1] - losses[0], rel=1e-4)


def test_a_small_mixture_is_learned():
    generator = generator_of(mixture())
    settings = Settings(batch_size=256, learning_rate=1e-2, average=0.98)
    objective = NoisedEnergy(5.0, points=20_000, mesh=100**2, residual=1.0)
    generator.fit(steps=400, objective=objective, settings=settings, seed=0, progress=False)
    samples = generator.sample(2000, seed=1)
    assert effective_sample_size(samples.log_weights).fraction > 0.9
    # without the target's energies, N(0, 4) is not in the least lopsided
    assert abs(float((samples.positions[:, 0] > 0).double().mean()) - 0.7) < 0.05


def test_the_residual_falls():
    target = mixture()
    velocity = GradientFlowVelocity(target, PerceptronEnergy(2, 32, windows=8), std=STD, shortest=2e-2)
    generator = bg.BoltzmannGenerator(target, ContinuousFlow(Base([False] * 2, std=STD), velocity), defensive=0.0)
    objective = GradientFlowResidual(5.0, curriculum=0.0)
    before = float(objective(step_of(generator))[0].detach())
    generator.fit(
        steps=200, objective=objective, settings=Settings(batch_size=128, learning_rate=1e-2), seed=0, progress=False
    )
    after = float(objective(step_of(generator))[0].detach())
    assert math.isfinite(after) and after < 0.6 * before


def test_errors():
    target = mixture()
    plain = ContinuousFlow(Base([False] * 2), PerceptronVelocity(2, 8))
    generator = bg.BoltzmannGenerator(target, plain)
    for objective in (NoisedEnergy(5.0, points=10), GradientFlowResidual(5.0)):
        with pytest.raises(InputError, match="GradientFlowVelocity"):
            generator.fit(steps=1, objective=objective, progress=False)
    for wrong in ({"points": 0}, {"draws": 0}, {"mesh": -1}, {"mesh": 1.5}):
        with pytest.raises(InputError, match="whole number"):
            NoisedEnergy(5.0, **wrong)


@pytest.mark.parametrize(
    ("name", "value"), [("height", -1.0), ("residual", math.inf), ("late", 0.0), ("late", math.nan), ("points", 0)]
)
def test_settings_out_of_range(name, value):
    with pytest.raises(InputError, match=name):
        NoisedEnergy(5.0, **{name: value})
