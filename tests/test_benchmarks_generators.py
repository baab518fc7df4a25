"""A row of the benchmarks that was killed again and again has the figures of one that was not."""

import functools
import sys
from pathlib import Path

import pytest

from openmm_bg.sampling import ReplicaExchange
from openmm_bg.training import Settings, Trainer

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"

# the tests of the wheel run outside the checkout, and the wheel does not ship the benchmarks
if not BENCHMARKS.is_dir():
    pytest.skip("the benchmarks folder is not beside the tests", allow_module_level=True)

# scripts, no package: they can be imported only once their folder is on the path (hence E402)
sys.path.insert(0, str(BENCHMARKS))
import generators  # noqa: E402

SMALL = (
    "ladders=4 replicas=4 exchange_iterations=40 exchange_steps=10 heating_steps=50 bursts=2 likelihood_steps=8 "
    "training_steps=20"
)


class Killed(BaseException):
    """Nobody catches it and nothing is saved, as when a process dies."""


def killing(method, call: int):
    """The same method, which dies instead of its n-th call."""
    calls = 0

    @functools.wraps(method)
    def wrapped(*arguments, **options):
        nonlocal calls
        calls += 1
        if calls == call:
            raise Killed
        return method(*arguments, **options)

    return wrapped


def test_a_killed_row_resumes_to_the_same_figures(tmp_path, monkeypatch):
    # a checkpoint after every step, so that training goes on in the middle
    monkeypatch.setattr(generators, "Settings", functools.partial(Settings, checkpoint_seconds=0.0, validate_every=7))
    # the package hands on a function of the module's name
    monkeypatch.setattr(sys.modules[ReplicaExchange.__module__], "_CHECKPOINT_SECONDS", 0.0)

    def row(folder: str) -> dict:
        options = generators.parse(
            ["ACE GLY NME", "--output", "rows.jsonl", "--folder", str(tmp_path / folder), "--threads", "1",
             "--batch-size", "32", "--samples", "200", "--set", *SMALL.split()]
        )  # fmt: skip
        return generators.measure(options, {"molecule": options.molecule, "seed": options.seed})

    whole = row("whole")
    for owner, name, call in (
        (ReplicaExchange, "_iterate", 17),
        (generators, "bursts", 1),
        (Trainer, "_look", 5),
        (Trainer, "_look", 14),  # of those that are left
        (generators, "evaluate", 1),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, killing(getattr(owner, name), call))
            with pytest.raises(Killed):
                row("killed")
    resumed = row("killed")
    for one in (whole, resumed):
        one.pop("date"), one.pop("sampling_seconds")
        for name in ("data_seconds", "training_seconds"):
            one["cost"].pop(name)
    assert resumed == whole
    assert whole["cost"]["steps"] == 28 and whole["cost"]["training_evaluations"] == 20 * 32
