"""The continuity residual as an objective: its loss recomputed, its gradients, and that it learns."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import openmm_bg as bg
from openmm_bg.energies import Energy
from openmm_bg.errors import InputError
from openmm_bg.flows import Base, ContinuousFlow, PerceptronEnergy, PerceptronVelocity, RealNVP, VelocityField
from openmm_bg.sampling import effective_sample_size, reweighted_mean
from openmm_bg.sampling.target import Target
from openmm_bg.training import ContinuityResidual, Settings
from openmm_bg.training.objectives import Step

STD = 1.5
SMALL = {"walkers": 40, "times": 6, "refresh": 3, "memory": 2, "groups": 4, "curriculum": 0.0}


class Gaussian(Energy):
    """x^2 / 2 width^2 + 1.7."""

    def __init__(self, dimension: int, width: float):
        super().__init__((dimension,))
        self.width = width

    def reduced(self, x):
        return 0.5 * x.square().sum(-1) / self.width**2 + 1.7


class Exactly(VelocityField):
    """The transport along the straight path from N(0, STD^2) to N(0, width^2), times a factor that is learned."""

    def __init__(self, dimension: int, width: float, factor: float = 1.0):
        super().__init__(dimension)
        self.start, self.end = STD**-2, width**-2
        self.factor = torch.nn.Parameter(torch.tensor(factor))

    def slope(self, t):
        return -0.5 * self.factor * (self.end - self.start) / ((1 - t) * self.start + t * self.end)

    def forward(self, t, x):
        return self.slope(t).reshape(-1, 1) * x

    def with_divergence(self, t, x):
        return self(t, x), (self.dimension * self.slope(t)).expand(len(x))


def disturb(module: torch.nn.Module, size: float = 0.15) -> torch.nn.Module:
    rng = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data += size * torch.randn(parameter.shape, generator=rng)
    return module


def flow_of(velocity: VelocityField | None = None, psi: bool = False, dimension: int = 2) -> ContinuousFlow:
    velocity = velocity or disturb(PerceptronVelocity(dimension, 8, windows=4))
    perturbation = disturb(PerceptronEnergy(dimension, 6, windows=4)) if psi else None
    return ContinuousFlow(Base([False] * dimension, std=STD), velocity, perturbation=perturbation, steps=20).double()


def step_of(flow, energy, batch: int = 64, progress: float = 0.0, seed: int = 0) -> Step:
    target = Target(bg.BoltzmannGenerator(energy, flow), torch.float64)
    return Step(flow, target, None, batch, progress, torch.Generator().manual_seed(seed))


MIXTURE = bg.systems.GaussianMixture([[-2.0, 0.0], [2.0, 1.0]], scale=[0.7, 0.6], weights=[1, 3])


# --- the loss --------------------------------------------------------------------------------------------------------


def residuals(flow: ContinuousFlow, t: torch.Tensor, x: torch.Tensor, rate: float) -> torch.Tensor:
    """d_t f - div v + <grad f, v>, every derivative by autograd."""
    t, x = t.clone().requires_grad_(), x.clone().requires_grad_()
    s = t if rate == 0 else torch.expm1(rate * t) / math.expm1(rate)
    f = (1 - s) * -flow.base.log_prob(x) + s * MIXTURE.reduced(x)
    if flow.perturbation is not None:
        f = f + t * (1 - t) * flow.perturbation(t, x)
    by_t, by_x = torch.autograd.grad(f.sum(), (t, x), create_graph=True)
    v = flow.velocity(t, x)
    divergence = sum(torch.autograd.grad(v[:, i].sum(), x, create_graph=True)[0][:, i] for i in range(x.shape[1]))
    return by_t - divergence + (by_x * v).sum(-1)


@pytest.mark.parametrize(("psi", "rate"), [(False, 0.0), (True, 0.0), (True, 2.0)])
def test_the_loss_is_the_spread_of_the_residual_within_groups(psi, rate):
    flow = flow_of(psi=psi)
    objective = ContinuityResidual(rate=rate, **SMALL)
    step = step_of(flow, MIXTURE)
    objective(step)  # which makes a sweep
    state = step.generator.get_state()
    loss, numbers = objective(step)
    assert "sweep_ess" not in numbers
    # which points: four groups of one sweep and one time each
    rng = torch.Generator()
    rng.set_state(state)
    memory = objective.tensors
    assert memory["x"].shape == (1, 6, 40, 2) and memory["energy"].shape == (1, 6, 40) and memory["t"].shape == (1, 6)
    sweep = torch.randint(1, (4, 1), generator=rng)
    time = torch.randint(6, (4, 1), generator=rng)
    row = torch.randint(40, (4, 16), generator=rng)
    total, squares = 0.0, 0.0
    for group in range(4):
        at = sweep[group, 0], time[group, 0]
        r = residuals(flow, memory["t"][at].expand(16), memory["x"][at][row[group]], rate)
        r = r - r.mean()
        total = total + 0.5 * (r.abs() + r.square()).sum()
        squares = squares + r.square().sum()
    torch.testing.assert_close(loss, total / 64, atol=1e-10, rtol=1e-10)
    assert numbers["residual"] == pytest.approx(float((squares / 64).sqrt().detach()))
    parameters = list(flow.parameters())
    given = torch.autograd.grad(loss, parameters, allow_unused=True)
    expected = torch.autograd.grad(total / 64, parameters, allow_unused=True)
    for (name, _), one, other in zip(flow.named_parameters(), given, expected, strict=True):
        # what depends on time alone moves no residual within a group
        if name == "perturbation.outer.rows":
            assert one is None or one.abs().max() < 1e-12
            continue
        assert one.abs().max() > 0, name
        torch.testing.assert_close(one, other, atol=1e-9, rtol=1e-9)


def test_what_is_remembered_are_points_with_their_energies_and_gradients():
    objective = ContinuityResidual(**SMALL)
    objective(step_of(flow_of(), MIXTURE))
    memory = objective.tensors
    assert not any(tensor.requires_grad for tensor in memory.values())
    energy, gradient = MIXTURE.value_and_gradient(memory["x"].reshape(-1, 2))
    torch.testing.assert_close(memory["energy"].flatten(), energy)
    torch.testing.assert_close(memory["gradient"].reshape(-1, 2), gradient)
    t = memory["t"][0]
    assert (t.diff() > 0).all() and t[-1] == 1
    assert ((t[:-1] * 6).floor() == torch.arange(5)).all(), "one in each stretch"


def test_remembered_points_follow_the_path():
    """Resampled by their weights, walkers of a field that is wrong have the moments of exp(-f_t)."""
    target, width = Gaussian(2, 0.5), 0.5
    objective = ContinuityResidual(walkers=4000, times=5, curriculum=0.0, moves=2)
    flow = flow_of()
    objective(step_of(flow, target))  # tunes the moves
    objective.state.clear()
    objective(step_of(flow, target, seed=1))
    for t, x in zip(objective.tensors["t"][-1], objective.tensors["x"][-1], strict=True):
        variance = 1 / ((1 - t) / STD**2 + t / width**2)
        # resampled walkers are fewer than they seem
        assert float(x.square().mean() / variance) == pytest.approx(1, abs=0.12)


@pytest.mark.parametrize("dimension", [1, 3])
def test_the_exact_field_has_no_loss_and_its_neighbours_have(dimension):
    target = Gaussian(dimension, 0.6)
    losses = {}
    for factor in (0.8, 1.0, 1.2):
        field = Exactly(dimension, 0.6, factor)
        flow = flow_of(field, dimension=dimension)
        loss, numbers = ContinuityResidual(**SMALL)(step_of(flow, target))
        losses[factor] = float(loss.detach())
        (slope,) = torch.autograd.grad(loss, field.factor)
        assert factor == 1 or slope * (factor - 1) > 0, "downhill is towards the exact field"
        if factor == 1:
            assert numbers["sweep_ess"] > 0.999
    assert losses[1.0] < 1e-6 and losses[0.8] > 0.01 and losses[1.2] > 0.01


def test_points_without_an_energy_do_not_spoil_the_others():
    class Walled(Gaussian):
        def reduced(self, x):
            return torch.where(x[:, 0] > 0, super().reduced(x), math.inf)

    flow = flow_of(psi=True)
    objective = ContinuityResidual(**SMALL | {"explore": 1.0, "resample_below": 0.0})
    loss, numbers = objective(step_of(flow, Walled(2, 0.7)))
    lost = ~torch.isfinite(objective.tensors["energy"])
    assert lost.any() and not lost.all()
    loss.backward()
    assert torch.isfinite(loss) and math.isfinite(numbers["residual"])
    for name, parameter in flow.named_parameters():
        assert torch.isfinite(parameter.grad).all(), name
    assert flow.velocity.trunk.weight3.grad.abs().max() > 0


# --- sweeps ----------------------------------------------------------------------------------------------------------


def test_sweeps_come_every_so_often_and_the_oldest_are_forgotten():
    flow, objective = flow_of(), ContinuityResidual(**SMALL)
    step = step_of(flow, MIXTURE)
    kept, evaluations = [], [0]
    for call in range(10):
        _, numbers = objective(step)
        assert ("sweep_ess" in numbers) == (call % 3 == 0)
        kept.append(objective.tensors["x"].clone())
        evaluations.append(step.target.evaluations)
    assert [len(x) for x in kept] == [1, 1, 1, 2, 2, 2, 2, 2, 2, 2]
    assert torch.equal(kept[3][0], kept[2][0]) and torch.equal(kept[6][0], kept[5][1])
    assert not torch.equal(kept[6][1], kept[5][1])
    # a start, and one after the field and one after the move at each time; replay asks for nothing
    asked = [b - a for a, b in itertools.pairwise(evaluations)]
    assert asked == [40 * 13 if call % 3 == 0 else 0 for call in range(10)]
    assert {len(tensor) for name, tensor in objective.tensors.items() if name != "sizes"} == {2}


@pytest.mark.parametrize(("progress", "opened"), [(0.0, 0.1), (0.1, 0.325), (0.4, 1.0), (0.9, 1.0)])
def test_the_path_opens_with_the_run(progress, opened):
    objective = ContinuityResidual(**SMALL | {"curriculum": 0.4})
    _, numbers = objective(step_of(flow_of(), MIXTURE, progress=progress))
    assert numbers["opened"] == pytest.approx(opened)
    t = objective.tensors["t"][0]
    assert t[-1] == pytest.approx(opened) and (t > 0).all() and (t.diff() > 0).all()
    at_once = ContinuityResidual(**SMALL)
    assert at_once(step_of(flow_of(), MIXTURE))[1]["opened"] == 1


def test_lengths_of_moves_are_learned_and_kept_over_the_sweeps():
    objective = ContinuityResidual(**SMALL | {"refresh": 1, "times": 32})
    step = step_of(flow_of(), MIXTURE)
    objective(step)
    first = objective.tensors["sizes"].clone()
    assert (first[3:] > math.log(1e-2) + 1).all(), "the first length is a short one here"
    rates = [objective(step)[1]["moves"] for _ in range(8)]
    assert min(rates) > 0.3 and max(rates) < 0.9
    assert (objective.tensors["sizes"] - first)[20:].abs().max() < 1, "found in the first sweep"


def test_moves_of_many_steps_ask_for_more_energies():
    asked = []
    for leapfrog in (1, 5):
        step = step_of(flow_of(), MIXTURE)
        ContinuityResidual(**SMALL | {"leapfrog": leapfrog})(step)
        asked.append(step.target.evaluations)
    walkers, times = SMALL["walkers"], SMALL["times"]
    assert asked[1] - asked[0] == 4 * walkers * times


def test_every_second_sweep_is_hot():
    objective = ContinuityResidual(walkers=3000, times=8, moves=4, refresh=1, memory=2, curriculum=0.0, hot=1.5)
    step = step_of(flow_of(Exactly(2, 0.8)), Gaussian(2, 0.8))
    for _ in range(2):
        objective(step)
    # the last time is that of the target, whose variance is 0.64
    cold, warm = objective.tensors["x"][:, -1].var(1).mean(-1).tolist()
    assert cold == pytest.approx(0.64, rel=0.08)
    assert warm == pytest.approx(1.5 * 0.64, rel=0.08)
    # the exact field leaves no residual where the walkers are hot either
    assert float(objective(step)[0].detach()) < 1e-6
    for hot in (0.5, 2.0, math.nan):
        with pytest.raises(InputError, match="hot"):
            ContinuityResidual(hot=hot)


def test_flattened_weights_keep_their_order_and_leave_good_ones_alone():
    even = torch.randn(100, generator=torch.Generator().manual_seed(0)) * 0.1
    share, same = ContinuityResidual._tempered(even)
    assert share > 0.9 and torch.equal(same, even)
    steep = torch.linspace(0, 60, 100)
    steep[3] = -math.inf
    share, flat = ContinuityResidual._tempered(steep)
    w = torch.softmax(steep, 0)
    assert share == pytest.approx(float(1 / (100 * w.square().sum())), rel=1e-4) and share < 0.05
    w = torch.softmax(flat, 0)
    assert 1 / (100 * w.square().sum()) >= 0.3 and flat[3] == -math.inf
    keep = [i for i in range(100) if i != 3]
    assert (flat[keep].diff() > 0).all()


def test_seeds_reproduce_and_weights_of_the_flow_are_not_touched():
    flow = flow_of(psi=True)
    before = {name: tensor.clone() for name, tensor in flow.state_dict().items()}
    losses = [ContinuityResidual(**SMALL)(step_of(flow, MIXTURE, seed=seed))[0].item() for seed in (1, 1, 2)]
    assert losses[0] == losses[1] != losses[2]
    assert all(torch.equal(before[name], tensor) for name, tensor in flow.state_dict().items())


def test_it_needs_a_continuous_flow_and_an_energy():
    with pytest.raises(InputError, match="leapfrog must be a whole number of at least 1"):
        ContinuityResidual(leapfrog=0)
    flow = RealNVP(2, layers=2, hidden=(4,)).double()
    with pytest.raises(InputError, match="trains a ContinuousFlow, not a RealNVP"):
        ContinuityResidual()(step_of(flow, MIXTURE))
    with pytest.raises(InputError, match="energy"):
        bg.BoltzmannGenerator(None, flow_of()).fit(steps=2, objective=ContinuityResidual(), progress=False)


# --- learning --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("psi", [False, True])
def test_a_short_training_finds_a_mixture_of_unequal_weights(psi):
    perturbation = PerceptronEnergy(2, 24, windows=6) if psi else None
    flow = ContinuousFlow(
        Base([False] * 2, std=STD), PerceptronVelocity(2, 32, windows=6), perturbation=perturbation, steps=20
    )
    generator = bg.BoltzmannGenerator(MIXTURE, flow, defensive=0.0)
    before = effective_sample_size(generator.sample(2000, seed=1).log_weights).fraction
    result = generator.fit(
        steps=400,
        objective=ContinuityResidual(walkers=128, times=16, refresh=40, groups=8),
        settings=Settings(batch_size=256, average=0.98, validate_every=10_000, validation_size=500),
        progress=False,
    )
    assert result.skipped == 0 and result.evaluations == 10 * 128 * 33
    samples = generator.sample(2000, seed=1)
    after = effective_sample_size(samples.log_weights).fraction
    # the straight path has to carry mass from one mode to the other, which a learned path avoids
    assert before < 0.25 and after > (0.85 if psi else 0.5)
    right = reweighted_mean((samples.positions[:, 0] > 0).double(), samples.log_weights)
    assert right.error < 0.03 and abs(right.value - 0.75) < 4 * right.error
    if psi:
        assert abs((samples.positions[:, 0] > 0).double().mean() - 0.75) < 0.1, "by the flow alone"


def test_it_is_what_a_continuous_flow_is_trained_with():
    generator = bg.BoltzmannGenerator(MIXTURE, flow_of())
    result = generator.fit(
        steps=3, progress=False, settings=Settings(batch_size=32, validate_every=100, validation_size=10)
    )
    assert result.evaluations == 512 * 129
