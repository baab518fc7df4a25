"""Temperature replica exchange: the reference sampler, and the data for a first generator.

A replica keeps its temperature; walkers move between temperatures by exchanging positions. Neighbours i, i+1
exchange with probability min(1, exp[(beta_i - beta_{i+1}) (U_i - U_{i+1})]), even and odd pairs in turn, and
velocities are rescaled by sqrt(T_new / T_old) (Sugita & Okamoto, Chem. Phys. Lett. 314, 141 (1999)).
Deterministic alternation of the pairs makes round trips fastest (Syed et al., J. R. Stat. Soc. B 84, 321 (2022)).
"""

from __future__ import annotations

import hashlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import openmm
from tqdm import tqdm

from openmm_bg.device import find_device
from openmm_bg.errors import InputError
from openmm_bg.sampling.archive import load_arrays, save_arrays
from openmm_bg.sampling.dynamics import check_system, whole_number
from openmm_bg.sampling.exchange_result import ReplicaExchangeResult
from openmm_bg.sampling.replicas import replicas_for
from openmm_bg.units import GAS_CONSTANT, kelvin, per_picosecond, picoseconds

__all__ = ["ReplicaExchange", "ReplicaExchangeResult", "geometric_temperatures", "replica_exchange"]

_CHECKPOINT_SECONDS = 30.0


def geometric_temperatures(low: Any, high: Any, n: int) -> np.ndarray:
    """`n` temperatures in K from `low` to `high`, each the same factor above the one before.

    A constant heat capacity makes all neighbours of such a ladder exchange equally often.

    Parameters
    ----------
    low, high : Quantity or float
        K.
    n : int
        At least 2.

    Returns
    -------
    ndarray, (n,)

    Examples
    --------
    >>> geometric_temperatures(300, 1200, 3)
    array([ 300.,  600., 1200.])
    """
    low, high = kelvin(low, "the lowest temperature"), kelvin(high, "the highest temperature")
    n = whole_number(n, "n", minimum=2)
    if high <= low:
        raise InputError(f"The highest temperature ({high:g} K) must lie above the lowest ({low:g} K).")
    return low * (high / low) ** (np.arange(n) / (n - 1))


class ReplicaExchange:
    """A replica exchange that can be run piece by piece; `replica_exchange` is the short form.

    Parameters
    ----------
    system : openmm.System
        Without barostat or thermostat.
    positions : (atoms, 3), nm
        Where all walkers start.
    temperatures : sequence
        Rising, K.
    steps_per_iteration : int
        Steps between exchanges, and between frames.
    timestep, friction : Quantity or float
        ps, 1/ps.
    seed : int
        Every random number comes from it: the result does not depend on the number of workers.
    keep : sequence of int
        Indices of the temperatures whose frames are kept.
    ladders : int
        Independent exchanges side by side, each with all temperatures. Several ladders run as one batch in torch where
        the System allows it (no constraints, virtual sites, periodic box or forces without a torch form): five and more
        times the steps per second and core of OpenMM's Reference platform.
    workers : int
        Threads, where OpenMM runs the replicas.
    minimize : bool
        Relax the start first.
    platform : str, optional
        An OpenMM platform, which then runs the replicas whatever their number; by default that is
        `fastest_platform(system)`.
    device : str
        Where a batch runs, "cpu" or "cuda".

    Examples
    --------
    >>> from openmm_bg import systems
    >>> molecule = systems.load("alanine_dipeptide")
    >>> run = ReplicaExchange(
    ...     molecule.system, molecule.positions, temperatures=[300, 400], steps_per_iteration=10, seed=1
    ... )
    >>> run.run(3, progress=False)
    >>> run.result().frames[0].shape
    (3, 22, 3)
    """

    def __init__(
        self,
        system: openmm.System,
        positions: Any,
        *,
        temperatures: Sequence[Any] | np.ndarray,
        steps_per_iteration: int = 500,
        timestep: Any = 0.001,
        friction: Any = 1.0,
        seed: int,
        keep: Sequence[int] = (0,),
        ladders: int = 1,
        workers: int = 2,
        minimize: bool = True,
        platform: str | None = None,
        device: str = "cpu",
    ) -> None:
        ladder = np.array([kelvin(temperature) for temperature in temperatures])
        if len(ladder) < 2 or (np.diff(ladder) <= 0).any():
            raise InputError("Replica exchange needs at least two temperatures in rising order.")
        if not keep or any(not 0 <= index < len(ladder) for index in keep):
            raise InputError(f"keep must name temperatures by index, 0 to {len(ladder) - 1}, not {list(keep)}.")
        self.temperatures = ladder
        self.seed = whole_number(seed, "seed", minimum=0)
        self.workers = whole_number(workers, "workers", minimum=1)
        self.steps_per_iteration = whole_number(steps_per_iteration, "steps_per_iteration", minimum=1)
        self.keep = tuple(sorted(set(keep)))
        self.ladders = whole_number(ladders, "ladders", minimum=1)
        start = check_system(system, positions)
        self._replicas, self._generator = replicas_for(
            system, start, np.tile(ladder, self.ladders), self.seed,
            timestep=timestep, friction=friction, platform=platform, workers=self.workers,
            batch=self.ladders > 1, device=find_device(device),
        )  # fmt: skip
        # What a checkpoint must share with the run that resumes it.
        self._identity = {
            "system": hashlib.sha256(openmm.XmlSerializer.serialize(system).encode()).hexdigest(),
            "temperatures": ladder.tolist(),
            "ladders": self.ladders,
            "steps_per_iteration": self.steps_per_iteration,
            "timestep": picoseconds(timestep),
            "friction": per_picosecond(friction),
            "seed": self.seed,
            "keep": list(self.keep),
            **self._replicas.identity,
        }
        self._replicas.start(minimize)
        self.attempts = 0  # iterations done, discarded ones included
        # one row per ladder: which of its walkers is at each temperature
        self._walkers = np.tile(np.arange(len(ladder)), (self.ladders, 1))
        self._tried = np.zeros(len(ladder) - 1, dtype=np.int64)
        self._accepted = np.zeros(len(ladder) - 1, dtype=np.int64)
        self._frames: dict[int, list[np.ndarray]] = {index: [] for index in self.keep}
        self._energies: list[np.ndarray] = []
        self._occupants: list[np.ndarray] = []

    def __len__(self) -> int:
        """Iterations recorded, in each ladder."""
        return len(self._energies)

    def heat(self, steps: int, *, progress: bool = True) -> None:
        """Move all walkers at the highest temperature, then slow each down to its own.

        Walkers that all start from one structure need longer to forget it than a short ladder runs: the coldest wait
        for exchanges that bring them something else. After heating, each starts from a conformation of its own.

        Parameters
        ----------
        steps : int
            Enough to cross the barriers at the highest temperature. Discard some iterations afterwards, in which the
            ladder comes to equilibrium: positions are those of the highest temperature everywhere.
        progress : bool
            A bar with the remaining time on stderr, where that is a terminal.

        Raises
        ------
        InputError
            After the first iteration, or where the dynamics is unstable.

        Examples
        --------
        >>> from openmm_bg import systems
        >>> molecule = systems.load("alanine_dipeptide")
        >>> run = ReplicaExchange(
        ...     molecule.system, molecule.positions, temperatures=[300, 400], steps_per_iteration=10, seed=1
        ... )
        >>> run.heat(20, progress=False)
        >>> run.run(2, record=False, progress=False)
        """
        if self.attempts:
            raise InputError(
                f"Walkers are heated before the first iteration, and {self.attempts} are done: build another "
                "ReplicaExchange."
            )
        steps = whole_number(steps, "steps", minimum=1)
        with tqdm(total=steps, desc="heating", unit="step", disable=None if progress else True) as bar:
            self._replicas.heat(steps, bar.update)

    def run(
        self,
        n_iterations: int,
        *,
        record: bool = True,
        checkpoint: str | os.PathLike[str] | None = None,
        progress: bool = True,
        callback: Callable[[ReplicaExchange], None] | None = None,
    ) -> None:
        """Run `n_iterations` more: dynamics, record, exchange.

        Parameters
        ----------
        n_iterations : int
        record : bool
            False discards the iterations (equilibration).
        checkpoint : path, optional
            Saved about every half minute, at the end, and at Ctrl-C, which takes effect after the running
            iteration (a second Ctrl-C at once).
        progress : bool
            A bar with the remaining time on stderr, where that is a terminal.
        callback : callable, optional
            Called with this object after every iteration.
        """
        n_iterations = whole_number(n_iterations, "n_iterations", minimum=0)
        saved = time.monotonic()
        with (
            _deferred_interrupt() as interrupted,
            tqdm(total=n_iterations, unit="iteration", disable=None if progress else True) as bar,
        ):
            for _ in range(n_iterations):
                self._iterate(record)
                bar.update()
                if callback is not None:
                    callback(self)
                if checkpoint is not None and time.monotonic() - saved > _CHECKPOINT_SECONDS:
                    self.save(checkpoint)
                    saved = time.monotonic()
                if interrupted.is_set():
                    break
            if checkpoint is not None:
                self.save(checkpoint)
        if interrupted.is_set():
            raise KeyboardInterrupt

    def result(self) -> ReplicaExchangeResult:
        """Everything recorded so far."""

        def by_ladder(rows: list[np.ndarray], *shape: int, dtype: type = np.float64) -> np.ndarray:
            table = np.array(rows, dtype=dtype).reshape(len(self), self.ladders, *shape)
            return table.swapaxes(0, 1).reshape(-1, *shape)

        temperatures, atoms = len(self.temperatures), self._replicas.positions(np.array([0])).shape[1]
        return ReplicaExchangeResult(
            temperatures=self.temperatures.copy(),
            potential_energy=by_ladder(self._energies, temperatures),
            walkers=by_ladder(self._occupants, temperatures, dtype=np.int64),
            exchanges_tried=self._tried.copy(),
            exchanges_accepted=self._accepted.copy(),
            frames={index: by_ladder(frames, atoms, 3) for index, frames in self._frames.items()},
            force_evaluations=self._replicas.force_evaluations,
            seed=self.seed,
            ladders=self.ladders,
        )

    def _iterate(self, record: bool) -> None:
        temperatures = len(self.temperatures)
        energies = self._replicas.advance(self.steps_per_iteration).reshape(self.ladders, temperatures)
        if record:
            self._energies.append(energies)
            self._occupants.append(self._walkers.copy())
            for index, frames in self._frames.items():
                frames.append(self._replicas.positions(np.arange(self.ladders) * temperatures + index))
        beta = 1 / (GAS_CONSTANT * self.temperatures)
        low = np.arange(self.attempts % 2, temperatures - 1, 2)
        log_ratio = (beta[low] - beta[low + 1]) * (energies[:, low] - energies[:, low + 1])
        swapped = np.log1p(-self._generator.random(log_ratio.shape)) < log_ratio
        self._tried[low] += self.ladders
        self._accepted[low] += swapped.sum(0)
        order = np.tile(np.arange(temperatures), (self.ladders, 1))
        order[:, low] += swapped
        order[:, low + 1] -= swapped
        if swapped.any():
            self._walkers = np.take_along_axis(self._walkers, order, 1)
            self._replicas.permute((order + temperatures * np.arange(self.ladders)[:, None]).ravel())
        self.attempts += 1

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a checkpoint (`.npz`, no pickle inside), replacing the file in one step."""
        result = self.result()
        header, arrays = self._replicas.save()
        header |= {
            **self._identity,
            "attempts": self.attempts,
            "exchange_generator": self._generator.bit_generator.state,
        }
        save_arrays(
            path,
            header,
            **arrays,
            occupants=self._walkers,
            tried=self._tried,
            accepted=self._accepted,
            potential_energy=result.potential_energy,
            walkers=result.walkers,
            **{f"frames_{index}": frames for index, frames in result.frames.items()},
        )

    def restore(self, path: str | os.PathLike[str]) -> None:
        """Continue from a checkpoint of the same System, ladder, steps and seed.

        On the Reference platform the run then gives bitwise the numbers of a run that was never stopped.

        Raises
        ------
        InputError
            When the file is missing or damaged, or belongs to another run.
        """
        names = ("occupants", "tried", "accepted", "potential_energy", "walkers")
        own = tuple(self._replicas.save()[1])
        header, arrays = load_arrays(path, (*own, *names, *(f"frames_{index}" for index in self.keep)))
        other = [name for name, value in self._identity.items() if header.get(name) != value]
        if other:
            raise InputError(
                f"The checkpoint {path} belongs to another run (it differs in {', '.join(other)}): "
                "resume with the settings it was made with, or remove it."
            )

        def by_iteration(table: np.ndarray) -> list[np.ndarray]:
            return list(table.reshape(self.ladders, -1, *table.shape[1:]).swapaxes(0, 1))

        self._replicas.restore(header, arrays)
        self._generator.bit_generator.state = header["exchange_generator"]
        self.attempts = header["attempts"]
        self._walkers, self._tried, self._accepted = arrays["occupants"], arrays["tried"], arrays["accepted"]
        self._energies = by_iteration(arrays["potential_energy"])
        self._occupants = by_iteration(arrays["walkers"])
        self._frames = {index: by_iteration(arrays[f"frames_{index}"]) for index in self.keep}


def replica_exchange(
    system: openmm.System,
    positions: Any,
    *,
    temperatures: Sequence[Any] | np.ndarray,
    n_iterations: int,
    heating_steps: int = 0,
    equilibration_iterations: int = 0,
    steps_per_iteration: int = 500,
    timestep: Any = 0.001,
    friction: Any = 1.0,
    seed: int,
    keep: Sequence[int] = (0,),
    ladders: int = 1,
    workers: int = 2,
    minimize: bool = True,
    platform: str | None = None,
    device: str = "cpu",
    checkpoint: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: bool = True,
    callback: Callable[[ReplicaExchange], None] | None = None,
) -> ReplicaExchangeResult:
    """Temperature replica exchange of one molecule; a frame per kept temperature and iteration.

    Parameters
    ----------
    n_iterations, equilibration_iterations : int
        Iterations of each ladder recorded, and discarded before them.
    heating_steps : int
        Steps of all walkers at the highest temperature before everything else (:meth:`ReplicaExchange.heat`).
    checkpoint : path, optional
        Where the state is saved about every half minute.
    resume : bool
        Continue from `checkpoint` up to the same total of iterations; start afresh where there is none yet.
    system, positions, temperatures, steps_per_iteration, timestep, friction, seed, keep, ladders, workers, minimize
        As in `ReplicaExchange`. For a small peptide in implicit solvent `geometric_temperatures(300, 1000, 6)`
        is a good start: alanine dipeptide exchanges 31 to 43 percent of the time and crosses the phi barrier
        about ten times per nanosecond of all replicas together.
    platform, device, progress, callback
        As in `ReplicaExchange` and `ReplicaExchange.run`.

    Returns
    -------
    ReplicaExchangeResult

    Raises
    ------
    InputError
        For input that does not fit, a checkpoint of another run, a checkpoint that exists when `resume` is
        False, or an unstable simulation.
    """
    n_iterations = whole_number(n_iterations, "n_iterations", minimum=1)
    heating_steps = whole_number(heating_steps, "heating_steps", minimum=0)
    equilibration_iterations = whole_number(equilibration_iterations, "equilibration_iterations", minimum=0)
    if resume and checkpoint is None:
        raise InputError("resume=True needs the checkpoint to resume from.")
    exists = checkpoint is not None and Path(checkpoint).exists()
    if exists and not resume:
        raise InputError(f"The checkpoint {checkpoint} exists already: pass resume=True to continue it, or remove it.")
    run = ReplicaExchange(
        system,
        positions,
        temperatures=temperatures,
        steps_per_iteration=steps_per_iteration,
        timestep=timestep,
        friction=friction,
        seed=seed,
        keep=keep,
        ladders=ladders,
        workers=workers,
        minimize=minimize,
        platform=platform,
        device=device,
    )
    if exists and checkpoint is not None:
        run.restore(checkpoint)
    elif heating_steps:
        run.heat(heating_steps, progress=progress)
    warming = max(0, equilibration_iterations - run.attempts)
    run.run(warming, record=False, checkpoint=checkpoint, progress=progress)
    run.run(max(0, n_iterations - len(run)), checkpoint=checkpoint, progress=progress, callback=callback)
    return run.result()


@contextmanager
def _deferred_interrupt() -> Iterator[threading.Event]:
    """Turn the first Ctrl-C into a set event, so that an iteration is never left half done."""
    interrupted = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield interrupted  # signals arrive in the main thread only
        return
    previous = signal.getsignal(signal.SIGINT) or signal.SIG_DFL

    def note(number: int, frame: Any) -> None:
        if interrupted.is_set():
            raise KeyboardInterrupt
        interrupted.set()

    signal.signal(signal.SIGINT, note)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, previous)
