"""Small trainings that tests of several files take apart: a double well, its data, objectives that misbehave."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import openmm_bg as bg
from openmm_bg.flows import RealNVP
from openmm_bg.training import Settings

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


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def cosine(n: int, rate: float = 1e-3) -> list[float]:
    """The learning rates of n steps."""
    return [rate * 0.5 * (1 + math.cos(math.pi * i / n)) for i in range(n)]


@dataclass
class Acting:
    """Another objective that does something to its loss at chosen calls, which it counts as a checkpoint must.

    ``cut`` is the class's: a call at which a run is interrupted, after its random numbers are drawn.
    """

    inner: object
    what: Callable | None = None
    calls: Iterable[int] = ()
    finish: int | None = None
    cut = None

    def __post_init__(self):
        self.calls = set(self.calls)
        self.needs_data, self.needs_energy = self.inner.needs_data, self.inner.needs_energy
        self.state, self.tensors = self.inner.state, self.inner.tensors

    def __call__(self, step):
        loss, numbers = self.inner(step)
        call = self.state["calls"] = self.state.get("calls", 0) + 1
        if call == self.finish:
            self.state["finished"] = 1
        if call == Acting.cut:
            raise KeyboardInterrupt
        return (self.what(loss, step) if call in self.calls else loss), numbers


def broken(loss, step):
    return loss * math.nan


def pushing(loss, step):
    """Every weight towards 5, where no target is."""
    return sum((p - 5).square().sum() for p in step.flow.parameters())


def cuttable(kind: type) -> type:
    """An objective that stops at the call ``cut``, after its random numbers are drawn; ``cut`` is the class's."""

    class Cut(kind):
        cut = 0

        def __call__(self, step):
            seen = super().__call__(step)
            if self.state["calls"] == self.cut:
                raise KeyboardInterrupt
            return seen

    return Cut


def check_resumption(make_generator, make_objective, kind, stop, folder, monkeypatch, **arguments):
    """A fit that is interrupted at a call and resumed ends as one that is not; its objective and result."""
    whole, cut, resumed = (make_generator() for _ in range(3))
    arguments = dict(settings=QUICK, seed=3, progress=False) | arguments
    expected = whole.fit(objective=make_objective(), **arguments)
    with monkeypatch.context() as patch:
        patch.setattr(kind, "cut", stop)
        with pytest.raises(KeyboardInterrupt):
            cut.fit(objective=make_objective(), checkpoint=folder / "c", **arguments)
    objective = make_objective()
    result = resumed.fit(objective=objective, checkpoint=folder / "c", resume=True, **arguments)
    assert equal(weights(whole.flow), weights(resumed.flow))
    assert (result.steps, result.evaluations) == (expected.steps, expected.evaluations)
    assert timeless(result.history) == timeless(expected.history)
    return objective, result
