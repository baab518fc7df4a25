"""Energies from OpenMM Contexts: one in this process, or one in each of several worker processes.

This file is also the program a worker runs, started by its path, so that a worker imports OpenMM and numpy and
nothing else: neither torch nor the user's `__main__`.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import select
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Mapping
from typing import IO, Any

import numpy as np
import openmm
from openmm import unit

_KJ = unit.kilojoule_per_mole
_KJ_PER_NM = unit.kilojoule_per_mole / unit.nanometer

# A chunk carries at most this many particles, so that a reply stays within some megabytes.
_CHUNK_PARTICLES = 2**17
_CHUNKS_PER_WORKER = 4
_SECONDS_TO_EXIT = 1.0


class Evaluator:
    """Energies and gradients of a System in one Context, one conformation after another.

    Parameters
    ----------
    system
        All of its forces count.
    platform
        Name of an OpenMM platform; CPU is used with one thread.

    Raises
    ------
    openmm.OpenMMException
        If OpenMM cannot make a Context of this System.
    """

    def __init__(self, system: openmm.System, platform: str) -> None:
        properties = {"Threads": "1"} if platform == "CPU" else {}
        integrator = openmm.VerletIntegrator(0.001)
        self.context = openmm.Context(system, integrator, openmm.Platform.getPlatform(platform), properties)
        self._virtual = np.array([system.isVirtualSite(i) for i in range(system.getNumParticles())], dtype=bool)
        self._parameters: dict[str, float] = {}

    def evaluate(
        self, positions: np.ndarray, parameters: Mapping[str, float], gradients: bool
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Potential energies and, if wanted, their gradients.

        Parameters
        ----------
        positions
            ``(rows, atoms, 3)`` in nm, float64, finite.
        parameters
            Values of global parameters, the same names in every call.
        gradients
            Whether forces are computed at all.

        Returns
        -------
        tuple of array
            ``(rows,)`` in kJ/mol and ``(rows, atoms, 3)`` in kJ/mol/nm (None if not wanted). A row whose energy,
            or gradient where wanted, is not finite has the energy +inf and zero gradient.

        Raises
        ------
        openmm.OpenMMException
            For any trouble but NaN coordinates; the Context should then be thrown away.
        """
        if parameters != self._parameters:
            for name, value in parameters.items():
                self.context.setParameter(name, value)
            self._parameters = dict(parameters)
        # Filled in beforehand with the answer for a bad row: nothing of an earlier row can come through.
        energies = np.full(len(positions), np.inf)
        slopes = np.zeros(positions.shape) if gradients else None
        for row, point in enumerate(positions):
            energy, forces = self._evaluate(point, gradients)
            if not np.isfinite(energy):
                continue
            if slopes is not None:
                if not np.isfinite(forces).all():
                    continue
                np.negative(forces, out=slopes[row])
                slopes[row, self._virtual] = 0.0
            energies[row] = energy
        return energies, slopes

    def _evaluate(self, positions: np.ndarray, gradients: bool) -> tuple[float, np.ndarray | None]:
        try:
            self.context.setPositions(positions)
            if self._virtual.any():
                self.context.computeVirtualSites()
            state = self.context.getState(energy=True, forces=gradients)
        except openmm.OpenMMException as error:
            if "coordinate is NaN" not in str(error):
                raise
            return np.nan, None
        energy = state.getPotentialEnergy().value_in_unit(_KJ)
        return energy, state.getForces(asNumpy=True).value_in_unit(_KJ_PER_NM) if gradients else None


class Pool:
    """Worker processes, each with an `Evaluator` of its own.

    The processes start in the constructor and make their Contexts at the first `evaluate`. They end with `close`,
    when the pool is collected, when this process ends in whatever way, and after any error.

    Parameters
    ----------
    system, platform
        As for `Evaluator`.
    workers
        Number of processes.
    """

    def __init__(self, system: openmm.System, platform: str, workers: int) -> None:
        self._num_atoms: int = system.getNumParticles()
        self._setup = {"system": openmm.XmlSerializer.serialize(system), "platform": platform}
        processes: list[_Process] = []
        self._processes = processes
        # A process forked from this one holds a copy of the pool, and must not end the workers with it.
        self.owner: int = os.getpid()
        self._finalizer = weakref.finalize(self, _end, processes, self.owner)
        try:
            for _ in range(workers):
                processes.append(_Process())
        except BaseException:
            self.close()
            raise

    @property
    def pids(self) -> tuple[int, ...]:
        """Process numbers of the workers."""
        return tuple(process.pid for process in self._processes)

    def evaluate(
        self, positions: np.ndarray, parameters: Mapping[str, float], gradients: bool
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """As `Evaluator.evaluate`, the rows in the order given, whichever worker had them.

        Raises
        ------
        openmm.OpenMMException
            What a worker's OpenMM said.
        RuntimeError
            If a worker failed otherwise or ended. After any exception the pool is closed.
        """
        rows = len(positions)
        energies = np.full(rows, np.inf)
        slopes = np.zeros(positions.shape) if gradients else None
        request = {"gradients": gradients, "parameters": dict(parameters)}
        chunks: queue.SimpleQueue[slice] = queue.SimpleQueue()
        for chunk in self._chunks(rows):
            chunks.put(chunk)
        ended: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

        def feed(process: _Process) -> None:
            try:
                if not process.ready:
                    process.ask(self._setup, np.empty(0))
                    process.ready = True
                with contextlib.suppress(queue.Empty):
                    while True:
                        chunk = chunks.get_nowait()
                        count = chunk.stop - chunk.start
                        reply = process.ask({**request, "rows": count}, positions[chunk])
                        energies[chunk] = reply[:count]
                        if slopes is not None:
                            slopes[chunk] = reply[count:].reshape(count, *positions.shape[1:])
                ended.put(None)
            except BaseException as error:
                ended.put(error)

        # One thread for each worker: it sleeps on the pipe, and wakes at once if the worker ends.
        threads = [threading.Thread(target=feed, args=(process,), daemon=True) for process in self._processes]
        try:
            for thread in threads:
                thread.start()
            for _ in threads:
                error = ended.get()
                if error is not None:
                    raise error
        except BaseException:
            for process in self._processes:
                process.kill()
            for thread in threads:
                if thread.ident is not None:
                    thread.join()
            self.close()
            raise
        return energies, slopes

    def close(self) -> None:
        """End the workers and wait until they are gone."""
        self._finalizer()

    def _chunks(self, rows: int) -> list[slice]:
        size = -(-rows // (_CHUNKS_PER_WORKER * len(self._processes)))
        size = max(1, min(size, _CHUNK_PARTICLES // max(1, self._num_atoms)))
        return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


class _Process:
    """One worker process, seen from its parent."""

    def __init__(self) -> None:
        if not sys.executable:
            raise RuntimeError(
                "Worker processes need a Python interpreter and sys.executable names none; use workers=1."
            )
        paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
        threads = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OPENMM_CPU_THREADS")
        # What the worker complains of goes to a file: nobody has to read it, so it cannot block.
        self._complaints: IO[bytes] = tempfile.TemporaryFile()
        try:
            self._process = subprocess.Popen(
                # -P: the folder of this file must not become a place to import from
                [sys.executable, "-P", os.path.abspath(__file__)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._complaints,
                bufsize=0,
                env={**os.environ, "PYTHONPATH": paths, **dict.fromkeys(threads, "1")},
            )
        except BaseException:
            self._complaints.close()
            raise
        self.pid: int = self._process.pid
        self.ready: bool = False

    def ask(self, header: dict[str, Any], array: np.ndarray) -> np.ndarray:
        """The array the worker answers with; raises its exception."""
        try:
            send(self._process.stdin, header, array)
            answer, values = receive(self._process.stdout)
        except (EOFError, OSError, ValueError):  # ValueError: the pool was closed meanwhile
            raise RuntimeError(self._obituary()) from None
        if "message" not in answer:
            return values
        message = f"{answer['message']} (in worker process {self.pid})"
        if answer["type"] == "OpenMMException":
            raise openmm.OpenMMException(message)
        raise RuntimeError(f"{answer['type']}: {message}")

    def kill(self) -> None:
        with contextlib.suppress(OSError):
            self._process.kill()

    def end(self) -> None:
        """Ask the worker to go, insist after a while, and give back what it held."""
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(_SECONDS_TO_EXIT)
        except subprocess.TimeoutExpired:
            self.kill()
            self._process.wait()
        self._process.stdout.close()
        self._complaints.close()

    def _obituary(self) -> str:
        self.kill()
        status = self._process.wait()
        cause = f"signal {-status}" if status < 0 else f"exit status {status}"
        message = f"Worker process {self.pid} ended ({cause}); the next evaluation starts new workers."
        with contextlib.suppress(OSError, ValueError):
            self._complaints.seek(0)
            last = self._complaints.read().decode(errors="replace").strip()[-1000:]
            message += f" It wrote: {last}" if last else ""
        return message


def _end(processes: list[_Process], owner: int) -> None:
    if os.getpid() != owner:
        return
    for process in processes:
        process.end()
    processes.clear()


# One message: the sizes of its two parts in bytes, a JSON object, numbers in float64.
_SIZES = struct.Struct("=QQ")


def send(stream: IO[bytes], header: dict[str, Any], *arrays: np.ndarray) -> None:
    """Write one message; `arrays` are float64."""
    text = json.dumps(header).encode()
    arrays = tuple(np.ascontiguousarray(array, dtype=np.float64) for array in arrays)
    parts = [_SIZES.pack(len(text), sum(array.nbytes for array in arrays)) + text]
    for part in (*parts, *(array.reshape(-1).view(np.uint8) for array in arrays)):
        rest = memoryview(part)
        while len(rest):
            rest = rest[stream.write(rest) :]


def receive(stream: IO[bytes]) -> tuple[dict[str, Any], np.ndarray]:
    """Read one message; EOFError where the stream ends."""
    text_size, array_size = _SIZES.unpack(_read(stream, _SIZES.size))
    header = json.loads(_read(stream, text_size).decode())
    return header, np.frombuffer(_read(stream, array_size), dtype=np.float64)


def _read(stream: IO[bytes], size: int) -> bytearray:
    data = bytearray(size)
    rest = memoryview(data)
    while len(rest):
        count = stream.readinto(rest)
        if not count:
            raise EOFError
        rest = rest[count:]
    return data


def _end_with_parent(requests: int) -> None:
    """End this process as soon as nobody is left to ask: not after a chunk that nobody will read."""
    if not hasattr(select, "poll"):
        return  # elsewhere the end of the stream is seen after the chunk
    watch = select.poll()
    watch.register(requests, 0)  # hanging up is reported unasked
    while not any(event & (select.POLLHUP | select.POLLERR) for _, event in watch.poll()):
        pass
    os._exit(0)


def main() -> None:
    """The worker: answer requests from standard input until it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends its workers
    requests, replies = os.fdopen(os.dup(0), "rb", 0), os.fdopen(os.dup(1), "wb", 0)
    os.dup2(2, 1)  # whatever is printed must not get between the replies
    threading.Thread(target=_end_with_parent, args=(requests.fileno(),), daemon=True).start()
    evaluator: Evaluator | None = None
    while True:
        try:
            request, array = receive(requests)
        except EOFError:
            return
        try:
            if "system" in request:
                system = openmm.XmlSerializer.deserialize(request["system"])
                evaluator = Evaluator(system, request["platform"])
                shape = (-1, system.getNumParticles(), 3)
                results: tuple[np.ndarray, ...] = ()
            else:
                energies, slopes = evaluator.evaluate(array.reshape(shape), request["parameters"], request["gradients"])
                results = (energies,) if slopes is None else (energies, slopes)
            header = {}
        except Exception as error:
            header, results = {"type": type(error).__name__, "message": str(error)}, ()
        try:
            send(replies, header, *results)
        except OSError:  # the parent is gone
            return


if __name__ == "__main__":
    main()
