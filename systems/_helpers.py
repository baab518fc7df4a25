"""What the analytic targets share: checks of their parameters and random numbers."""

from __future__ import annotations

import math
import numbers

import torch
from torch import Tensor

from openmm_bg.errors import InputError


def positive(name: str, value: object) -> float:
    """`value` as a float, refused unless positive and finite."""
    if isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value) and value > 0:
        return float(value)
    raise InputError(f"{name} must be a positive finite number, not {value}.")


def whole(name: str, value: object, least: int) -> int:
    """`value` as an int, refused unless a whole number of at least `least`."""
    if isinstance(value, numbers.Integral) and not isinstance(value, bool) and value >= least:
        return int(value)
    raise InputError(f"{name} must be a whole number of at least {least}, not {value}.")


def normal(*shape: int, generator: torch.Generator) -> Tensor:
    """Standard normal numbers in float64."""
    return torch.randn(*shape, dtype=torch.float64, generator=generator, device=generator.device)


def uniform(*shape: int, generator: torch.Generator) -> Tensor:
    """Numbers uniform in [0, 1), in float64."""
    return torch.rand(*shape, dtype=torch.float64, generator=generator, device=generator.device)
