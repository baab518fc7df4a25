"""Where chunks of walkers run: a pool of processes that survives the death of its workers, or Dask."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.connection import wait
from typing import Any

import torch

from openmm_bg.errors import InputError
from openmm_bg.sampling.dynamics import whole_number

__all__ = ["WorkerPool", "dask_executor"]


class WorkerPool(Executor):
    """Processes of one thread each; where one dies, those of the pool are replaced and work can be given again.

    Parameters
    ----------
    workers : int, optional
        By default one for each core this process may use.

    Notes
    -----
    Workers are started afresh (``spawn``: OpenMM and torch do not survive a fork), so a script that makes a pool must
    keep its own work under ``if __name__ == "__main__":``. They leave Ctrl-C to this process and end with it.

    Examples
    --------
    >>> with WorkerPool(2) as pool:    # doctest: +SKIP
    ...     result = bg.AdaptiveTraining(generator, molecule.positions, executor=pool).run()
    """

    def __init__(self, workers: int | None = None) -> None:
        self.workers = usable_cores() if workers is None else whole_number(workers, "workers", minimum=1)
        self._pool = self._new()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Give a worker something to do."""
        try:
            return self._pool.submit(fn, *args, **kwargs)
        except BrokenProcessPool:
            self._pool.shutdown(wait=True)
            self._pool = self._new()
            return self._pool.submit(fn, *args, **kwargs)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """End the workers when they have done what they were given."""
        self._pool.shutdown(wait, cancel_futures=cancel_futures)

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is not None:  # nobody will want what they are doing
            for process in list((self._pool._processes or {}).values()):
                process.terminate()
        self.shutdown(cancel_futures=True)

    def _new(self) -> ProcessPoolExecutor:
        spawn = multiprocessing.get_context("spawn")
        return ProcessPoolExecutor(self.workers, mp_context=spawn, initializer=_begin)


def usable_cores() -> int:
    """Cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on every system
        return os.cpu_count() or 1


@contextmanager
def dask_executor(address: str) -> Iterator[Executor]:
    """The executor of a Dask scheduler; chunks run wherever it has workers, which need openmm_bg.

    Parameters
    ----------
    address : str
        Such as "tcp://10.0.0.1:8786".

    Raises
    ------
    InputError
        If ``distributed`` is not installed, or nothing answers there.

    Examples
    --------
    >>> with dask_executor("tcp://10.0.0.1:8786") as executor:    # doctest: +SKIP
    ...     result = bg.AdaptiveTraining(generator, molecule.positions, executor=executor).run()
    """
    try:
        import distributed
    except ImportError:
        raise InputError(
            "A scheduler needs the package distributed, which is not installed; pip install openmm_bg[dask]."
        ) from None
    try:
        client = distributed.Client(address, timeout="10s")
    except (OSError, ValueError) as error:
        raise InputError(f"There is no Dask scheduler at {address}: {error}.") from None
    with client:
        # what failed once must be run, not remembered
        yield client.get_executor(pure=False)


def _begin() -> None:
    """In a new worker: one thread, deaf to Ctrl-C, gone when its parent is."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()


def _end_with(parent: Any) -> None:
    # a killed parent closes no pipe that its workers hold themselves
    wait([parent.sentinel])
    os._exit(1)
