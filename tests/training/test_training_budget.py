"""What a run may cost, what it does when it diverges, stages that end early, energies that are known already."""

from __future__ import annotations

import json
import math
import time

import numpy as np
import pytest
import torch
from openmm import unit

import openmm_bg as bg
from openmm_bg.errors import InputError
from openmm_bg.flows import RealNVP
from openmm_bg.training import (
    Budget,
    ForwardPath,
    LogVariance,
    MaximumLikelihood,
    ReversePath,
    Settings,
    Stage,
    Trainer,
)

QUICK = Settings(batch_size=64, validation_size=128, validate_every=10, average=0.9)


def well(seed: int = 0) -> bg.BoltzmannGenerator:
    return bg.BoltzmannGenerator(bg.systems.load("double_well"), RealNVP(2, layers=2, hidden=(8,), seed=seed))


def well_data(n: int = 300) -> torch.Tensor:
    return bg.systems.load("double_well").sample(n, torch.Generator().manual_seed(5))


def weights(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: t.clone() for name, t in module.state_dict().items()}


def equal(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def timeless(records: list[dict]) -> list[dict]:
    return [{k: v for k, v in record.items() if k != "seconds"} for record in records]


class At(ReversePath):
    """Does something at chosen calls, counted in its state."""

    def __init__(self, calls, what):
        super().__init__()
        self.calls, self.what = set(calls), what

    def __call__(self, step):
        loss, numbers = super().__call__(step)
        self.state["count"] = self.state.get("count", 0) + 1
        return (self.what(loss, self) if self.state["count"] in self.calls else loss), numbers


def nothing(loss, objective):
    return loss * math.nan


def interrupt(loss, objective):
    raise KeyboardInterrupt


def finish(loss, objective):
    objective.state["finished"] = 1
    return loss


# -- budgets


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("90s", Budget(seconds=90.0)),
        ("10min", Budget(seconds=600.0)),
        (" 1.5 H ", Budget(seconds=5400.0)),
        ("1e7", Budget(evaluations=10_000_000)),
        ("2.5e+3", Budget(evaluations=2500)),
        ("400", Budget(evaluations=400)),
    ],
)
def test_a_budget_is_read_from_a_word(text, expected):
    assert Budget.parse(text) == expected
    assert Budget.parse(text).evaluations is None or isinstance(Budget.parse(text).evaluations, int)


@pytest.mark.parametrize("text", ["", "s", "10m", "10 days", "-5s", "1e-3", "1.2.3s", "1h30min", "many", None, "1e400"])
def test_what_is_no_budget_is_refused(text):
    with pytest.raises(InputError, match="neither a time"):
        Budget.parse(text)


@pytest.mark.parametrize(
    "arguments", [{}, {"seconds": 0}, {"seconds": -1.0}, {"evaluations": 0}, {"seconds": math.inf}]
)
def test_a_budget_that_cannot_be_spent_is_refused(arguments):
    with pytest.raises(InputError, match="budget"):
        Budget(**arguments)
    with pytest.raises(InputError):
        Budget.parse("0")


def test_what_is_left_and_what_is_spent_of_a_budget():
    budget = Budget(10.0, 1000)
    assert budget.less(4.0, 300) == Budget(6.0, 700)
    assert Budget(seconds=10.0).less(4.0, 300) == Budget(seconds=6.0)
    assert budget.spent(5.0, 100) == 0.5 and budget.spent(1.0, 900) == 0.9
    assert Budget(evaluations=1000).spent(1e9, 100) == 0.1
    with pytest.raises(InputError, match="cannot be spent"):
        budget.less(10.0, 0)


def test_a_budget_of_evaluations_ends_there_and_repeats():
    made = []
    for _ in range(2):
        generator = well()
        result = generator.fit(budget="2000", settings=QUICK, progress=False)
        assert result.evaluations == 64 * result.steps and 2000 <= result.evaluations < 2000 + 64
        assert "ess" in result.history[-1] and result.history[-1]["step"] == result.steps
        made.append(weights(generator.flow))
    assert equal(*made)


def test_a_budget_of_time_ends_in_time():
    started = time.perf_counter()
    result = well().fit(budget=Budget(seconds=1.0), settings=QUICK, progress=False)
    assert 1.0 <= result.seconds < 3.0 and time.perf_counter() - started < 10.0 and result.steps > 3


def test_the_learning_rate_falls_with_the_budget():
    result = well().fit(budget=Budget(evaluations=64 * 100), settings=QUICK, progress=False)
    rates = {record["step"]: record["rate"] for record in result.history}
    for step, rate in rates.items():
        assert math.isclose(rate, 0.5 * (1 + math.cos(math.pi * (step - 1) / 100)) * QUICK.learning_rate, rel_tol=1e-9)
    assert min(rates.values()) < 0.01 * QUICK.learning_rate


def test_a_budget_of_evaluations_resumes_to_the_bit(tmp_path):
    arguments = dict(budget="2500", settings=QUICK, seed=2, progress=False)
    whole, cut, resumed = well(), well(), well()
    expected = whole.fit(objective=At([], nothing), **arguments)
    with pytest.raises(KeyboardInterrupt):
        cut.fit(objective=At([23], interrupt), checkpoint=tmp_path / "c", **arguments)
    result = resumed.fit(objective=At([], nothing), checkpoint=tmp_path / "c", resume=True, **arguments)
    assert equal(weights(whole.flow), weights(resumed.flow))
    assert timeless(result.history) == timeless(expected.history)
    assert result.evaluations == expected.evaluations


def test_resuming_where_the_budget_is_spent_takes_no_step(tmp_path):
    arguments = dict(budget="640", settings=QUICK, checkpoint=tmp_path / "c", progress=False)
    first = well().fit(**arguments)
    assert well().fit(resume=True, **arguments).steps == first.steps


def test_likelihood_learns_under_a_budget_of_evaluations():
    result = well().fit(well_data(), likelihood_steps=60, budget="640", settings=QUICK, progress=False)
    assert result.history[4]["stage"] == "likelihood" and result.history[4]["rate"] > 0.1 * QUICK.learning_rate


@pytest.mark.parametrize("how", [{"energy": False}, {"likelihood_steps": 0, "objective": ForwardPath()}])
def test_a_budget_that_nothing_spends_is_refused(how, monkeypatch):
    monkeypatch.setattr("openmm_bg.training.trainer._IDLE", 30)
    with pytest.raises(InputError, match="never spent"):
        well().fit(well_data(), budget=10**6, settings=QUICK, progress=False, **how)


def test_an_objective_begins_anew_in_every_fit():
    objective = ForwardPath()
    objective.state["finished"] = 1
    result = well().fit(well_data(), likelihood_steps=0, steps=7, objective=objective, settings=QUICK, progress=False)
    assert result.steps == 7


# -- divergence


def stage_of(objective, steps: int = 60, **more) -> list[Stage]:
    return [Stage("energy", steps, [(1.0, objective)], **more)]


def test_twenty_steps_without_a_gradient_roll_back(tmp_path):
    settings = Settings(batch_size=64, validation_size=128, validate_every=10, average=0.9)
    objective = At(range(26, 46), nothing)
    trainer = Trainer(
        well(), stage_of(objective), settings=settings, log=tmp_path / "log", progress=False
    )  # fmt: skip
    seen = {}
    original = trainer._roll_back

    def watched(record):
        seen["good"] = {name: t.clone() for name, t in trainer.watch.good.items()}
        original(record)
        seen["after"] = trainer._weights()

    trainer._roll_back = watched
    kept = {}
    keep = trainer.watch.keep

    def noted(stage, score, tensors):
        kept[trainer.result.steps] = tensors
        keep(stage, score, tensors)

    trainer.watch.keep = noted
    result = trainer.run()
    assert (result.rollbacks, result.skipped, result.steps) == (1, 20, 60)
    assert equal(seen["after"], seen["good"]) and equal(seen["good"], kept[20])
    records = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    (event,) = [record for record in records if "rolled_back" in record]
    assert (event["step"], event["rolled_back"], event["rate_factor"]) == (45, 1, 0.5)
    assert all(torch.isfinite(t).all() for t in trainer.generator.flow.state_dict().values())
    # half the cosine afterwards, the whole of it before
    for record in records:
        cosine = 0.5 * (1 + math.cos(math.pi * (record["step"] - 1) / 60)) * settings.learning_rate
        assert math.isclose(record["rate"], cosine * (0.5 if record["step"] > 45 else 1.0), rel_tol=1e-9)


def test_nineteen_bad_steps_do_not_roll_back_and_forty_do_so_twice():
    result = Trainer(well(), stage_of(At(range(6, 25), nothing)), settings=QUICK, progress=False).run()
    assert (result.rollbacks, result.skipped) == (0, 19)
    generator = well()
    trainer = Trainer(generator, stage_of(At(range(6, 46), nothing)), settings=QUICK, progress=False)
    result = trainer.run()
    assert (result.rollbacks, result.skipped, trainer.watch.factor) == (2, 40, 0.25)


def test_fit_says_how_often_it_went_back():
    generator = well()
    result = generator.fit(steps=40, objective=At(range(6, 26), nothing), settings=QUICK, progress=False)
    assert result.rollbacks == generator.provenance["training"]["rollbacks"] == 1


def ruin(trainer):
    """Throw the averaged weights far away, as a diverged training would."""

    def do(loss, objective):
        with torch.no_grad():
            for module in (trainer[0].flow, trainer[0].average):
                for parameter in module.parameters():
                    parameter.data += 5.0  # the graph of this step does not see it
        return loss * math.nan

    return do


def test_a_collapse_of_the_score_rolls_back():
    holder = []
    trainer = Trainer(well(), stage_of(At([33], ruin(holder))), settings=QUICK, progress=False)
    holder.append(trainer)
    result = trainer.run()
    assert result.rollbacks == 1 and trainer.watch.factor == 0.5
    (event,) = [record for record in result.history if "rolled_back" in record]
    before = next(record for record in result.history if record["step"] == 30)
    after = next(record for record in result.history if record["step"] == 50)
    assert event["step"] == 40 and event["ess_clipped"] < 0.2 * before["ess_clipped"]
    assert after["ess_clipped"] > 0.5 * before["ess_clipped"]


@pytest.mark.parametrize("stop", [20, 30])
def test_a_run_that_went_back_resumes_to_the_bit(stop, tmp_path):
    """Interrupted among the bad steps, and after the return."""
    bad = range(6, 26)
    whole, cut, resumed = well(), well(), well()
    expected = Trainer(whole, stage_of(At(bad, nothing)), settings=QUICK, progress=False).run()

    class Cut(At):
        def __call__(self, step):
            out = super().__call__(step)
            if self.state["count"] == stop:
                raise KeyboardInterrupt
            return out

    path = tmp_path / "c"
    with pytest.raises(KeyboardInterrupt):
        Trainer(cut, stage_of(Cut(bad, nothing)), settings=QUICK, checkpoint=path, progress=False).run()
    trainer = Trainer(
        resumed, stage_of(At(bad, nothing)), settings=QUICK, checkpoint=path, resume=True, progress=False
    )  # fmt: skip
    result = trainer.run()
    assert equal(weights(whole.flow), weights(resumed.flow))
    assert (result.rollbacks, result.skipped) == (expected.rollbacks, expected.skipped) == (1, 20)
    assert timeless(result.history) == timeless(expected.history)


# -- stages


def test_a_finished_objective_ends_its_stage_and_the_next_goes_on():
    stages = [
        Stage("first", 500, [(1.0, At([17], finish))]),
        Stage("second", 20, [(1.0, ReversePath())]),
    ]
    trainer = Trainer(well(), stages, settings=QUICK, progress=False)
    result = trainer.run()
    assert trainer.planned == [17, 20] and (result.steps, result.evaluations) == (37, 37 * 64)
    assert {r["step"]: r["stage"] for r in result.history} == {10: "first", 20: "second", 30: "second", 37: "second"}


def test_a_stage_that_ended_early_resumes_to_the_bit(tmp_path):
    def run(generator, second, **more):
        stages = [Stage("first", 500, [(1.0, At([17], finish))]), Stage("second", 20, [(1.0, second)])]
        return Trainer(generator, stages, settings=QUICK, progress=False, **more).run()

    whole, cut, resumed = well(), well(), well()
    expected = run(whole, At([], nothing))
    with pytest.raises(KeyboardInterrupt):
        run(cut, At([8], interrupt), checkpoint=tmp_path / "c")
    result = run(resumed, At([], nothing), checkpoint=tmp_path / "c", resume=True)
    assert equal(weights(whole.flow), weights(resumed.flow)) and result.steps == expected.steps == 37


def test_a_stage_with_a_rate_keeps_it_and_the_others_share_one_cosine():
    settings = Settings(batch_size=32, validation_size=64, validate_every=1, warmup=0.0, ramp=0.0)
    stages = [
        Stage("first", 10, [(1.0, ReversePath())]),
        Stage("flat", 7, [(1.0, ReversePath())], rate=2e-3),
        Stage("last", 10, [(1.0, ReversePath())]),
    ]
    result = Trainer(well(), stages, settings=settings, progress=False).run()
    rates = [record["rate"] for record in result.history]
    assert rates[10:17] == [2e-3] * 7
    cosine = [0.5 * (1 + math.cos(math.pi * k / 20)) * settings.learning_rate for k in range(20)]
    assert np.allclose(rates[:10] + rates[17:], cosine, rtol=1e-12)


# -- mixtures of objectives, known energies, devices


def test_fit_mixes_objectives_by_their_weights():
    class Fixed(MaximumLikelihood):
        def __init__(self, value):
            super().__init__()
            self.value = value

        def __call__(self, step):
            assert self.needs_data
            return next(step.flow.parameters()).sum() * 0 + self.value, {f"seen_{self.value}": self.value}

    settings = Settings(batch_size=32, validation_size=64, validate_every=1)
    result = well().fit(
        well_data(), likelihood_steps=0, steps=3, objective=[(0.5, Fixed(4.0)), (2.0, Fixed(3.0))], settings=settings,
        progress=False,
    )  # fmt: skip
    # the recipe adds a likelihood of torsions, of which there are none here
    assert all(math.isclose(record["loss"], 8.0, rel_tol=1e-6) for record in result.history)
    assert result.history[0]["seen_4.0"] == 4.0 and result.history[0]["seen_3.0"] == 3.0


def test_known_energies_are_used_and_not_evaluated():
    arguments = dict(likelihood_steps=5, steps=20, settings=QUICK, progress=False)
    data = well_data()
    known = bg.systems.load("double_well")(data)
    runs = {}
    for name, energies in (("known", known), ("asked", None), ("other", 2 * known)):
        generator = well()
        result = generator.fit(data, energies=energies, objective=LogVariance(own=0), **arguments)
        runs[name] = result.evaluations, weights(generator.flow)
    assert [runs[name][0] for name in ("known", "asked", "other")] == [0, len(data), 0]
    assert all(torch.allclose(runs["known"][1][k], runs["asked"][1][k], atol=1e-3) for k in runs["known"][1])
    assert not equal(runs["known"][1], runs["other"][1])


def test_known_energies_of_the_wrong_shape_are_refused():
    data = well_data(50)
    for wrong in (torch.zeros(49), torch.zeros(50, 1), torch.zeros(())):
        with pytest.raises(InputError, match="50 conformations"):
            well().fit(data, energies=wrong, steps=1, progress=False)
    with pytest.raises(InputError, match="belong to data"):
        well().fit(energies=torch.zeros(50), steps=1, progress=False)


def test_known_energies_of_a_molecule_may_carry_a_unit(alanine):
    run = bg.simulate(
        alanine.system, alanine.positions, temperature=300, n_frames=100, steps_per_frame=10, seed=1,
        platform="Reference", progress=False,
    )  # fmt: skip
    frames = np.asarray(run.positions)

    def trainer_energies(energies):
        generator = bg.BoltzmannGenerator.for_molecule(alanine.topology, alanine.system, positions=alanine.positions)
        settings = Settings(batch_size=16, validation_size=16, validate_every=1)
        result = generator.fit(
            frames, energies=energies, likelihood_steps=1, steps=2, objective=LogVariance(own=0), settings=settings,
            progress=False,
        )  # fmt: skip
        assert result.evaluations == (len(frames) if energies is None else 0)
        return weights(generator.flow), [record.get("spread") for record in result.history]

    generator = bg.BoltzmannGenerator.for_molecule(alanine.topology, alanine.system, positions=alanine.positions)
    kilojoules = generator.energy(torch.as_tensor(frames)).numpy() * 8.31446261815324e-3 * 300
    plain, spread = trainer_energies(kilojoules)
    measured, _ = trainer_energies(kilojoules / 4.184 * unit.kilocalories_per_mole)
    assert all(torch.allclose(plain[name], measured[name], atol=1e-5) for name in plain)
    _, asked = trainer_energies(None)
    assert np.allclose(spread[1:], asked[1:], rtol=1e-3)


def test_an_unknown_device_is_refused_in_one_sentence():
    for name in ("abacus", "cuda:99"):
        with pytest.raises(InputError, match=f"There is no device '{name}'") as caught:
            well().fit(steps=1, settings=Settings(device=name), progress=False)
        assert "\n" not in str(caught.value) and str(caught.value).endswith("use 'cpu'.")
