"""An autograd function from a value and a gradient that are computed elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class _KnownGradient(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, u: Tensor, gradient: Tensor, differentiable: Callable[[Tensor], Tensor] | None
    ) -> Tensor:
        ctx.save_for_backward(x, gradient)
        ctx.differentiable = differentiable
        return u.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:
        x, gradient = ctx.saved_tensors
        return _FirstDerivative.apply(x, upstream, gradient, ctx.differentiable), None, None, None


class _FirstDerivative(torch.autograd.Function):
    """Keeps the gradient attached to x, so that a derivative of it never comes out as zero."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, upstream: Tensor, gradient: Tensor, differentiable: Callable[[Tensor], Tensor] | None
    ) -> Tensor:
        ctx.save_for_backward(x, upstream)
        ctx.differentiable = differentiable
        return upstream.view(-1, *(1 for _ in x.shape[1:])) * gradient

    @staticmethod
    def backward(ctx: Any, direction: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        if ctx.differentiable is None:
            raise RuntimeError(
                "Second derivatives were asked of an energy that gives first derivatives only "
                "(forces evaluated in an OpenMM Context, or compile=True)."
            )
        # Fresh nodes, so that a derivative by one does not run through the other; still attached where a graph
        # is recorded, which leaves third derivatives to the same code.
        attached = torch.is_grad_enabled()
        with torch.enable_grad():
            x, upstream = (_node(tensor, attached) for tensor in ctx.saved_tensors)
            u = ctx.differentiable(x)
            (gradient,) = torch.autograd.grad(u, x, upstream, create_graph=True)
            first, second = torch.autograd.grad(
                gradient, (x, upstream), direction, create_graph=attached, materialize_grads=True
            )
        return first, second, None, None


def _node(tensor: Tensor, attached: bool) -> Tensor:
    return tensor.view_as(tensor) if attached and tensor.requires_grad else tensor.detach().requires_grad_()


def known_gradient(
    function: Callable[[Tensor], tuple[Tensor, Tensor]],
    x: Tensor,
    differentiable: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """The u of ``function(x) -> (u, gradient)``, differentiable with that gradient.

    Parameters
    ----------
    function
        Takes ``(batch, ...)``, gives ``(batch,)`` and ``(batch, ...)``; no graph is recorded inside.
    x
        Points.
    differentiable
        The same u by differentiable operations, called only for second and higher derivatives. Without it a
        second derivative raises RuntimeError.

    Examples
    --------
    >>> x = torch.tensor([3.0], requires_grad=True)
    >>> u = known_gradient(lambda x: (x**3, 3 * x**2), x, lambda x: x**3)
    >>> (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    >>> torch.autograd.grad(slope.sum(), x)
    (tensor([18.]),)
    """
    with torch.no_grad():
        u, gradient = function(x.detach())
    return _KnownGradient.apply(x, u, gradient, differentiable)
