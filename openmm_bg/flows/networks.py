"""The small networks that set the parameters of the transforms."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Constant(nn.Module):
    """A network of no inputs: the same learnable numbers for every row, zero at initialisation."""

    def __init__(self, outputs: int):
        super().__init__()
        self.values = nn.Parameter(torch.zeros(outputs))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.values.expand(len(inputs), -1)


def perceptron(inputs: int, hidden: Sequence[int], outputs: int) -> nn.Module:
    """A SiLU perceptron whose last layer starts at zero, so that a transform starts as the identity."""
    if inputs == 0:
        return Constant(outputs)
    sizes = [inputs, *hidden]
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(sizes):
        layers += [nn.Linear(before, after), nn.SiLU()]
    last = nn.Linear(sizes[-1], outputs)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(*layers, last)


def fourier_features(angles: Tensor, order: int) -> Tensor:
    """cos and sin of 1..order times each angle: ``(batch, d)`` to ``(batch, 2 * order * d)``, grouped by angle."""
    multiples = angles[..., None] * torch.arange(1, order + 1, dtype=angles.dtype, device=angles.device)
    return torch.cat([multiples.cos(), multiples.sin()], -1).flatten(-2)


class PerceptronStack(nn.Module):
    """One perceptron per output row, evaluated together; row ``i`` sees only the inputs that ``visible[i]`` marks.

    Parameters
    ----------
    visible : Tensor of bool, (rows, inputs)
    hidden, outputs : int
        Two hidden layers of ``hidden`` units; ``outputs`` numbers per row, zero at initialisation.
    """

    def __init__(self, visible: Tensor, hidden: int, outputs: int):
        super().__init__()
        rows, inputs = visible.shape
        self.register_buffer("visible", visible[..., None].to(torch.get_default_dtype()), persistent=False)
        fan_in = visible.sum(-1).clamp(min=1)[:, None, None]
        self.weight1 = nn.Parameter(torch.randn(rows, inputs, hidden) / fan_in.sqrt())
        self.bias1 = nn.Parameter(torch.randn(rows, 1, hidden) * 0.1)
        self.weight2 = nn.Parameter(torch.randn(rows, hidden, hidden) / hidden**0.5)
        self.bias2 = nn.Parameter(torch.zeros(rows, 1, hidden))
        self.weight3 = nn.Parameter(torch.zeros(rows, hidden, outputs))
        self.bias3 = nn.Parameter(torch.zeros(rows, 1, outputs))

    def forward(self, inputs: Tensor, row: int | None = None) -> Tensor:
        """``(batch, inputs)`` to ``(batch, rows, outputs)``, or to ``(batch, outputs)`` of a single row."""
        if row is not None:
            h = nn.functional.silu(inputs @ (self.weight1[row] * self.visible[row]) + self.bias1[row])
            h = nn.functional.silu(h @ self.weight2[row] + self.bias2[row])
            return h @ self.weight3[row] + self.bias3[row]
        h = nn.functional.silu(inputs @ (self.weight1 * self.visible) + self.bias1)
        h = nn.functional.silu(h @ self.weight2 + self.bias2)
        return (h @ self.weight3 + self.bias3).transpose(0, 1)
