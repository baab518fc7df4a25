"""Trajectories, topologies and weights from files, or one clear sentence why not."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from openmm_bg.errors import InputError

_ARRAYS = (".npz", ".npy")
_UNREADABLE = (
    OSError, ValueError, IndexError, KeyError, TypeError, RuntimeError, AttributeError, AssertionError, EOFError,
    StopIteration, ImportError, zipfile.BadZipFile,
)  # fmt: skip


def read_topology(path: str | os.PathLike[str]) -> Any:
    """The topology in a file: PDB, PDBx/mmCIF, prmtop, psf, gro, mol2 or h5.

    Raises
    ------
    InputError
        Where there is no such file, or mdtraj finds no topology in it.
    """
    import mdtraj

    _exists(path)
    try:
        return mdtraj.load_topology(str(path))
    except _UNREADABLE as error:
        raise InputError(f"{path} could not be read as a topology: {_reason(error)}.") from None


def read_trajectory(
    path: str | os.PathLike[str], topology: Any, *, atoms: ArrayLike | None = None
) -> NDArray[np.float32]:
    """Positions in nm, (frames, atoms, 3), of any trajectory that mdtraj reads.

    Molecules that a periodic box has cut are made whole. Positions may also be an array in nm: a ``.npy`` file, or the
    ``positions`` of a ``.npz`` file such as a run's.

    Parameters
    ----------
    path : path
    topology : mdtraj.Topology
    atoms : sequence of int, optional
        Keep these alone.

    Raises
    ------
    InputError
        Where there is no such file, it is of a kind that is not known, damaged, empty or of another number of atoms.
    """
    import mdtraj

    _exists(path)
    keep = None if atoms is None else np.asarray(atoms, dtype=np.intp)
    name = os.fspath(path).lower()
    if name.endswith(_ARRAYS):
        x = _array(path, ("positions",))
        if x.ndim != 3 or x.shape[1:] != (topology.n_atoms, 3) or x.dtype.kind not in "fiu":
            raise InputError(
                f"{path} holds an array of shape {x.shape}; for this topology give (frames, {topology.n_atoms}, 3)."
            )
        x = x if keep is None else x[:, keep]
    else:
        known = [ending for ending in mdtraj.FormatRegistry.loaders if name.endswith(ending)]
        if not known:
            raise InputError(
                f"{path} is of a kind that mdtraj does not read; give a trajectory such as .dcd, .xtc, .trr, .nc, .h5 "
                "or .pdb, or positions in nm as .npy or .npz."
            )
        own = known[0] in (".pdb", ".pdb.gz", ".h5", ".hdf5", ".lh5", ".gsd")
        try:
            with _hushed():
                if own:
                    trajectory = mdtraj.load(str(path), atom_indices=keep)
                else:
                    trajectory = mdtraj.load(str(path), top=topology, atom_indices=keep)
        except _UNREADABLE as error:
            raise InputError(
                f"{path} could not be read as frames of {topology.n_atoms} atoms: {_reason(error)}."
            ) from None
        expected = topology.n_atoms if keep is None else len(keep)
        if trajectory.n_atoms != expected:
            raise InputError(
                f"{path} has {trajectory.n_atoms} atoms and the topology {expected}; give those of one molecule."
            )
        if trajectory.unitcell_lengths is not None and trajectory.topology.n_bonds:
            trajectory.make_molecules_whole(inplace=True)
        x = trajectory.xyz
    if not len(x):
        raise InputError(f"{path} holds no frames.")
    return np.asarray(x, dtype=np.float32)


def read_weights(path: str | os.PathLike[str], frames: int, *, logarithms: bool = False) -> NDArray[np.float64]:
    """One weight for each frame, from ``.npy``, ``.npz`` or text; from their logarithms, scaled to a largest one of 1.

    A ``.npz`` file holds ``log_weights`` or ``weights``, or is the ``samples.npz`` of a run, whose log weights are
    -reduced_energy - log_prob; or it holds one array.

    Raises
    ------
    InputError
        Where there is no such file, no numbers in it, or not one for each frame.
    """
    _exists(path)
    name = os.fspath(path).lower()
    if name.endswith(_ARRAYS):
        w = _array(path, ("log_weights",) if logarithms else ("weights",))
    else:
        try:
            w = np.loadtxt(path, ndmin=1)
        except _UNREADABLE as error:
            raise InputError(f"{path} could not be read as a column of numbers: {_reason(error)}.") from None
    if w.shape != (frames,) or w.dtype.kind not in "fiu":
        raise InputError(f"{path} holds {w.shape} numbers, but there are {frames} frames; give one weight for each.")
    w = w.astype(np.float64)
    if not logarithms:
        return w
    if np.isnan(w).any() or np.isposinf(w).any():
        raise InputError(f"{path} holds log weights that are NaN or +inf; find the faulty energies first.")
    if np.isneginf(w).all():
        raise InputError(f"All weights in {path} are zero, so there is nothing to compare.")
    return np.exp(w - w.max())


def read_arrays(path: str | os.PathLike[str], names: tuple[str, ...]) -> tuple[NDArray[Any], ...]:
    """Named arrays of a ``.npz`` file."""
    _exists(path)
    try:
        with np.load(path, allow_pickle=False) as file:
            return tuple(file[name] for name in names)
    except _UNREADABLE as error:
        raise InputError(f"{path} does not hold the arrays {' and '.join(names)}: {_reason(error)}.") from None


def _array(path: str | os.PathLike[str], names: tuple[str, ...]) -> NDArray[Any]:
    """The array of a .npy file; of a .npz file the one of these names, or the only one."""
    try:
        file = np.load(path, allow_pickle=False)
        if isinstance(file, np.ndarray):
            return file
        with file:
            for name in names:
                if name in file.files:
                    return file[name]
            if "log_weights" in names and {"reduced_energy", "log_prob"} <= set(file.files):
                return -file["reduced_energy"] - file["log_prob"]
            if len(file.files) == 1:
                return file[file.files[0]]
    except _UNREADABLE as error:
        raise InputError(f"{path} could not be read: {_reason(error)}.") from None
    raise InputError(f"{path} holds no array named {' or '.join(names)}.")


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
    """The reader of DCD files, which is C, tells stdout what it found; nobody asked, least of all for JSON."""
    sys.stdout.flush()
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        with contextlib.suppress(OSError, AttributeError, TypeError):
            ctypes.CDLL(None).fflush(None)  # C buffers what does not go to a terminal
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def _exists(path: str | os.PathLike[str]) -> None:
    if not Path(path).is_file():
        raise InputError(f"There is no file {path}.")


def _reason(error: BaseException) -> str:
    """The first sentence of an error, without the full stop."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text.split(". ")[0].rstrip(".").strip("'")[:200]
