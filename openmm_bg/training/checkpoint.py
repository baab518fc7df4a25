"""The file that a training goes on from: tensors by their part, and a header of numbers."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from openmm_bg.errors import InputError
from openmm_bg.files import write_atomically

Parts = dict[str, dict[str, Tensor]]


def write_checkpoint(path: Path, header: dict[str, Any], parts: Parts) -> None:
    """Replace the file at once; ``header`` holds its run's ``identity`` and is JSON, no part's name has a dot."""
    tensors = {f"{part}.{name}": t for part, named in parts.items() for name, t in named.items()}
    tensors = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    write_atomically(path, save(tensors, {"training": json.dumps(header)}))


def read_checkpoint(path: Path, identity: dict[str, Any]) -> tuple[dict[str, Any], Parts]:
    """Header and parts, where a part without tensors is empty.

    Raises
    ------
    InputError
        For a file that is broken or belongs to a run of another identity.
    """
    parts: Parts = defaultdict(dict)
    with whole(path), safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["training"])
        for name in file.keys():
            part, _, rest = name.partition(".")
            parts[part][rest] = file.get_tensor(name)
        theirs = header["identity"]
    other = [name for name, value in identity.items() if theirs.get(name) != value]
    if other or len(theirs) != len(identity):
        raise InputError(
            f"{path} belongs to a run with other {' and '.join(other or theirs)}; resume with the same, or delete it "
            "to start anew."
        )
    return header, parts


@contextmanager
def whole(path: Path) -> Iterator[None]:
    """Refuse a checkpoint in one sentence where reading it fails."""
    try:
        yield
    except InputError:
        raise
    except (SafetensorError, LookupError, AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{path} is not a whole checkpoint of this training; delete it to start anew.") from error
