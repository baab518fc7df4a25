"""Finished parts stay on disk, so that an interrupted run goes on where it was."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from _rehman_friesecke.tables import Row
from openmm_bg.sampling.archive import load_arrays, save_arrays

Result = tuple[list[Row], np.ndarray]


def once(folder: Path, name: str, settings: dict[str, Any], make: Callable[[], Result]) -> Result:
    """What ``make()`` returns, or what it returned for the same settings before.

    Parameters
    ----------
    folder, name
        The file is ``folder/parts/name.npz``.
    settings : dict
        All that decides the result; JSON.
    make : callable
        Returns rows of numbers and an array.
    """
    path = folder / "parts" / f"{name}.npz"
    path.parent.mkdir(exist_ok=True)
    settings = json.loads(json.dumps(settings))
    if path.exists():
        header, arrays = load_arrays(path, ("array",))
        if header["settings"] == settings:
            return header["rows"], arrays["array"]
    rows, array = make()
    save_arrays(path, {"settings": settings, "rows": rows}, array=array)
    return rows, array


def digest(array: np.ndarray) -> str:
    """What stands for an array among settings."""
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
