"""Many walkers of molecular dynamics at one temperature, in chunks that any executor can run.

The walkers are cut into chunks whose number and whose random numbers depend on nothing but the walkers, so the frames
are the same whether the chunks run here, in a pool of processes or on a cluster, and on however many workers.

A walker is its positions alone. Each stretch of dynamics begins with fresh velocities, which is exact, and which a
change of positions by a generator's move needs anyway.
"""

from __future__ import annotations

import math
from concurrent.futures import Executor
from typing import Any, NamedTuple

import numpy as np
import openmm
import torch
from numpy.typing import NDArray
from tqdm.auto import tqdm

from openmm_bg.errors import InputError
from openmm_bg.generator import BoltzmannGenerator
from openmm_bg.generator_file import refuse_code
from openmm_bg.sampling.batched import batchable
from openmm_bg.sampling.chunks import Chunk, run_chunks, seed_for_torch
from openmm_bg.sampling.dynamics import LangevinPropagator, check_system, whole_number
from openmm_bg.sampling.metropolis import independence_chain
from openmm_bg.units import kelvin, nanometers, per_picosecond, picoseconds

__all__ = ["Moves", "Walkers"]

# Walkers in a chunk: a batch of 32 is nearly as fast per walker as one of hundreds; Contexts run one after the other.
_BATCHED, _ALONE = 32, 8


class Moves(NamedTuple):
    """Proposals that all walkers tried, those accepted, and walkers that could not try for want of a density."""

    tried: int
    accepted: int
    refused: int


class Walkers:
    """Walkers of one System at one temperature.

    Parameters
    ----------
    system : openmm.System
        Without barostat or thermostat.
    positions : (atoms, 3) or (walkers, atoms, 3), nm
        Where all of them start, or each of them.
    temperature, timestep, friction : Quantity or float
        K, ps, 1/ps.
    walkers : int
        How many, where one start is given.
    seed : int
        Every random number comes from it.
    executor : concurrent.futures.Executor, optional
        Where chunks run: :class:`~openmm_bg.sampling.WorkerPool`, a ``distributed.Client(address).get_executor()`` of
        Dask, or any other; None for this process. It stays open.
    minimize : bool
        Relax the start first, where one is given.

    Attributes
    ----------
    positions : ndarray (walkers, atoms, 3), float64
        nm.
    force_evaluations : int
    calls : int
        Stretches of dynamics and series of moves so far; with positions, all there is to a checkpoint.

    Examples
    --------
    >>> from openmm_bg import systems
    >>> molecule = systems.load("alanine_dipeptide")
    >>> walkers = Walkers(molecule.system, molecule.positions, temperature=300, walkers=4, seed=1)
    >>> walkers.advance(20, 10, progress=False).shape
    (4, 2, 22, 3)
    """

    def __init__(
        self,
        system: openmm.System,
        positions: Any,
        *,
        temperature: Any,
        walkers: int = 128,
        timestep: Any = 0.001,
        friction: Any = 1.0,
        seed: int,
        executor: Executor | None = None,
        minimize: bool = True,
    ) -> None:
        starts = nanometers(positions)
        one = starts.ndim == 2
        first = check_system(system, starts if one else starts[0])
        if not one and (starts.shape[1:] != first.shape or not np.isfinite(starts).all()):
            raise InputError("positions must be finite numbers of shape (atoms, 3) or (walkers, atoms, 3).")
        self.temperature, self.timestep = kelvin(temperature), picoseconds(timestep)
        self.friction, self.seed = per_picosecond(friction), whole_number(seed, "seed", minimum=0)
        self._xml = openmm.XmlSerializer.serialize(system)
        refuse_code(self._xml, "The walkers' System")
        if one and minimize:
            relaxed = LangevinPropagator(
                system, first, temperature=self.temperature, timestep=self.timestep, friction=self.friction,
                generator=np.random.default_rng(0),
            )  # fmt: skip
            relaxed.minimize()
            first = relaxed.positions
        count = whole_number(walkers, "walkers", minimum=1)
        self.positions = np.repeat(first[None], count, 0) if one else np.array(starts, dtype=np.float64)
        size = _ALONE if batchable(system) else _BATCHED
        self._chunks = np.array_split(np.arange(len(self)), math.ceil(len(self) / size))
        self._executor = executor
        self.calls = self.force_evaluations = 0

    def __len__(self) -> int:
        return len(self.positions)

    def advance(
        self, steps: int, interval: int, *, temperature: Any = None, progress: bool = True, label: str = "dynamics"
    ) -> NDArray[Any]:
        """Dynamics of all walkers from fresh velocities.

        A chunk whose worker dies is run again, with the same result. Nothing changes here before all chunks are done.

        Parameters
        ----------
        steps, interval : int
            Time steps, and between frames: a divisor of them.
        temperature : Quantity or float, optional
            K, of this stretch in place of the walkers' own.
        progress : bool
            A bar with the remaining time on stderr, where that is a terminal; ``label`` stands before it.

        Returns
        -------
        ndarray (walkers, steps / interval, atoms, 3)
            nm.

        Raises
        ------
        InputError
            Where the dynamics is unstable, a chunk fails three times, or no worker lives long enough to finish one.
        """
        steps, interval = whole_number(steps, "steps", minimum=1), whole_number(interval, "interval", minimum=1)
        if steps % interval:
            raise InputError(f"interval must divide the {steps} steps, and {interval} does not.")
        at = self.temperature if temperature is None else kelvin(temperature)
        chunks = [
            Chunk(self._xml, self.positions[those], at, self.timestep, self.friction, steps, interval, self.seed,
                  (self.calls, number))
            for number, those in enumerate(self._chunks)
        ]  # fmt: skip
        with tqdm(
            total=len(chunks), desc=label, unit="chunk", disable=None if progress else True, dynamic_ncols=True
        ) as bar:
            done = run_chunks(chunks, self._executor, bar.update)
        self.calls += 1
        self.force_evaluations += sum(part.force_evaluations for part in done)
        frames = np.concatenate([part.frames for part in done])
        self.positions = frames[:, -1].astype(np.float64)
        return frames

    def heat(self, temperature: Any, steps: int, settling_steps: int, *, progress: bool = True) -> None:
        """Move all walkers at a high temperature, then let them settle at their own.

        Walkers that start from one structure need longer to forget it than they run; after heating, each starts from a
        conformation of its own. Their basins are still those of the high temperature.

        Parameters
        ----------
        temperature : Quantity or float
            K.
        steps, settling_steps : int
            Enough to cross the barriers (or none), and a few times 1 / friction.
        """
        if steps:
            self.advance(steps, steps, temperature=temperature, progress=progress, label="heating")
        self.advance(settling_steps, settling_steps, progress=progress, label="settling")

    def move(self, generator: BoltzmannGenerator, proposals: int) -> Moves:
        """Let every walker try independent proposals, one after the other, all of them evaluated as one batch.

        Accepted or rejected by the generator's energy in float64. A walker outside its support stays where it is.

        Parameters
        ----------
        generator : BoltzmannGenerator
            With an energy; of this molecule.
        proposals : int
            For each walker.
        """
        n = whole_number(proposals, "proposals", minimum=1)
        seeds = np.random.SeedSequence(self.seed, spawn_key=(self.calls, 0))
        rng, random = np.random.default_rng(seeds), torch.Generator().manual_seed(seed_for_torch(seeds))
        x = torch.as_tensor(self.positions)
        if generator.coordinates is None:
            x = x.flatten(1)
        q, _ = generator.sample_internal(n * len(self), random)
        placed = generator.place(q, generator.frame(x.repeat_interleave(n, 0)))
        # the same density for both sides, found in one and the same way
        log_w = generator.log_weights(torch.cat([x, placed])).numpy()
        here, there = log_w[: len(self)], log_w[len(self) :].reshape(len(self), n)
        there = np.where(np.isfinite(there), there, -np.inf)
        candidates = placed.numpy().reshape(len(self), n, *self.positions.shape[1:])
        positions, accepted, refused = self.positions.copy(), 0, 0
        for k in range(len(self)):
            if not np.isfinite(here[k]):
                refused += 1
                continue
            chain = independence_chain([here[k], *there[k]], rng).indices
            accepted += int(np.count_nonzero(np.diff(chain)))
            if chain[-1]:
                positions[k] = candidates[k, chain[-1] - 1]
        self.positions = positions
        self.calls += 1
        return Moves(n * (len(self) - refused), accepted, refused)
