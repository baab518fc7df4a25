"""The protocol on a molecule x in a solvent y, held against quadrature; and the bias of every shortcut."""

from __future__ import annotations

import math

import numpy as np
import pytest

from openmm_bg.errors import InputError
from openmm_bg.sampling.switching import Middle, Switch, choose, schedule, switch

CORE, RADIUS = 15.0, 0.4  # kT; the molecule repels the solvent
SOLVENT = 5
STEPS = 16
MEAN, WIDTH = 0.7, 1.2  # of the generator, an imperfect one


def molecule(x):
    """Two wells."""
    return 0.5 * x**2 + 2.5 * np.exp(-2 * x**2)


def core(x, y):
    return CORE * np.exp(-0.5 * ((y - x) / RADIUS) ** 2)


def potential(x, y, coupling=1.0):
    return molecule(x) + (0.5 * y**2 + coupling * core(x, y)).sum(0)


def moments(x, y):
    return np.stack([x, x**2, (y**2).mean(0), (x * y).mean(0), np.cos(3 * x - 2 * y).mean(0)])


# At a given x the coordinates of the solvent do not know of each other, so that all averages are sums over a grid.
GRID = np.linspace(-6, 6, 961)
JOINT = np.exp(-0.5 * GRID**2 - core(GRID[:, None], GRID))
DENSITY = np.exp(-molecule(GRID)) * JOINT.sum(1) ** SOLVENT
DENSITY /= DENSITY.sum()
CONDITIONAL = JOINT / JOINT.sum(1, keepdims=True)


def exact():
    x, y = np.meshgrid(GRID, GRID, indexing="ij")
    return (moments(x, y[None]) * CONDITIONAL).sum(2) @ DENSITY


def coupling_of(k):
    return (1 - (k + 1) / STEPS) ** 4


class Walkers:
    """Many walkers, started in equilibrium; x moves in the dynamics as well as y."""

    def __init__(self, walkers, time_step=0.15, proposals=1, seed=0):
        self.rng = np.random.default_rng(seed)
        chosen = self.rng.choice(len(GRID), size=walkers, p=DENSITY)
        cumulative = CONDITIONAL.cumsum(1)[chosen]
        uniform = self.rng.random((SOLVENT, walkers, 1))
        self.x = GRID[chosen]
        self.y = np.stack([GRID[(cumulative < u).sum(1)] for u in uniform])
        self.time_step, self.proposals = time_step, proposals
        self.velocity = None
        self.perturbation_work = 0.0
        self.coupling = 1.0

    def energy(self):
        return potential(self.x, self.y)

    def kinetic_energy(self):
        vx, vy = self.velocity
        return 0.5 * vx**2 + 0.5 * (vy**2).sum(0)

    def draw_velocities(self):
        self.velocity = self.rng.normal(size=self.x.shape), self.rng.normal(size=self.y.shape)

    def propagate(self, steps):
        for k in steps:
            self.step(coupling_of(k))
        self.switch_to(0.0 if steps.step > 0 else 1.0)

    def switch_to(self, coupling):
        before = potential(self.x, self.y, self.coupling)
        self.perturbation_work = self.perturbation_work + potential(self.x, self.y, coupling) - before
        self.coupling = coupling

    def step(self, coupling):
        """Half a drift, the change of the coupling, a kick, half a drift."""
        h, (vx, vy) = self.time_step, self.velocity
        self.x, self.y = self.x + 0.5 * h * vx, self.y + 0.5 * h * vy
        self.switch_to(coupling)
        push = coupling * core(self.x, self.y) * (self.y - self.x) / RADIUS**2
        vx = vx - h * (self.x * (1 - 10 * np.exp(-2 * self.x**2)) + push.sum(0))
        vy = vy - h * (self.y - push)
        self.x, self.y = self.x + 0.5 * h * vx, self.y + 0.5 * h * vy
        self.velocity = vx, vy

    def log_weight(self, x):
        return -molecule(x) + 0.5 * ((x - MEAN) / WIDTH) ** 2

    def propose(self):
        new = MEAN + WIDTH * self.rng.normal(size=(self.proposals, len(self.x)))
        index, log_ratio = choose(self.log_weight(new), self.log_weight(self.x), self.rng)
        old, self.x = self.x, np.take_along_axis(new, index[None], 0)[0]
        return Middle(potential(old, self.y, 0.0), potential(self.x, self.y, 0.0), log_ratio)

    def move(self, protocol=switch):
        """One attempt of every walker; the log of the ratio by which it was decided."""
        x, y = self.x, self.y
        self.perturbation_work, self.coupling = 0.0, 1.0
        log_acceptance = protocol(self, STEPS).log_acceptance
        stay = -self.rng.standard_exponential(len(x)) > log_acceptance
        self.x, self.y = np.where(stay, x, self.x), np.where(stay, y, self.y)
        return log_acceptance


def deviation(walkers, protocol=switch, moves=15):
    """Of the moments from their exact values, in standard errors; and the mean acceptance."""
    total, acceptance = 0.0, []
    for _ in range(moves):
        log_acceptance = walkers.move(protocol)
        total = total + moments(walkers.x, walkers.y)
        acceptance.append(np.exp(np.minimum(log_acceptance, 0)).mean())
    mean = total / moves
    error = mean.std(1) / math.sqrt(mean.shape[1])
    return (mean.mean(1) - exact()) / error, float(np.mean(acceptance))


@pytest.mark.parametrize(
    "options",
    [{}, {"time_step": 0.3}, {"proposals": 5}, {"time_step": 0.3, "proposals": 5, "seed": 1}],
    ids=["one proposal", "large step", "five proposals", "large step, five proposals"],
)
def test_moments_are_exact(options):
    z, acceptance = deviation(Walkers(3000, **options))
    assert np.abs(z).max() < 3.5
    assert acceptance > 0.1


def test_switching_and_many_proposals_raise_the_acceptance():
    class Sudden(Walkers):
        def propagate(self, steps):
            pass

    sudden, switched = (deviation(walkers, moves=4)[1] for walkers in (Sudden(3000), Walkers(3000)))
    assert switched > 1.3 * sudden
    assert deviation(Walkers(3000, proposals=8), moves=4)[1] > 1.1 * switched


def test_the_mean_of_the_ratio_is_one_in_equilibrium():
    """<alpha> = 1, as the protocol has a density: an identity that the decision has no part in."""
    walkers = Walkers(20_000, proposals=3)
    alpha = np.exp(walkers.move())
    assert abs(alpha.mean() - 1) < 3.5 * alpha.std() / math.sqrt(len(alpha))


# -- shortcuts


class ProposeThenRelax(Walkers):
    """Decoupled in one go, proposed, and then coupled step by step."""

    def propagate(self, steps):
        if steps.step < 0:
            super().propagate(steps)


class RelaxThenPropose(Walkers):
    def propagate(self, steps):
        if steps.step > 0:
            super().propagate(steps)


class OtherSteps(Walkers):
    """A second half with another time step."""

    def propagate(self, steps):
        self.time_step = 0.15 if steps.step > 0 else 0.3
        super().propagate(steps)


class KineticEnergyDropped(Walkers):
    def kinetic_energy(self):
        return 0.0


class DensityDropped(Walkers):
    def log_weight(self, x):
        return -molecule(x)


class EndsOfTheSwitchedSystem(Walkers):
    """The energy of the switched system, fully coupled, in place of a true one that differs."""

    def energy(self):
        return potential(self.x, self.y, 0.4)


@pytest.mark.parametrize(
    "shortcut",
    [ProposeThenRelax, RelaxThenPropose, OtherSteps, KineticEnergyDropped, DensityDropped, EndsOfTheSwitchedSystem],
)  # fmt: skip
def test_moments_are_wrong_with(shortcut):
    assert np.abs(deviation(shortcut(3000))[0]).max() > 6


def perturbation_work_only(walkers, steps):
    """Faulty: the work of changing the coupling without that of the finite time step."""
    outcome = switch(walkers, steps)
    inside = outcome.log_acceptance + outcome.decoupling_work + outcome.recoupling_work
    return Switch(None, None, inside - walkers.perturbation_work)


def test_moments_are_wrong_without_the_shadow_work():
    assert np.abs(deviation(Walkers(3000, time_step=0.3), perturbation_work_only)[0]).max() > 6


# -- the parts


def test_the_last_row_of_the_schedule_is_decoupled_and_charges_go_first():
    couplings = schedule(10)
    assert couplings.shape == (10, 2) and couplings[-1].tolist() == [0, 0]
    assert (np.diff(couplings, axis=0) <= 0).all() and ((couplings >= 0) & (couplings <= 1)).all()
    charged = couplings[:, 0] > 0
    assert (couplings[charged, 1] == 1).all()


def test_choice_of_many_is_a_draw_from_the_weights():
    """On three states of a uniform proposal, one step from equilibrium stays in equilibrium, state by state."""
    rng = np.random.default_rng(0)
    log_w = np.log([0.1, 0.3, 0.6])
    n = 200_000
    state = rng.choice(3, size=n, p=np.exp(log_w))
    new = rng.integers(3, size=(4, n))
    index, log_ratio = choose(log_w[new], log_w[state], rng)
    chosen = np.take_along_axis(new, index[None], 0)[0]
    after = np.where(-rng.standard_exponential(n) <= log_ratio, chosen, state)
    flux = np.array([[np.mean((state == a) & (after == b)) for b in range(3)] for a in range(3)])
    np.testing.assert_allclose(flux, flux.T, atol=4 * math.sqrt(0.1 / n))
    np.testing.assert_allclose(np.bincount(after) / n, np.exp(log_w), atol=4 * math.sqrt(0.25 / n))


def test_what_cannot_be_weighed_is_not_chosen():
    rng = np.random.default_rng(0)
    assert choose([-np.inf, -1.0], -1.0, rng)[0] == 1
    assert choose([-np.inf, -np.inf], -1.0, rng)[1] == -np.inf
    assert choose([-1.0], np.inf, rng)[1] == -np.inf
    with pytest.raises(ValueError, match="NaN"):
        choose([np.nan], 0.0, rng)


def test_a_protocol_that_fails_is_rejected_and_a_state_that_failed_is_an_error():
    class Explodes(Walkers):
        def propagate(self, steps):
            super().propagate(steps)
            if steps.step < 0:
                self.y = self.y + np.array([0, np.nan, np.inf])

    log_acceptance = switch(Explodes(3), STEPS).log_acceptance
    assert np.isfinite(log_acceptance[0]) and (log_acceptance[1:] == -np.inf).all()
    walkers = Walkers(3)
    walkers.x[1] = np.nan
    with pytest.raises(ValueError, match="already failed"):
        switch(walkers, STEPS)
    with pytest.raises(InputError, match="at least one step"):
        switch(Walkers(3), 0)


def test_nothing_is_recoupled_that_is_certain_to_be_rejected():
    class Hopeless(Walkers):
        def propose(self):
            return super().propose()._replace(log_ratio=np.full(len(self.x), -np.inf))

        def propagate(self, steps):
            assert steps.step > 0
            super().propagate(steps)

    outcome = switch(Hopeless(3), STEPS)
    assert (outcome.log_acceptance == -np.inf).all() and np.isnan(outcome.recoupling_work).all()
