"""The files a sampler writes. They are opened for one iteration at a time, and can be cut back to a checkpoint."""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

import openmm
from openmm import app, unit

from openmm_bg.errors import InputError
from openmm_bg.sampling.metropolis import Attempt


def refuse_existing(*paths: str | os.PathLike[str] | None) -> None:
    """An InputError if one of the files exists and is not empty; nothing is touched."""
    for path in paths:
        if path is not None and Path(path).exists() and Path(path).stat().st_size > 0:
            raise InputError(
                f"The file {path} exists and is not empty; pass resume=True to continue it, or choose another name."
            )


def cut_back(path: str | os.PathLike[str], length: int) -> None:
    """Drop what was written to a file after a checkpoint that recorded its length in bytes."""
    size = Path(path).stat().st_size if Path(path).exists() else 0
    if size < length:
        raise InputError(
            f"The checkpoint was written when {path} had {length} bytes, but it has {size} now; restore the file that "
            "belongs to the checkpoint."
        )
    os.truncate(path, length)


class AttemptLog:
    """One line per attempted move, comma-separated under a quoted header, numbers in full precision.

    A log of nothing but independent attempts is a table of numbers. Others have three more columns at the end: the kind
    of move and how many proposals it tried and accepted, which is more than one on the cheap energy of two stages.

    Parameters
    ----------
    file : path or text file
        A path is written anew; an open file is written to as it is, and never closed.
    length : int, optional
        Continue a file that had this many bytes when the checkpoint was written.
    header : bool
        Whether a file that is not continued begins with a header.
    kinds : bool
        Write the three columns.
    """

    HEADER = (
        '"Step","Iteration","Accepted","Refused","Potential Energy (kJ/mole)","Proposed Potential Energy (kJ/mole)",'
        '"Log Probability","Proposed Log Probability","Log Acceptance"'
    )
    KINDS = ',"Move","Tried","Moved"'

    def __init__(
        self,
        file: str | os.PathLike[str] | TextIO,
        length: int | None = None,
        header: bool = True,
        kinds: bool = False,
    ):
        self._kinds = kinds
        self._file = Path(file) if isinstance(file, (str, os.PathLike)) else file
        if isinstance(self._file, Path) and length is not None:
            cut_back(self._file, length)
        elif header:
            self._append(self.HEADER + (self.KINDS if kinds else "") + "\n")

    @property
    def length(self) -> int | None:
        """Bytes written so far; None for an open file."""
        return self._file.stat().st_size if isinstance(self._file, Path) else None

    def write(self, iteration: int, attempts: Sequence[Attempt]) -> None:
        """Append the attempts of one iteration."""
        rows = (
            f"{a.step},{iteration},{int(a.accepted)},{int(a.refused)},"
            + ",".join(repr(float(v)) for v in a[3:8])
            + (f",{a.kind},{a.tried},{a.moved}" if self._kinds else "")
            for a in attempts
        )
        self._append("".join(row + "\n" for row in rows))

    def _append(self, text: str) -> None:
        if isinstance(self._file, Path):
            with open(self._file, "a", encoding="ascii", newline="\n") as file:
                file.write(text)
        else:
            self._file.write(text)


class IterationTrajectory:
    """A DCD file with one frame per iteration, written after the moves.

    Parameters
    ----------
    path : path
    topology : openmm.app.Topology
    time_step : float
        ps.
    interval : int
        Time steps between frames.
    first_step : int
        Step of the first frame.
    length, frames : int, optional
        Continue a file that had this many bytes and frames when the checkpoint was written.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        topology: app.Topology,
        time_step: float,
        interval: int,
        first_step: int,
        length: int | None = None,
        frames: int = 0,
    ):
        self._path = Path(path)
        self._arguments = (topology, time_step, first_step, interval)
        self.first_step = first_step
        self.frames = frames
        if length is None:
            with open(self._path, "wb") as file:
                app.DCDFile(file, *self._arguments)
        else:
            cut_back(self._path, length)
            # A DCD header counts the frames and knows the last step.
            with open(self._path, "r+b") as file:
                file.seek(8)
                file.write(struct.pack("<i", frames))
                file.seek(20)
                file.write(struct.pack("<i", first_step + (frames - 1) * interval if frames else 0))

    @property
    def length(self) -> int:
        """Bytes written so far."""
        return self._path.stat().st_size

    def write(self, state: openmm.State) -> None:
        """Append the positions of a State, unwrapped."""
        positions = state.getPositions(asNumpy=True).value_in_unit(unit.nanometer)
        with open(self._path, "r+b") as file:
            app.DCDFile(file, *self._arguments, append=True).writeModel(
                positions, periodicBoxVectors=state.getPeriodicBoxVectors()
            )
        self.frames += 1

    @property
    def mark(self) -> tuple[int, int, int]:
        """Frames, bytes and first step: what a checkpoint keeps."""
        return self.frames, self.length, self.first_step


class WeightedTrajectory:
    """Every conformation that an attempt ended in, once, with the number of consecutive attempts that did.

    Weighted so, the frames are a sample of the ensemble that has more of it than one frame per iteration: with a good
    generator almost every accepted proposal is independent of the one before.

    Parameters
    ----------
    frames : IterationTrajectory
        Where they are written; its steps and their interval do not apply.
    weights : path
        One line per frame: step and weight, comma-separated under a quoted header.
    length : int, optional
        Continue a file of weights that had this many bytes when the checkpoint was written.
    """

    def __init__(self, frames: IterationTrajectory, weights: str | os.PathLike[str], length: int | None = None):
        self.frames = frames
        self._weights = Path(weights)
        self._visited: list[tuple[openmm.State, int]] = []
        if length is None:
            self._weights.write_text('"Step","Weight"\n', encoding="ascii")
        else:
            cut_back(self._weights, length)

    @property
    def mark(self) -> tuple[int, int, int, int]:
        """That of the frames, and bytes of the weights: what a checkpoint keeps."""
        return *self.frames.mark, self._weights.stat().st_size

    def begin(self) -> None:
        """Forget what a series that was interrupted has left."""
        self._visited.clear()

    def visit(self, context: openmm.Context, moved: bool) -> None:
        """Count the conformation of a Context after an attempt, and whether it is a new one."""
        if moved or not self._visited:
            self._visited.append((context.getState(positions=True), 0))
        state, weight = self._visited.pop()
        self._visited.append((state, weight + 1))

    def write(self, step: int) -> None:
        """Append what was visited in one series of attempts."""
        with open(self._weights, "a", encoding="ascii", newline="\n") as file:
            for state, weight in self._visited:
                self.frames.write(state)
                file.write(f"{step},{weight}\n")
