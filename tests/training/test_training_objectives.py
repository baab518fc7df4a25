"""Gradients of the objectives and of the target, against closed forms, quadrature and autograd."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from openmm import app

import openmm_bg as bg
from openmm_bg.energies import Energy
from openmm_bg.errors import InputError
from openmm_bg.flows import MolecularFlow, RealNVP, SplineFlow
from openmm_bg.sampling import effective_sample_size
from openmm_bg.sampling.target import Target
from openmm_bg.training import LogVariance, MaximumLikelihood, ReversePath, Settings
from openmm_bg.training.objectives import Step


class Gaussian(Energy):
    """N(mean, width^2) in one dimension; -log of the density, or off by ``shift``."""

    def __init__(self, mean: float, width: float, shift: float = 0.0):
        super().__init__((1,))
        self.mean, self.width, self.shift = mean, width, shift

    def reduced(self, x):
        constant = math.log(self.width) + 0.5 * math.log(2 * math.pi) + self.shift
        return 0.5 * ((x[:, 0] - self.mean) / self.width) ** 2 + constant


def one_dimension(scale: float = 0.6, shift: float = 0.3) -> RealNVP:
    """y = exp(2 tanh(scale / 2)) z + shift, the two numbers being the parameters."""
    flow = RealNVP(1, layers=2).double()
    (values,) = flow.parameters()
    with torch.no_grad():
        values.copy_(torch.tensor([scale, shift], dtype=torch.float64))
    return flow


def step_of(flow, energy, n: int, data=None, seed: int = 0) -> Step:
    target = None if energy is None else Target(bg.BoltzmannGenerator(energy, flow), torch.float64)
    return Step(flow, target, data, n, 0.0, torch.Generator().manual_seed(seed))


def test_reverse_path_is_the_gradient_of_the_divergence():
    mean, width = -0.2, 1.4
    flow = one_dimension()
    (values,) = flow.parameters()
    s, t = 2 * torch.tanh(values[0] / 2), values[1]
    exact = math.log(width) - s + ((2 * s).exp() + (t - mean) ** 2) / (2 * width**2) - 0.5
    (expected,) = torch.autograd.grad(exact, values)
    n, estimates = 20_000, []
    for seed in range(20):
        loss, _ = ReversePath(power=0)(step_of(flow, Gaussian(mean, width), n, seed=seed))
        estimates.append(torch.autograd.grad(loss, values)[0])
    estimates = torch.stack(estimates)
    error = estimates.std(0) / math.sqrt(len(estimates))
    assert (error < 0.05 * expected.abs()).all()
    assert ((estimates.mean(0) - expected).abs() < 4 * error).all()


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_powers_of_the_weight_are_divergences(power):
    """phi''(w) = w^(power - 2): the gradient of the integral of q phi(p/q), found by quadrature."""
    target = Gaussian(0.1, 1.2)
    flow = one_dimension(0.45, 0.4)
    (values,) = flow.parameters()
    x = torch.linspace(-15, 15, 30_001, dtype=torch.float64)[:, None]
    log_q = flow.log_prob(x)
    log_w = -target.reduced(x) - log_q
    phi = {0.0: -log_w, 0.5: -4 * (log_w / 2).exp(), 1.0: log_w.exp() * log_w}[power]
    (expected,) = torch.autograd.grad((log_q.exp() * phi).sum() * 1e-3 * 1.0, values)
    estimates = []
    for seed in range(20):
        objective = ReversePath(power=power, cap=math.inf)
        objective.tensors["log_mean_weight"] = torch.zeros((), dtype=torch.float64)
        loss, _ = objective(step_of(flow, target, 20_000, seed=seed))
        estimates.append(torch.autograd.grad(loss, values)[0])
    estimates = torch.stack(estimates)
    error = estimates.std(0) / math.sqrt(len(estimates))
    assert (error < 0.05 * expected.abs()).all()
    assert ((estimates.mean(0) - expected).abs() < 4 * error + 2e-3 * expected.abs()).all()


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_path_gradient_vanishes_without_noise_at_the_target(power):
    flow = one_dimension(0.0, 0.3)
    objective = ReversePath(power=power)
    loss, numbers = objective(step_of(flow, Gaussian(0.3, 1.0, shift=7.0), 100))
    (gradient,) = torch.autograd.grad(loss, list(flow.parameters()))
    assert gradient.abs().max() < 1e-12
    assert numbers["lost"] == 0 and numbers["spread"] < 1e-12


def test_rows_without_an_energy_do_not_spoil_the_others():
    class Walled(Gaussian):
        def reduced(self, x):
            return torch.where(x[:, 0] > 0, super().reduced(x), math.nan)

    flow = one_dimension()
    loss, numbers = ReversePath()(step_of(flow, Walled(0.0, 1.0), 500))
    gradient = torch.autograd.grad(loss, list(flow.parameters()))[0]
    assert torch.isfinite(gradient).all() and (gradient != 0).all() and 0.2 < numbers["lost"] < 0.6

    class Nowhere(Gaussian):
        def reduced(self, x):
            return x[:, 0] * math.nan

    loss, numbers = ReversePath()(step_of(flow, Nowhere(0.0, 1.0), 50))
    assert not torch.isfinite(loss) and numbers["lost"] == 1


def test_a_score_that_is_not_finite_leaves_the_gradient_finite():
    y = torch.zeros(4, 2, dtype=torch.float64, requires_grad=True)
    score = torch.ones(4, 2, dtype=torch.float64)
    score[1, 0] = math.nan
    loss = ReversePath(power=0)._path(y, score, torch.zeros(4, dtype=torch.float64))
    (gradient,) = torch.autograd.grad(loss, y)
    assert (gradient[1] == 0).all() and (gradient[[0, 2, 3]] == 0.25).all()


def test_maximum_likelihood_is_the_mean():
    flow = one_dimension()
    data = torch.linspace(-2, 2, 50, dtype=torch.float64)[:, None]
    loss, numbers = MaximumLikelihood()(step_of(flow, None, 50, lambda n: data[:n]))
    assert math.isclose(loss.item(), -flow.log_prob(data).mean().item())
    assert math.isclose(numbers["nll"], loss.item())
    faded = Step(flow, None, lambda n: data[:n], 50, 0.75, torch.Generator())
    assert math.isclose(MaximumLikelihood(fade=True)(faded)[0].item(), 0.25 * loss.item())


@pytest.mark.parametrize("constraints", [None, app.HBonds])
def test_target_is_energy_less_volume_and_its_gradient_is_autograds(constraints):
    molecule = bg.systems.load("alanine_dipeptide", constraints=constraints)
    run = bg.simulate(
        molecule.system, molecule.positions, temperature=300, n_frames=4, steps_per_frame=20, seed=1,
        platform="Reference", progress=False,
    )  # fmt: skip
    generator = bg.BoltzmannGenerator.for_molecule(molecule.topology, molecule.system, positions=run.positions[0])
    target = Target(generator, torch.float64)
    q, log_volume = generator.coordinates(torch.as_tensor(np.asarray(run.positions)).double())
    q[3, 5] = math.nan
    q[2, 0] = -0.1  # a bond of negative length
    value, gradient = target.value_and_gradient(q)
    assert (value[2:] == math.inf).all() and (gradient[2:] == 0).all()
    leaf = q[:2].clone().requires_grad_()
    x, volume = generator.coordinates.inverse(leaf)
    u = generator.energy(x) - volume
    (expected,) = torch.autograd.grad(u.sum(), leaf)
    assert torch.allclose(value[:2], u.detach(), rtol=0, atol=1e-9)
    assert torch.allclose(gradient[:2], expected, rtol=1e-9, atol=1e-7)
    assert torch.allclose(volume, log_volume[:2], atol=1e-9)
    assert target.evaluations == 4
    assert torch.allclose(target.value(q), value, rtol=0, atol=1e-9)
    step = 1e-5
    for column in (0, 30, q.shape[1] - 1):
        moved = q[:2].repeat(2, 1)
        moved[:2, column] += step
        moved[2:, column] -= step
        above, below = target.value(moved).split(2)
        assert torch.allclose((above - below) / (2 * step), gradient[:2, column], rtol=1e-4, atol=1e-2)


def test_molecular_objective_prefers_the_right_weights_of_basins():
    """The log-variance pushes the torsions' density towards the basins that hold too little of it."""
    flow = MolecularFlow(7, [5, 6], {}, [], layers=2, hidden=16, torsion_hidden=24).double()
    flow.initialize(0.3 * torch.randn(100, 7, generator=torch.Generator().manual_seed(0)))

    class Ideal:
        """A target whose every conditional is the flow's own, so that only the torsions are wrong."""

        evaluations = 0

        def value_and_gradient(self, q):
            leaf = q.detach().requires_grad_()
            t, y = flow.chart.split(leaf)
            u = -flow.log_prob_stiff(y, t) - 2.0 * torch.cos(t[:, 0])
            (gradient,) = torch.autograd.grad(u.sum(), leaf)
            return u.detach(), gradient

    optimizer = torch.optim.Adam(flow.torsions.parameters(), lr=2e-2)
    objective, random = ReversePath(explore=0.0), torch.Generator().manual_seed(0)
    spreads = []
    for _ in range(150):
        loss, numbers = objective(Step(flow, Ideal(), None, 128, 0.0, random))
        spreads.append(numbers["spread"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert spreads[0] > 1.0 and np.mean(spreads[-5:]) < 0.3 * spreads[0]
    with torch.no_grad():
        t = flow.draw_torsions(4000, random)
    # the mean cosine of the von Mises density with kappa = 2
    assert abs(float(t[:, 0].cos().mean()) - 0.6978) < 0.1


def test_log_variance_is_zero_at_the_target_only():
    s, shift = 0.6, 0.3
    flow = one_dimension(s, shift)
    width = math.exp(2 * math.tanh(s / 2))
    rows = torch.linspace(-6, 6, 500, dtype=torch.float64)[:, None]
    # any points, any constant of the energy
    loss, seen = LogVariance()(step_of(flow, Gaussian(shift, width, 7.0), 400, data=lambda n: rows[:n]))
    assert float(loss.detach()) < 1e-20 and seen["spread"] < 1e-9 and seen["lost"] == 0
    loss, _ = LogVariance()(step_of(flow, Gaussian(shift + 0.5, width, 7.0), 400, data=lambda n: rows[:n]))
    assert float(loss.detach()) > 0.01


def test_log_variance_has_the_gradient_of_the_variance():
    flow = one_dimension()
    (values,) = flow.parameters()
    energy = Gaussian(-0.2, 1.4)
    rows = torch.linspace(-3, 2, 300, dtype=torch.float64)[:, None]
    loss, _ = LogVariance(own=0, delta=1e6)(step_of(flow, energy, 300, data=lambda n: rows[:n]))
    (got,) = torch.autograd.grad(loss, values)
    (expected,) = torch.autograd.grad(0.5 * (flow.log_prob(rows) + energy(rows)).var(correction=0), values)
    assert torch.allclose(got, expected, rtol=1e-9)


class Lopsided(Energy):
    """Two Gaussians of width 0.4 at -1.5 and 1.5 with weights 0.2 and 0.8; infinite beyond 6."""

    def __init__(self):
        super().__init__((1,))

    def reduced(self, x):
        parts = torch.stack([-0.5 * ((x[:, 0] - c) / 0.4) ** 2 + math.log(w) for c, w in ((-1.5, 0.2), (1.5, 0.8))])
        return torch.where(x[:, 0].abs() < 6, -torch.logsumexp(parts, 0), math.inf)


def test_log_variance_mends_the_weights_of_data():
    generator = bg.BoltzmannGenerator(Lopsided(), SplineFlow([False], layers=2, bins=24, bound=5.0), defensive=0.0)
    random = torch.Generator().manual_seed(0)
    rows = 0.4 * torch.randn(2000, 1, generator=random) + 1.5 * torch.randn(2000, 1, generator=random).sign()
    settings = Settings(batch_size=512, learning_rate=2e-2, average=0.98)
    generator.fit(rows, likelihood_steps=200, steps=0, settings=settings, seed=0, progress=False)
    before = generator.sample(4000, seed=1).positions
    assert abs(float((before > 0).double().mean()) - 0.5) < 0.05
    generator.fit(
        rows, likelihood_steps=0, steps=400, objective=LogVariance(), settings=settings, seed=0, progress=False
    )
    after = generator.sample(4000, seed=1)
    assert abs(float((after.positions > 0).double().mean()) - 0.8) < 0.03
    assert effective_sample_size(after.log_weights).fraction > 0.98


def test_log_variance_loses_points_without_an_energy_and_says_so():
    flow = one_dimension()
    rows = torch.tensor([[0.1], [0.2], [9.0], [math.nan]], dtype=torch.float64)
    loss, seen = LogVariance(own=0)(step_of(flow, Lopsided(), 4, data=lambda n: rows[:n]))
    assert math.isfinite(float(loss.detach())) and seen["lost"] == 0.5
    loss, _ = LogVariance(own=0)(step_of(flow, Lopsided(), 2, data=lambda n: rows[2:]))
    assert math.isnan(float(loss))


@pytest.mark.parametrize("arguments", [{"own": -0.1}, {"own": 1.5}, {"own": math.nan}, {"delta": 0.0}])
def test_log_variance_refuses(arguments):
    with pytest.raises(InputError, match="must be"):
        LogVariance(**arguments)


def test_log_variance_asks_for_data_unless_it_draws_everything():
    generator = bg.BoltzmannGenerator(Lopsided(), SplineFlow([False], layers=2))
    with pytest.raises(InputError, match="needs data"):
        generator.fit(steps=1, objective=LogVariance(), progress=False)
    assert generator.fit(steps=1, objective=LogVariance(own=1.0), progress=False).steps == 1


class Itself:
    """The flow's own density as the target, so that every weight is one and nothing is left to learn."""

    def __init__(self, flow):
        self.flow = flow

    def value_and_gradient(self, q):
        q = q.detach().requires_grad_()
        u = -self.flow.log_prob(q)
        return u.detach(), torch.autograd.grad(u.sum(), q)[0]


@pytest.mark.parametrize("power", [0.0, 0.5])
def test_the_path_gradient_of_a_molecule_vanishes_at_its_own_density(power):
    """It does so sample by sample, and only if the score of the stiff coordinates is in it."""
    flow = MolecularFlow(7, torsions=[5, 6], rotors={}, stiff_torsions=[4], layers=3, hidden=8).double()
    random = torch.Generator().manual_seed(0)
    flow.initialize(0.1 * torch.randn(200, 7, generator=random, dtype=torch.float64))
    with torch.no_grad():
        for parameter in flow.stiff.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=random, dtype=parameter.dtype)
    step = Step(flow, Itself(flow), None, 64, 0.0, random)
    loss, numbers = ReversePath(power=power, variance=0.0, explore=0.0)(step)
    gradients = torch.autograd.grad(loss, list(flow.stiff.parameters()))
    assert numbers["spread"] < 1e-9 and max(float(g.abs().max()) for g in gradients) < 1e-9
