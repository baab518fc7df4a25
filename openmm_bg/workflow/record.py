"""What the folder of a run remembers: run.json, written, read and checked, and the lock that keeps others out."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import platform
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import openmm
import torch

from openmm_bg.errors import InputError
from openmm_bg.files import write_atomically
from openmm_bg.systems import Molecule
from openmm_bg.version import __version__
from openmm_bg.workflow.settings import RunSettings
from openmm_bg.workflow.source import canonical

STEPS = ("prepare", "simulate", "train", "sample", "compare", "report")
LOCK = ".lock"
_KINDS = {
    "source": str, "name": str, "description": str, "forcefield": list, "temperature": (int, float), "atoms": int,
    "settings": dict, "command": str, "versions": dict, "begun": list, "steps": dict,
}  # fmt: skip


def new_record(source: str, molecule: Molecule, settings: RunSettings, command: str) -> dict[str, Any]:
    """The record of a run that has done nothing yet."""
    return {
        "openmm_bg": __version__,
        "source": canonical(source),
        "name": molecule.name,
        "description": molecule.description,
        "forcefield": list(molecule.forcefield),
        "temperature": molecule.temperature,
        "atoms": molecule.num_atoms,
        "settings": dataclasses.asdict(settings),
        "command": command,
        "versions": versions(),
        "begun": [],
        "steps": {},
    }


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Write run.json, replacing it in one step."""
    write_atomically(folder / "run.json", json.dumps(record, indent=2).encode())


def read_record(folder: Path) -> dict[str, Any]:
    """The record that a folder holds.

    Raises
    ------
    InputError
        Where there is none, or it is damaged or of another version's settings.
    """
    path = folder / "run.json"
    try:
        record = json.loads(path.read_text())
        missing = [name for name, kind in _KINDS.items() if not isinstance(record[name], kind)]
        if missing or not set(record["steps"]) <= set(STEPS):
            raise TypeError(f"{', '.join(missing) or 'steps'} is not what it should be")
        if {field.name for field in dataclasses.fields(RunSettings)} - record["settings"].keys():
            raise TypeError("its settings are not those of this version; begin another run")
        RunSettings(**record["settings"])
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{folder} holds no run; begin one with `openmm-bg run`.") from None
    except KeyError as error:
        raise InputError(f"{path} is damaged: {error} is missing.") from None
    except (ValueError, TypeError) as error:
        reason = str(error).rstrip(".")
        raise InputError(f"{path} is not the record of a run, or it is damaged: {reason}.") from None
    return record


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep a second process out of the folder."""
    with (folder / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(f"{folder} is in use by another run; wait for it, or choose another folder.") from None
        yield


def versions() -> dict[str, str]:
    """What a reader needs to know to repeat a run."""
    return {
        "openmm_bg": __version__,
        "openmm": openmm.Platform.getOpenMMVersion(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "mdtraj": metadata.version("mdtraj"),
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }
