"""Where the work of a run is done: processes, a cluster, a GPU, an OpenMM platform."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import Executor
from dataclasses import dataclass

import openmm

from openmm_bg.device import find_device
from openmm_bg.sampling import WorkerPool, dask_executor, fastest_platform
from openmm_bg.sampling.dynamics import platform_named, whole_number
from openmm_bg.sampling.worker_pool import usable_cores


@dataclass(frozen=True)
class Resources:
    """Where a run works. What it finds does not depend on it, except for rounding.

    Attributes
    ----------
    workers : int or None
        Processes that move the walkers of an adaptive run; None for one on each core.
    scheduler : str or None
        Address of a Dask scheduler, whose workers do so instead.
    device : str
        Where training and batches of molecules run: "cpu", or "cuda" with or without a number.
    platform : str or None
        OpenMM's, for single simulations; None for the fastest (:func:`~openmm_bg.sampling.fastest_platform`).

    Raises
    ------
    InputError
        For fewer than one worker, and a device or a platform that is not there.

    Examples
    --------
    >>> Resources(workers=1, platform="Reference").device
    'cpu'
    """

    workers: int | None = None
    scheduler: str | None = None
    device: str = "cpu"
    platform: str | None = None

    def __post_init__(self) -> None:
        if self.workers is not None:
            whole_number(self.workers, "workers", minimum=1)
        find_device(self.device)
        if self.platform is not None:
            platform_named(self.platform)

    @contextlib.contextmanager
    def executor(self) -> Iterator[Executor | None]:
        """Where walkers run: Dask, a pool of processes, or for one worker this process."""
        if self.scheduler is not None:
            with dask_executor(self.scheduler) as executor:
                yield executor
        elif (usable_cores() if self.workers is None else self.workers) == 1:
            yield None
        else:
            with WorkerPool(self.workers) as pool:
                yield pool

    def check_scheduler(self) -> None:
        """Refuse a scheduler that is not there."""
        if self.scheduler is not None:
            with self.executor():
                pass

    def platform_for(self, system: openmm.System) -> tuple[openmm.Platform, dict[str, str]]:
        """The platform of a single simulation, and its properties."""
        name = self.platform or fastest_platform(system)
        return platform_named(name), {"Threads": "1"} if name == "CPU" else {}
