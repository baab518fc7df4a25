"""The small networks that set the parameters of the transforms."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from openmm_bg.flows.columns import Batched, ColumnNetwork, Selection


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
    """cos and sin of 1..order times each angle: ``(d, batch)`` to ``(2 * order * d, batch)``, grouped by angle."""
    multiples = angles[:, None] * torch.arange(1, order + 1, dtype=angles.dtype, device=angles.device)[:, None]
    return torch.cat([multiples.cos(), multiples.sin()], 1).flatten(0, 1)


class PerceptronStack(Batched, nn.Module):
    """One perceptron of two hidden layers per row, evaluated together; row ``i`` sees the inputs that ``visible[i]``
    marks.

    Parameters
    ----------
    visible : Tensor of bool, (rows, inputs)
    hidden, outputs : int
        Units of each hidden layer; numbers per row, zero at initialisation.
    packed : bool
        The first layer holds as many weights per row as the row with most inputs needs, not one for every input.

    Examples
    --------
    >>> stack = PerceptronStack(torch.eye(3).bool(), hidden=8, outputs=2, packed=True)
    >>> stack.weight1.shape, stack.columns(torch.zeros(3, 5), None).shape
    (torch.Size([3, 1, 8]), torch.Size([3, 2, 5]))
    """

    def __init__(self, visible: Tensor, hidden: int, outputs: int, *, packed: bool = False):
        super().__init__()
        rows, inputs = visible.shape
        fan_in = visible.sum(-1).clamp(min=1)[:, None, None]
        self.packed, self.select = packed, None
        if packed:
            seen = [row.nonzero()[:, 0].tolist() for row in visible]
            wide = max(1, *map(len, seen))
            # what a row lacks is filled up with an input that it gives no weight
            self.select = Selection([i for s in seen for i in s + [-1] * (wide - len(s))], inputs)
            visible = torch.tensor([[k < len(s) for k in range(wide)] for s in seen])
        wide = visible.shape[1]
        self.register_buffer("visible", visible[..., None].to(torch.get_default_dtype()), persistent=False)
        self.weight1 = nn.Parameter(torch.randn(rows, wide, hidden) / fan_in.sqrt())
        self.bias1 = nn.Parameter(torch.randn(rows, 1, hidden) * 0.1)
        self.weight2 = nn.Parameter(torch.randn(rows, hidden, hidden) / hidden**0.5)
        self.bias2 = nn.Parameter(torch.zeros(rows, 1, hidden))
        self.weight3 = nn.Parameter(torch.zeros(rows, hidden, outputs))
        self.bias3 = nn.Parameter(torch.zeros(rows, 1, outputs))

    def weights(self) -> list[Tensor]:
        return [self.weight1 * self.visible, self.bias1, self.weight2, self.bias2, self.weight3, self.bias3]

    def gather(self, kept: Tensor, context: Tensor | None) -> Tensor:
        rows, wide, _ = self.weight1.shape
        if self.select is None:
            return kept.expand(rows, -1, -1)
        return self.select(kept).view(rows, wide, -1)

    def spread(self, gradient: Tensor, kept: int, context: bool) -> tuple[Tensor, None]:
        return gradient.sum(0) if self.select is None else self.select.back(gradient.flatten(0, 1)), None

    def some(self, inputs: Tensor, first: int, last: int) -> Tensor:
        """The rows from ``first`` to before ``last`` alone, ``(last - first, outputs, batch)``.

        Where the stack is not packed ``inputs`` may end with the last that they see.
        """
        rows = slice(first, last)
        if self.select is None:
            weight = self.weight1[rows, : len(inputs)] * self.visible[rows, : len(inputs)]
            x = inputs.expand(last - first, -1, -1)
        else:
            wide = self.weight1.shape[1]
            weight = self.weight1[rows] * self.visible[rows]
            x = inputs.index_select(0, self.select.index[first * wide : last * wide]).view(last - first, wide, -1)
        h = nn.functional.silu(self.layer(x, weight, self.bias1[rows]))
        h = nn.functional.silu(self.layer(h, self.weight2[rows], self.bias2[rows]))
        return self.layer(h, self.weight3[rows], self.bias3[rows])
