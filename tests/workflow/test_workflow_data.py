"""How much data a molecule gets by default, where its walkers start, and that a killed exchange goes on."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from openmm import app

import openmm_bg as bg
from openmm_bg.errors import InputError
from openmm_bg.sampling import ReplicaExchange, replica_exchange
from openmm_bg.training import Settings
from openmm_bg.workflow import RunSettings, data, generator_for
from openmm_bg.workflow.settings import split_frames


@pytest.fixture(scope="module")
def generator(alanine):
    return generator_for(alanine, RunSettings())


SMALL = RunSettings(
    data="exchange",
    ladders=3,
    replicas=4,
    exchange_iterations=20,
    exchange_steps=5,
    equilibration_iterations=2,
    heating_steps=600,
)


def test_alanine_dipeptide_costs_less_than_ten_million_evaluations(alanine, generator):
    s = data.settle(RunSettings(data="exchange"), alanine, generator)
    walkers, iterations = s.ladders * s.replicas, s.equilibration_iterations + s.exchange_iterations
    exchange = walkers * (s.heating_steps + iterations * (s.exchange_steps + 1))
    bursts = s.training_conformations * 28  # 25 steps on average, two for velocities, one for the energy
    assert exchange + bursts < 5e6
    assert exchange + bursts + s.training_steps * Settings().batch_size < 1e7


def test_an_adaptive_run_costs_less(alanine, generator):
    """All rounds at their longest, and the last training."""
    s = data.settle(RunSettings(), alanine, generator)
    assert (s.walkers, s.heating_steps, s.ladders, s.training_steps) == (128, 4900, None, 4000)
    amounts = data.adaptive_settings(s)
    trained = sum(round(amounts.training_steps * amounts.growth**r) for r in range(2)) + amounts.closing_steps
    dynamics = amounts.least_dynamics + 2 * amounts.walkers * amounts.steps
    assert dynamics + trained * Settings().batch_size < 8e6  # two rounds of training are enough for most molecules
    fixed = bg.systems.load("alanine_dipeptide", constraints=app.HBonds)
    assert data.settle(RunSettings(), fixed, generator).walkers == 32
    long = RunSettings().for_molecule(23, 62, batched=True)
    assert long.heating_steps / s.heating_steps == pytest.approx(23 / 7) and long.walkers == s.walkers
    assert long.for_molecule(7, 22, batched=True) == long


@pytest.mark.parametrize(
    ("wrong", "phrase"),
    [
        ({"budget": "1e6"}, "leaves too little for training"),
        ({"walkers": 2, "round_steps": 250}, "10 training conformations are too few for 60 coordinates; give more wal"),
        ({"frame_interval": 49}, "interval must divide the 5000 steps"),
        ({"highest_temperature": 280.0}, "must lie below the highest one, at which walkers start"),
    ],
)
def test_what_an_adaptive_run_cannot_do_is_refused_beforehand(alanine, generator, wrong, phrase):
    with pytest.raises(InputError, match=phrase):
        data.settle(RunSettings(**wrong), alanine, generator)


def test_longer_chains_get_longer_ladders():
    short = RunSettings(data="exchange").for_molecule(7, 22, batched=True)
    long = RunSettings(data="exchange").for_molecule(23, 62, batched=True)
    assert short.ladders == long.ladders and short.replicas < long.replicas
    for name in ("exchange_iterations", "heating_steps"):
        assert getattr(long, name) / getattr(short, name) == pytest.approx(23 / 7)
    # what was asked for stays, and settling twice changes nothing
    asked = dataclasses.replace(SMALL, replicas=None).for_molecule(23, 62, batched=True)
    assert asked.exchange_iterations == 20 and asked.replicas == long.replicas
    assert asked.for_molecule(7, 22, batched=True) == asked
    RunSettings(data="exchange").for_molecule(0, 5, batched=True)


def test_what_no_batch_can_run_has_one_ladder(generator):
    fixed = bg.systems.load("alanine_dipeptide", constraints=app.HBonds)
    one = data.settle(RunSettings(data="exchange"), fixed, generator)
    assert (one.ladders, one.exchange_iterations, one.exchange_steps, one.heating_steps) == (1, 2400, 500, 0)
    with pytest.raises(InputError, match="it has constraints; give one ladder"):
        data.settle(RunSettings(data="exchange", ladders=16), fixed, generator)


def test_one_ladder_is_the_plain_replica_exchange(alanine, tmp_path):
    settings = dataclasses.replace(SMALL, ladders=1, heating_steps=0)
    mine = data.exchange(alanine, settings, tmp_path / "exchange.npz", progress=False)
    theirs = replica_exchange(
        alanine.system, alanine.positions, temperatures=mine.temperatures, n_iterations=20, equilibration_iterations=2,
        steps_per_iteration=5, seed=settings.seed, progress=False,
    )  # fmt: skip
    assert np.array_equal(mine.frames[0], theirs.frames[0])


def test_an_exchange_that_was_killed_goes_on_from_its_checkpoint(alanine, tmp_path):
    whole = data.exchange(alanine, SMALL, tmp_path / "whole.npz", progress=False)
    assert whole.frames[0].shape == (60, 22, 3) and len(whole.potential_energy) == 60
    stopped = ReplicaExchange(
        alanine.system, alanine.positions, temperatures=whole.temperatures, steps_per_iteration=5, seed=SMALL.seed,
        ladders=3,
    )  # fmt: skip
    stopped.heat(600, progress=False)
    stopped.run(1, record=False, checkpoint=tmp_path / "stopped.npz", progress=False)
    again = data.exchange(alanine, SMALL, tmp_path / "stopped.npz", progress=False)
    assert np.array_equal(again.frames[0], whole.frames[0])
    assert again.force_evaluations == whole.force_evaluations


def test_held_out_frames_end_every_ladder_after_a_gap():
    training, held_out = split_frames(np.arange(1000), 0.2)
    assert training[-1] == 799 and held_out[0] == 850 and held_out[-1] == 999
    training, held_out = split_frames(np.arange(200), 0.2, ladders=2)
    assert training.tolist() == [*range(80), *range(100, 180)]
    assert held_out.tolist() == [*range(85, 100), *range(185, 200)]
    frames = np.random.default_rng(0).random((40, 5, 3))
    assert split_frames(frames, 0.2, ladders=2)[0].shape == (32, 5, 3)
    with pytest.raises(InputError, match="20 frames are too few to hold 1 percent"):
        split_frames(np.arange(40), 0.01, ladders=2)
