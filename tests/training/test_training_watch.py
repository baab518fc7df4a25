"""When a training counts as diverged, and what it goes back to."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from small_runs import QUICK, Acting, broken, cosine, equal, lines, pushing, timeless, weights, well, well_data

import openmm_bg as bg
from openmm_bg.flows import RealNVP
from openmm_bg.training import MaximumLikelihood, ReversePath, Settings, Stage, Trainer
from openmm_bg.training.watch import Watch

# -- the watch alone


def test_twenty_bad_steps_in_a_row_are_a_divergence():
    watch = Watch({})
    for usable in [False] * 19 + [True] + [False] * 19:
        watch.step(usable)
        assert not watch.lost(0, None)
    watch.step(False)
    assert watch.lost(0, None) and watch.lost(0, 1.0)
    watch.rolled_back()
    assert not watch.lost(0, None) and watch.factor == 0.5


def test_scores_are_compared_within_a_stage():
    watch = Watch({})
    watch.keep(0, 0.5, {"a": 1})
    assert watch.lost(0, 0.09) and not watch.lost(0, 0.11) and not watch.lost(0, None)
    assert not watch.lost(1, 0.0)
    watch.keep(1, 0.01, {"a": 3})
    assert watch.best == 0.01 and not watch.lost(1, 0.0)  # a score that says nothing yet


def test_good_is_what_has_nearly_the_best_score():
    watch = Watch({"a": 0})
    for score, weight, good in ((0.5, 1, 1), (0.46, 2, 2), (0.44, 3, 2), (None, 4, 4), (0.3, 5, 4)):
        watch.keep(0, score, {"a": weight})
        assert watch.good == {"a": good} and watch.best == 0.5  # the best counts, not the last
    watch.keep(1, 0.2, {"a": 6})
    watch.step(False)
    watch.keep(1, 0.4, {"a": 7})  # in the middle of trouble nothing is good
    assert watch.good == {"a": 6} and watch.numbers() == {"factor": 1.0, "bad": 1, "best": 0.4, "stage": 1}


# -- in training


def energy_stage(what=None, calls=(), steps: int = 60) -> list[Stage]:
    """On the energy, with something else at some calls."""
    return [Stage("energy", steps, [(1.0, Acting(ReversePath(), what, calls))])]


def wide_well() -> bg.BoltzmannGenerator:
    """Of a flow with more weights to push."""
    return bg.BoltzmannGenerator(bg.systems.load("double_well"), RealNVP(2, layers=4, hidden=(16,)))


def test_twenty_bad_steps_lead_back_to_the_last_good_weights_and_half_the_rate(tmp_path):
    """Steps 25 to 44 are NaN; the last good weights are those of the validation after step 20."""
    seen = []

    def watching(loss, step):
        seen.append(weights(step.flow))  # seen[i] are those before step i + 1
        return loss * math.nan if 25 <= len(seen) <= 44 else loss

    trainer = Trainer(
        well(), energy_stage(watching, range(1, 61)), settings=QUICK, log=tmp_path / "log", progress=False
    )
    result = trainer.run()
    assert (result.steps, result.skipped, result.rollbacks) == (60, 20, 1)
    assert equal(seen[24], seen[43]) and not equal(seen[20], seen[24])
    assert equal(seen[44], seen[20])
    records = lines(tmp_path / "log")
    (event,) = [record for record in records if "rolled_back" in record]
    assert (event["step"], event["rolled_back"], event["rate_factor"]) == (44, 1, 0.5)
    rates = cosine(60, QUICK.learning_rate)
    for record in records:
        assert record["rate"] == pytest.approx(rates[record["step"] - 1] * (0.5 if record["step"] > 44 else 1.0))


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
    returned = trained(broken, range(11, 31), 31)
    assert returned.result.rollbacks == 1 and returned.watch.factor == 0.5
    for name, tensor in returned.flow.state_dict().items():
        if tensor.is_floating_point():
            assert torch.allclose(tensor - good[name], 0.5 * (after[name] - good[name]), atol=1e-7)


def test_every_twenty_bad_steps_halve_the_rate_again():
    generator = well()
    result = generator.fit(
        steps=60, objective=Acting(ReversePath(), broken, range(11, 61)), settings=QUICK, progress=False
    )
    assert (result.skipped, result.rollbacks) == (50, 2)
    assert [record["rolled_back"] for record in result.history if "rolled_back" in record] == [1, 2]
    assert [record["rate_factor"] for record in result.history if "rolled_back" in record] == [0.5, 0.25]
    assert all(torch.isfinite(t).all() for t in generator.flow.state_dict().values())
    assert generator.provenance["training"]["rollbacks"] == 2


def test_trouble_before_the_first_validation_leads_back_to_the_start():
    seen = []

    def watching(loss, step):
        seen.append(weights(step.flow))
        return loss * math.nan if 6 <= len(seen) <= 25 else loss

    stages = energy_stage(watching, range(1, 31), 30)
    trainer = Trainer(well(), stages, settings=replace(QUICK, validate_every=1000), progress=False)
    result = trainer.run()
    assert (result.rollbacks, result.skipped) == (1, 20)
    assert equal(seen[25], seen[0]) and not equal(seen[24], seen[0])


COLLAPSE = Settings(batch_size=128, validation_size=500, validate_every=10, average=0.9, learning_rate=2e-2)


def test_a_score_that_collapses_leads_back_to_where_it_was_good():
    """Thirty steps push all weights towards 5: it falls slowly, since it is that of the average."""
    result = Trainer(wide_well(), energy_stage(pushing, range(31, 61), 80), settings=COLLAPSE, progress=False).run()
    records = {record["step"]: record for record in result.history}
    (event,) = [step for step, record in records.items() if "rolled_back" in record]
    scores = {step: record["ess_clipped"] for step, record in records.items()}
    assert 30 < event <= 60 and scores[event] < 0.2 * scores[30] and scores[event - 10] < 0.9 * scores[30]
    assert scores[80] > 0.9 * scores[30] and (result.rollbacks, result.skipped) == (1, 0)


def test_the_score_of_a_likelihood_leads_nowhere_back():
    """It is not what that stage learns: a flow between two modes may score worse for a while."""
    stages = [Stage("likelihood", 60, [(1.0, Acting(MaximumLikelihood(), pushing, range(21, 61)))])]
    result = Trainer(wide_well(), stages, well_data(), settings=COLLAPSE, progress=False).run()
    assert result.history[-1]["ess"] < 0.2 * result.history[1]["ess"]
    assert result.rollbacks == 0


@pytest.mark.parametrize(
    ("what", "calls", "stop"),
    [(broken, range(6, 26), 20), (broken, range(6, 26), 30), (pushing, range(11, 41), 25)],
    ids=["amid bad steps", "after the return", "amid a collapse"],
)
def test_a_run_that_went_back_resumes_to_the_bit(what, calls, stop, tmp_path, monkeypatch):
    whole, cut, resumed = wide_well(), wide_well(), wide_well()
    arguments = dict(settings=COLLAPSE, seed=2, progress=False)
    expected = Trainer(whole, energy_stage(what, calls, 50), **arguments).run()
    assert expected.rollbacks
    with monkeypatch.context() as patch:
        patch.setattr(Acting, "cut", stop)
        with pytest.raises(KeyboardInterrupt):
            Trainer(cut, energy_stage(what, calls, 50), checkpoint=tmp_path / "c", **arguments).run()
    result = Trainer(
        resumed, energy_stage(what, calls, 50), checkpoint=tmp_path / "c", resume=True, log=tmp_path / "log",
        **arguments,
    ).run()  # fmt: skip
    assert equal(weights(whole.flow), weights(resumed.flow))
    assert (result.rollbacks, result.skipped, result.evaluations) == (
        expected.rollbacks, expected.skipped, expected.evaluations,
    )  # fmt: skip
    assert timeless(lines(tmp_path / "log")) == timeless(expected.history)
