"""SiLU perceptrons that take samples as columns, with a gradient written out by hand.

A coupling cuts its vectors in two, permutes them and joins them again. With a sample per column, ``(features, batch)``,
each of these moves whole rows of memory, so that transforms keep their vectors in this layout behind the ``(batch,
dimension)`` that they show. The derivative of every SiLU is found once, in the pass itself, and serves the pushed score
and the gradient alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class ColumnNetwork:
    """What perceptrons on columns have in common; mixed into modules that say how their layers are laid out.

    The input is what a coupling keeps, ``(kept, batch)`` with any number of rows, and a context, ``(features, batch)``
    or None.
    """

    def weights(self) -> list[Tensor]:
        """Weight and bias of every layer, in turn."""
        raise NotImplementedError

    def gather(self, kept: Tensor, context: Tensor | None) -> Tensor:
        """The input of the first layer."""
        raise NotImplementedError

    def spread(self, gradient: Tensor, kept: int, context: bool) -> tuple[Tensor, Tensor | None]:
        """The transpose of :meth:`gather`: gradients of the kept rows and, if asked for, of the context."""
        raise NotImplementedError

    def arrange(self, out: Tensor) -> Tensor:
        """The output of the last layer in the order of :meth:`columns`."""
        return out

    def disarrange(self, gradient: Tensor) -> Tensor:
        """The transpose of :meth:`arrange`."""
        return gradient

    @staticmethod
    def layer(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        raise NotImplementedError

    @staticmethod
    def layer_back(gradient: Tensor, weight: Tensor) -> Tensor:
        """The gradient of a layer's input."""
        raise NotImplementedError

    @staticmethod
    def layer_gradients(gradient: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients of a layer's weight and bias."""
        raise NotImplementedError

    def columns(self, kept: Tensor, context: Tensor | None) -> Tensor:
        """The numbers that the network sets, a sample per column."""
        if torch.is_grad_enabled():
            return self.traced(kept, context)[0]
        return self.plain(kept, context, self.weights())

    def plain(self, kept: Tensor, context: Tensor | None, weights: Sequence[Tensor]) -> Tensor:
        """The same by ordinary operations."""
        x = self.gather(kept, context)
        for weight, bias in _pairs(weights)[:-1]:
            x = functional.silu(self.layer(x, weight, bias))
        return self.arrange(self.layer(x, *weights[-2:]))

    def traced(self, kept: Tensor, context: Tensor | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """As :meth:`columns`, with the derivatives of the hidden units that :meth:`pull` takes."""
        out, *slopes = _Pass.apply(self, kept, context, *self.weights())
        return out, tuple(slopes)

    @torch.no_grad()
    def pull(self, gradient: Tensor, slopes: Sequence[Tensor], kept: int) -> Tensor:
        """Vector-Jacobian product: the gradient of the ``kept`` rows from that of the output, detached."""
        gradient = self.disarrange(gradient)
        weights = self.weights()[0::2]
        for weight, slope in zip(weights[:0:-1], reversed(slopes), strict=True):
            gradient = self.layer_back(gradient, weight) * slope
        return self.first_back(gradient, weights[0], kept, False)[0]

    def first_back(self, gradient: Tensor, weight: Tensor, kept: int, context: bool) -> tuple[Tensor, Tensor | None]:
        """Gradients of the kept rows and the context from those of the first layer's output."""
        return self.spread(self.layer_back(gradient, weight), kept, context)


class _Pass(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, network: ColumnNetwork, kept: Tensor, context: Tensor | None, *weights: Tensor
    ) -> tuple[Tensor, ...]:
        inputs, slopes = [network.gather(kept, context)], []
        for weight, bias in _pairs(weights)[:-1]:
            h = network.layer(inputs[-1], weight, bias)
            sigmoid = torch.sigmoid(h)
            inputs.append(h.mul_(sigmoid))
            # silu' = s + silu (1 - s)
            slopes.append(torch.addcmul(sigmoid, h, 1 - sigmoid))
        ctx.network, ctx.depth = network, len(slopes)
        ctx.save_for_backward(kept, context, *weights, *inputs, *slopes)
        ctx.mark_non_differentiable(*slopes)
        ctx.set_materialize_grads(False)
        return network.arrange(network.layer(inputs[-1], *weights[-2:])), *slopes

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        network, depth = ctx.network, ctx.depth
        kept, context, *rest = ctx.saved_tensors
        count = 2 * (depth + 1)
        weights, inputs, slopes = rest[:count], rest[count : count + depth + 1], rest[count + depth + 1 :]
        if gradient is None:
            return (None,) * (3 + count)
        if torch.is_grad_enabled():
            # someone differentiates this gradient: ordinary operations know how
            needed = [t for t, need in zip((kept, context, *weights), ctx.needs_input_grad[1:], strict=True) if need]
            found = iter(
                torch.autograd.grad(network.plain(kept, context, weights), needed, gradient, create_graph=True)
            )
            return None, *(next(found) if need else None for need in ctx.needs_input_grad[1:])
        gradients: list[Tensor] = []
        gradient = network.disarrange(gradient)
        for k in range(depth, 0, -1):
            gradients[:0] = network.layer_gradients(gradient, inputs[k])
            gradient = network.layer_back(gradient, weights[2 * k]).mul_(slopes[k - 1])
        gradients[:0] = network.layer_gradients(gradient, inputs[0])
        by_kept, by_context = None, None
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            by_kept, by_context = network.first_back(gradient, weights[0], len(kept), ctx.needs_input_grad[2])
        return None, by_kept if ctx.needs_input_grad[1] else None, by_context, *gradients


class Batched(ColumnNetwork):
    """Layers of several networks at once: weights ``(networks, in, out)``, biases ``(networks, 1, out)``."""

    @staticmethod
    def layer(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.baddbmm(bias.mT, weight.mT, x)

    @staticmethod
    def layer_back(gradient: Tensor, weight: Tensor) -> Tensor:
        return weight @ gradient

    @staticmethod
    def layer_gradients(gradient: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return x @ gradient.mT, gradient.sum(-1)[:, None]


class Selection(nn.Module):
    """Rows of a matrix by their index, and the transpose of that, which adds rows up in a fixed order.

    Parameters
    ----------
    index : sequence of int
        What is beyond ``rows`` is selected but has no transpose; -1 selects anything and has none either.
    rows : int
    """

    def __init__(self, index: Sequence[int], rows: int):
        super().__init__()
        uses: list[list[int]] = [[] for _ in range(rows)]
        for place, row in enumerate(index):
            if 0 <= row < rows:
                uses[row].append(place)
        self.most = max(1, *map(len, uses)) if rows else 1
        # one row of zeros for what is used less often than the others
        uses = [u + [len(index)] * (self.most - len(u)) for u in uses]
        self.register_buffer("index", torch.tensor(index, dtype=torch.long).clamp(min=0), persistent=False)
        self.register_buffer("uses", torch.tensor(uses, dtype=torch.long).view(rows, self.most), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """``(rows, batch)`` to ``(selected, batch)``."""
        return x.index_select(0, self.index)

    def back(self, gradient: Tensor, first: int | None = None) -> Tensor:
        """``(selected, batch)`` to ``(rows, batch)``, or to the first of them alone."""
        uses = self.uses[:first]
        padded = torch.cat([gradient, gradient.new_zeros(1, gradient.shape[1])])
        return padded.index_select(0, uses.flatten()).view(*uses.shape, gradient.shape[1]).sum(1)


def _pairs(weights: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    return list(zip(weights[0::2], weights[1::2], strict=True))
