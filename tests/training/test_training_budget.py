"""What a training may cost, what it does when it diverges, and stages that end or keep their own rate."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from openmm import unit

import openmm_bg as bg
from openmm_bg.errors import InputError
from openmm_bg.flows import RealNVP
from openmm_bg.sampling import effective_sample_size
from openmm_bg.training import (
    Budget,
    LogVariance,
    MaximumLikelihood,
    ReversePath,
    Settings,
    Stage,
    Trainer,
)
from openmm_bg.training.watch import Watch

QUICK = Settings(batch_size=64, validation_size=128, validate_every=10, average=0.9)


def well(seed: int = 0) -> bg.BoltzmannGenerator:
    return bg.BoltzmannGenerator(bg.systems.load("double_well"), RealNVP(2, layers=4, hidden=(16,), seed=seed))


def well_data(n: int = 500) -> torch.Tensor:
    return bg.systems.load("double_well").sample(n, torch.Generator().manual_seed(5))


def weights(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: t.clone() for name, t in module.state_dict().items()}


def equal(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def timeless(records: list[dict]) -> list[dict]:
    return [{k: v for k, v in record.items() if k != "seconds"} for record in records]


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@dataclass
class Acting:
    """Another objective that does something at chosen calls, which it counts in its state as a checkpoint must.

    ``cut`` is the class's: a call at which the run is interrupted, once.
    """

    inner: object
    what: object = None
    calls: tuple[int, ...] = ()
    finish: int | None = None
    cut = None

    def __post_init__(self):
        self.needs_data, self.needs_energy = self.inner.needs_data, self.inner.needs_energy
        self.state, self.tensors = self.inner.state, self.inner.tensors

    def __call__(self, step):
        loss, numbers = self.inner(step)
        self.state["calls"] = self.state.get("calls", 0) + 1
        if self.state["calls"] == self.finish:
            self.state["finished"] = 1
        if self.state["calls"] == Acting.cut:
            raise KeyboardInterrupt
        return (self.what(loss, step) if self.state["calls"] in self.calls else loss), numbers


def broken(loss, step):
    return loss * math.nan


def pushing(loss, step):
    return sum((p - 5).square().sum() for p in step.flow.parameters())


# -- budgets in words


@pytest.mark.parametrize(
    ("text", "seconds", "evaluations"),
    [
        ("90s", 90.0, None),
        ("10min", 600.0, None),
        ("2h", 7200.0, None),
        ("1.5h", 5400.0, None),
        (" 10 min ", 600.0, None),
        ("2H", 7200.0, None),
        ("0.5s", 0.5, None),
        ("1e3s", 1000.0, None),
        ("1e7", None, 10_000_000),
        ("1E+7", None, 10_000_000),
        ("2.5e3", None, 2500),
        ("1000", None, 1000),
        (1000, None, 1000),
    ],
)
def test_a_budget_is_read_from_its_words(text, seconds, evaluations):
    budget = Budget.parse(text)
    assert budget == Budget(seconds, evaluations)
    assert isinstance(budget.evaluations, int | None)


@pytest.mark.parametrize(
    "text",
    [
        "", " ", "s", "min", "10 minutes", "10m", "10d", "-5s", "-1e3", "0", "0s", "0.5", "1e", "1e-3h", ".", "1.2.3",
        "1,000", "1_000", "ten", "nan", "inf", "1e400", "1e400s", "10min 5s", "10min1000", "1e7\n1e7", None, "٣s",
    ],
)  # fmt: skip
def test_other_words_are_refused(text):
    with pytest.raises(InputError, match="budget"):
        Budget.parse(text)


@pytest.mark.parametrize(
    "arguments",
    [{}, {"seconds": 0}, {"seconds": -1.0}, {"seconds": math.nan}, {"seconds": math.inf}, {"evaluations": 0}],
)
def test_a_budget_that_cannot_be_spent_is_refused(arguments):
    with pytest.raises(InputError, match="budget"):
        Budget(**arguments)


def test_what_runs_out_first_is_what_is_spent():
    assert Budget(seconds=10.0).spent(5.0, 10**9) == 0.5
    assert Budget(evaluations=100).spent(1e9, 25) == 0.25
    assert Budget(10.0, 100).spent(5.0, 25) == 0.5
    assert Budget(10.0, 100).spent(1.0, 150) == 1.5


def test_less_is_what_is_left():
    assert Budget(10.0, 100).less(4.0, 30) == Budget(6.0, 70)
    assert Budget(seconds=10.0).less(4.0, 10**9) == Budget(6.0)
    assert Budget(evaluations=100).less(1e9, 30) == Budget(evaluations=70)
    for seconds, evaluations in ((10.0, 0), (0.0, 100), (11.0, 0)):
        with pytest.raises(InputError, match="cannot be spent"):
            Budget(10.0, 100).less(seconds, evaluations)


# -- budgets in training


@pytest.mark.parametrize(("budget", "steps"), [("640", 10), (Budget(evaluations=6400), 100), ("650", 11), ("1", 1)])
def test_a_budget_of_evaluations_ends_a_run_exactly_there(budget, steps):
    """In place of the number of steps; with the step that spends the last of it."""
    generator = well()
    result = generator.fit(steps=3, budget=budget, settings=QUICK, progress=False)
    assert (result.steps, result.evaluations) == (steps, 64 * steps)
    assert "ess" in result.history[-1] and result.history[-1]["step"] == steps
    assert generator.provenance["training"]["evaluations"] == 64 * steps


def test_a_budget_of_evaluations_repeats_a_run():
    runs = []
    for seed in (1, 1, 2):
        generator = well()
        generator.fit(well_data(), likelihood_steps=5, budget="1000", seed=seed, settings=QUICK, progress=False)
        runs.append(weights(generator.flow))
    assert equal(runs[0], runs[1]) and not equal(runs[0], runs[2])


@pytest.mark.parametrize("stop", [3, 14, 25])
def test_a_budget_of_evaluations_resumes_to_the_bit(stop, tmp_path, monkeypatch):
    arguments = dict(likelihood_steps=5, budget="1900", settings=QUICK, seed=3, progress=False)
    whole, cut, resumed = well(), well(), well()
    expected = whole.fit(well_data(), objective=Acting(ReversePath()), **arguments, log=tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(Acting, "cut", stop)
        with pytest.raises(KeyboardInterrupt):
            cut.fit(well_data(), objective=Acting(ReversePath()), checkpoint=tmp_path / "c", **arguments)
    result = resumed.fit(
        well_data(), objective=Acting(ReversePath()), checkpoint=tmp_path / "c", log=tmp_path / "log", resume=True,
        **arguments,
    )  # fmt: skip
    assert equal(weights(whole.flow), weights(resumed.flow))
    assert (result.steps, result.evaluations) == (expected.steps, expected.evaluations) == (35, 1920)
    assert timeless(lines(tmp_path / "log")) == timeless(lines(tmp_path / "whole"))


def test_a_checkpoint_of_another_budget_is_refused(tmp_path):
    arguments = dict(settings=QUICK, checkpoint=tmp_path / "c", progress=False)
    well().fit(budget="640", **arguments)
    for other in ("1280", "10s", None):
        with pytest.raises(InputError, match="budget"):
            well().fit(budget=other, resume=True, **arguments)
    assert well().fit(budget="640", resume=True, **arguments).steps == 10


@pytest.mark.parametrize("budget", ["1s", Budget(1.0, 10**9)])
def test_a_budget_of_time_ends_a_run_in_time(budget):
    started = time.perf_counter()
    result = well().fit(budget=budget, settings=QUICK, progress=False)
    assert 1.0 <= result.seconds < 1.5 and time.perf_counter() - started < 4
    assert result.steps > 10 and "ess" in result.history[-1]


def test_of_time_and_evaluations_the_first_to_run_out_ends_a_run():
    result = well().fit(budget=Budget(1000.0, 640), settings=QUICK, progress=False)
    assert result.evaluations == 640


def test_with_a_budget_the_rate_follows_the_share_that_is_spent(tmp_path):
    """It rises over the first three hundredths and then falls as a cosine to zero."""
    settings = Settings(batch_size=64, validation_size=64, validate_every=1, learning_rate=1e-3)
    well().fit(budget="6400", settings=settings, log=tmp_path / "log", progress=False)
    records = lines(tmp_path / "log")
    spent = np.arange(100) / 100  # before each step
    expected = 1e-3 * 0.5 * (1 + np.cos(math.pi * spent)) * np.minimum(1, spent / 0.03)
    assert [record["rate"] for record in records] == pytest.approx(list(expected), abs=1e-8)
    assert [record["evaluations"] for record in records] == list(range(64, 6401, 64))


def test_with_a_budget_of_time_the_rate_falls_to_zero(tmp_path):
    settings = Settings(batch_size=64, validation_size=64, validate_every=5, learning_rate=1e-3)
    well().fit(budget="1s", settings=settings, log=tmp_path / "log", progress=False)
    records = [record for record in lines(tmp_path / "log") if record["seconds"] > 0.1]
    rates = [record["rate"] for record in records]
    assert all(one > other for one, other in zip(rates, rates[1:], strict=False))
    # of what was spent before the step
    expected = [1e-3 * 0.5 * (1 + math.cos(math.pi * min(record["seconds"], 1.0))) for record in records]
    assert rates == pytest.approx(expected, abs=1e-4)


@pytest.mark.xfail(strict=True, reason="nothing is spent while the likelihood is trained: a warm-up without end")
def test_a_budget_of_evaluations_leaves_the_likelihood_its_rate(tmp_path):
    settings = Settings(batch_size=64, validation_size=64, validate_every=1, learning_rate=1e-2)
    well().fit(well_data(), likelihood_steps=40, budget="640", settings=settings, log=tmp_path / "l", progress=False)
    likelihood = [record for record in lines(tmp_path / "l") if record["stage"] == "likelihood"]
    assert len(likelihood) == 40 and likelihood[20]["rate"] > 1e-3


@pytest.mark.xfail(raises=KeyboardInterrupt, strict=True, reason="a budget that nothing spends never ends")
@pytest.mark.parametrize("kind", ["likelihood alone", "stored energies"])
def test_a_budget_of_evaluations_that_nothing_spends_is_refused_or_ends(kind):
    endless = Acting(MaximumLikelihood(), broken, calls=())
    Acting.cut = 500
    try:
        if kind == "likelihood alone":
            generator = bg.BoltzmannGenerator(None, RealNVP(2, layers=2, hidden=(8,)))
            trainer = Trainer(
                generator, [Stage("likelihood", 10**9, [(1.0, endless)])], well_data(), progress=False,
                budget=Budget(evaluations=640), settings=QUICK,
            )  # fmt: skip
            trainer.run()
        else:
            objective = [(1.0, LogVariance(own=0)), (1.0, endless)]
            well().fit(
                well_data(), likelihood_steps=0, budget="640", objective=objective, settings=QUICK, progress=False
            )
    except InputError:
        pass
    finally:
        Acting.cut = None


@pytest.mark.xfail(raises=AttributeError, strict=True, reason="only a Budget or its words")
def test_a_bare_number_of_evaluations_is_a_budget_or_refused():
    try:
        assert well().fit(budget=640, settings=QUICK, progress=False).evaluations == 640
    except InputError:
        pass


def test_words_that_are_no_budget_are_refused_before_anything_is_trained():
    generator = well()
    before = weights(generator.flow)
    with pytest.raises(InputError, match="neither a time"):
        generator.fit(budget="soon", progress=False)
    assert equal(before, weights(generator.flow))


# -- the watch


def test_the_watch_counts_bad_steps_in_a_row():
    watch = Watch({})
    for _ in range(19):
        watch.step(False)
    assert not watch.lost(0, None)
    watch.step(True)
    for _ in range(19):
        watch.step(False)
    assert not watch.lost(0, None)
    watch.step(False)
    assert watch.lost(0, None) and watch.lost(0, 1.0)
    watch.rolled_back()
    assert not watch.lost(0, None) and watch.factor == 0.5


def test_the_watch_compares_scores_within_a_stage_only():
    watch = Watch({})
    watch.keep(0, 0.5, {"a": 1})
    assert watch.lost(0, 0.09) and not watch.lost(0, 0.11) and not watch.lost(0, None)
    assert not watch.lost(1, 0.0)
    watch.keep(0, 0.3, {"a": 2})  # the best counts, not the last
    assert watch.lost(0, 0.09) and watch.good == {"a": 2}
    watch.keep(1, 0.01, {"a": 3})
    assert watch.best == 0.01 and not watch.lost(1, 0.0)  # a score that says nothing yet
    watch.step(False)
    watch.keep(1, 0.2, {"a": 4})  # in the middle of trouble nothing is good
    assert watch.good == {"a": 3}
    assert watch.numbers() == {"factor": 1.0, "bad": 1, "best": 0.2, "stage": 1}


def plain_or(what=None, calls=(), stage=ReversePath, needs=True) -> list[Stage]:
    return [Stage("energy", 80, [(1.0, Acting(stage(), what, tuple(calls)))])]


def test_twenty_bad_steps_lead_back_to_the_last_good_weights_and_half_the_rate(tmp_path):
    """Steps 25 to 44 are NaN; the last good weights are those of the validation after step 20."""
    seen = {}

    def watching(loss, step):
        at = len(seen)
        seen[at] = weights(step.flow)
        return loss * math.nan if 24 <= at < 44 else loss

    trainer = Trainer(well(), plain_or(watching, range(1, 81)), settings=QUICK, log=tmp_path / "log", progress=False)
    result = trainer.run()
    assert (result.steps, result.skipped, result.rollbacks) == (80, 20, 1)
    # seen[i] are the weights before step i + 1
    assert equal(seen[24], seen[43]) and not equal(seen[20], seen[24])
    assert equal(seen[44], seen[20])
    records = {record["step"]: record for record in lines(tmp_path / "log")}
    assert records[44]["rolled_back"] == 1 and records[44]["rate_factor"] == 0.5
    assert sum("rolled_back" in record for record in records.values()) == 1
    undisturbed = Trainer(well(), plain_or(), settings=QUICK, progress=False).run()
    for record in undisturbed.history:
        factor = 1.0 if record["step"] <= 44 else 0.5
        assert records[record["step"]]["rate"] == pytest.approx(factor * record["rate"])


def test_the_moments_of_the_optimiser_go_back_too():
    """After the return the next update is the one that followed the good weights, at half the rate."""
    settings = Settings(batch_size=64, validation_size=64, validate_every=10, warmup=0.0)

    def trained(what, calls, steps):
        stages = [Stage("likelihood", steps, [(1.0, Acting(MaximumLikelihood(), what, calls))], rate=1e-2)]
        data = well_data(1)  # every batch is the same
        trainer = Trainer(well(), stages, data, settings=settings, progress=False)
        trainer.run()
        return trainer

    good, after = (trained(None, (), steps).flow.state_dict() for steps in (10, 11))
    returned = trained(broken, tuple(range(11, 31)), 31)
    assert returned.result.rollbacks == 1 and returned.watch.factor == 0.5
    for name, tensor in returned.flow.state_dict().items():
        if tensor.is_floating_point():
            assert torch.allclose(tensor - good[name], 0.5 * (after[name] - good[name]), atol=1e-7)


def test_every_twenty_bad_steps_halve_the_rate_again():
    trainer = Trainer(well(), plain_or(broken, range(31, 81)), settings=QUICK, progress=False)
    result = trainer.run()
    assert (result.skipped, result.rollbacks, trainer.watch.factor) == (50, 2, 0.25)
    assert [record["rolled_back"] for record in result.history if "rolled_back" in record] == [1, 2]
    assert all(torch.isfinite(t).all() for t in trainer.generator.flow.state_dict().values())


def test_trouble_from_the_first_step_leads_back_to_the_start():
    generator = well()
    before = weights(generator.flow)
    settings = Settings(batch_size=64, validation_size=128, validate_every=1000)
    stages = [Stage("likelihood", 30, [(1.0, Acting(MaximumLikelihood(), broken, tuple(range(6, 26))))])]
    seen = []
    trainer = Trainer(generator, stages, well_data(), settings=settings, progress=False)
    stages[0].terms[0][1].what = lambda loss, step: seen.append(weights(step.flow)) or loss * math.nan
    trainer.run()
    assert trainer.result.rollbacks == 1 and not equal(seen[0], {k: t.float() for k, t in before.items()})
    assert trainer.watch.good.keys() and len(seen) == 20


def test_nineteen_bad_steps_are_skipped_and_no_more():
    result = Trainer(well(), plain_or(broken, range(21, 40)), settings=QUICK, progress=False).run()
    assert (result.skipped, result.rollbacks) == (19, 0)


COLLAPSE = Settings(batch_size=256, validation_size=1000, validate_every=10, average=0.9, learning_rate=2e-2)


def test_a_score_that_collapses_leads_back(tmp_path):
    """Ten steps push all weights to 5; the flow goes back to step 30 and ends as if nothing had been."""
    generator = well()
    trainer = Trainer(
        generator, plain_or(pushing, range(31, 61)), settings=COLLAPSE, log=tmp_path / "log", progress=False
    )
    result = trainer.run()
    records = {record["step"]: record for record in lines(tmp_path / "log")}
    returns = [step for step, record in records.items() if "rolled_back" in record]
    assert returns and all(30 < step <= 60 for step in returns) and result.rollbacks == len(returns)
    for step in returns:
        assert records[step]["ess_clipped"] < 0.2 * records[30]["ess_clipped"]
    assert trainer.watch.factor == 0.5 ** len(returns) and result.skipped == 0
    assert records[70]["ess"] > 0.8 * records[30]["ess"]
    assert effective_sample_size(generator.sample(2000, seed=1).log_weights).fraction > 0.7


def test_the_score_of_a_likelihood_leads_nowhere_back():
    """It is not what that stage learns: a flow between two modes may score worse for a while."""
    stages = [Stage("likelihood", 80, [(1.0, Acting(MaximumLikelihood(), pushing, tuple(range(31, 81))))])]
    result = Trainer(well(), stages, well_data(), settings=COLLAPSE, progress=False).run()
    assert result.history[-1]["ess"] < 0.2 * result.history[2]["ess"]
    assert result.rollbacks == 0


@pytest.mark.parametrize("kind", ["steps", "score"])
@pytest.mark.parametrize("stop", [35, 47, 66], ids=["before", "amid", "after"])
def test_a_run_that_went_back_resumes_to_the_bit(kind, stop, tmp_path, monkeypatch):
    what, calls = (broken, range(25, 45)) if kind == "steps" else (pushing, range(31, 61))
    whole, cut, resumed = well(), well(), well()
    arguments = dict(settings=COLLAPSE, seed=2, progress=False)
    expected = Trainer(whole, plain_or(what, calls), **arguments).run()
    assert expected.rollbacks
    with monkeypatch.context() as patch:
        patch.setattr(Acting, "cut", stop)
        with pytest.raises(KeyboardInterrupt):
            Trainer(cut, plain_or(what, calls), checkpoint=tmp_path / "c", **arguments).run()
    result = Trainer(
        resumed, plain_or(what, calls), checkpoint=tmp_path / "c", resume=True, log=tmp_path / "log", **arguments
    ).run()
    assert equal(weights(whole.flow), weights(resumed.flow))
    assert (result.rollbacks, result.skipped, result.evaluations) == (
        expected.rollbacks, expected.skipped, expected.evaluations,
    )  # fmt: skip
    assert timeless(lines(tmp_path / "log")) == timeless(expected.history)


def test_fit_tells_how_often_it_went_back():
    generator = well()
    result = generator.fit(
        steps=80, objective=Acting(ReversePath(), broken, tuple(range(25, 45))), settings=QUICK, progress=False
    )
    assert result.rollbacks == generator.provenance["training"]["rollbacks"] == 1


# -- stages


def rates_of(result) -> list[float]:
    return [record["rate"] for record in result.history]


EVERY = Settings(batch_size=16, validation_size=16, validate_every=1, warmup=0.0, ramp=0.0, learning_rate=1e-3)


def cosine(n: int, rate: float = 1e-3) -> list[float]:
    return [rate * 0.5 * (1 + math.cos(math.pi * i / n)) for i in range(n)]


def test_the_stages_without_a_rate_share_one_cosine():
    stages = [Stage(name, n, [(1.0, ReversePath())]) for name, n in (("one", 5), ("none", 0), ("two", 7))]
    result = Trainer(well(), stages, settings=EVERY, progress=False).run()
    assert rates_of(result) == pytest.approx(cosine(12))
    assert [record["stage"] for record in result.history] == ["one"] * 5 + ["two"] * 7


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_stage_with_a_rate_keeps_it_and_leaves_the_cosine_to_the_others(place):
    stages = [Stage("one", 5, [(1.0, ReversePath())]), Stage("two", 7, [(1.0, ReversePath())])]
    expected = [cosine(12)[:5], cosine(12)[5:]]
    stages.insert(place, Stage("constant", 4, [(1.0, ReversePath())], rate=3e-4))
    expected.insert(place, [3e-4] * 4)
    result = Trainer(well(), stages, settings=EVERY, progress=False).run()
    assert rates_of(result) == pytest.approx(sum(expected, []))


def test_a_warm_up_and_ramps_lead_into_every_stage():
    """Over their shares of the whole run."""
    settings = Settings(batch_size=16, validation_size=16, validate_every=1, warmup=0.1, ramp=0.05)
    stages = [
        Stage("one", 40, [(1.0, ReversePath())], rate=1.0e-3),
        Stage("two", 60, [(1.0, ReversePath())], rate=2e-3),
    ]
    rates = rates_of(Trainer(well(), stages, settings=settings, progress=False).run())
    assert rates[:10] == pytest.approx([1e-3 * (i + 1) / 10 for i in range(10)])
    assert rates[10:40] == pytest.approx([1e-3] * 30)
    assert rates[40:45] == pytest.approx([2e-3 * (i + 1) / 5 for i in range(5)])
    assert rates[45:] == pytest.approx([2e-3] * 55)


@dataclass
class Progress(ReversePath):
    """Remembers the progress it was told."""

    told: list = field(default_factory=list)

    def __call__(self, step):
        self.told.append(step.progress)
        return super().__call__(step)


def test_a_finished_stage_ends_and_the_rest_goes_on():
    objective = Progress()
    stages = [
        Stage("short", 20, [(1.0, Acting(ReversePath(), finish=7))], rate=3e-4),
        Stage("rest", 10, [(1.0, objective)]),
    ]
    trainer = Trainer(well(), stages, settings=EVERY, progress=False)
    assert trainer.total == 30
    result = trainer.run()
    assert (result.steps, trainer.total, trainer.planned) == (17, 17, [7, 10])
    assert [record["stage"] for record in result.history] == ["short"] * 7 + ["rest"] * 10
    # as if it had been planned so
    assert rates_of(result) == pytest.approx([3e-4] * 7 + cosine(10))
    assert objective.told == pytest.approx([i / 10 for i in range(10)])


def test_a_cosine_goes_on_from_where_a_finished_stage_ends():
    """Of 12 + 8 steps, the first stage ends after 4: the remaining 8 are the last two thirds of 12."""
    stages = [
        Stage("short", 12, [(1.0, Acting(ReversePath(), finish=4))]),
        Stage("rest", 8, [(1.0, ReversePath())]),
    ]
    result = Trainer(well(), stages, settings=EVERY, progress=False).run()
    assert rates_of(result) == pytest.approx(cosine(20)[:4] + cosine(12)[4:])


@pytest.mark.parametrize("finish", [1, 7, 20])
def test_the_last_stage_may_finish_too(finish):
    generator = well()
    result = generator.fit(steps=20, objective=Acting(ReversePath(), finish=finish), settings=EVERY, progress=False)
    assert result.steps == finish and "ess" in result.history[-1]
    assert generator.provenance["training"]["stages"] == [["energy", finish]]


def test_one_of_several_objectives_may_finish_a_stage():
    objective = [(1.0, ReversePath()), (0.5, Acting(LogVariance(own=1.0), finish=6))]
    assert well().fit(steps=20, objective=objective, settings=EVERY, progress=False).steps == 6


@pytest.mark.parametrize("stop", [5, 13], ids=["before", "after"])
def test_a_run_with_a_finished_stage_resumes_to_the_bit(stop, tmp_path, monkeypatch):
    def stages():
        shared = Acting(ReversePath(), finish=8)
        return [Stage("short", 20, [(1.0, shared)]), Stage("rest", 20, [(1.0, Acting(ReversePath()))])]

    whole, cut, resumed = well(), well(), well()
    arguments = dict(settings=QUICK, progress=False)
    expected = Trainer(whole, stages(), **arguments).run()
    with monkeypatch.context() as patch:
        # calls are counted by each objective: the second one's are 8 fewer
        patch.setattr(Acting, "cut", stop if stop < 8 else stop - 4)
        with pytest.raises(KeyboardInterrupt):
            Trainer(cut, stages(), checkpoint=tmp_path / "c", **arguments).run()
    result = Trainer(resumed, stages(), checkpoint=tmp_path / "c", resume=True, **arguments).run()
    assert result.steps == expected.steps == 28
    assert equal(weights(whole.flow), weights(resumed.flow))
    assert timeless(result.history) == timeless(expected.history)


# -- what fit hands on


def test_several_objectives_are_one_weighted_sum():
    """The loss of the log is the sum; and the weights come out as with the sum as one objective."""
    seen = []

    @dataclass
    class Pull:
        """Pulls every parameter to a value."""

        to: float
        name: str
        needs_data = False
        needs_energy = False

        def __post_init__(self):
            self.state, self.tensors = {}, {}

        def __call__(self, step):
            loss = sum((p - self.to).square().sum() for p in step.flow.parameters())
            seen.append((self.name, float(loss.detach())))
            return loss, {self.name: float(loss.detach())}

    generator = well()
    result = generator.fit(
        steps=200, objective=[(0.3, Pull(0.0, "a")), (0.1, Pull(1.0, "b"))], progress=False,
        settings=Settings(batch_size=4, validation_size=16, validate_every=1, learning_rate=2e-2, clip=1e9),
    )  # fmt: skip
    assert [name for name, _ in seen[:4]] == ["a", "b", "a", "b"]
    for record in result.history:
        assert record["loss"] == pytest.approx(0.3 * record["a"] + 0.1 * record["b"], rel=1e-5)
    # the minimum of 3 p^2 + (p - 1)^2
    trainer_end = torch.cat([p.flatten() for p in generator.flow.parameters()])
    assert float(trainer_end.median()) == pytest.approx(0.25, abs=0.05)


class Marked(bg.Energy):
    """A normal density that remembers how many rows it was asked for."""

    def __init__(self, mean: float):
        super().__init__((2,))
        self.mean, self.asked = mean, 0

    def reduced(self, x):
        self.asked += len(x)
        return 0.5 * (x - self.mean).square().sum(-1)


def test_given_energies_are_used_and_not_evaluated():
    """The generator's energy is another one: what is learned is what the given energies say."""
    data = torch.randn(400, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.5
    truth, wrong = Marked(0.5), Marked(-3.0)
    settings = Settings(batch_size=64, validation_size=16, validate_every=5, average=0.9)
    arguments = dict(likelihood_steps=0, steps=30, objective=LogVariance(own=0), settings=settings, progress=False)
    generators = [
        bg.BoltzmannGenerator(energy, RealNVP(2, layers=2, hidden=(8,)), defensive=0.0) for energy in (truth, wrong)
    ]
    evaluated = generators[0].fit(data, **arguments)
    validations = truth.asked - 400
    given = generators[1].fit(data, energies=truth.reduced(data), **arguments)
    assert (evaluated.evaluations, given.evaluations) == (400, 0)
    assert wrong.asked == validations  # the samples of validations are not counted
    assert [r["loss"] for r in given.history] == pytest.approx([r["loss"] for r in evaluated.history], rel=1e-4)
    for one, other in zip(*(g.flow.parameters() for g in generators), strict=True):
        # the better of the validated weights may differ, both have been at every validation
        assert torch.isfinite(one).all() and torch.isfinite(other).all()


def test_log_variance_on_data_alone_evaluates_every_row_once():
    for steps in (2, 30):
        result = well().fit(
            well_data(), likelihood_steps=0, steps=steps, objective=LogVariance(own=0), settings=QUICK, progress=False
        )
        assert result.evaluations == 500
    half = well().fit(
        well_data(), likelihood_steps=0, steps=30, objective=LogVariance(own=0.5), settings=QUICK, progress=False
    )
    assert half.evaluations == 500 + 30 * 32


def test_rows_of_data_that_no_objective_asks_about_cost_nothing():
    result = well().fit(well_data(), likelihood_steps=5, steps=5, settings=QUICK, progress=False)
    assert result.evaluations == 5 * 64


@pytest.mark.parametrize("shape", [(499,), (501,), (500, 1), ()])
def test_energies_of_another_shape_are_refused(shape):
    with pytest.raises(InputError, match="500 conformations, but energies"):
        well().fit(well_data(), energies=np.zeros(shape), steps=1, progress=False)


def test_energies_without_data_are_refused():
    with pytest.raises(InputError, match="belong to data"):
        well().fit(energies=np.zeros(5), steps=1, progress=False)


def test_energies_of_a_molecule_come_in_kilojoules_or_with_their_unit(alanine):
    """Bare numbers, kJ/mol and kcal/mol teach the same as the energies that would be evaluated; lost frames go."""
    run = bg.simulate(
        alanine.system, alanine.positions, temperature=300, n_frames=150, steps_per_frame=20, seed=1,
        platform="Reference", progress=False,
    )  # fmt: skip
    frames = np.asarray(run.positions).copy()
    settings = Settings(batch_size=64, validation_size=32, validate_every=4, learning_rate=2e-3)

    def generator():
        return bg.BoltzmannGenerator.for_molecule(alanine.topology, alanine.system, positions=alanine.positions)

    potential = generator().energy.potential(torch.as_tensor(frames)).numpy()
    frames[7] = np.nan
    potential[7] = 1e6  # belongs to the frame that is left out
    outcomes = []
    for energies in (
        None,
        potential,
        unit.Quantity(potential, unit.kilojoules_per_mole),
        unit.Quantity(potential / 4.184, unit.kilocalories_per_mole),
        list(potential),
    ):
        with pytest.warns(UserWarning, match="1 of 150"):
            outcomes.append(
                generator().fit(
                    frames, energies=energies, likelihood_steps=0, steps=8, objective=LogVariance(own=0),
                    settings=settings, progress=False,
                )
            )  # fmt: skip
    assert [outcome.evaluations for outcome in outcomes] == [149, 0, 0, 0, 0]
    spreads = [[record["spread"] for record in outcome.history] for outcome in outcomes]
    for other in spreads[1:]:
        assert other == pytest.approx(spreads[0], rel=1e-3)


@pytest.mark.parametrize("device", ["nowhere", "", "cuda:99"])
def test_a_device_that_is_not_there_is_refused_in_one_sentence(device):
    with pytest.raises(InputError, match="use 'cpu'") as caught:
        well().fit(steps=1, settings=Settings(device=device), progress=False)
    message = str(caught.value)
    assert repr(device) in message and "\n" not in message and message.endswith(".")


@pytest.mark.xfail(raises=RuntimeError, strict=True, reason="it makes tensors, but no random numbers")
def test_a_device_that_only_pretends_is_refused_too():
    with pytest.raises(InputError, match="meta"):
        well().fit(steps=1, settings=Settings(device="meta"), progress=False)
