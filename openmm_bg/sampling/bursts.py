"""Bursts: many short runs from each equilibrated frame, which decorrelate bonds and angles for almost nothing.

Bond lengths and angles forget themselves within tens of femtoseconds, torsions within picoseconds. Equilibrated frames
supply the torsions; a burst from a frame, with fresh velocities, supplies independent bonds and angles at the same
temperature. Every burst starts in equilibrium and stays there, so nothing has to be discarded.

The lengths of the bursts are drawn at random. With one fixed length the fastest bonds would always be found in
the same phase: an N-H bond (period 10.1 fs) is at the mirror image of its start after 25 fs, whatever the velocity.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any

import numpy as np
import openmm
import torch
from tqdm import tqdm

from openmm_bg.device import find_device
from openmm_bg.energies import ForceFieldEnergy
from openmm_bg.errors import InputError
from openmm_bg.sampling.batched import BatchedLangevin, batchable
from openmm_bg.sampling.dynamics import LangevinPropagator, Trajectory, whole_number
from openmm_bg.units import nanometers

__all__ = ["bursts"]

# Frames that share one random number stream: fixed, so that the result does not depend on the number of threads.
_BLOCK = 16
# Bursts in one batch: enough to fill the kernel, few enough to stay in a processor's cache.
_ROWS = 1024
_ROWS_OF_A_GPU = 2**16


def bursts(
    system: openmm.System,
    frames: Any,
    *,
    temperature: Any,
    n_bursts: int = 16,
    steps: int = 25,
    timestep: Any = 0.001,
    friction: Any = 10.0,
    seed: int,
    workers: int = 2,
    platform: str | None = None,
    device: str = "cpu",
    progress: bool = True,
) -> Trajectory:
    """`n_bursts` short independent Langevin runs from each frame; the last conformation of each is kept.

    Parameters
    ----------
    system : openmm.System
        Without barostat or thermostat. Where it has constraints, they are applied to the frames first.
    frames : (frames, atoms, 3), nm
        Equilibrated at `temperature`.
    temperature, timestep, friction : Quantity or float
        K, ps, 1/ps.
    n_bursts, steps : int
        Runs per frame, and their mean length: each is drawn uniformly between half of it and one and a half times it.
    seed : int
        The same seed gives bitwise the same result, in torch and on the Reference platform, whatever `workers` is.
    workers : int
        Threads, where OpenMM runs the bursts.
    platform : str, optional
        An OpenMM platform. By default the bursts run as batches in torch where the System allows it (see
        :class:`~openmm_bg.sampling.ReplicaExchange`), else on `fastest_platform(system)`.
    device : str
        Where batches run, "cpu" or "cuda".
    progress : bool
        A bar with the remaining time on stderr, where that is a terminal.

    Returns
    -------
    Trajectory
        ``frames * n_bursts`` conformations, those of one frame next to each other. They are equilibrated but not
        independent of each other: split training and test data by frame.

    Raises
    ------
    InputError
        For input that does not fit, or when the dynamics becomes unstable.

    Examples
    --------
    >>> from openmm_bg import systems
    >>> molecule = systems.load("alanine_dipeptide")
    >>> frames = molecule.positions[None].repeat(2, axis=0)
    >>> bursts(molecule.system, frames, temperature=300, n_bursts=3, seed=1).positions.shape
    (6, 22, 3)
    """
    x = nanometers(frames, "frames")
    if x.ndim != 3 or x.shape[1:] != (system.getNumParticles(), 3) or len(x) == 0:
        raise InputError(
            f"frames have the shape {x.shape}; give an array of shape (frames, {system.getNumParticles()}, 3)."
        )
    if not np.isfinite(x).all():
        raise InputError("frames contain NaN or infinite coordinates; leave those frames out.")
    n_bursts = whole_number(n_bursts, "n_bursts", minimum=1)
    steps = whole_number(steps, "steps", minimum=1)
    shortest, longest = steps - steps // 2, steps + steps // 2
    workers = whole_number(workers, "workers", minimum=1)
    seed = whole_number(seed, "seed", minimum=0)
    if platform is None and batchable(system) is None:
        return _batched(
            system, x, n_bursts, (shortest, longest), seed, progress, find_device(device),
            temperature=temperature, timestep=timestep, friction=friction,
        )  # fmt: skip
    starts = range(0, len(x), _BLOCK)
    streams = np.random.SeedSequence(seed).spawn(len(starts))

    idle: SimpleQueue[LangevinPropagator] = SimpleQueue()
    walkers = [
        LangevinPropagator(
            system,
            x[0],
            temperature=temperature,
            timestep=timestep,
            friction=friction,
            generator=np.random.default_rng(),  # replaced by the stream of each block
            platform=platform,
        )
        for _ in range(min(workers, len(starts)))
    ]
    for walker in walkers:
        idle.put(walker)
    positions = np.empty((len(x), n_bursts, *x.shape[1:]))
    energies = np.empty((len(x), n_bursts))

    def block(start: int, stream: np.random.SeedSequence) -> int:
        walker = idle.get()
        try:
            walker.generator = np.random.default_rng(stream)
            chosen = range(start, min(start + _BLOCK, len(x)))
            for i in chosen:
                for j in range(n_bursts):
                    walker.positions = x[i]
                    walker.draw_velocities()
                    walker.advance(int(walker.generator.integers(shortest, longest, endpoint=True)))
                    positions[i, j], energies[i, j] = walker.positions, walker.potential_energy()
            return len(chosen)
        finally:
            idle.put(walker)

    with (
        ThreadPoolExecutor(len(walkers)) as pool,
        tqdm(total=len(x), unit="frame", disable=None if progress else True) as bar,
    ):
        try:
            for done in pool.map(block, starts, streams):
                bar.update(done)
        except BaseException:
            pool.shutdown(cancel_futures=True)  # Ctrl-C and errors stop after the running blocks
            raise
    return Trajectory(
        positions.reshape(-1, *x.shape[1:]),
        energies.reshape(-1),
        walkers[0].temperature,
        sum(walker.force_evaluations for walker in walkers),
        seed,
    )


def _batched(
    system: openmm.System,
    x: np.ndarray,
    n_bursts: int,
    lengths: tuple[int, int],
    seed: int,
    progress: bool,
    device: torch.device,
    *,
    temperature: Any,
    timestep: Any,
    friction: Any,
) -> Trajectory:
    """The same in torch: all bursts of one length together."""
    rng = np.random.default_rng(seed)
    random = torch.Generator(device).manual_seed(int(rng.integers(2**31)))
    energy = ForceFieldEnergy(system, temperature).to(device)
    rows = _ROWS if device.type == "cpu" else _ROWS_OF_A_GPU
    steps = rng.integers(*lengths, size=len(x) * n_bursts, endpoint=True)
    frame = np.arange(len(steps)) // n_bursts
    positions, energies = np.empty((len(steps), *x.shape[1:])), np.empty(len(steps))
    evaluations = 0
    with tqdm(total=len(steps), unit="burst", disable=None if progress else True) as bar:
        for length in np.unique(steps):
            those = np.flatnonzero(steps == length)
            for part in np.array_split(those, math.ceil(len(those) / rows)):
                walkers = BatchedLangevin(
                    energy, x[frame[part]], temperature=temperature, timestep=timestep, friction=friction,
                    generator=random,
                )  # fmt: skip
                walkers.draw_velocities()
                walkers.advance(int(length))
                energies[part] = walkers.potential_energy().numpy(force=True)
                positions[part] = walkers.positions.double().numpy(force=True)
                evaluations += walkers.force_evaluations
                bar.update(len(part))
    return Trajectory(positions, energies, energy.temperature, evaluations, seed)
