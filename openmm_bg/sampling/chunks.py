"""Stretches of dynamics as plain data, and any executor that runs them.

A chunk of walkers is plain data and `propagate` a plain function of it, so this process, a pool of processes and a
cluster differ in nothing but speed. A chunk brings its random numbers along: one that is lost with its worker is run
again, with the same result.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, CancelledError, Executor, Future, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import openmm
import torch
from numpy.typing import NDArray

from openmm_bg.energies import ForceFieldEnergy
from openmm_bg.errors import InputError
from openmm_bg.generator_file import refuse_code
from openmm_bg.sampling.batched import BatchedLangevin, batchable
from openmm_bg.sampling.dynamics import LangevinPropagator

__all__ = ["Chunk", "Propagated", "propagate", "run_chunks", "seed_for_torch"]

_ATTEMPTS = 3


@dataclass(frozen=True)
class Chunk:
    """A stretch of dynamics of some walkers: all that a worker needs to know.

    Attributes
    ----------
    system : str
        XML of the System.
    positions : ndarray (walkers, atoms, 3), nm
    temperature, timestep, friction : float
        K, ps, 1/ps.
    steps, interval : int
        Time steps, and between frames; the last step makes the last frame.
    seed : int
    key : tuple of int
        Which stretch and which chunk: with the seed, all of its random numbers.
    """

    system: str
    positions: NDArray[np.float64]
    temperature: float
    timestep: float
    friction: float
    steps: int
    interval: int
    seed: int
    key: tuple[int, int]


class Propagated(NamedTuple):
    """Frames (walkers, frames, atoms, 3) in nm, float32 of a batch and float64 of OpenMM, and what they cost."""

    frames: NDArray[Any]
    force_evaluations: int


def propagate(chunk: Chunk) -> Propagated:
    """Run a chunk, from fresh velocities: one batch in torch where the System allows it, else OpenMM; on one thread.

    Raises
    ------
    InputError
        If the System holds a PythonForce, or where the dynamics is unstable.
    """
    refuse_code(chunk.system, "A chunk of walkers")
    system, energy = _prepared(chunk.system)
    seeds = np.random.SeedSequence(chunk.seed, spawn_key=chunk.key)
    options = {"temperature": chunk.temperature, "timestep": chunk.timestep, "friction": chunk.friction}
    walkers, frames = len(chunk.positions), chunk.steps // chunk.interval
    shape = (walkers, frames, *chunk.positions.shape[1:])
    if energy is not None:
        positions, random = np.empty(shape, np.float32), torch.Generator().manual_seed(seed_for_torch(seeds))
        with _one_thread():
            batch = BatchedLangevin(energy, chunk.positions, generator=random, **options)
            batch.draw_velocities()
            for i in range(frames):
                batch.advance(chunk.interval)
                positions[:, i] = batch.positions.numpy()
        return Propagated(positions, batch.force_evaluations)
    positions = np.empty(shape)
    walker = LangevinPropagator(system, chunk.positions[0], generator=np.random.default_rng(), **options)
    for k, its_seeds in enumerate(seeds.spawn(walkers)):
        walker.positions, walker.generator = chunk.positions[k], np.random.default_rng(its_seeds)
        walker.draw_velocities()
        for i in range(frames):
            walker.advance(chunk.interval)
            positions[k, i] = walker.positions
    return Propagated(positions, walker.force_evaluations)


@functools.lru_cache(maxsize=2)
def _prepared(xml: str) -> tuple[openmm.System, ForceFieldEnergy | None]:
    """The System, and its energy where a batch can run it; a worker builds them once."""
    system = openmm.XmlSerializer.deserialize(xml)
    # the temperature of this energy does not matter to dynamics
    return system, None if batchable(system) else ForceFieldEnergy(system, 300.0)


def run_chunks(
    chunks: Sequence[Chunk], executor: Executor | None, report: Callable[[int], Any] = lambda done: None
) -> list[Propagated]:
    """Propagate chunks, in this process or by an executor.

    Parameters
    ----------
    chunks : sequence of Chunk
    executor : concurrent.futures.Executor or None
    report : callable
        Hears of every chunk that is done.

    Raises
    ------
    InputError
        Where the dynamics is unstable, a chunk fails three times, or no worker lives long enough to finish one.
    """
    done: dict[int, Propagated] = {}
    if executor is None:
        for i, chunk in enumerate(chunks):
            done[i] = propagate(chunk)
            report(1)
    failures: Counter[int] = Counter()
    in_vain = 0
    while len(done) < len(chunks):
        before, lost = len(done), None
        futures = _submit(executor, {i: chunk for i, chunk in enumerate(chunks) if i not in done})
        try:
            for future in as_completed(futures):
                number = futures[future]
                try:
                    done[number] = future.result()
                    report(1)
                except InputError:
                    raise  # about what was asked for: it would come again
                except (BrokenExecutor, CancelledError) as error:
                    lost = error
                except Exception as error:
                    failures[number] += 1
                    if failures[number] == _ATTEMPTS:
                        raise InputError(
                            f"A chunk of walkers failed {_ATTEMPTS} times, the last time with {type(error).__name__}: "
                            f"{error}."
                        ) from error
        finally:
            for future in futures:
                future.cancel()
        in_vain = 0 if len(done) > before else in_vain + 1
        if lost is not None and in_vain == _ATTEMPTS:
            raise InputError(
                f"Workers died {_ATTEMPTS} times before any of them had finished a chunk of walkers "
                f"({type(lost).__name__}: {lost}); give them more memory, or fewer walkers."
            ) from lost
    return [done[i] for i in range(len(chunks))]


def _submit(executor: Executor, chunks: dict[int, Chunk]) -> dict[Future[Propagated], int]:
    try:
        return {executor.submit(propagate, chunk): i for i, chunk in chunks.items()}
    except RuntimeError as error:  # broken or shut down
        raise InputError(
            f"The executor takes no more work ({error}); a WorkerPool replaces workers that have died."
        ) from error


def seed_for_torch(seeds: np.random.SeedSequence) -> int:
    """63 bits of them, which is what a torch.Generator takes."""
    return int(seeds.generate_state(1, np.uint64)[0] >> np.uint64(1))


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
