"""Statistics of the marked entries of a vector, with shapes that do not depend on the data.

Boolean indexing would make the host wait for the device, and could not be recorded in a CUDA graph.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of ``x[mask]``, ``(n,)`` to a scalar; NaN where nothing is marked."""
    return torch.where(mask, x, 0.0).sum() / mask.sum()


def masked_std(x: Tensor, mask: Tensor) -> Tensor:
    """Standard deviation of ``x[mask]`` with n - 1; NaN where fewer than two are marked."""
    n = mask.sum()
    deviation = torch.where(mask, x - masked_mean(x, mask), 0.0)
    return torch.where(n > 1, (deviation.square().sum() / (n - 1)).sqrt(), math.nan)


def masked_median(x: Tensor, mask: Tensor) -> Tensor:
    """The lower median of ``x[mask]``, as torch defines it; NaN where nothing is marked."""
    ordered = torch.where(mask, x, math.inf).sort().values
    middle = torch.div(mask.sum() - 1, 2, rounding_mode="floor").clamp(min=0)
    return torch.where(mask.any(), ordered.gather(0, middle[None])[0], math.nan)
