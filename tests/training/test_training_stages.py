"""Stages of a run: their rates, their ends, the sums of objectives they follow, and where they are trained."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import pytest
import torch
from small_runs import QUICK, Acting, cosine, equal, timeless, weights, well, well_data

import openmm_bg as bg
from openmm_bg.errors import InputError
from openmm_bg.flows import MolecularFlow
from openmm_bg.training import ForwardPath, LogVariance, MaximumLikelihood, ReversePath, Settings, Stage, Trainer

EVERY = Settings(batch_size=16, validation_size=16, validate_every=1, warmup=0.0, ramp=0.0, learning_rate=1e-3)


def likelihood(name: str, steps: int, rate: float | None = None, finish: int | None = None) -> Stage:
    return Stage(name, steps, [(1.0, Acting(MaximumLikelihood(), finish=finish))], rate=rate)


def run(stages: list[Stage], settings: Settings = EVERY, **more):
    return Trainer(well(), stages, well_data(), settings=settings, progress=False, **more).run()


def rates_of(result) -> list[float]:
    return [record["rate"] for record in result.history]


# -- rates


def test_torsions_follow_the_rate_of_their_stage():
    flow = MolecularFlow(7, [5, 6], {}, [], layers=2, hidden=8, torsion_hidden=8, seed=0)
    data = 0.3 * torch.randn(100, 7, generator=torch.Generator().manual_seed(0))
    moved = {}
    for rate in (0.0, 0.1, 1.0):
        generator = bg.BoltzmannGenerator(None, copy.deepcopy(flow))
        generator._initialize(data)
        before = weights(generator.flow)
        stage = Stage("likelihood", 1, [(1.0, MaximumLikelihood())], torsion_rate=rate)
        settings = Settings(batch_size=16, warmup=0.0, average=0.0, learning_rate=1e-3, dtype=torch.float64)
        Trainer(generator, [stage], data, settings=settings, progress=False).run()
        moved[rate] = {
            k: float((v.double() - before[k].double()).abs().max()) for k, v in weights(generator.flow).items()
        }
    torsions = [name for name, _ in flow.named_parameters() if name.startswith("torsions.")]
    stiff = [name for name, _ in flow.named_parameters() if not name.startswith("torsions.")]
    for name in torsions:
        assert moved[0.0][name] == 0
        assert moved[0.1][name] == pytest.approx(0.1 * moved[1.0][name], rel=1e-2)
    assert any(moved[1.0][name] > 0 for name in torsions)
    assert all(moved[0.0][name] == moved[1.0][name] for name in stiff) and max(moved[0.0].values()) > 0


@pytest.mark.parametrize("place", [None, 0, 1, 2])
def test_a_stage_with_a_rate_keeps_it_and_the_others_share_one_cosine(place):
    stages = [likelihood("one", 5), likelihood("none", 0), likelihood("two", 7)]
    expected = [cosine(12)[:5], [], cosine(12)[5:]]
    if place is not None:
        stages.insert(place, likelihood("constant", 4, rate=3e-4))
        expected.insert(place, [3e-4] * 4)
    assert rates_of(run(stages)) == pytest.approx([rate for part in expected for rate in part])


def test_a_warm_up_and_ramps_lead_into_every_stage():
    """Over their shares of the whole run."""
    settings = Settings(batch_size=16, validation_size=16, validate_every=1, warmup=0.1, ramp=0.05)
    rates = rates_of(run([likelihood("one", 40, rate=1e-3), likelihood("two", 60, rate=2e-3)], settings))
    assert rates[:10] == pytest.approx([1e-3 * (i + 1) / 10 for i in range(10)])
    assert rates[10:40] == pytest.approx([1e-3] * 30)
    assert rates[40:45] == pytest.approx([2e-3 * (i + 1) / 5 for i in range(5)])
    assert rates[45:] == pytest.approx([2e-3] * 55)


# -- ends


@dataclass
class Progress(MaximumLikelihood):
    """Remembers the progress it was told."""

    told: list = field(default_factory=list)

    def __call__(self, step):
        self.told.append(step.progress)
        return super().__call__(step)


def test_a_finished_stage_ends_and_the_rest_goes_on_as_if_it_had_been_planned_so():
    objective = Progress()
    stages = [likelihood("short", 20, rate=3e-4, finish=7), Stage("rest", 10, [(1.0, objective)])]
    trainer = Trainer(well(), stages, well_data(), settings=EVERY, progress=False)
    assert trainer.total == 30
    result = trainer.run()
    assert (result.steps, trainer.total, trainer.planned) == (17, 17, [7, 10])
    assert [record["stage"] for record in result.history] == ["short"] * 7 + ["rest"] * 10
    assert rates_of(result) == pytest.approx([3e-4] * 7 + cosine(10))
    assert objective.told == pytest.approx([i / 10 for i in range(10)])


def test_a_cosine_goes_on_from_where_a_finished_stage_ends():
    """Of 12 + 8 steps, the first stage ends after 4: the remaining 8 are the last two thirds of 12."""
    result = run([likelihood("short", 12, finish=4), likelihood("rest", 8)])
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


def test_an_objective_begins_anew_in_every_fit():
    objective = ForwardPath()
    objective.state["finished"] = 1
    result = well().fit(well_data(), likelihood_steps=0, steps=7, objective=objective, settings=QUICK, progress=False)
    assert result.steps == 7


@pytest.mark.parametrize("stop", [5, 13], ids=["before the end", "after it"])
def test_a_run_with_a_finished_stage_resumes_to_the_bit(stop, tmp_path, monkeypatch):
    def stages():
        short = [(1.0, Acting(ReversePath(), finish=8))]
        return [Stage("short", 20, short), Stage("rest", 12, [(1.0, Acting(ReversePath()))])]

    whole, cut, resumed = well(), well(), well()
    arguments = dict(settings=QUICK, progress=False)
    expected = Trainer(whole, stages(), **arguments).run()
    with monkeypatch.context() as patch:
        # calls are counted by each objective: 13 can only be the ninth of the second
        patch.setattr(Acting, "cut", stop if stop < 8 else stop - 4)
        with pytest.raises(KeyboardInterrupt):
            Trainer(cut, stages(), checkpoint=tmp_path / "c", **arguments).run()
    result = Trainer(resumed, stages(), checkpoint=tmp_path / "c", resume=True, **arguments).run()
    assert result.steps == expected.steps == 20
    assert equal(weights(whole.flow), weights(resumed.flow))
    assert timeless(result.history) == timeless(expected.history)


# -- sums and devices


@dataclass
class Pull:
    """Pulls every parameter to a value."""

    to: float
    needs_data = False
    needs_energy = False

    def __post_init__(self):
        self.state, self.tensors = {}, {}

    def __call__(self, step):
        loss = sum((p - self.to).square().sum() for p in step.flow.parameters())
        return loss, {f"to_{self.to}": float(loss.detach())}


def test_several_objectives_are_one_weighted_sum():
    """The loss of the log is the sum, and the weights go to where the sum is least."""
    settings = Settings(batch_size=4, validation_size=16, validate_every=10, learning_rate=5e-2, clip=1e9, average=0.9)
    generator = well()
    result = generator.fit(steps=100, objective=[(0.3, Pull(0.0)), (0.1, Pull(1.0))], settings=settings, progress=False)
    for record in result.history:
        assert record["loss"] == pytest.approx(0.3 * record["to_0.0"] + 0.1 * record["to_1.0"], rel=1e-5)
    # 0.3 p^2 + 0.1 (p - 1)^2 is least at 1/4, for every parameter
    n = sum(p.numel() for p in generator.flow.parameters())
    assert result.history[-1]["to_0.0"] / n == pytest.approx(1 / 16, abs=0.01)
    assert result.history[-1]["to_1.0"] / n == pytest.approx(9 / 16, abs=0.01)


@pytest.mark.parametrize("name", ["abacus", "cuda:99", "meta"])
def test_a_device_that_is_not_there_is_refused_in_one_sentence(name):
    with pytest.raises(InputError, match=f"There is no device '{name}'") as caught:
        well().fit(steps=1, settings=Settings(device=name), progress=False)
    assert "\n" not in str(caught.value)
