"""Arrays and a JSON header in one `.npz` file: no pickle in it, and never half a file on disk."""

from __future__ import annotations

import io
import json
import os
import zipfile
from typing import Any

import numpy as np

from openmm_bg.errors import InputError
from openmm_bg.files import write_atomically

__all__ = ["load_arrays", "save_arrays"]


def save_arrays(path: str | os.PathLike[str], header: dict[str, Any], **arrays: np.ndarray) -> None:
    """Write arrays and a JSON header to `path` as `.npz`; a reader sees the old file or the new, never half."""
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, header=np.array(json.dumps(header)), **arrays)
    write_atomically(path, buffer.getvalue())


def load_arrays(path: str | os.PathLike[str], names: tuple[str, ...]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Read the header and the named arrays of a file of `save_arrays`."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return json.loads(file["header"].item()), {name: file[name] for name in names}
    except FileNotFoundError:
        raise InputError(f"There is no file {path}.") from None
    except (ValueError, KeyError, OSError, AttributeError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} is not a file of this kind, or it is damaged: {error}.") from None
