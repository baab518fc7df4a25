"""What is recorded on a CUDA device, as far as a CPU can tell; the rest where there is a device."""

import copy
import itertools
import math

import pytest
import torch

import openmm_bg as bg
from openmm_bg.flows import MolecularFlow, RealNVP
from openmm_bg.sampling.target import Target
from openmm_bg.training import LogVariance, MaximumLikelihood, ReversePath, Settings
from openmm_bg.training.objectives import Step
from openmm_bg.training.replay import Replay

# what a graph replays shows on a device alone; that a step can be recorded is checked without one
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


class Guarded(torch.utils._python_dispatch.TorchDispatchMode):
    """Refuses whatever would make the host wait for the device, or give shapes that depend on data."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__
        if name.split(".")[0] in ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique", "_unique2"):
            raise AssertionError(f"{name} waits for the device")
        if name.startswith(("index.", "index_put")) and any(i is not None and i.dtype == torch.bool for i in args[1]):
            raise AssertionError(f"{name} by a mask waits for the device")
        return function(*args, **(kwargs or {}))


class Quiet:
    """A target of fixed shapes, as the compiled energy of a device is."""

    def value_and_gradient(self, q):
        return (q.square().sum(-1) / 2).detach(), q.detach()


def molecular() -> MolecularFlow:
    flow = MolecularFlow(6, torsions=[4, 5], rotors={}, stiff_torsions=[3], layers=2, hidden=8)
    flow.initialize(0.1 * torch.randn(100, 6, generator=torch.Generator().manual_seed(0)))
    return flow


@pytest.mark.parametrize("objective", [ReversePath(), ReversePath(power=0, temper=0), MaximumLikelihood()])
@pytest.mark.parametrize("make", [molecular, lambda: RealNVP(6, layers=2, hidden=(8,))])
def test_a_recorded_step_looks_at_no_number(objective, make):
    flow, data = make(), torch.zeros(64, 6)
    step = Step(flow, Quiet(), lambda n: data[:n], 32, torch.tensor(0.3), torch.Generator().manual_seed(1))
    for _ in range(2):
        with Guarded():
            loss, _ = objective(step)
            torch.autograd.grad(loss, list(flow.parameters()), allow_unused=True)
        if hasattr(objective, "advance"):
            objective.advance()


def test_the_guard_sees_what_it_should():
    x = torch.arange(3.0)
    for look in (lambda: float(x[0]), lambda: x[x > 1], lambda: x.nonzero(), lambda: bool((x > 1).any())):
        with pytest.raises(AssertionError, match="waits"), Guarded():
            look()


def test_the_torsions_are_renewed_every_eighth_step():
    flow, objective = molecular(), ReversePath()
    step = Step(flow, Quiet(), None, 16, 0.0, torch.Generator().manual_seed(1))
    seen = []
    for _ in range(17):
        objective(step)
        objective.advance()
        seen.append(objective.tensors["torsions"])
    renewed = [a is not b for a, b in itertools.pairwise(seen)]
    assert renewed == [*[False] * 7, True] * 2


def test_exploration_turns_its_share_and_fades():
    flow, objective = molecular(), ReversePath(explore=0.4)
    for progress, share in ((0.0, 0.4), (0.5, 0.2), (1.0, 0.0)):
        step = Step(flow, Quiet(), None, 4000, progress, torch.Generator().manual_seed(1))
        _, explored = objective._draw_torsions(flow, step)
        assert abs(float(explored.float().mean()) - share) <= 4 * math.sqrt(share * (1 - share) / 4000)


@pytest.mark.parametrize("progress", [0.0, 0.6, 1.0])
def test_torsions_are_drawn_from_the_flattened_density(progress):
    """Two bins of known probability: a draw without replacement by weights of the power 1 - temper, which fades."""
    flow, objective = molecular(), ReversePath(temper=0.5, explore=0.0)
    n = 500
    log_q = torch.cat([torch.full((3 * n,), math.log(0.9)), torch.full((n,), math.log(0.1))])
    many = torch.cat([torch.full((3 * n, 2), 1.0), torch.full((n, 2), -1.0)])
    objective._pool = lambda *_: (many, log_q)
    rare = []
    for seed in range(40):
        step = Step(flow, Quiet(), None, n, progress, torch.Generator().manual_seed(seed))
        t, _ = objective._draw_torsions(flow, step)
        rare.append(float((t[:, 0] < 0).float().mean()))
    # by successive draws: the share of what remains, weights 1 and 9^temper
    weight = 9 ** (0.5 * (1 - progress * 2 / 3))
    left, expected = [3.0 * n, 1.0 * n], 0.0
    for _ in range(n):
        p = weight * left[1] / (weight * left[1] + left[0])
        expected += p / n
        left = [left[0] - (1 - p), left[1] - p]
    assert abs(sum(rare) / 40 - expected) < 0.01


def test_dead_regions_pay_more_and_more_and_clashes_little():
    """Slopes of the log-variance: square near the median, linear above the window, small and growing below it."""
    objective = ReversePath(window=6.0)
    start = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, -3.0, 3.0, 20.0, -20.0, -math.inf])
    explored = torch.zeros(10, dtype=torch.bool)
    slopes = []
    for progress in (0.0, 0.5, 1.0):
        log_w = start.clone().requires_grad_()
        objective._log_variance(log_w, explored, torch.ones(10), progress)[0].backward()
        slopes.append(9 * log_w.grad)  # nine are finite, the mean of those near the median is 0
    for slope, below in zip(slopes, (0.0, -1.0, -2.0), strict=True):
        assert torch.allclose(slope, torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, -6.0, 6.0, 12.0, below, 0.0]))


def test_the_fused_optimiser_leaves_out_what_is_not_finite():
    """What a recorded step relies on."""
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.Adam([weight], lr=0.1, fused=True)
    weight.grad = torch.ones(3)
    optimizer.found_inf = torch.tensor(0.0)
    optimizer.step()
    state = {k: v.clone() for k, v in optimizer.state[weight].items()}
    before = weight.detach().clone()
    assert (before < 1).all()
    weight.grad = torch.full((3,), math.nan)
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    assert torch.equal(weight.detach(), before)
    assert all(torch.equal(state[k], v) for k, v in optimizer.state[weight].items())


def test_only_objectives_that_say_so_are_recorded():
    assert Replay.can([(1.0, ReversePath()), (0.1, MaximumLikelihood())])
    assert not Replay.can([(1.0, ReversePath()), (0.1, LogVariance())])


@needs_cuda
def test_recorded_training_learns_what_plain_training_does(monkeypatch):
    target = bg.systems.load("double_well")

    def ess() -> float:
        generator = bg.BoltzmannGenerator(copy.deepcopy(target), RealNVP(2, layers=4, hidden=(32,)), defensive=0.0)
        settings = Settings(device="cuda", batch_size=256, validate_every=400)
        result = generator.fit(steps=400, settings=settings, seed=1, progress=False)
        assert result.skipped == 0 and result.evaluations == 400 * 256
        return result.history[-1]["ess"]

    recorded = ess()
    monkeypatch.setattr(Replay, "can", staticmethod(lambda terms: False))
    assert abs(recorded - ess()) < 0.1


@needs_cuda
def test_the_target_of_a_molecule_can_be_recorded():
    molecule = bg.systems.load("alanine_dipeptide")
    generator = bg.BoltzmannGenerator.for_molecule(
        molecule.topology, molecule.system, 300, positions=molecule.positions
    )
    target = Target(generator, torch.float32, "cuda")
    random = torch.Generator("cuda").manual_seed(0)
    q = copy.deepcopy(generator.flow).float().to("cuda").sample(64, random)[0]
    expected = target.value_and_gradient(q)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value, gradient = target.value_and_gradient(q)
    graph.replay()
    assert torch.allclose(value, expected[0]) and torch.allclose(gradient, expected[1])
