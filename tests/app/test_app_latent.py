"""Latent steps in a Context: exact averages, batches up to the first acceptance, mixtures, adaptation, the log."""

from __future__ import annotations

import csv
import io
import math

import numpy as np
import pytest
import torch
import toys

from openmm_bg import app as bg_app
from openmm_bg.app.reporter import BoltzmannGeneratorReporter
from openmm_bg.coordinates import InternalCoordinates
from openmm_bg.errors import InputError
from openmm_bg.generator import BoltzmannGenerator

Sampler = bg_app.BoltzmannGeneratorSampler


def chain(width=0.8, **options):
    simulation = toys.simulation_of(toys.chain_system(), toys.chain_topology(), toys.CHAIN_POSITIONS)
    generator = toys.stretched_generator(topology=toys.chain_topology(), width=width)
    options = {"latentShare": 1.0, "latentStep": 0.6, "seed": 7} | options
    return simulation, Sampler(generator, simulation, 10, **options)


# -- exact averages


def deviation(simulation, sampler, series=400, blocks=25):
    """Moments of the chain after each series of attempts, in standard errors from the exact ones."""
    sampler.attemptMoves(40)
    frames = []
    for _ in range(series):
        sampler.attemptMoves()
        frames.append(toys.positions_of(simulation))
    q = InternalCoordinates(toys.chain_zmatrix())(torch.tensor(np.array(frames)))[0].numpy()
    moments = toys.chain_moments(q)[:, 1 if sampler.generator.coordinates.constraints else 0 :]
    moments = moments.reshape(blocks, series // blocks, -1).mean(1)
    return (moments.mean(0) - toys.chain_exact()[-moments.shape[1] :]) / (moments.std(0, ddof=1) / math.sqrt(blocks))


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_chain_moments_are_exact(share):
    simulation, sampler = chain(latentShare=share, proposalsPerIteration=8)
    assert np.abs(deviation(simulation, sampler)).max() < 3.5
    assert set(sampler.statistics) == ({"latent"} if share == 1 else {"independent", "latent"})
    assert all(0.1 < counts.acceptance < 0.9 for counts in sampler.statistics.values())


def test_moments_with_constrained_bonds_are_exact():
    system, generator, positions = toys.hydrogen_bonds_constrained()
    simulation = toys.simulation_of(system, toys.chain_topology(), positions)
    sampler = Sampler(generator, simulation, 10, 8, latentShare=1.0, latentStep=0.6, seed=8)
    assert np.abs(deviation(simulation, sampler)).max() < 3.5
    x, v = toys.positions_of(simulation), toys.velocities_of(simulation)
    for i, j in ((0, 1), (2, 3)):
        assert np.linalg.norm(x[i] - x[j]) == pytest.approx(toys.BOND, rel=1e-9)
        assert abs((x[i] - x[j]) @ (v[i] - v[j])) / toys.BOND < 1e-4


def test_trimer_has_the_mass_metric_measure():
    """0.3333 without the term; the kernel by itself is tested more sharply beside the sampling package."""
    system, topology, generator, positions = toys.trimer()
    generator = BoltzmannGenerator(None, toys.latent_flow([1.7], [0.75], [False]), generator.coordinates)
    simulation = toys.simulation_of(system, topology, positions)
    sampler = Sampler(generator, simulation, 10, 1, latentShare=1.0, latentStep=0.97, seed=6)
    values = []
    for _ in range(2400):
        sampler.attemptMoves()
        x = toys.positions_of(simulation)
        values.append(((x[0] - x[1]) @ (x[2] - x[1]) / (0.1 * 0.12)) ** 2)
    blocks = np.reshape(values, (40, -1)).mean(1)
    error = blocks.std(ddof=1) / math.sqrt(40)
    assert error < 0.008 and abs(blocks.mean() - 0.2947) < 3 * error


def test_seed_frame_stays_in_place():
    simulation, sampler = chain(proposalsPerIteration=30)
    before = sampler.generator.frame(torch.tensor(toys.positions_of(simulation))[None])
    sampler.attemptMoves()
    assert sampler.numAccepted > 3
    after = sampler.generator.frame(torch.tensor(toys.positions_of(simulation))[None])
    torch.testing.assert_close(before.origin, after.origin, rtol=0, atol=1e-13)
    torch.testing.assert_close(before.rotation, after.rotation, rtol=0, atol=1e-12)


# -- batches and mixtures


def test_rejections_of_a_batch_are_kept_up_to_the_first_acceptance():
    _, sampler = chain(proposalsPerIteration=60, latentStep=0.3)
    drawn = []
    take = sampler._latent.take
    sampler._latent.take = lambda n, at: drawn.append((n, at.copy(), take(n, at))) or drawn[-1][2]
    attempts = sampler.attemptMoves()
    made = iter(attempts)
    for n, at, (placed, log_probs) in drawn:
        assert len(placed) == min(n, 16)
        for log_prob in log_probs:
            attempt = next(made)
            assert attempt.proposed_log_prob == log_prob
            assert attempt.log_prob == pytest.approx(sampler._latent.log_prob(at), abs=1e-9)
            if attempt.accepted:
                break
    assert next(made, None) is None and len(attempts) == 60
    assert len(drawn) >= sampler.numAccepted > 5, "after every acceptance a batch is drawn from the new conformation"


def test_share_is_that_of_the_proposals():
    _, sampler = chain(latentShare=0.3, proposalsPerIteration=25)
    for _ in range(20):
        attempts = sampler.attemptMoves()
        kinds = [attempt.kind for attempt in attempts]
        assert len(kinds) == 25 and kinds == sorted(kinds), "one series of each kind"
    latent = sampler.statistics["latent"].attempts
    assert abs(latent - 150) < 4 * math.sqrt(500 * 0.3 * 0.7)
    assert latent + sampler.statistics["independent"].attempts == sampler.numProposed == 500


def test_each_kind_of_move_has_its_own_density():
    """The flow's for a step in its latents, the mixture's for an independent draw."""
    simulation, sampler = chain(latentShare=0.5, proposalsPerIteration=16)
    seen = []
    move = sampler.attemptMove
    sampler.attemptMove = lambda: seen.append((toys.positions_of(simulation), move())) or seen[-1][1]
    sampler.attemptMoves()
    sources = {"independent": sampler._proposals, "latent": sampler._latent}
    for x, attempt in seen:
        assert attempt.log_prob == pytest.approx(sources[attempt.kind].log_prob(x), abs=1e-8)
        assert abs(sources["latent"].log_prob(x) - sources["independent"].log_prob(x)) > 1e-5
    assert {attempt.kind for _, attempt in seen} == set(sources)


def test_log_names_the_kind_of_move():
    log = io.StringIO()
    simulation, sampler = chain(latentShare=0.5, proposalsPerIteration=10, logFile=log, energy=toys.CheapChain())
    simulation.step(50)
    rows = list(csv.DictReader(io.StringIO(log.getvalue())))
    assert sum(int(row["Tried"]) for row in rows) == 50
    for kind, counts in sampler.statistics.items():
        mine = [row for row in rows if row["Move"] == kind]
        assert sum(int(row["Moved"]) for row in mine) == counts.moved > 0
        assert sum(int(row["Accepted"]) for row in mine) == counts.accepted
        assert sum(row["Proposed Potential Energy (kJ/mole)"] != "nan" for row in mine) == counts.evaluated


def test_console_shows_acceptance_of_each_kind(tmp_path):
    simulation, sampler = chain(latentShare=0.5, proposalsPerIteration=10, energy=toys.CheapChain())
    columns = {"step": True, "speed": True, "progress": True, "remainingTime": True, "totalSteps": 100}
    reporter = BoltzmannGeneratorReporter(tmp_path / "console.csv", 50, sampler, **columns)
    simulation.reporters.append(reporter)
    simulation.step(100)
    lines = (tmp_path / "console.csv").read_text().splitlines()
    assert lines[0] == (
        '#"Progress (%)","Step","Speed (ns/day)","Time Remaining","Accepted, independent (%)","Moved, independent (%)",'
        '"Accepted, latent (%)","Moved, latent (%)"'
    )
    last = lines[-1].split(",")
    assert last[:2] == ["100.0%", "100"] and last[3] == "0:00"
    for kind, shown in zip(("independent", "latent"), (last[4:6], last[6:]), strict=True):
        counts = sampler.statistics[kind]
        assert float(shown[0]) == pytest.approx(100 * counts.acceptance, abs=0.051)
        assert float(shown[1]) == pytest.approx(100 * counts.moved / counts.tried, abs=0.051)


# -- adaptation


def test_length_and_number_are_learned_while_the_phase_is_open_and_never_after():
    simulation, sampler = chain(width=0.3, latentStep=0.02, proposalsPerIteration=10, adaptationIterations=60)
    assert sampler.adapting and sampler.latentStep == 0.02
    simulation.step(10 * 60)
    assert not sampler.adapting and sampler.adaptationIterations == 60
    learned = sampler.latentStep, sampler.proposalsPerIteration, sampler._latent.batch_size
    assert 0.1 < learned[0] < 0.95 and learned[1] == 10, "as many as there are time steps"
    moved = sampler.statistics["latent"]
    start = moved.moved, moved.tried
    simulation.step(10 * 60)
    assert (sampler.latentStep, sampler.proposalsPerIteration, sampler._latent.batch_size) == learned
    assert 0.15 < (moved.moved - start[0]) / (moved.tried - start[1]) < 0.4
    for learner in (lambda: sampler._latent.learn(0.5), lambda: sampler._number.observe(0.5)):
        with pytest.raises(InputError, match="Adaptation is closed"):
            learner()


def test_nothing_is_learned_by_default():
    simulation, sampler = chain(proposalsPerIteration=4)
    simulation.step(100)
    assert (sampler.adapting, sampler.latentStep, sampler.proposalsPerIteration) == (False, 0.6, 4)


def test_adaptation_may_be_closed_early_and_only_once():
    simulation, sampler = chain(proposalsPerIteration=4, adaptationIterations=50)
    simulation.step(100)
    sampler.closeAdaptation()
    learned = sampler.latentStep
    assert learned != 0.6 and sampler.adaptationIterations == 10
    simulation.step(100)
    sampler.closeAdaptation()
    assert sampler.latentStep == learned and sampler.adaptationIterations == 10


def test_number_is_learned_without_latent_steps_too():
    """Enough proposals that one of them is accepted with a probability of 95 %."""
    simulation, sampler = chain(latentShare=0.0, adaptationIterations=200, energy=toys.CheapChain())
    simulation.step(10 * 200)
    counts = sampler.statistics["independent"]
    expected = math.log(0.05) / math.log1p(-counts.moved / counts.tried)
    assert sampler.proposalsPerIteration == pytest.approx(expected, abs=4)


# -- what is refused


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"latentShare": 1.2}, "latentShare"),
        ({"latentShare": math.nan}, "latentShare"),
        ({"latentStep": 1.0}, "latent step"),
        ({"adaptationIterations": -1}, "at least 0"),
        ({"adaptationIterations": 2.5}, "whole number"),
    ],
)
def test_senseless_arguments_are_refused(options, word):
    with pytest.raises(InputError, match=word):
        chain(**options)


def test_flows_without_latents_are_refused():
    simulation = toys.simulation_of(toys.chain_system(), toys.chain_topology(), toys.CHAIN_POSITIONS)
    Sampler(toys.chain_generator(), simulation)
    with pytest.raises(InputError, match="ProductFlow"):
        Sampler(toys.chain_generator(), simulation, latentShare=0.1)
