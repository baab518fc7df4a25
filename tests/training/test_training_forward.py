"""The forward path gradient: that of maximum likelihood on average, without its noise at the target."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from scipy.stats import norm, qmc
from small_runs import QUICK, Acting, check_resumption

import openmm_bg as bg
from openmm_bg.errors import InputError
from openmm_bg.flows import MolecularFlow, RealNVP, SplineFlow
from openmm_bg.training import ForwardPath, LogVariance, MaximumLikelihood, Settings
from openmm_bg.training.objectives import Step


def evenly(dimension: int, log2_n: int) -> torch.Tensor:
    """Points of the standard normal that are spread evenly, ``(2^log2_n, dimension)``."""
    return torch.as_tensor(norm.ppf(qmc.Sobol(dimension, seed=1).random_base2(log2_n)))


class Density:
    """A target by its log-density, as objectives see it."""

    def __init__(self, log_density):
        self.log_density, self.evaluations = log_density, 0

    def value_and_gradient(self, q):
        self.evaluations += len(q)
        leaf = q.detach().requires_grad_()
        u = -self.log_density(leaf)
        (gradient,) = torch.autograd.grad(u.sum(), leaf)
        return u.detach(), gradient


def perturbed(flow, scale: float = 0.3, seed: int = 0):
    """The flow in double precision, with weights that are not those of its start."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in flow.double().parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=random, dtype=torch.float64))
    return flow


def gradient_of(objective, flow, data, target) -> torch.Tensor:
    """The gradient of the loss on all of the data, by all parameters, as one vector."""
    step = Step(flow, target, lambda n: data[:n], len(data), 0.0, torch.Generator().manual_seed(0))
    loss, _ = objective(step)
    return flat(loss, flow)


def flat(loss, flow) -> torch.Tensor:
    parameters = list(flow.parameters())
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return torch.cat(
        [torch.zeros_like(p).flatten() if g is None else g.flatten() for p, g in zip(parameters, found, strict=True)]
    )


def row_by_row(objective, flow, data, target) -> torch.Tensor:
    return torch.stack([gradient_of(objective, flow, row[None], target) for row in data])


def molecular() -> MolecularFlow:
    """Two bonds, a stiff torsion and one free torsion."""
    flow = MolecularFlow(4, torsions=[3], rotors={}, stiff_torsions=[2], layers=2, hidden=8, torsion_hidden=8)
    flow = flow.double()
    flow.initialize(0.3 * torch.randn(200, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    return perturbed(flow, 0.1)


def rotor() -> MolecularFlow:
    """The free torsion is a rotor, measured as the mean of three: the chart is a shear."""
    flow = MolecularFlow(
        5, torsions=[2], rotors={2: (3, 4)}, stiff_torsions=[3, 4], layers=2, hidden=8, torsion_hidden=8
    )
    flow = flow.double()
    flow.initialize(0.2 * torch.randn(200, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    return perturbed(flow, 0.1)


# -- its mean


def test_in_one_dimension_its_mean_is_the_closed_form():
    """y = exp(s) z + t under p = N(m, w^2): KL(p || q) = s + (w^2 + (m - t)^2) exp(-2 s) / 2 + const."""
    mean, width = -0.2, 1.4
    flow = RealNVP(1, layers=2).double()
    (values,) = flow.parameters()
    with torch.no_grad():
        values.copy_(torch.tensor([0.6, 0.3], dtype=torch.float64))
    s, t = 2 * torch.tanh(values[0] / 2), values[1]
    expected = flat(s + 0.5 * (width**2 + (mean - t) ** 2) * torch.exp(-2 * s), flow)
    data = mean + width * evenly(1, 14)
    target = Density(lambda x: -0.5 * ((x[:, 0] - mean) / width) ** 2 + 7.0)
    assert gradient_of(ForwardPath(), flow, data, target) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("kind", ["realnvp", "spline"])
def test_its_mean_is_that_of_maximum_likelihood(kind):
    flow = {
        "realnvp": lambda: RealNVP(2, layers=4, hidden=(8,)),
        "spline": lambda: SplineFlow([False] * 2, layers=2, bins=6, hidden=(8,)),
    }[kind]()
    perturbed(flow, 0.3 if kind == "realnvp" else 0.03)
    mean, widths = torch.tensor([0.3, -0.2], dtype=torch.float64), torch.tensor([1.1, 0.8], dtype=torch.float64)
    data = mean + widths * evenly(2, 15)
    target = Density(lambda x: -0.5 * ((x - mean) / widths).square().sum(-1))
    forward, likelihood = (
        gradient_of(objective, flow, data, target) for objective in (ForwardPath(), MaximumLikelihood())
    )
    assert likelihood.norm() > 0.1
    assert (forward - likelihood).norm() < 1e-3 * likelihood.norm()


@pytest.mark.parametrize("make", [molecular, rotor])
def test_of_a_molecular_flow_it_trains_the_stiff_coordinates_given_the_torsions(make):
    """On p(t) N(y; m(t), diag w^2), the mean is the likelihood's of y given t; the torsions' density stays."""
    flow = make()
    stiff = len(flow.chart.stiff)
    noise = evenly(stiff + 1, 15)
    t = (2 * math.pi * (torch.special.ndtr(noise[:, :1]) - 0.5)).clamp(-3.14, 3.14)
    widths = torch.linspace(0.15, 0.25, stiff, dtype=torch.float64)

    def middle(t):
        return 0.1 * torch.cos(t + torch.arange(stiff))

    def log_density(q):
        t, y = flow.chart.split(q)
        return -0.5 * ((y - middle(t)) / widths).square().sum(-1) + 0.3 * torch.sin(2 * t[:, 0])

    y = middle(t) + widths * noise[:, 1:]
    data = flow.chart.join(t, y)
    assert torch.isfinite(data).all()
    forward = gradient_of(ForwardPath(), flow, data, Density(log_density))
    likelihood = flat(-flow.log_prob_stiff(y, t).mean(), flow)
    assert likelihood.norm() > 0.1
    assert (forward - likelihood).norm() < 1e-2 * likelihood.norm()
    loss, _ = ForwardPath()(Step(flow, Density(log_density), lambda n: data[:n], 50, 0.0, torch.Generator()))
    loss.backward()
    assert all(p.grad is None or (p.grad == 0).all() for p in flow.torsions.parameters())


# -- its noise


@pytest.mark.parametrize("kind", ["realnvp", "spline", "masked"])
def test_at_the_target_it_vanishes_sample_by_sample(kind):
    """Where the likelihood's gradient is zero only on average."""
    flow = {
        "realnvp": lambda: RealNVP(3, layers=4, hidden=(8,)),
        "masked": lambda: RealNVP(3, layers=4, hidden=(8,), networks="masked"),
        "spline": lambda: SplineFlow([False] * 3, layers=2, bins=6, hidden=(8,)),
    }[kind]()
    perturbed(flow)
    data, _ = flow.sample(12, torch.Generator().manual_seed(3))
    target = Density(lambda x: flow.log_prob(x) - 5.0)
    assert row_by_row(ForwardPath(), flow, data, target).abs().max() < 1e-9
    assert row_by_row(MaximumLikelihood(), flow, data, target).abs().max() > 0.1


@pytest.mark.parametrize("make", [molecular, rotor])
def test_at_the_target_of_a_molecular_flow_it_vanishes_whatever_the_torsions_weigh(make):
    flow = make()
    data, _ = flow.sample(12, torch.Generator().manual_seed(3))

    def log_density(q):
        t, y = flow.chart.split(q)
        return flow.log_prob_stiff(y, t) + 2.0 * torch.cos(t[:, 0])

    # a sum over t that y cannot see, so that p(y | t) is the flow's own
    assert row_by_row(ForwardPath(), flow, data, Density(log_density)).abs().max() < 1e-9
    assert gradient_of(MaximumLikelihood(), flow, data, None).abs().max() > 1e-2


def test_near_the_target_its_noise_is_smaller_than_the_likelihoods():
    flow = perturbed(RealNVP(2, layers=4, hidden=(8,)), 0.1)
    data = evenly(2, 10)
    target = Density(lambda x: -0.5 * x.square().sum(-1))
    forward, likelihood = (
        row_by_row(objective, flow, data[:80], target) for objective in (ForwardPath(), MaximumLikelihood())
    )
    assert forward.var(0).sum() < 0.2 * likelihood.var(0).sum()


def test_large_scores_keep_their_part_in_the_mean():
    """A third of the data lies in a valley a hundred times as narrow as the rest, with scores a hundred times as large.

    y = exp(s) z + t: KL(p || q) = s + (variance + (mean - t)^2) exp(-2 s) / 2 + const, whatever p is.
    """
    flow = RealNVP(1, layers=2).double()
    (values,) = flow.parameters()
    with torch.no_grad():
        values.copy_(torch.tensor([0.4, 0.1], dtype=torch.float64))
    s, t = 2 * torch.tanh(values[0] / 2), values[1]
    narrow, wide = 1.0 + 0.01 * evenly(1, 12), evenly(1, 13)
    mean, square = 1 / 3, (1 + 0.01**2 + 2) / 3
    expected = flat(s + 0.5 * (square - mean**2 + (mean - t) ** 2) * torch.exp(-2 * s), flow)

    def log_density(x):
        parts = [(1 / 3, 1.0, 0.01), (2 / 3, 0.0, 1.0)]
        logs = [math.log(w / d) - 0.5 * ((x[:, 0] - m) / d) ** 2 for w, m, d in parts]
        return torch.logsumexp(torch.stack(logs), 0)

    data = torch.cat([narrow, wide])
    step = Step(flow, Density(log_density), lambda n: data[:n], len(data), 0.0, torch.Generator())
    loss, numbers = ForwardPath()(step)
    assert numbers["largest_score"] > 50 and numbers["lost"] == 0
    assert flat(loss, flow) == pytest.approx(expected, rel=1e-2)


def test_rows_without_an_energy_are_left_out():
    flow = perturbed(RealNVP(2, layers=2, hidden=(8,)))
    data = evenly(2, 6)

    class Walled(Density):
        def value_and_gradient(self, q):
            u, gradient = super().value_and_gradient(q)
            wall = q[:, 0] > 0.5
            return torch.where(wall, math.inf, u), torch.where(wall[:, None], 0.0, gradient)

    def log_density(x):
        return -x.square().sum(-1)

    inside = data[data[:, 0] <= 0.5]
    assert 10 < len(inside) < 60
    got = gradient_of(ForwardPath(), flow, data, Walled(log_density))
    assert torch.allclose(got, gradient_of(ForwardPath(), flow, inside, Density(log_density)), atol=1e-12)
    nowhere = Step(flow, Walled(log_density), lambda n: data[:n] + 10.0, 8, 0.0, torch.Generator())
    assert not torch.isfinite(ForwardPath()(nowhere)[0])


# -- in training


def well(seed: int = 0) -> bg.BoltzmannGenerator:
    flow = RealNVP(2, layers=4, hidden=(16,), seed=seed)
    return bg.BoltzmannGenerator(bg.systems.load("double_well"), flow, defensive=0.0)


def well_data(n: int = 500, seed: int = 5) -> torch.Tensor:
    return bg.systems.load("double_well").sample(n, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("n", [100, 5000])
def test_every_row_is_evaluated_once(n):
    """However many steps; 5000 is more than one part of the labels."""
    data = well_data(n)
    for steps in (3, 20):
        result = well().fit(
            data, likelihood_steps=0, steps=steps, objective=ForwardPath(), settings=QUICK, progress=False
        )
        assert (result.steps, result.evaluations, result.skipped) == (steps, n, 0)


def test_known_energies_do_not_spare_the_forces():
    data = well_data(100)
    energies = bg.systems.load("double_well")(data)
    arguments = dict(likelihood_steps=0, steps=5, settings=QUICK, progress=False)
    known = well().fit(data, energies=energies, objective=ForwardPath(), **arguments)
    assert known.evaluations == 100
    both = [(1.0, LogVariance(own=0)), (1.0, ForwardPath())]
    assert well().fit(data, energies=energies, objective=both, **arguments).evaluations == 100


class Banana(bg.Energy):
    """x normal, y normal of width 1/2 about (x^2 - 1) / 2."""

    def __init__(self):
        super().__init__((2,))

    def reduced(self, x):
        return 0.5 * x[:, 0] ** 2 + 2 * (x[:, 1] - 0.5 * (x[:, 0] ** 2 - 1)) ** 2

    def sample(self, n: int, seed: int) -> torch.Tensor:
        z = torch.randn(n, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return torch.stack([z[:, 0], 0.5 * (z[:, 0] ** 2 - 1) + 0.5 * z[:, 1]], 1)


def test_few_data_are_enough_for_one_mode():
    """150 rows: the divergence from rows it has not seen vanishes; the likelihood's, of the same steps, does not."""
    target = Banana()
    data, fresh = target.sample(150, 5), target.sample(4000, 6)
    exact = -float(target(fresh).mean()) - math.log(math.pi)
    settings = Settings(batch_size=128, learning_rate=1e-2, average=0.98, validation_size=500)
    ends = {}
    for name, arguments in {
        "path": dict(likelihood_steps=0, steps=200, objective=ForwardPath()),
        "likelihood": dict(energy=False, steps=200),
    }.items():
        generator = bg.BoltzmannGenerator(target, RealNVP(2, layers=4, hidden=(16,)), defensive=0.0)
        assert exact - float(generator.log_prob(fresh).mean()) > 0.5
        generator.fit(data, settings=settings, progress=False, **arguments)
        ends[name] = exact - float(generator.log_prob(fresh).mean())
    assert abs(ends["path"]) < 0.01 and ends["likelihood"] > 0.03


def test_on_a_molecule_it_trains_without_a_stumble():
    """A flow that was fitted to thermal frames as a Gaussian: no score stands out, and the weights grow even."""
    trained = bg.BoltzmannGenerator.load(Path(__file__).parents[1] / "data" / "alanine_small.bg")
    samples = trained.sample(1000, seed=1)
    rows = torch.multinomial(samples.log_weights.softmax(0), 400, generator=torch.Generator().manual_seed(2))
    generator = bg.BoltzmannGenerator(
        trained.energy, MolecularFlow.from_config(trained.flow.config()), trained.coordinates
    )
    objective = [(1.0, ForwardPath()), (0.1, MaximumLikelihood(torsions_only=True))]
    result = generator.fit(
        samples.positions[rows], likelihood_steps=0, steps=30, objective=objective, progress=False,
        settings=Settings(batch_size=64, validation_size=500, validate_every=10, learning_rate=3e-3, average=0.9),
    )  # fmt: skip
    assert (result.evaluations, result.skipped, result.rollbacks) == (400, 0, 0)
    assert max(record["largest_score"] for record in result.history) < 10
    scores = [record["score"] for record in result.history]
    shares = [record["ess_clipped"] for record in result.history]
    assert scores[-1] < 0.8 * scores[0] and shares[-1] > shares[0]


def test_an_interrupted_run_resumes_to_the_bit_and_counts_every_row_once(tmp_path, monkeypatch):
    arguments = dict(data=well_data(), likelihood_steps=5, steps=30)
    _, result = check_resumption(well, lambda: Acting(ForwardPath()), Acting, 17, tmp_path, monkeypatch, **arguments)
    assert (result.steps, result.evaluations) == (35, 500)


def test_it_needs_data_and_an_energy():
    with pytest.raises(InputError, match="ForwardPath needs data"):
        well().fit(steps=1, objective=ForwardPath(), progress=False)
    silent = bg.BoltzmannGenerator(None, RealNVP(2, layers=2, hidden=(8,)))
    with pytest.raises(InputError, match="energy"):
        bg.training.Trainer(silent, [bg.training.Stage("energy", 1, [(1.0, ForwardPath())])], well_data(10))
