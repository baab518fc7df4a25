"""An expression as a torch function whose derivatives, of any order, are expressions too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from openmm_bg.energies import expression
from openmm_bg.energies.expression import Node


def value(node: Node, inner: Mapping[str, Tensor], outer: Mapping[str, Tensor]) -> Tensor:
    """The expression, differentiable in its `inner` variables as often as wanted.

    Autograd would go through both branches of a `select` and multiply the infinities of the branch not taken by
    zero; derivatives taken symbolically never meet them.

    Parameters
    ----------
    node
        The expression.
    inner
        The variables to differentiate, tensors of one common shape.
    outer
        Everything else: tensors that broadcast to that shape and need no gradient.

    Examples
    --------
    >>> x = torch.tensor([0.0, 2.0], dtype=torch.float64, requires_grad=True)
    >>> f = expression.variable("x") ** 3
    >>> value(f, {"x": x}, {}).sum().backward()
    >>> x.grad
    tensor([ 0., 12.], dtype=torch.float64)
    """
    names = tuple(inner)
    return _Value.apply(node, names, dict(outer), *inner.values())


class _Value(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, node: Node, names: Sequence[str], outer: dict[str, Tensor], *inner: Tensor) -> Tensor:
        ctx.save_for_backward(*inner)
        ctx.node, ctx.names, ctx.outer = node, names, outer
        values = {**outer, **dict(zip(names, inner, strict=True))}
        (result,) = expression.evaluate([node], values, inner[0])
        return result.expand_as(inner[0]).clone() if result.shape != inner[0].shape else result.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
        inner = dict(zip(ctx.names, ctx.saved_tensors, strict=True))
        gradients: list[Tensor | None] = []
        for name, needed in zip(ctx.names, ctx.needs_input_grad[3:], strict=True):
            slope = expression.derivative(ctx.node, name)
            if not needed or expression.is_number(slope, 0):
                gradients.append(None)
            elif not torch.is_grad_enabled():
                (factor,) = expression.evaluate([slope], {**ctx.outer, **inner}, upstream)
                gradients.append(upstream * factor)
            else:
                gradients.append(upstream * value(slope, inner, ctx.outer))
        return None, None, None, *gradients
