"""The small networks that set the parameters of the transforms."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from openmm_bg.flows.columns import Batched, ColumnNetwork


class Constant(nn.Module):
    """A network of no inputs: the same learnable numbers for every row, zero at initialisation."""

    def __init__(self, outputs: int):
        super().__init__()
        self.values = nn.Parameter(torch.zeros(outputs))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.values.expand(len(inputs), -1)

    def traced(self, kept: Tensor, context: Tensor | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        return self.columns(kept, context), ()

    def columns(self, kept: Tensor, context: Tensor | None) -> Tensor:
        return self.values[:, None].expand(-1, kept.shape[1])


class Perceptron(ColumnNetwork, nn.Sequential):
    """A SiLU perceptron: ``forward`` takes samples as rows, ``columns`` as columns."""

    def weights(self) -> list[Tensor]:
        return [p for layer in self if isinstance(layer, nn.Linear) for p in (layer.weight, layer.bias)]

    def gather(self, kept: Tensor, context: Tensor | None) -> Tensor:
        if context is None:
            return kept
        return torch.cat([kept, context]) if len(kept) else context

    @staticmethod
    def layer(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.addmm(bias[:, None], weight, x)

    @staticmethod
    def layer_back(gradient: Tensor, weight: Tensor) -> Tensor:
        return weight.T @ gradient

    @staticmethod
    def layer_gradients(gradient: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return gradient @ x.T, gradient.sum(1)

    def first_back(self, gradient: Tensor, weight: Tensor, kept: int, context: bool) -> tuple[Tensor, Tensor | None]:
        # a context without gradient, most of the input, is spared
        by_context = self.layer_back(gradient, weight[:, kept:]) if context else None
        return self.layer_back(gradient, weight[:, :kept]), by_context


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
    return Perceptron(*layers, last)


def fourier_features(angles: Tensor, order: int) -> Tensor:
    """cos and sin of 1..order times each angle: ``(batch, d)`` to ``(batch, 2 * order * d)``, grouped by angle."""
    multiples = angles[..., None] * torch.arange(1, order + 1, dtype=angles.dtype, device=angles.device)
    return torch.cat([multiples.cos(), multiples.sin()], -1).flatten(-2)


class PerceptronStack(Batched, nn.Module):
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
