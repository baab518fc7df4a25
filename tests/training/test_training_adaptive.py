"""Adaptive runs on toys against quadrature, stopped everywhere and resumed; the convergence test by itself."""

from __future__ import annotations

import dataclasses
import json
import math
from itertools import pairwise

import numpy as np
import openmm
import pytest
import torch
from interruptions import interrupt_at
from openmm import app
from small_runs import equal, lines, timeless, weights

import openmm_bg as bg
from openmm_bg.energies import Energy
from openmm_bg.errors import InputError
from openmm_bg.flows import Base, MolecularFlow, SplineFlow
from openmm_bg.sampling import Walkers, reweighted_mean
from openmm_bg.training import AdaptiveSettings, AdaptiveTraining, Basin, Convergence, Figures, Settings, Trainer
from openmm_bg.training.convergence import measure, torsion_regions
from openmm_bg.training.reservoir import Reservoir
from openmm_bg.units import thermal_energy

KT = thermal_energy(300.0)
QUICK = Settings(batch_size=64, validation_size=512, validate_every=50, average=0.97)
START = np.array([[-1.0, 0.0, 0.0]])


# -- a particle with two wells at x = -1 and 1 nm, unequal and 6 kT deep: dynamics at 300 K does not cross


def wells() -> openmm.System:
    system = openmm.System()
    system.addParticle(4.0)
    force = openmm.CustomExternalForce("kt*(6*(x^2-1)^2+0.4*x+2*(y^2+z^2))")
    force.addGlobalParameter("kt", KT)
    force.addParticle(0)
    system.addForce(force)
    return system


class Wells(Energy):
    def __init__(self):
        super().__init__((3,))

    def reduced(self, x):
        return 6 * (x[:, 0].square() - 1).square() + 0.4 * x[:, 0] + 2 * x[:, 1:].square().sum(-1)


def share_on_the_right() -> float:
    x = np.linspace(-2.5, 2.5, 20001)
    p = np.exp(-6 * (x**2 - 1) ** 2 - 0.4 * x)
    return float(p[x > 0].sum() / p.sum())


def right(positions: np.ndarray) -> dict[str, np.ndarray]:
    return {"the right well": positions[:, 0, 0] > 0}


WELLS = AdaptiveSettings(
    walkers=64, heating_temperature=2500, heating_steps=150, settling_steps=100, steps=300, interval=10, timestep=0.02,
    friction=2.0, likelihood_steps=40, training_steps=60, closing_steps=60, rounds=5, draws=4000, capacity=3000,
)  # fmt: skip


def in_wells(generator=None, settings=WELLS, **changes) -> AdaptiveTraining:
    generator = generator or bg.BoltzmannGenerator(Wells(), SplineFlow([False] * 3, layers=2, hidden=(8,)))
    arguments = dict(
        system=wells(), temperature=300, regions=right, settings=settings, training=QUICK, seed=1, progress=False
    )  # fmt: skip
    return AdaptiveTraining(generator, START, **(arguments | changes))


def test_from_one_well_to_both_in_their_proportions():
    heard = []
    adaptation = in_wells(callback=heard.append)
    result = adaptation.run()
    assert result.converged and result.verdict.startswith("The convergence test held in 2 rounds in a row, after ")
    assert [record["round"] for record in heard] == [*range(result.rounds + 1), result.rounds]
    assert heard[0]["failures"] == ["nothing was trained yet"] and heard[-1]["closed"] and adaptation.closed
    # what the generator makes, weighted; and where the walkers are whom it has moved
    exact = share_on_the_right()
    samples = adaptation.generator.sample(20_000, seed=7)
    share, error = reweighted_mean((samples.positions[:, 0] > 0).double().numpy(), samples.log_weights)
    assert abs(share - exact) < 4 * error < 0.05
    each = (result.held_out[:, :, 0, 0] > 0).mean(1)
    assert abs(each.mean() - exact) < 4 * each.std() / math.sqrt(len(each))
    assert result.figures.basins["the right well"].walkers == pytest.approx(each.mean())
    # all that was paid for is counted
    dynamics = 64 * (150 + 100 + (result.rounds + 2) * 300 + 2 * (4 + result.rounds))
    assert result.evaluations["dynamics"] == dynamics
    assert result.evaluations["moves"] == 64 * 11 * (result.rounds + 1)
    assert result.evaluations["figures"] == (4000 + 64 * 30) * (result.rounds + 1)
    steps = [round(60 * 1.5**r) for r in range(result.rounds)]
    assert result.steps == 40 + sum(steps) + 60
    assert result.evaluations["training"] == 64 * (sum(steps) + 60)
    # and the generator is what production uses
    assert adaptation.generator.provenance["adaptation"]["closed"]
    with pytest.raises(InputError, match="adaptation of this generator is closed"):
        in_wells(adaptation.generator)


# -- a chain of four atoms whose torsion has wells at -90 and 90 degrees, of 1 kT difference and 8 kT deep

ATOMS = np.array([[0.14, 0.05, 0.0], [0.0, 0.0, 0.0], [0.0, -0.15, 0.0], [0.1, -0.2, 0.12]])


def torsion_energy(phi: np.ndarray) -> np.ndarray:
    return 4 * (1 + np.cos(2 * phi)) + 0.5 * (1 - np.sin(phi))


def chain() -> tuple[app.Topology, openmm.System]:
    topology, system = app.Topology(), openmm.System()
    residue = topology.addResidue("HOO", topology.addChain())
    kinds = (("H1", app.element.hydrogen), ("O1", app.element.oxygen), ("O2", app.element.oxygen),
             ("H2", app.element.hydrogen))  # fmt: skip
    atoms = [topology.addAtom(name, element, residue) for name, element in kinds]
    for mass in (12.0, 16.0, 16.0, 12.0):
        system.addParticle(mass)
    bonds, angles, torsions = openmm.HarmonicBondForce(), openmm.HarmonicAngleForce(), openmm.PeriodicTorsionForce()
    for i, (a, b) in enumerate(pairwise(atoms)):
        topology.addBond(a, b)
        bonds.addBond(i, i + 1, 0.15, KT / 0.012**2)
    for i in range(2):
        angles.addAngle(i, i + 1, i + 2, 1.9, KT / 0.15**2)
    torsions.addTorsion(0, 1, 2, 3, 2, 0.0, 4 * KT)
    torsions.addTorsion(0, 1, 2, 3, 1, -math.pi / 2, 0.5 * KT)
    for force in (bonds, angles, torsions):
        system.addForce(force)
    return topology, system


def chain_generator() -> bg.BoltzmannGenerator:
    topology, system = chain()
    usual = bg.BoltzmannGenerator.for_molecule(topology, system, positions=ATOMS)
    small = MolecularFlow.from_config(
        usual.flow.config() | {"layers": 2, "hidden": 8, "torsion_hidden": 8, "order": 1, "mixing": False}
    )  # fmt: skip
    return bg.BoltzmannGenerator.for_molecule(topology, system, positions=ATOMS, flow=small)


CHAIN = AdaptiveSettings(
    walkers=32, heating_temperature=2500, heating_steps=300, settling_steps=200, steps=400, interval=20, timestep=0.004,
    friction=2.0, likelihood_steps=30, training_steps=60, closing_steps=60, rounds=4, draws=4000, capacity=2000,
)  # fmt: skip


def of_chain(generator=None, settings=CHAIN, **changes) -> AdaptiveTraining:
    arguments = dict(settings=settings, training=QUICK, seed=2, progress=False)
    return AdaptiveTraining(generator or chain_generator(), ATOMS, **(arguments | changes))


def test_a_torsion_against_quadrature(tmp_path):
    adaptation = of_chain(log=tmp_path / "log.jsonl", checkpoint=tmp_path / "c.npz")
    result = adaptation.run()
    phi = np.radians(np.arange(0.005, 360, 0.01))
    p = np.exp(-torsion_energy(phi))
    exact = p.reshape(3, -1).sum(1) / p.sum()
    samples = adaptation.generator.sample(20_000, seed=3)
    regions = torsion_regions(adaptation.generator)(samples.positions.numpy())
    assert [name.split(" of ")[0] for name in regions] == ["0° to 120°", "120° to 240°", "240° to 360°"]
    for inside, expected in zip(regions.values(), exact, strict=True):
        share, error = reweighted_mean(inside.astype(float), samples.log_weights)
        assert abs(share - expected) < 4 * error < 0.1
    assert result.figures.ess > 0.5 and result.figures.forward > 0.5
    # the log is what the result holds, and strict JSON
    assert lines(tmp_path / "log.jsonl") == json.loads(json.dumps(result.history, allow_nan=False))
    kinds = ["training" if "stage" in record else "round" for record in result.history]
    assert kinds[0] == kinds[-1] == "round" and kinds.count("round") == result.rounds + 2
    steps = [record["step"] for record in result.history if "stage" in record]
    assert steps == sorted(steps) and steps[-1] == result.steps
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.npz", "log.jsonl"]


BRIEF = dataclasses.replace(
    CHAIN, walkers=8, heating_steps=20, settling_steps=20, steps=40, interval=10, likelihood_steps=4, training_steps=6,
    closing_steps=8, rounds=2, draws=200, capacity=50,
)  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    adaptation = of_chain(settings=BRIEF, log=folder / "log", checkpoint=folder / "c")
    return adaptation, adaptation.run()


@pytest.mark.parametrize(
    ("owner", "method", "call"),
    [
        (Walkers, "advance", 0),  # heating
        (Walkers, "advance", 3),  # dynamics of the second round
        (torch.optim.Adam, "step", 2),  # likelihood of the first
        (torch.optim.Adam, "step", 14),  # energy of the second
        (Walkers, "move", 1),  # after its training
        (torch.optim.Adam, "step", 22),  # the last training
        (Walkers, "advance", 5),  # the last dynamics
    ],
)
def test_a_run_that_was_stopped_goes_on_to_the_same_numbers(whole, tmp_path, monkeypatch, owner, method, call):
    adaptation, expected = whole
    arguments = dict(settings=BRIEF, log=tmp_path / "log", checkpoint=tmp_path / "c")
    with monkeypatch.context() as patch:
        interrupt_at(patch, owner, method, call)
        with pytest.raises(KeyboardInterrupt):
            of_chain(**arguments).run()
    resumed = of_chain(resume=True, **arguments)
    result = resumed.run()
    assert equal(weights(resumed.generator.flow), weights(adaptation.generator.flow))
    assert np.array_equal(result.held_out, expected.held_out) and result.verdict == expected.verdict
    assert np.array_equal(resumed.walkers.positions, adaptation.walkers.positions)
    assert timeless(result.history) == timeless(expected.history) == timeless(lines(tmp_path / "log"))
    assert (result.evaluations, result.steps) == (expected.evaluations, expected.steps)
    assert result.seconds > 0 and sorted(path.name for path in tmp_path.iterdir()) == ["c", "log"]


def test_a_checkpoint_belongs_to_its_run(whole, tmp_path):
    adaptation, expected = whole
    path = adaptation.checkpoint
    again = of_chain(settings=BRIEF, checkpoint=path, resume=True)
    assert again.closed and np.array_equal(again.run().held_out, expected.held_out)
    with pytest.raises(InputError, match="belongs to a run with other settings and seed"):
        of_chain(settings=dataclasses.replace(BRIEF, draws=300), checkpoint=path, resume=True, seed=3)
    (tmp_path / "half").write_bytes(path.read_bytes()[:1000])
    with pytest.raises(InputError, match="half is not a file of this kind, or it is damaged"):
        of_chain(settings=BRIEF, checkpoint=tmp_path / "half", resume=True)


def test_a_fresh_start_does_not_take_up_an_old_training(whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_at(patch, torch.optim.Adam, "step", 5)
        with pytest.raises(KeyboardInterrupt):
            of_chain(settings=BRIEF, checkpoint=tmp_path / "c").run()
    assert (tmp_path / "c.round0").exists()
    monkeypatch.setattr(Trainer, "_load", lambda self: pytest.fail("an old training was loaded"))
    result = of_chain(settings=BRIEF, checkpoint=tmp_path / "c").run()
    assert np.array_equal(result.held_out, whole[1].held_out)


def test_whitening_is_done_once_and_never_to_a_trained_generator(monkeypatch):
    times = []
    inform = bg.BoltzmannGenerator.inform
    monkeypatch.setattr(bg.BoltzmannGenerator, "inform", lambda self, x: times.append(len(x)) or inform(self, x))
    generator = chain_generator()
    of_chain(generator, BRIEF).run()
    assert times == [32]
    generator.provenance.pop("adaptation")
    of_chain(generator, BRIEF).run()
    assert times == [32]


def test_a_generator_that_knows_nothing_yet_takes_its_chirality_from_the_start():
    topology, system = chain()
    flow = chain_generator().flow
    generator = bg.BoltzmannGenerator.for_molecule(topology, system, flow=MolecularFlow.from_config(flow.config()))
    assert not generator.informed
    result = of_chain(generator, BRIEF).run()
    assert generator.informed and result.figures.draws == 200


def test_constrained_bonds_are_kept_from_the_walkers_to_the_generator():
    """Dynamics by OpenMM; the generator has no positions to begin with."""
    molecule = bg.systems.load("alanine_dipeptide", constraints=app.HBonds)
    generator = bg.BoltzmannGenerator.for_molecule(molecule.topology, molecule.system, 300)
    settings = dataclasses.replace(
        BRIEF, walkers=4, steps=100, interval=5, timestep=0.001, rounds=1, likelihood_steps=2, training_steps=2,
        closing_steps=2, capacity=80,
    )  # fmt: skip
    result = AdaptiveTraining(
        generator, molecule.positions, settings=settings, training=QUICK, seed=1, progress=False
    ).run()  # fmt: skip
    assert result.held_out.dtype == np.float64 and result.figures.unreachable == 0
    assert torch.isfinite(generator.log_prob(result.held_out[:, -1])).all()


# -- how adaptation ends without convergence


def test_rounds_end_it_and_the_verdict_says_why(whole):
    _, result = whole
    assert not result.converged and result.rounds == 2
    assert result.verdict.startswith("The convergence test did not hold within 2 rounds: the ")
    assert result.verdict.endswith(".")


def test_a_budget_is_halved_between_rounds_and_the_last_training():
    settings = dataclasses.replace(BRIEF, rounds=100, likelihood_steps=0)
    adaptation = of_chain(settings=settings, budget="12000", convergence=Convergence(ess=0.999))
    result = adaptation.run()
    assert "before half of the budget was spent: the effective sample size is" in result.verdict
    total = sum(result.evaluations.values())
    after = 8 * (40 + 2) + 8 * 11 + 200 + 32  # moves, dynamics and figures follow the last training
    assert 12_000 <= total - after < 12_000 + QUICK.batch_size
    closing = [record for record in result.history if "stage" in record][-1]["evaluations"]
    before = [record for record in result.history if "failures" in record][-1]["evaluations"]
    assert sum(before.values()) >= 6000 and closing > before["training"] + 4000


def test_a_budget_that_training_would_see_nothing_of_is_refused():
    with pytest.raises(InputError, match=r"leaves too little for training, since .* 8 walkers take 960 of them"):
        of_chain(settings=BRIEF, budget="1900")


def test_time_that_has_run_out_leaves_the_generator_of_the_last_round():
    adaptation = of_chain(settings=dataclasses.replace(BRIEF, rounds=1), budget="1h")
    look = adaptation._look

    def slow(judge):
        figures = look(judge)
        adaptation.state.seconds += 4000 if adaptation.state.round else 0
        return figures

    adaptation._look = slow
    result = adaptation.run()
    assert result.verdict.endswith("Nothing was left of the budget for a last training.")
    assert result.steps == 10 and adaptation.generator.provenance["adaptation"]["closed"]


@pytest.mark.parametrize(
    ("arguments", "phrase"),
    [
        ({"generator": bg.BoltzmannGenerator(None, SplineFlow([False] * 3, layers=2, hidden=(8,)))}, "with an energy"),
        ({"system": None}, "needs the system and the temperature of its walkers"),
        ({"temperature": -3}, "temperature must be a positive finite number"),
        ({"budget": "soon"}, "'soon' is neither a time"),
    ],
)
def test_what_cannot_be_adapted_is_refused(arguments, phrase):
    with pytest.raises(InputError, match=phrase):
        in_wells(**arguments)


@pytest.mark.parametrize(
    "change",
    [{"walkers": 1}, {"growth": 0.5}, {"interval": 7}, {"rounds": 0}, {"draws": 10}, {"heating_temperature": 0}],
)
def test_settings_say_what_is_wrong(change):
    (name,) = change
    with pytest.raises(InputError, match=name):
        dataclasses.replace(BRIEF, **change)


# -- the test that ends it

BASIN = Basin(0.3, 0.003, 0.28, 0.05)
GOOD = Figures(0.8, 0.81, 0.8, 0.75, 3.0, 1000, 500, 0, {"left": BASIN})


def changed(**changes) -> Figures:
    return dataclasses.replace(GOOD, **changes)


def basin(**changes) -> Figures:
    return changed(basins={"left": dataclasses.replace(BASIN, **changes)})


@pytest.mark.parametrize(
    ("now", "phrase"),
    [
        (changed(ess=0.4), "the effective sample size is 40.0 %, below 50 %"),
        (changed(ess_clipped=0.4), "the clipped effective sample size is 40.0 %"),
        (changed(forward=0.1), "the forward figure is 10.0 %, below 50 %"),
        (changed(forward=math.nan), "the forward figure is nan %"),
        (changed(largest_log_ratio=math.inf), "the largest log p/q is inf, above 6"),
        (
            changed(unreachable=3, forward=0.0, largest_log_ratio=math.inf),
            "3 of 500 frames lie outside the generator's support",
        ),
        (basin(walkers=0.05, walkers_error=0.03), "5 % of the walkers' frames and 30 % of the reweighted draws lie in"),
        (basin(error=0.1), "the free energy of left is known to 0.33 kT, not to 0.25"),
        (basin(share=0.0, error=0.0), "the free energy of left is known to inf kT"),
        (basin(share=0.27), r"the free energy of left moved by \+0.11 ± 0.01 kT since the round before"),
    ],
)
def test_each_part_of_the_test_can_fail_alone(now, phrase):
    import re

    failures = Convergence().failures(now, GOOD)
    assert any(re.match(phrase, failure) for failure in failures), failures
    assert len(failures) == 1 + (now.basins["left"].share == 0)  # then walkers and draws differ, too


def test_what_holds_is_not_a_failure():
    assert Convergence().failures(GOOD, GOOD) == []
    assert Convergence().failures(GOOD, None) == []
    assert Convergence().failures(basin(share=0.291), GOOD) == []
    rare = basin(share=0.0, error=0.0, walkers=0.001, walkers_error=0.001)
    assert Convergence().failures(rare, rare) == [] != Convergence(rare=1e-4).failures(rare, rare)
    assert Figures.from_dict(json.loads(json.dumps(GOOD.to_dict()))) == GOOD
    lost = changed(largest_log_ratio=math.inf)
    assert Figures.from_dict(json.loads(json.dumps(lost.to_dict(), allow_nan=False))) == lost


@pytest.mark.parametrize("wrong", [{"ess": 1.0}, {"largest_log_ratio": 0.0}, {"sigma": math.nan}, {"rounds": 0}])
def test_a_test_that_means_nothing_is_refused(wrong):
    (name,) = wrong
    with pytest.raises(InputError, match=name):
        Convergence(**wrong)


WIDTH = 1.1


class Gaussian(Energy):
    """A normal of that width in three dimensions."""

    def __init__(self):
        super().__init__((3,))

    def reduced(self, x):
        return 0.5 * x.square().sum(-1) / WIDTH**2


def test_figures_of_two_normals_against_closed_forms():
    """p = N(0, 1.1^2) and q = N(0, 1): E_p[p/q] by hand, and a half space that holds half of both."""
    flow = SplineFlow([False] * 3, layers=2, hidden=(8,))
    flow.base = Base([False] * 3)
    generator = bg.BoltzmannGenerator(Gaussian(), flow, defensive=0)
    frames = WIDTH * np.random.default_rng(1).standard_normal((200, 50, 1, 3))
    figures = measure(generator, frames, lambda x: {"half": x[:, 0, 0] > 0}, draws=50_000, seed=4)
    expected = (WIDTH**2 * math.sqrt(2 / WIDTH**2 - 1)) ** 3  # 0.935
    assert figures.ess == pytest.approx(expected, rel=0.01) and figures.forward == pytest.approx(expected, rel=0.01)
    assert figures.ess <= figures.ess_clipped and figures.held_out == 10_000
    squares = np.square(frames).sum((2, 3))
    largest = 0.5 * squares.max() * (1 - 1 / WIDTH**2) - 3 * math.log(WIDTH)
    assert figures.largest_log_ratio == pytest.approx(largest, abs=0.01)
    half = figures.basins["half"]
    assert half.share == pytest.approx(0.5, abs=4 * half.error) and half.error < 0.004
    # frames of one walker are independent here: the spread from walker to walker is that of a coin of 50 throws
    assert half.walkers_error == pytest.approx(0.5 / math.sqrt(50 * 200), rel=0.2)
    far = measure(generator, frames + np.array([0, 0, 60.0]), None, draws=1000, seed=4)
    assert far.forward < 1e-3 and far.largest_log_ratio > 100 and far.basins == {} and far.unreachable == 0


def test_mirror_images_are_counted_as_out_of_reach(alanine):
    generator = bg.BoltzmannGenerator.for_molecule(alanine.topology, alanine.system, positions=alanine.positions)
    frames = np.stack([alanine.positions, alanine.positions * [1, 1, -1]])[:, None].repeat(3, 1)
    figures = measure(generator, frames, None, draws=200, seed=1)
    assert (figures.unreachable, figures.held_out, figures.forward) == (3, 6, 0)
    assert Convergence(ess=0).failures(figures, None) == ["3 of 6 frames lie outside the generator's support"]


def test_a_basin_without_spread_is_not_known_exactly():
    flow = SplineFlow([False] * 3, layers=2, hidden=(8,))
    generator = bg.BoltzmannGenerator(Gaussian(), flow, defensive=0)
    figures = measure(generator, np.zeros((9, 4, 1, 3)), lambda x: {"none": x[:, 0, 0] > 9}, draws=100, seed=4)
    assert figures.basins["none"].walkers == 0 and 0.03 < figures.basins["none"].walkers_error < 0.2


# -- the memory of frames


def test_every_frame_stays_with_the_same_probability():
    kept = np.zeros(40)
    for seed in range(400):
        rng = np.random.default_rng(seed)
        reservoir = Reservoir(10)
        for start in (0, 5, 12, 30):
            stop = {0: 5, 5: 12, 12: 30, 30: 40}[start]
            reservoir.add(np.arange(start, stop)[:, None], rng)
        assert len(reservoir) == 10 and (np.diff(reservoir.frames[:, 0]) > 0).all()
        kept[reservoir.frames[:, 0]] += 1
    # hypergeometric: 100 times each, with a deviation of 8.7
    assert kept.sum() == 4000 and abs(kept - 100).max() < 4 * 8.7
