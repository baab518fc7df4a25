"""Steps in latent space: reversible in the base, exact in the target for many walkers at once, and in batches."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from openmm_bg import flows
from openmm_bg.coordinates import InternalCoordinates, ZMatrix
from openmm_bg.errors import InputError
from openmm_bg.generator import BoltzmannGenerator
from openmm_bg.sampling.latent_moves import TARGET_ACCEPTANCE, LatentProposals, latent_step
from openmm_bg.sampling.latents import latents_of
from openmm_bg.sampling.metropolis import log_acceptance

# -- the kernel


@pytest.mark.parametrize("step", [0.1, 0.6, 0.999])
def test_steps_leave_the_base_alone_and_both_kinds_forget_at_one_rate(step):
    n, random = 40_000, torch.Generator().manual_seed(1)
    base = flows.Base([False, True], std=1.5).double()
    z = base.sample(n, random)
    new = latent_step(z, step, base.circular, base.std, random)
    normal, circle = new[:, 0] / 1.5, new[:, 1]
    error = 4 / math.sqrt(n)
    assert abs(normal.mean()) < error and normal.square().mean() == pytest.approx(1, abs=1.5 * error)
    assert abs(circle.cos().mean()) < error and (circle.abs() <= math.pi).all()
    rate = math.sqrt(1 - step**2)
    assert (normal * z[:, 0] / 1.5).mean() == pytest.approx(rate, abs=1.5 * error)
    assert (circle - z[:, 1]).cos().mean() == pytest.approx(rate, abs=error)


def test_steps_are_reversible():
    """Pairs (z, z') of a stationary chain are distributed as (z', z): odd moments of the pair vanish."""
    n, random = 200_000, torch.Generator().manual_seed(2)
    base = flows.Base([False, True]).double()
    z = base.sample(n, random)
    new = latent_step(z, 0.7, base.circular, base.std, random)
    for f, g in ((lambda v: v[:, 0] ** 2, lambda v: v[:, 0] ** 4), (lambda v: v[:, 1].cos(), lambda v: v[:, 1].sin())):
        odd = f(z) * g(new) - f(new) * g(z)
        assert abs(odd.mean()) < 4 * odd.std() / math.sqrt(n)


# -- exact averages, for many walkers


def walk(flow, energy, q, steps, *, step=0.5, volume=None, drop_q=False, mixture=None, seed=0, refresh=0.0):
    """Many walkers make latent steps on a reduced energy of internal coordinates; yields them after every step.

    `volume` is the log of the volume element of the coordinates, `mixture` a faulty density instead of the flow's,
    `refresh` the share of steps that are independent draws instead.
    """
    random, rng = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
    latents = latents_of(flow)

    def density(q, log_prob):
        value = log_prob if mixture is None else mixture(q)
        return torch.zeros_like(value) if drop_q else value - (0 if volume is None else volume(q))

    with torch.no_grad():
        z, image, log_prob = latents.inverse(q)
        for _ in range(steps):
            if rng.random() < refresh:
                new = flow.sample(len(q), random)[0]
            else:
                new = latents.forward(latent_step(z, step, latents.circular, latents.std, random), image)
            inside = torch.isfinite(new).all(-1)
            new = torch.where(inside[:, None], new, q)
            z_new, image_new, log_prob_new = latents.inverse(new)
            ratio = log_acceptance(energy(q), energy(new), density(q, log_prob), density(new, log_prob_new))
            yes = torch.from_numpy(-rng.standard_exponential(len(q)) <= ratio) & inside
            q = torch.where(yes[:, None], new, q)
            z, image = torch.where(yes[:, None], z_new, z), torch.where(yes[:, None], image_new, image)
            log_prob = torch.where(yes, log_prob_new, log_prob)
            yield q


def deviation(frames, observe, exact, burn=40):
    """Of the averages over walkers and time, in standard errors over independent walkers."""
    kept = torch.stack([observe(q) for i, q in enumerate(frames) if i >= burn]).mean(0)
    return (kept.mean(0) - torch.as_tensor(exact)) / (kept.std(0) / math.sqrt(len(kept)))


class Narrow(flows.Transform):
    """A linear map in one dimension, a Moebius map of the circle in the other."""

    def __init__(self, scale=0.8):
        super().__init__(2)
        self.scale, self.k = scale, 0.6

    def forward(self, z, context=None):
        x, angle = z.unbind(1)
        turned = 2 * torch.atan2(self.k * torch.sin(angle / 2), torch.cos(angle / 2))
        slope = self.k / (torch.cos(angle / 2) ** 2 + (self.k * torch.sin(angle / 2)) ** 2)
        return torch.stack([0.3 + self.scale * x, flows.wrap(turned + 0.5)], 1), slope.log() + math.log(self.scale)

    def inverse(self, y, context=None):
        x, angle = (y[:, 0] - 0.3) / self.scale, flows.wrap(y[:, 1] - 0.5)
        turned = 2 * torch.atan2(torch.sin(angle / 2), self.k * torch.cos(angle / 2))
        slope = (1 / self.k) / (torch.cos(angle / 2) ** 2 + (torch.sin(angle / 2) / self.k) ** 2)
        return torch.stack([x, turned], 1), slope.log() - math.log(self.scale)


def narrow_flow():
    return flows.Flow(flows.Base([False, True]), Narrow()).double()


def line_and_circle(q):
    """exp(-u): a standard normal, and a von Mises density of concentration 1 at zero."""
    return 0.5 * q[:, 0].square() - q[:, 1].cos()


def moments(q):
    return torch.stack([q[:, 0], q[:, 0].square(), q[:, 1].cos(), q[:, 1].sin()], 1)


EXACT = [0.0, 1.0, float(torch.special.i1(torch.tensor(1.0)) / torch.special.i0(torch.tensor(1.0))), 0.0]


@pytest.mark.parametrize("step", [0.3, 0.8])
def test_line_and_circle_are_exact(step):
    start = torch.zeros(4000, 2, dtype=torch.float64)
    frames = walk(narrow_flow(), line_and_circle, start, 200 if step < 0.5 else 120, step=step)
    assert deviation(frames, moments, EXACT).abs().max() < 3.5


def test_line_and_circle_are_wrong_without_the_density():
    start = torch.zeros(4000, 2, dtype=torch.float64)
    frames = walk(narrow_flow(), line_and_circle, start, 120, step=0.8, drop_q=True)
    assert deviation(frames, moments, EXACT).abs().max() > 20


def test_line_and_circle_are_wrong_with_the_density_of_the_mixture():
    """Latents are those of the flow; its broadened copy has no part in a step."""
    flow = narrow_flow()

    def mixture(q):
        plain, broad = flow.log_probs(q)
        return torch.logaddexp(plain + math.log(0.5), broad + math.log(0.5))

    flow.base.share = 0.5
    frames = walk(flow, line_and_circle, torch.zeros(4000, 2, dtype=torch.float64), 120, step=0.8, mixture=mixture)
    assert deviation(frames, moments, EXACT).abs().max() > 10


# -- a constrained trimer of masses 12, 3, 12: its angle alone, with the mass-metric term


def trimer(mass_metric=True):
    masses = (12.0, 3.0, 12.0)
    coordinates = InternalCoordinates(
        ZMatrix((0, 1, 2), np.zeros((0, 4), dtype=int)), constraints=[(0, 1, 0.1), (1, 2, 0.12)], masses=masses
    )
    if not mass_metric:
        coordinates.mass_metric = None
    return coordinates


class OfAngle(flows.Transform):
    def forward(self, z, context=None):
        return 1.8 + 0.6 * z, z.new_full((len(z),), math.log(0.6))

    def inverse(self, y, context=None):
        return (y - 1.8) / 0.6, y.new_full((len(y),), -math.log(0.6))


@pytest.mark.parametrize(("mass_metric", "exact"), [(True, 0.2947), (False, 1 / 3)])
def test_trimer_has_the_mass_metric_measure_and_not_without_the_term(mass_metric, exact):
    flow = flows.Flow(flows.Base([False]), OfAngle(1)).double()
    coordinates = trimer(mass_metric)

    def energy(q):
        return torch.where(torch.isfinite(coordinates.inverse(q)[1]), 0.0, torch.inf)

    start = torch.full((4000, 1), 1.5, dtype=torch.float64)
    frames = walk(flow, energy, start, 100, step=0.7, volume=lambda q: coordinates.inverse(q)[1])
    kept = torch.stack([q[:, 0].cos().square() for i, q in enumerate(frames) if i >= 20]).mean(0)
    assert abs(kept.mean() - exact) < 3.5 * kept.std() / math.sqrt(len(kept)) + 1e-4
    assert kept.std() / math.sqrt(len(kept)) < 0.003


# -- rotors


def rotor_energy(q):
    """Three wells that are not equally deep, as next to something that breaks the symmetry."""
    return (3 * q[:, 0]).cos() + 0.8 * (q[:, 0] - 0.5).cos()


def rotor_moments(q):
    return torch.stack([q[:, 0].cos(), q[:, 0].sin(), (3 * q[:, 0]).cos()], 1)


def rotor_exact():
    x = torch.linspace(-math.pi, math.pi, 20_001, dtype=torch.float64)[:-1, None]
    weight = torch.exp(-rotor_energy(x))
    return (rotor_moments(x) * weight[:, None]).sum(0) / weight.sum()


def rotor_flow(model):
    if model == "spline":
        flow = flows.SplineTorsions([3], hidden=8)
        flow.transform.turn.data += 0.3
    else:
        flow = flows.AffineTorsions([3], layers=2, hidden=(8,), generator=torch.Generator().manual_seed(0))
        # the density reaches the cut, which lies inside a well
        flow.scale.fill_(2.0)
        flow.centre.fill_(2.0)
    return flow.double().eval()


@pytest.mark.parametrize("model", ["spline", "affine"])
def test_rotor_with_wells_of_different_depth_is_exact(model):
    """Latents of a spline cross between images; with an unrolled circle independent draws must do that."""
    flow = rotor_flow(model)
    refresh = 0.0 if model == "spline" else 0.3
    frames = walk(flow, rotor_energy, torch.zeros(4000, 1, dtype=torch.float64), 250, step=0.6, refresh=refresh)
    assert deviation(frames, rotor_moments, rotor_exact(), burn=100).abs().max() < 3.5


# -- batches from one conformation


def generator(defensive=0.3):
    flow = flows.Flow(flows.Base([False] * 3), Affine(3))
    return BoltzmannGenerator(None, flow, defensive=defensive)


class Affine(flows.Transform):
    def forward(self, z, context=None):
        return 0.2 + 0.7 * z, z.new_full((len(z),), 3 * math.log(0.7))

    def inverse(self, y, context=None):
        return (y - 0.2) / 0.7, y.new_full((len(y),), -3 * math.log(0.7))


def test_a_batch_holds_steps_from_the_current_conformation_with_the_density_of_the_flow():
    proposals = LatentProposals(generator(), 1, step=0.1, batch_size=50)
    at = np.array([[0.1, -0.4, 1.0]])
    x, log_prob = proposals.take(1000, at)
    assert x.shape == (50, 1, 3)
    z, moved = ((v.reshape(-1, 3) - 0.2) / 0.7 for v in (at, x))
    noise = (moved - math.sqrt(1 - 0.01) * z) / 0.1
    assert abs(noise.mean()) < 4 / math.sqrt(150) and noise.std() == pytest.approx(1, abs=0.25)
    plain = -0.5 * (moved**2).sum(1) - 1.5 * math.log(2 * math.pi) - 3 * math.log(0.7)
    np.testing.assert_allclose(log_prob, plain, rtol=0, atol=1e-12)
    assert proposals.log_prob(x[7]) == pytest.approx(plain[7], abs=1e-12)
    # from one of its own proposals it goes on without a pass through the network
    calls = []
    inverse = proposals._latents.inverse
    proposals._latents.inverse = lambda q: calls.append(len(q)) or inverse(q)
    proposals.take(3, x[7])
    proposals.take(2, x[7])
    assert calls == [3, 1, 2], "what is forgotten is found again"
    assert proposals.take(4, at)[0].shape == (4, 1, 3)


def test_state_continues_exactly():
    at = np.array([[0.1, -0.4, 1.0]])
    one, two = (LatentProposals(generator(), seed, batch_size=5) for seed in (1, 2))
    for acceptance in (0.9, 0.4):
        one.learn(acceptance)
    one.take(3, at)
    two.load_state_dict(one.state_dict())
    one.log_prob(at)
    two.log_prob(at)
    for _ in range(2):
        for mine, theirs in zip(one.take(9, at), two.take(9, at), strict=True):
            np.testing.assert_array_equal(mine, theirs)
    one.learn(0.1)
    two.learn(0.1)
    assert (one.step, one.batch_size) == (two.step, two.batch_size)


def test_step_is_adapted_to_the_target_acceptance_and_no_more_once_closed():
    proposals = LatentProposals(generator(), 1, step=0.02)
    for _ in range(300):
        proposals.learn(math.exp(-4 * proposals.step))
    assert math.exp(-4 * proposals.step) == pytest.approx(TARGET_ACCEPTANCE, abs=0.03)
    assert 8 <= proposals.batch_size <= 14
    proposals.adaptation.close()
    step = proposals.step
    with pytest.raises(InputError, match="closed"):
        proposals.learn(0.9)
    assert proposals.step == step


@pytest.mark.parametrize("step", [0.0, 1.0, -0.1, math.nan])
def test_senseless_steps_are_refused(step):
    with pytest.raises(InputError, match="between 0 and 1"):
        LatentProposals(generator(), 1, step=step)
