"""What a training may cost: budgets in words, what they end, and the learning rate that follows them."""

from __future__ import annotations

import itertools
import math
import time

import numpy as np
import pytest
from small_runs import QUICK, Acting, equal, lines, timeless, weights, well, well_data

from openmm_bg.errors import InputError
from openmm_bg.training import Budget, ForwardPath, ReversePath, Settings

# -- in words


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


@pytest.mark.parametrize(
    "text",
    [
        "", " ", "s", "min", "10 minutes", "10m", "10 days", "1h30min", "10min 5s", "10min1000", "-5s", "-1e3", "0",
        "0s", "0.5", "1e", "1e-3", "1e-3h", ".", "1.2.3s", "1,000", "1_000", "ten", "nan", "inf", "1e400", "1e400s",
        "1e7\n1e7", None, "٣s",
    ],
)  # fmt: skip
def test_what_is_no_budget_is_refused(text):
    with pytest.raises(InputError, match="budget"):
        Budget.parse(text)


@pytest.mark.parametrize(
    "arguments", [{}, {"seconds": 0}, {"seconds": -1.0}, {"evaluations": 0}, {"seconds": math.inf}]
)
def test_a_budget_that_cannot_be_spent_is_refused(arguments):
    with pytest.raises(InputError, match="budget"):
        Budget(**arguments)


def test_what_is_left_and_what_is_spent_of_a_budget():
    budget = Budget(10.0, 1000)
    assert budget.less(4.0, 300) == Budget(6.0, 700)
    assert Budget(seconds=10.0).less(4.0, 300) == Budget(seconds=6.0)
    assert budget.spent(5.0, 100) == 0.5 and budget.spent(1.0, 900) == 0.9
    assert Budget(evaluations=1000).spent(1e9, 100) == 0.1
    for seconds, evaluations in ((10.0, 0), (0.0, 1000), (0.0, 1001)):
        with pytest.raises(InputError, match="Nothing is left"):
            budget.less(seconds, evaluations)


# -- what it ends


@pytest.mark.parametrize(
    ("budget", "steps"), [("640", 10), (640, 10), (640.0, 10), ("650", 11), ("1", 1), (Budget(1000.0, 640), 10)]
)
def test_a_budget_of_evaluations_ends_a_run_exactly_there(budget, steps):
    """In place of the number of steps, with the step that spends the last of it."""
    generator = well()
    result = generator.fit(steps=3, budget=budget, settings=QUICK, progress=False)
    assert (result.steps, result.evaluations) == (steps, 64 * steps)
    assert "ess" in result.history[-1] and result.history[-1]["step"] == steps
    assert generator.provenance["training"]["evaluations"] == 64 * steps


def test_a_budget_of_time_ends_in_time():
    started = time.perf_counter()
    result = well().fit(budget=Budget(seconds=0.5), settings=QUICK, progress=False)
    assert 0.5 <= result.seconds < 3.0 and time.perf_counter() - started < 10.0 and result.steps > 3


def test_words_that_are_no_budget_are_refused_before_anything_is_trained():
    generator = well()
    before = weights(generator.flow)
    with pytest.raises(InputError, match="neither a time"):
        generator.fit(budget="soon", progress=False)
    assert equal(before, weights(generator.flow))


def test_a_likelihood_before_the_energy_learns_and_spends_the_budget_later(monkeypatch):
    """However long it is: the steps that will evaluate are waited for."""
    monkeypatch.setattr("openmm_bg.training.trainer._IDLE", 30)
    result = well().fit(well_data(), likelihood_steps=60, budget="320", settings=QUICK, progress=False)
    assert (result.steps, result.evaluations) == (65, 320)
    assert result.history[4]["stage"] == "likelihood" and result.history[4]["rate"] > 0.1 * QUICK.learning_rate


@pytest.mark.parametrize("how", [{"energy": False}, {"likelihood_steps": 0, "objective": ForwardPath()}])
def test_a_budget_that_nothing_spends_is_refused(how, monkeypatch):
    monkeypatch.setattr("openmm_bg.training.trainer._IDLE", 30)
    with pytest.raises(InputError, match="never spent"):
        well().fit(well_data(), budget=10**6, settings=QUICK, progress=False, **how)


# -- the learning rate


def test_the_rate_rises_and_falls_with_the_share_that_is_spent(tmp_path):
    """Over the first three hundredths, or 240 steps where those are fewer; then it falls as a cosine to zero."""
    settings = Settings(batch_size=64, validation_size=16, validate_every=1, learning_rate=1e-3)
    well().fit(budget=str(64 * 40), settings=settings, log=tmp_path / "log", progress=False)
    records = lines(tmp_path / "log")
    spent = np.arange(40) / 40  # before each step
    rising = np.maximum(np.arange(1, 41) / 240, spent / 0.03).clip(max=1.0)
    expected = 1e-3 * 0.5 * (1 + np.cos(math.pi * spent)) * rising
    assert [record["rate"] for record in records] == pytest.approx(list(expected), abs=1e-8)
    assert [record["evaluations"] for record in records] == list(range(64, 64 * 41, 64))


def test_with_a_budget_of_time_the_rate_falls_to_zero(tmp_path):
    settings = Settings(batch_size=64, validation_size=16, validate_every=3, learning_rate=1e-3)
    well().fit(budget="0.7s", settings=settings, log=tmp_path / "log", progress=False)
    records = [record for record in lines(tmp_path / "log") if record["seconds"] > 0.1]
    rates = [record["rate"] for record in records]
    assert len(rates) > 1 and all(one > other for one, other in itertools.pairwise(rates))
    # it follows what was spent before the step: at least what the last record says, at most what this one does
    for before, after in itertools.pairwise(records):
        most, least = (1e-3 * 0.5 * (1 + math.cos(math.pi * min(r["seconds"] / 0.7, 1.0))) for r in (before, after))
        # the log rounds seconds to a thousandth
        assert least - 2e-6 <= after["rate"] <= most + 2e-6


# -- resuming


@pytest.mark.parametrize("stop", [3, 25])
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


def test_a_checkpoint_resumes_with_its_own_budget_alone(tmp_path):
    arguments = dict(settings=QUICK, checkpoint=tmp_path / "c", progress=False)
    well().fit(budget="640", **arguments)
    for other in ("1280", "10s", None):
        with pytest.raises(InputError, match="budget"):
            well().fit(budget=other, resume=True, **arguments)
    assert well().fit(budget="640", resume=True, **arguments).steps == 10  # it was spent
