"""The energy as OpenMM itself computes it, one conformation after another."""

from __future__ import annotations

import hashlib
import math
import os
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import openmm
import torch
from torch import Tensor

from openmm_bg import units
from openmm_bg.energies.base import Energy
from openmm_bg.energies.gradients import known_gradient
from openmm_bg.energies.workers import Evaluator, Pool
from openmm_bg.errors import InputError

# Starting workers takes about as long as this much evaluation, which is when they start.
_START_SECONDS = 0.5
# A batch that takes less than this is not worth sending to workers.
_SEND_SECONDS = 2e-3
# Up to here, without a CustomGBForce, Reference is chosen unseen: double precision, and fast enough.
_SMALL_SYSTEM = 100
# From here on graphics processors are tried.
_LARGE_SYSTEM = 2000
# Other platforms compute in single precision, so they must be faster by this much to be preferred to Reference.
_ADVANTAGE = 1.5

# The outcome of the measurements made in this process, by System content.
_fastest: dict[str, str] = {}
# Contexts that came into this process by a fork: their threads did not, so they cannot even be destroyed.
_inherited: list[Evaluator] = []


class ContextEnergy(Energy):
    """Reduced energy of an OpenMM System, or of some of its forces, evaluated in Contexts.

    Works for every force OpenMM knows. Slow: one call per conformation; differentiable once, and a second
    derivative raises. The box is the System's default box. Virtual sites are placed from their parent particles,
    whatever `x` says, and have zero gradient. Thermostats, barostats and CMMotionRemover contribute nothing.

    A conformation whose energy or forces OpenMM finds not finite has the energy +inf and zero gradient, on every
    platform. Forces are computed only where a gradient is wanted; where it is not, a finite energy is enough: two
    coincident atoms held by a harmonic bond then have an energy, though no gradient.

    With several workers, conformations go in chunks to as many processes, each with a Context of its own, and
    come back in order. The processes import neither torch nor the calling script, start once evaluations in this
    process have taken about as long as starting takes, and end with `close`, with the energy or with this
    process. Small batches are evaluated in this process all the same. If a worker fails, the call raises, and
    the next one starts new workers.

    Parameters
    ----------
    system
        Copied: later changes to it are not seen.
    temperature
        Quantity, or a number in K.
    forces
        Indices of the forces to include; all by default.
    platform
        Name of the platform. By default Reference (double precision) for fewer than 100 particles without a
        CustomGBForce. Otherwise the faster of Reference and CPU (one thread), and of CUDA, HIP and OpenCL from
        2000 particles on, as a short measurement on the first batch finds, remembered in this process for this
        System. The others compute in single precision and are taken if they are at least 1.5 times as fast as
        Reference. To have the same platform in every run, name it.
    workers
        Number of processes. With 1, everything is evaluated in this process.

    Attributes
    ----------
    system : openmm.System
    temperature : float
        K.
    thermal_energy : float
        kT in kJ/mol.
    num_atoms : int
    forces : tuple of int
        Indices of the forces included, without those that contribute nothing.
    workers : int
    platform : str
        Before a measurement is made, what it is expected to find: CPU.

    Raises
    ------
    InputError
        If a platform or force does not exist, or `workers` is not a positive integer.

    Examples
    --------
    >>> system = openmm.System()
    >>> _ = system.addParticle(12.0)
    >>> spring = openmm.CustomExternalForce("50*x^2")
    >>> _ = spring.addParticle(0)
    >>> _ = system.addForce(spring)
    >>> energy = ContextEnergy(system, 300)
    >>> round(float(energy.potential(torch.tensor([[[0.1, 0.0, 0.0]]], dtype=torch.float64))), 6)
    0.5
    """

    def __init__(
        self,
        system: openmm.System,
        temperature: Any,
        *,
        forces: Sequence[int] | None = None,
        platform: str | None = None,
        workers: int = 1,
    ) -> None:
        super().__init__((copy_system(system).getNumParticles(), 3))
        self.system: openmm.System = copy_system(system)
        self.temperature: float = units.kelvin(temperature)
        self.thermal_energy: float = units.thermal_energy(self.temperature)
        self.num_atoms: int = system.getNumParticles()
        if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
            raise InputError(f"workers must be a positive integer, not {workers!r}.")
        self.workers: int = workers

        chosen = range(system.getNumForces()) if forces is None else [int(i) for i in forces]
        for i in chosen:
            if not 0 <= i < system.getNumForces():
                raise InputError(f"Force {i} does not exist: the System has {system.getNumForces()} forces.")
        self.forces: tuple[int, ...] = tuple(
            i for i in sorted(set(chosen)) if not contributes_nothing(self.system.getForce(i))
        )
        generalized = any(isinstance(self.system.getForce(i), openmm.CustomGBForce) for i in self.forces)
        clear = self.num_atoms < _SMALL_SYSTEM and not generalized
        self._to_measure: bool = platform is None and not clear
        self.platform: str = find_platform(platform or ("Reference" if clear else "CPU"))
        self._global_parameters: dict[str, float] | None = None
        self._seconds: float = 0.0  # spent on batches while there were no workers
        self._seconds_per_row: float | None = None
        self._forget()

    def _forget(self) -> None:
        """The state before the first evaluation, as far as this process is concerned."""
        self._local: Evaluator | None = None
        self._pool: Pool | None = None
        self._lock = threading.RLock()
        self._owner: int = os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        # A Context can neither be copied nor sent to another process; it is made again where it is needed.
        own = ("_local", "_pool", "_lock", "_owner")
        return {name: value for name, value in self.__dict__.items() if name not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget()

    def __enter__(self) -> ContextEnergy:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End the worker processes and give up the Context; the next evaluation makes them again."""
        self._leave_to_parent()
        with self._lock:
            pool, self._pool, self._local = self._pool, None, None
            self._seconds = 0.0
            if pool is not None:
                pool.close()

    @property
    def worker_pids(self) -> tuple[int, ...]:
        """Process numbers of the running workers: none before they have started and after `close`."""
        return self._pool.pids if self._pool is not None and self._pool.owner == os.getpid() else ()

    @property
    def global_parameters(self) -> dict[str, float]:
        """Values of the global parameters of the forces included, by name, in md units."""
        with self._lock:
            if self._global_parameters is None:
                # Only a Context knows them all: those of nested forces, for example.
                parameters = Evaluator(self._included(), "Reference").context.getParameters()
                self._global_parameters = {name: parameters[name] for name in parameters}
            return dict(self._global_parameters)

    def set_global_parameters(self, values: Mapping[str, float]) -> None:
        """Change global parameters, in this process and in the workers, from the next evaluation on.

        Parameters
        ----------
        values
            Finite numbers in md units by name; parameters not named keep their values.

        Raises
        ------
        InputError
            If no force included has such a parameter, or a value is not a finite number.

        Examples
        --------
        >>> system = openmm.System()
        >>> _ = system.addParticle(12.0)
        >>> spring = openmm.CustomExternalForce("k*x^2")
        >>> _ = spring.addGlobalParameter("k", 50.0), spring.addParticle(0), system.addForce(spring)
        >>> energy = ContextEnergy(system, 300)
        >>> energy.set_global_parameters({"k": 100.0})
        >>> round(float(energy.potential(torch.tensor([[[0.1, 0.0, 0.0]]], dtype=torch.float64))), 6)
        1.0
        """
        parameters = self.global_parameters
        for name, value in values.items():
            if name not in parameters:
                known = ", ".join(sorted(parameters)) or "none"
                raise InputError(f"There is no global parameter {name!r}; the forces included have: {known}.")
            try:
                parameters[name] = float(value)
            except (TypeError, ValueError):
                raise InputError(f"The global parameter {name!r} must be a number, not {value!r}.") from None
            if not math.isfinite(parameters[name]):
                raise InputError(f"The global parameter {name!r} must be finite, not {value!r}.")
        self._global_parameters = parameters

    def potential(self, x: Tensor) -> Tensor:
        """Potential energies in kJ/mol, ``(batch,)``."""
        return self(x) * self.thermal_energy

    def reduced(self, x: Tensor) -> Tensor:
        if x.requires_grad and torch.is_grad_enabled():
            return known_gradient(self.reduced_and_gradient, x)
        return self._reduced(x, gradients=False)[0]

    def reduced_and_gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._reduced(x, gradients=True)

    def _reduced(self, x: Tensor, gradients: bool) -> tuple[Tensor, Tensor | None]:
        positions = x.detach().to(device="cpu", dtype=torch.float64).numpy()
        energies = np.full(len(positions), np.inf)
        slopes = np.zeros(positions.shape) if gradients else None
        rows = np.flatnonzero(np.isfinite(positions).all((1, 2)))
        if len(rows):
            self._leave_to_parent()
            with self._lock:
                values, derivatives = self._evaluate(np.ascontiguousarray(positions[rows]), gradients)
            energies[rows] = values / self.thermal_energy
            if slopes is not None:
                slopes[rows] = derivatives / self.thermal_energy
        return torch.as_tensor(energies).to(x), None if slopes is None else torch.as_tensor(slopes).to(x)

    def _evaluate(self, positions: np.ndarray, gradients: bool) -> tuple[np.ndarray, np.ndarray | None]:
        """Energies (kJ/mol) and gradients of finite conformations, from this process, the workers, or both."""
        parameters = self._global_parameters or {}
        if self._to_measure:
            self._measure(positions, parameters)
        total = len(positions)
        done, parts = 0, []
        while done < total and not self._send(total - done):
            # Without workers to decide about, all at once; else a few rows at a time, to see what they take.
            count = total if self.workers == 1 else min(total - done, max(1, done))
            fresh = self._local is None
            try:
                evaluator = self._evaluator()
                start = time.perf_counter()
                parts.append(evaluator.evaluate(positions[done : done + count], parameters, gradients))
            except BaseException:
                self._local = None  # an interrupted Context is not trusted
                raise
            seconds = time.perf_counter() - start
            done += count
            if not fresh:  # the first evaluation in a Context also prepares it
                self._seconds_per_row = seconds / count
            self._seconds += seconds if self.workers > 1 and total > 1 else 0.0
        if done < total:
            parts.append(self._evaluate_in_workers(positions[done:], parameters, gradients))
        if len(parts) == 1:
            return parts[0]
        energies = np.concatenate([part[0] for part in parts])
        return energies, np.concatenate([part[1] for part in parts]) if gradients else None

    def _send(self, rows: int) -> bool:
        """Whether to give so many rows to the workers, who may have to be started for it."""
        if self.workers == 1 or rows < 2:
            return False
        estimate = rows * (self._seconds_per_row or 0.0)
        if self._pool is None:
            return self._seconds + estimate >= _START_SECONDS
        return self._seconds_per_row is None or estimate >= _SEND_SECONDS

    def _evaluate_in_workers(
        self, positions: np.ndarray, parameters: Mapping[str, float], gradients: bool
    ) -> tuple[np.ndarray, np.ndarray | None]:
        try:
            if self._pool is None:
                self._pool = Pool(self._included(), self.platform, self.workers)
            return self._pool.evaluate(positions, parameters, gradients)
        except BaseException:
            self._pool = None  # it has ended its workers; the next batch starts others
            raise

    def _evaluator(self) -> Evaluator:
        if self._local is None:
            self._local = Evaluator(self._included(), self.platform)
        return self._local

    def _included(self) -> openmm.System:
        """The System with only the forces that count."""
        system = copy_system(self.system)
        for i in reversed(range(system.getNumForces())):
            if i not in self.forces:
                system.removeForce(i)
        return system

    def _measure(self, positions: np.ndarray, parameters: Mapping[str, float]) -> None:
        """Settle the platform by what a few evaluations take."""
        system = self._included()
        key = hashlib.sha256(openmm.XmlSerializer.serialize(system).encode()).hexdigest()
        if key not in _fastest:
            faster = ("CPU", "CUDA", "HIP", "OpenCL") if self.num_atoms > _LARGE_SYSTEM else ("CPU",)
            seconds = {"Reference": _seconds_each(system, "Reference", positions, parameters)}
            for name in _platforms():
                if name in faster:
                    try:
                        seconds[name] = _ADVANTAGE * _seconds_each(system, name, positions, parameters)
                    except openmm.OpenMMException:
                        continue  # not on this machine, or not with these forces
            _fastest[key] = min(seconds, key=seconds.__getitem__)
        self.platform = _fastest[key]
        self._to_measure = False

    def _leave_to_parent(self) -> None:
        """In a forked process: drop what belongs to the parent, untouched."""
        if self._owner != os.getpid():
            if self._local is not None:
                _inherited.append(self._local)
            self._forget()


def _seconds_each(
    system: openmm.System, platform: str, positions: np.ndarray, parameters: Mapping[str, float]
) -> float:
    """The least time of a few evaluations of energy and forces; one, if it takes long."""
    evaluator = Evaluator(system, platform)
    times = []
    for turn in range(6):
        start = time.perf_counter()
        evaluator.evaluate(positions[turn % len(positions)][None], parameters, gradients=True)
        times.append(time.perf_counter() - start)
        if sum(times) > 1.0:
            break
    return min(times[1:] or times)  # the first also prepares what the others use


def _platforms() -> list[str]:
    return [openmm.Platform.getPlatform(i).getName() for i in range(openmm.Platform.getNumPlatforms())]


def find_platform(name: str) -> str:
    """The name, if OpenMM has a platform of this name here."""
    if name not in _platforms():
        raise InputError(f"There is no platform {name!r} here; choose one of {', '.join(_platforms())}.")
    return name


def copy_system(system: openmm.System) -> openmm.System:
    """A deep copy, so that later changes to the original are not seen."""
    if not isinstance(system, openmm.System):
        raise InputError(f"An openmm.System is needed, not {type(system).__name__}.")
    return openmm.XmlSerializer.clone(system)


def contributes_nothing(force: openmm.Force) -> bool:
    """Whether a force only changes the dynamics: thermostats, barostats, removal of the overall motion."""
    name = type(force).__name__
    return name in ("CMMotionRemover", "AndersenThermostat") or name.endswith("Barostat")
