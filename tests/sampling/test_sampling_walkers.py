"""Walkers: the same frames wherever chunks run, workers that die, and statistics against quadrature."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import CancelledError, Executor, Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import openmm
import pytest
import torch
from openmm import app

import openmm_bg as bg
from openmm_bg.energies import Energy
from openmm_bg.errors import InputError
from openmm_bg.flows import Base, RealNVP
from openmm_bg.sampling import Walkers, WorkerPool, chunks, dask_executor
from openmm_bg.units import thermal_energy

KT = thermal_energy(300.0)
# U/kT = 2 ((x / 0.1)^2 - 1)^2 + 4 x + (y^2 + z^2) / 0.08^2 / 2, in nm: two unequal wells 2 kT deep
FORMULA = "kt*(2*((x/0.1)^2-1)^2+4*x+0.5*(y^2+z^2)/0.0064)"
NO_DASK = "distributed is not installed: pip install openmm_bg[dask]"
START = np.array([[-0.1, 0.0, 0.0]])


def well(formula: str = FORMULA) -> openmm.System:
    system = openmm.System()
    system.addParticle(4.0)
    force = openmm.CustomExternalForce(formula)
    force.addGlobalParameter("kt", KT)
    force.addParticle(0)
    system.addForce(force)
    return system


class Well(Energy):
    def __init__(self):
        super().__init__((3,))

    def reduced(self, x):
        along, across = x[:, 0], x[:, 1:]
        return 2 * ((along / 0.1).square() - 1).square() + 4 * along + 0.5 * across.square().sum(-1) / 0.0064


def exact() -> tuple[float, float]:
    """P(x > 0) and <x^2> by quadrature."""
    x = np.linspace(-0.4, 0.4, 20001)
    p = np.exp(-2 * ((x / 0.1) ** 2 - 1) ** 2 - 4 * x)
    return float(p[x > 0].sum() / p.sum()), float((p * x**2).sum() / p.sum())


def some(executor=None, system=None, n: int = 70) -> Walkers:
    """Three chunks."""
    return Walkers(
        system or well(), START, temperature=300, walkers=n, timestep=0.01, friction=2, seed=3, executor=executor
    )  # fmt: skip


def stretch(w: Walkers) -> list[np.ndarray]:
    return [w.advance(20, 10, progress=False), w.advance(10, 10, temperature=500, progress=False)]


# -- where chunks run


def test_frames_do_not_depend_on_who_runs_the_chunks(tmp_path, monkeypatch, alanine):
    """Here, a thread, one process, two processes of which one dies; a batch, and what no batch can run."""
    here = some()
    expected = stretch(here)
    assert expected[0].shape == (70, 2, 1, 3) and len(np.unique(expected[0][:, -1, 0, 0])) == 70
    contexts = chain_of_contexts(None, alanine)
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(1) as thread, WorkerPool(1) as one:
        for executor in (thread, one):
            elsewhere = some(executor)
            assert_same(stretch(elsewhere), expected)
            assert elsewhere.force_evaluations == here.force_evaluations == 70 * (30 + 2 * 2)
            assert np.array_equal(elsewhere.positions, here.positions)
        assert np.array_equal(chain_of_contexts(one, alanine), contexts)
    assert torch.get_num_threads() == threads
    monkeypatch.setattr(chunks, "propagate", dying_once)
    monkeypatch.setenv("DYING_ONCE", str(tmp_path / "died"))
    with WorkerPool(2) as two:
        assert_same(stretch(some(two)), expected)
    assert (tmp_path / "died").exists()


def chain_of_contexts(executor, alanine) -> np.ndarray:
    """Two chunks of a System that OpenMM runs, because of its constraints."""
    system = bg.systems.load("alanine_dipeptide", constraints=app.HBonds).system
    w = Walkers(system, alanine.positions, temperature=300, walkers=9, seed=3, executor=executor)
    frames = w.advance(10, 5, progress=False)
    i, j, length = system.getConstraintParameters(0)
    np.testing.assert_allclose(np.linalg.norm(frames[:, :, i] - frames[:, :, j], axis=-1), length._value, atol=1e-8)
    return frames


def assert_same(mine: list[np.ndarray], theirs: list[np.ndarray]) -> None:
    assert all(np.array_equal(a, b) for a, b in zip(mine, theirs, strict=True))


def test_positions_and_calls_are_all_there_is_to_a_checkpoint():
    whole, stopped = some(), some()
    stretch(whole)
    stopped.advance(20, 10, progress=False)
    resumed = Walkers(well(), stopped.positions, temperature=300, timestep=0.01, friction=2, seed=3)
    resumed.calls = stopped.calls
    resumed.advance(10, 10, temperature=500, progress=False)
    assert np.array_equal(resumed.positions, whole.positions)


def test_dask_gives_the_same_frames(tmp_path, monkeypatch):
    distributed = pytest.importorskip("distributed", reason=NO_DASK)
    expected = stretch(some())
    monkeypatch.setattr(chunks, "propagate", dying_once)
    monkeypatch.setenv("DYING_ONCE", str(tmp_path / "died"))
    options = dict(n_workers=2, threads_per_worker=1, dashboard_address=None, local_directory=tmp_path, silence_logs=50)
    with distributed.LocalCluster(**options) as cluster, dask_executor(cluster.scheduler_address) as executor:
        assert_same(stretch(some(executor)), expected)
    assert (tmp_path / "died").exists()


def test_dask_that_is_not_there_is_one_sentence(monkeypatch):
    pytest.importorskip("distributed", reason=NO_DASK)
    with pytest.raises(InputError, match="There is no Dask scheduler at nowhere"), dask_executor("nowhere"):
        pass
    monkeypatch.setitem(sys.modules, "distributed", None)
    missing = pytest.raises(InputError, match=r"not installed; pip install openmm_bg\[dask\]")
    with missing, dask_executor("tcp://127.0.0.1:1"):
        pass


# -- workers that die and chunks that fail

PROPAGATE = chunks.propagate


def dying_once(chunk):
    """The last chunk of the first stretch takes its worker with it, once; found in a worker by this name."""
    place = Path(os.environ["DYING_ONCE"])
    if chunk.key == (0, 2) and not place.exists():
        place.touch()
        os._exit(1)
    return PROPAGATE(chunk)


class Losing(Executor):
    """Has lost its workers before they could answer."""

    def __init__(self, error: type[Exception], at_once: bool):
        self.error, self.at_once, self.given = error, at_once, 0

    def submit(self, fn, /, *args, **kwargs):
        self.given += 1
        if self.at_once:
            raise self.error("no worker")
        future: Future = Future()
        future.set_exception(self.error("no worker"))
        return future


@pytest.mark.parametrize("error", [BrokenProcessPool, CancelledError])
def test_workers_that_always_die_are_reported(error):
    lost = Losing(error, at_once=False)
    w = some(lost)
    with pytest.raises(InputError, match=r"^Workers died 3 times before any of them had finished .*: no worker\)"):
        w.advance(20, 10, progress=False)
    assert lost.given == 9 and w.calls == w.force_evaluations == 0
    assert np.array_equal(w.positions, some().positions)


def test_a_pool_that_does_not_replace_its_workers_is_reported():
    with pytest.raises(InputError, match=r"takes no more work \(no worker\); a WorkerPool replaces workers"):
        some(Losing(BrokenProcessPool, at_once=True)).advance(20, 10, progress=False)


def test_a_chunk_that_fails_three_times_is_reported(monkeypatch):
    calls = []

    def counted(chunk):
        calls.append(chunk.key)
        if chunk.key[1] == 1:
            raise OSError("the disk is full")
        return PROPAGATE(chunk)

    monkeypatch.setattr(chunks, "propagate", counted)
    with ThreadPoolExecutor(1) as thread:
        with pytest.raises(InputError, match=r"failed 3 times, the last time with OSError: the disk is full"):
            some(thread).advance(20, 10, progress=False)
    assert sorted(calls) == [(0, 0), (0, 1), (0, 1), (0, 1), (0, 2)]


def test_unstable_dynamics_is_reported_at_once(monkeypatch):
    calls = []
    monkeypatch.setattr(chunks, "propagate", lambda chunk: calls.append(1) or PROPAGATE(chunk))
    with ThreadPoolExecutor(1) as thread, pytest.raises(InputError, match="became unstable"):
        w = Walkers(
            well("-1e9*kt*x^2"), START, temperature=300, walkers=3, seed=1, executor=thread, minimize=False
        )  # fmt: skip
        w.advance(100, 100, progress=False)
    assert len(calls) == 1


def test_code_is_refused_before_it_is_read(monkeypatch):
    chunk = chunks.Chunk('<System><Force type="PythonForce"/></System>', START[None], 300, 0.001, 1, 1, 1, 1, (0, 0))
    with pytest.raises(InputError, match="PythonForce"):
        chunks.propagate(chunk)


@pytest.mark.slow
def test_workers_end_with_the_process_that_made_them(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import os, time\nfrom openmm_bg.sampling import WorkerPool\n"
        "if __name__ == '__main__':\n    pool = WorkerPool(1)\n    print(pool.submit(os.getpid).result(), flush=True)\n"
        "    time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True)
    worker = int(process.stdout.readline())
    process.send_signal(signal.SIGKILL)
    process.wait()
    for _ in range(100):
        try:
            os.kill(worker, 0)
        except ProcessLookupError:
            return
        if "Z" in Path(f"/proc/{worker}/stat").read_text().split()[2]:
            return  # dead, and nobody has asked for its code yet
        time.sleep(0.05)
    pytest.fail("a worker outlived its parent")


@pytest.mark.parametrize(
    ("change", "phrase"),
    [
        ({"walkers": 0}, "walkers must be a whole number of at least 1"),
        ({"seed": -1}, "seed must be a whole number"),
        ({"temperature": -1}, "temperature must be a positive finite number"),
        ({"positions": np.zeros((2, 3))}, "the System has 1 particles"),
        ({"positions": np.full((4, 1, 3), np.nan)}, "NaN or infinite"),
        ({"positions": np.concatenate([np.zeros((1, 1, 3)), np.full((4, 1, 3), np.nan)])}, "must be finite numbers"),
    ],
)
def test_what_cannot_be_used_is_refused(change, phrase):
    arguments = {"positions": START, "temperature": 300, "walkers": 3, "seed": 1, "minimize": False} | change
    with pytest.raises(InputError, match=phrase):
        Walkers(well(), arguments.pop("positions"), **arguments)


def test_frames_must_end_with_the_last_step():
    with pytest.raises(InputError, match="interval must divide the 20 steps, and 15 does not"):
        some().advance(20, 15, progress=False)


# -- statistics


def deviation(samples: np.ndarray, expected: float) -> float:
    """Of the mean over independent walkers, in its standard errors."""
    return (samples.mean() - expected) / (samples.std(ddof=1) / math.sqrt(len(samples)))


def test_heated_walkers_leave_their_start_and_sample_the_target():
    w = some(n=128)
    w.heat(1500, 300, 300, progress=False)
    assert 0.3 < (w.positions[:, 0, 0] > 0).mean() < 0.7  # all began at x < 0
    x = w.advance(1000, 20, progress=False)[:, :, 0, 0]
    share, square = exact()
    assert abs(deviation((x > 0).mean(1), share)) < 4
    assert abs(deviation((x**2).mean(1), square)) < 4


def test_moves_alone_sample_the_target():
    """Thousands of walkers from one place, a generator that covers both wells, and no dynamics."""
    flow = RealNVP(3, layers=2, hidden=(4,))
    flow.base = Base([False] * 3, std=0.12)
    generator = bg.BoltzmannGenerator(Well(), flow)
    w = Walkers(well(), np.repeat(START[None], 2000, 0), temperature=300, seed=5)
    moves = w.move(generator, 30)
    assert moves.tried == 60_000 and moves.refused == 0 and 1000 < moves.accepted < 59_000
    share, square = exact()
    x = w.positions[:, 0, 0]
    assert abs(deviation((x > 0).astype(float), share)) < 4
    assert abs(deviation(x**2, square)) < 4
