"""Where tensors live."""

from __future__ import annotations

import torch

from openmm_bg.errors import InputError


def find_device(name: str) -> torch.device:
    """The device of a name, "cpu" or "cuda" with or without a number.

    Raises
    ------
    InputError
        If it is not one of those, or not there.
    """
    try:
        device = torch.device(name)
        if device.type in ("cpu", "cuda"):
            torch.empty(0, device=device)
            return device
    except (RuntimeError, AssertionError):
        pass
    raise InputError(f"There is no device {name!r} here; where torch finds no GPU, use 'cpu'.")
