"""The loop: it learns, repeats, survives Ctrl-C, resumes to the bit, and counts what it skips."""

from __future__ import annotations

import copy
import json
import math
import os
import signal

import numpy as np
import pytest
import torch
from small_runs import QUICK, equal, weights

import openmm_bg as bg
from openmm_bg.flows import RealNVP
from openmm_bg.sampling.reweighting import effective_sample_size
from openmm_bg.training import (
    MaximumLikelihood,
    ReversePath,
    Settings,
    Stage,
    Trainer,
    relabel_rotors,
    to_flow_coordinates,
)

DEEP = bg.systems.load("double_well", beta=4)


def well(seed: int = 0) -> bg.BoltzmannGenerator:
    return bg.BoltzmannGenerator(bg.systems.load("double_well"), RealNVP(2, layers=4, hidden=(16,), seed=seed))


def well_data(n: int = 500) -> torch.Tensor:
    return bg.systems.load("double_well").sample(n, torch.Generator().manual_seed(5))


class Broken(MaximumLikelihood):
    """Does something at chosen calls, after it has drawn its random numbers."""

    def __init__(self, calls: list[int], what):
        super().__init__()
        self.calls, self.what, self.count = calls, what, 0

    def __call__(self, step):
        loss, numbers = super().__call__(step)
        self.count += 1
        return (self.what(loss, step) if self.count in self.calls else loss), numbers


def interrupt(*_):
    raise KeyboardInterrupt


@pytest.fixture(scope="module")
def frames(alanine):
    run = bg.simulate(
        alanine.system, alanine.positions, temperature=300, n_frames=150, steps_per_frame=20, seed=1,
        platform="Reference", progress=False,
    )  # fmt: skip
    return np.asarray(run.positions)


def alanine_generator(alanine, flow: str = "spline") -> bg.BoltzmannGenerator:
    return bg.BoltzmannGenerator.for_molecule(alanine.topology, alanine.system, positions=alanine.positions, flow=flow)


# -- learning


def test_energy_alone_raises_the_effective_size():
    generator = bg.BoltzmannGenerator(DEEP, RealNVP(2, layers=4, hidden=(16,)))
    start = effective_sample_size(generator.sample(5000, seed=1).log_weights).fraction
    result = generator.fit(
        steps=300, settings=Settings(batch_size=256, learning_rate=1e-2, validate_every=100, validation_size=2000),
        progress=False,
    )  # fmt: skip
    end = effective_sample_size(generator.sample(5000, seed=1).log_weights).fraction
    assert start < 0.6 and end > start + 0.3
    assert (result.steps, result.skipped, result.evaluations) == (300, 0, 300 * 256)
    assert [r["step"] for r in result.history if "ess" in r] == [100, 200, 300]
    assert abs(result.history[-1]["ess"] - end) < 0.05


def test_likelihood_alone_lowers_the_divergence():
    generator = bg.BoltzmannGenerator(None, RealNVP(2, layers=4, hidden=(16,)))
    data, fresh = (DEEP.sample(2000, torch.Generator().manual_seed(seed)) for seed in (5, 6))
    start = float(generator.log_prob(fresh).mean())
    result = generator.fit(data, steps=200, settings=Settings(batch_size=256, learning_rate=1e-2), progress=False)
    end = float(generator.log_prob(fresh).mean())
    exact = -float((DEEP(fresh) + DEEP.log_z).mean())
    assert end > start + 0.3 and exact - 0.15 < end < exact
    assert result.evaluations == 0 and generator.provenance["training"]["stages"] == [["likelihood", 200]]


@pytest.mark.parametrize("flow", ["spline", "realnvp"])
def test_both_on_a_molecule(alanine, frames, flow):
    generator, on_data_alone = alanine_generator(alanine, flow), alanine_generator(alanine, flow)
    settings = Settings(batch_size=64, validation_size=256, validate_every=5, learning_rate=2e-3)
    result = generator.fit(frames, steps=30, likelihood_steps=30, progress=False, settings=settings)
    on_data_alone.fit(frames, steps=30, energy=False, progress=False, settings=settings)
    assert torch.isfinite(generator.log_prob(frames)).all()
    likelihood = result.history[:6]
    assert likelihood[-1]["nll"] < likelihood[0]["nll"] - 1
    # atoms overlap in some draws of either: the median does not see them
    without, with_energy = (g.sample(1000, seed=1).log_weights.median() for g in (on_data_alone, generator))
    assert with_energy > without + 10
    assert (result.steps, result.skipped, result.evaluations) == (60, 0, 30 * 64)
    record = generator.provenance["training"]
    assert record["frames"] == 150 and record["frames_outside_support"] == 0
    assert record["stages"] == [["likelihood", 30], ["energy", 30]]
    assert all(p.dtype == torch.float64 for p in generator.flow.parameters())


def test_training_keeps_the_density_exact(alanine, frames):
    """Single precision may shape the weights; the whitening stays one bijection in double precision."""
    generator = alanine_generator(alanine)
    generator.fit(frames, steps=2, likelihood_steps=2, settings=QUICK, progress=False)
    whitening = generator.flow.stiff.transforms[-1]
    assert (whitening.root @ whitening.inverse_root - torch.eye(len(whitening.root))).abs().max() < 1e-11
    assert abs(float(whitening.root.logdet() - whitening.log_det)) < 1e-10


def test_an_uninformed_generator_learns_handedness_from_its_data(alanine, frames):
    generator = bg.BoltzmannGenerator.for_molecule(alanine.topology, alanine.system)
    generator.fit(frames, steps=2, energy=False, settings=QUICK, progress=False)
    assert torch.isfinite(generator.log_prob(frames)).all()
    assert (generator.log_prob(frames * [-1, 1, 1]) == -math.inf).all()
    with pytest.raises(bg.InputError, match="chirality"):
        bg.BoltzmannGenerator.for_molecule(alanine.topology, alanine.system).fit(steps=1, progress=False)


# -- repeatability


def test_a_seed_repeats_a_run_and_nothing_global_moves():
    state, numbers = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    runs = []
    for seed in (1, 1, 2):
        generator = well()
        generator.fit(well_data(), steps=15, likelihood_steps=10, seed=seed, settings=QUICK, progress=False)
        runs.append(weights(generator.flow))
    assert equal(runs[0], runs[1]) and not equal(runs[0], runs[2])
    assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(np.random.get_state()[1], numbers)  # noqa: NPY002


def test_looking_does_not_change_what_is_learned():
    flows = []
    for every in (10, 1000):
        settings = Settings(batch_size=64, validation_size=128, validate_every=every)
        trainer = Trainer(well(), [Stage("energy", 40, [(1.0, ReversePath())])], settings=settings, progress=False)
        trainer.run()
        flows.append((weights(trainer.flow), weights(trainer.average)))
    assert equal(flows[0][0], flows[1][0]) and equal(flows[0][1], flows[1][1])


# -- trouble


@pytest.mark.parametrize(
    "what",
    [
        lambda loss, step: loss * math.nan,
        lambda loss, step: loss * math.inf,
        lambda loss, step: loss + (0 * sum(p.sum() for p in step.flow.parameters())).sqrt(),  # infinite slope
    ],
    ids=["nan", "inf", "gradient"],
)
def test_steps_that_are_not_finite_are_skipped_and_counted(what, tmp_path):
    settings = Settings(batch_size=32, validation_size=64)
    generator = well()
    stages = [Stage("likelihood", 50, [(1.0, Broken([3, 7, 50], what))])]
    trainer = Trainer(generator, stages, well_data(), settings=settings, log=tmp_path / "log", progress=False)
    result = trainer.run()
    assert (result.steps, result.skipped) == (50, 3)
    assert all(torch.isfinite(t).all() for t in generator.flow.state_dict().values())
    assert result.history[-1]["skipped"] == 3


def test_a_skipped_step_changes_no_weight():
    trainer = Trainer(
        well(), [Stage("likelihood", 1, [(1.0, Broken([1], lambda loss, step: loss * math.nan))])], well_data(),
        settings=QUICK, progress=False,
    )  # fmt: skip
    before = weights(trainer.flow), weights(trainer.average)
    trainer.run()
    assert equal(before[0], weights(trainer.flow)) and equal(before[1], weights(trainer.average))


def test_a_hopeless_energy_does_not_end_a_run(tmp_path):
    """Every weight zero at a validation: an effective size of zero, not an error."""

    class Forbidden(bg.Energy):
        def reduced(self, x):
            return x[:, 0] * math.nan

    generator = bg.BoltzmannGenerator(Forbidden((2,)), RealNVP(2, layers=2, hidden=(8,)))
    result = generator.fit(steps=12, settings=QUICK, log=tmp_path / "log", progress=False)
    assert result.skipped == 12 and result.history[0]["ess"] == 0
    _strict_lines(tmp_path / "log")


def test_log_is_json_lines(tmp_path):
    path = tmp_path / "new" / "log.jsonl"
    result = well().fit(well_data(), steps=60, likelihood_steps=50, settings=QUICK, log=path, progress=False)
    records = _strict_lines(path)
    assert records == result.history
    assert [r["step"] for r in records] == list(range(10, 111, 10))
    assert {r["stage"] for r in records} == {"likelihood", "energy"}
    assert records[-1]["evaluations"] == 60 * 64
    well().fit(steps=10, settings=QUICK, log=path, progress=False)
    assert len(_strict_lines(path)) == 1


def _strict_lines(path) -> list[dict]:
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


# -- interruption


@pytest.mark.parametrize("kind", ["general", "molecule"])
@pytest.mark.parametrize("stop", [4, 17, 36], ids=["likelihood", "before", "after validations"])
def test_an_interrupted_run_resumes_to_the_bit(kind, stop, tmp_path, alanine, frames, monkeypatch):
    make = well if kind == "general" else lambda: alanine_generator(alanine)
    data = well_data() if kind == "general" else frames
    arguments = dict(steps=25, likelihood_steps=15, settings=QUICK, seed=3, progress=False)
    whole = make()
    expected = whole.fit(data, **arguments, log=tmp_path / "whole")

    path, log, count = tmp_path / "checkpoint", tmp_path / "log", 0
    original = ReversePath._factor if stop > 15 else MaximumLikelihood.__call__

    def stopping(self, *arguments):
        nonlocal count
        result = original(self, *arguments)
        count += 1
        if count == (stop - 15 if stop > 15 else stop):
            raise KeyboardInterrupt  # random numbers of the step are drawn, states have changed
        return result

    cut = make()
    untouched = weights(cut.flow)
    with monkeypatch.context() as patch:
        patch.setattr(*((ReversePath, "_factor") if stop > 15 else (MaximumLikelihood, "__call__")), stopping)
        with pytest.raises(KeyboardInterrupt):
            cut.fit(data, **arguments, checkpoint=path, log=log)
    assert path.exists() and not equal(weights(cut.flow), untouched)
    assert cut.provenance["training"]["steps"] == stop - 1

    resumed = make()
    result = resumed.fit(data, **arguments, checkpoint=path, log=log, resume=True)
    assert equal(weights(resumed.flow), weights(whole.flow))
    assert (result.steps, result.evaluations) == (expected.steps, expected.evaluations)
    assert _timeless(result.history) == _timeless(expected.history)
    assert _timeless(_strict_lines(log)) == _timeless(_strict_lines(tmp_path / "whole"))
    assert resumed.sample(20, seed=1).log_prob.equal(whole.sample(20, seed=1).log_prob)


def _timeless(records: list[dict]) -> list[dict]:
    return [{k: v for k, v in record.items() if k != "seconds"} for record in records]


def test_an_interrupted_run_leaves_the_averaged_weights():
    for generator in (bg.BoltzmannGenerator(None, RealNVP(2, layers=2, hidden=(8,))), well()):
        stages = [Stage("likelihood", 20, [(1.0, Broken([12], interrupt))])]
        trainer = Trainer(generator, stages, well_data(), settings=QUICK, progress=False)
        with pytest.raises(KeyboardInterrupt):
            trainer.run()
        # with an energy: the best of the validated ones
        expected = weights(trainer.average) if generator.energy is None else trainer.best
        assert equal({k: t.float() for k, t in weights(generator.flow).items()}, expected)
        assert not equal(weights(trainer.average), weights(trainer.flow))


def test_ctrl_c_waits_until_a_step_is_whole(tmp_path, monkeypatch):
    """A signal in the middle of an update must not leave the optimiser a step ahead of the average."""
    stages = [Stage("energy", 30, [(1.0, ReversePath())])]
    whole = well()
    Trainer(whole, stages, settings=QUICK, progress=False).run()
    path = tmp_path / "checkpoint"
    stages = [Stage("energy", 30, [(1.0, ReversePath())])]
    trainer = Trainer(well(), stages, settings=QUICK, checkpoint=path, progress=False)
    step, calls = trainer.optimizer.step, 0

    def signalled():
        nonlocal calls
        calls += 1
        if calls == 20:  # a validation follows this update
            os.kill(os.getpid(), signal.SIGINT)
        return step()

    monkeypatch.setattr(trainer.optimizer, "step", signalled)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    assert signal.getsignal(signal.SIGINT) is handler
    assert trainer.result.steps == 20
    resumed = well()
    stages = [Stage("energy", 30, [(1.0, ReversePath())])]
    Trainer(resumed, stages, settings=QUICK, checkpoint=path, resume=True, progress=False).run()
    assert equal(weights(resumed.flow), weights(whole.flow))


def test_resume_without_a_checkpoint_starts_like_a_fresh_run(tmp_path, alanine, frames):
    """The whitening of the data is part of a fresh start, whether or not the caller would have resumed."""
    made = []
    for resume in (False, True):
        generator = alanine_generator(alanine)
        generator.fit(
            frames, steps=3, likelihood_steps=3, settings=QUICK, checkpoint=tmp_path / str(resume), resume=resume,
            progress=False,
        )  # fmt: skip
        made.append(weights(generator.flow))
    assert equal(*made)


def test_resuming_a_finished_run_takes_no_step(tmp_path):
    first, second = well(), well()
    arguments = dict(steps=20, settings=QUICK, checkpoint=tmp_path / "c", progress=False)
    first.fit(**arguments)
    result = second.fit(**arguments, resume=True)
    assert equal(weights(first.flow), weights(second.flow)) and result.steps == 20


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (dict(steps=21), "stages"),
        (dict(likelihood_steps=6, steps=19), "stages"),
        (dict(seed=1), "seed"),
        (dict(settings=Settings(batch_size=32)), "settings"),
        (dict(data=well_data(400)), "data"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(tmp_path, change, word):
    arguments = dict(
        data=well_data(), steps=20, likelihood_steps=5, settings=QUICK, checkpoint=tmp_path / "c", progress=False
    )
    well().fit(**arguments)
    with pytest.raises(bg.InputError, match=word):
        well().fit(**{**arguments, **change}, resume=True)


def test_broken_checkpoints_are_refused(tmp_path, alanine):
    path = tmp_path / "c"
    arguments = dict(steps=5, settings=QUICK, checkpoint=path, progress=False)
    well().fit(**arguments)
    content = path.read_bytes()
    for size in (0, 7, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(bg.InputError, match="checkpoint"):
            well().fit(**arguments, resume=True)
    path.write_bytes(content)
    with pytest.raises(bg.InputError, match="checkpoint"):  # another architecture
        bg.BoltzmannGenerator(bg.systems.load("double_well"), RealNVP(2, layers=2, hidden=(16,))).fit(
            **arguments, resume=True
        )
    well().save(path)
    with pytest.raises(bg.InputError, match="checkpoint"):
        well().fit(**arguments, resume=True)
    assert b"\x80\x04" not in content[:2] and not content.startswith(b"PK")


# -- input


def test_nothing_to_train_on():
    silent = bg.BoltzmannGenerator(None, RealNVP(2, layers=2, hidden=(8,)))
    with pytest.raises(bg.InputError, match="nothing to train on"):
        silent.fit(progress=False)
    with pytest.raises(bg.InputError, match="nothing to train on"):
        well().fit(energy=False, progress=False)
    with pytest.raises(bg.InputError, match="empty list"):
        well().fit(steps=1, objective=[], progress=False)
    with pytest.raises(bg.InputError, match="zero steps"):
        well().fit(steps=0, progress=False)
    with pytest.raises(bg.InputError, match="likelihood_steps"):
        well().fit(likelihood_steps=5, steps=5, progress=False)
    with pytest.raises(bg.InputError, match="MaximumLikelihood needs data"):
        Trainer(well(), [Stage("likelihood", 5, [(1.0, MaximumLikelihood())])])
    with pytest.raises(bg.InputError, match="ReversePath needs"):
        Trainer(silent, [Stage("energy", 5, [(1.0, ReversePath())])])


@pytest.mark.parametrize("uninformed", [False, True])
def test_wrong_data_of_a_molecule(alanine, frames, uninformed):
    def make():
        positions = None if uninformed else alanine.positions
        return bg.BoltzmannGenerator.for_molecule(alanine.topology, alanine.system, positions=positions)

    for wrong in (frames[:0], frames[:, :21], frames[:, :, :2], frames.reshape(len(frames), -1), "frames"):
        with pytest.raises(bg.InputError):
            make().fit(wrong, steps=1, progress=False)
    with pytest.raises(bg.InputError, match="finite"):
        make().fit(frames * np.nan, steps=1, progress=False)
    with pytest.raises(bg.InputError, match="covariance"):
        make().fit(frames[:20], steps=1, progress=False)
    shuffled = frames[:, ::-1]
    if not uninformed:
        with pytest.raises(bg.InputError, match="same molecule"):
            make().fit(frames * [-1, 1, 1], steps=1, progress=False)
        with pytest.raises(bg.InputError, match="same molecule"):
            make().fit(shuffled, steps=1, progress=False)


def test_wrong_data_of_a_density():
    for wrong in (np.zeros((0, 2)), np.zeros((5, 3)), np.full((5, 2), np.nan), "data"):
        with pytest.raises(bg.InputError):
            well().fit(wrong, steps=1, progress=False)


def test_frames_outside_the_support_are_left_out_with_a_warning(alanine, frames):
    data = frames.copy()
    data[3] = np.nan
    data[5:7] *= [-1, 1, 1]
    generator = alanine_generator(alanine)
    with pytest.warns(UserWarning, match="3 of 150"):
        generator.fit(data, steps=1, likelihood_steps=1, settings=QUICK, progress=False)
    assert generator.provenance["training"]["frames"] == 147
    assert generator.provenance["training"]["frames_outside_support"] == 3


# -- rotors


def test_relabelling_permutes_only_hydrogens_of_rotors_cyclically(alanine, frames):
    generator = alanine_generator(alanine)
    zmatrix = generator.coordinates.zmatrix
    rotors = np.array([[zmatrix.torsions[row][0] for row in rotor] for rotor in zmatrix.rotors])
    symbols = np.array([a.element.symbol for a in alanine.topology.atoms()])
    assert rotors.shape == (3, 3) and (symbols[rotors] == "H").all()
    before = frames.copy()
    relabelled = relabel_rotors(frames, rotors, np.random.default_rng(0))
    assert np.array_equal(frames, before)
    rest = np.setdiff1d(np.arange(22), rotors)
    assert np.array_equal(relabelled[:, rest], frames[:, rest])
    for rotor in rotors:
        turns = [
            np.array_equal(relabelled[i, rotor], np.roll(frames[i, rotor], -turn, axis=0)) * (turn + 1)
            for i in range(len(frames))
            for turn in range(3)
        ]
        counts = np.bincount(np.reshape(turns, (-1, 3)).sum(1), minlength=4)
        assert counts[0] == 0 and (counts[1:] > 25).all()
    u = generator.energy(torch.as_tensor(np.stack([frames, relabelled])).flatten(0, 1).double()).view(2, -1)
    assert torch.allclose(u[0], u[1], atol=1e-9)
    t = [generator.flow.chart.split(generator.coordinates(torch.as_tensor(x))[0])[0] for x in (frames, relabelled)]
    with torch.no_grad():
        assert torch.allclose(*(generator.flow.log_prob_torsions(part) for part in t), atol=1e-9)
    assert not torch.allclose(*t)


def test_training_rows_carry_the_relabelling_and_repeat(alanine, frames):
    generator = alanine_generator(alanine)
    one, lost = to_flow_coordinates(generator, frames, np.random.default_rng(1))
    again, _ = to_flow_coordinates(generator, frames, np.random.default_rng(1))
    assert lost == 0 and one.dtype == torch.float64 and torch.equal(one, again)
    plain, _ = generator.coordinates(torch.as_tensor(frames))
    changed = (one != plain).any(0)
    kinds = np.array(generator.coordinates.kinds)
    assert changed.any() and set(kinds[changed]) <= {"bond", "angle", "torsion"}
    u = [generator.energy(generator.place(q)) for q in (one, plain)]
    assert torch.allclose(*u, atol=1e-7)


def test_copies_of_a_generator_train_apart():
    one = well()
    two = copy.deepcopy(one)
    before = weights(two.flow)
    one.fit(steps=5, settings=QUICK, progress=False)
    assert equal(weights(two.flow), before)
