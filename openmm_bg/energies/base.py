"""What an energy is: points in, one reduced energy per point out, and one rule for the bad ones."""

from __future__ import annotations

import torch
from torch import Tensor

from openmm_bg.errors import InputError


class Energy(torch.nn.Module):
    """A reduced energy u(x) = U(x)/kT over a batch, differentiable in x.

    A subclass sets `event_shape` and writes `reduced`, the formula alone; rows must be independent of each
    other. Everything a formula may run into is settled here and nowhere else: a row whose coordinates or energy
    are not finite has the energy +inf and exactly zero gradient, and the other rows are what they would have
    been without it. "Not finite" includes energies beyond `largest(dtype)`, whose derivatives would overflow.

    Parameters
    ----------
    event_shape
        Shape of one point: ``(dimension,)``, or ``(atoms, 3)`` for a molecule in nm.

    Examples
    --------
    >>> class Harmonic(Energy):
    ...     def reduced(self, x):
    ...         return 0.5 * (x * x).sum(-1)
    >>> u = Harmonic((2,))
    >>> u(torch.tensor([[3.0, 4.0], [float("nan"), 0.0]]))
    tensor([12.5000,     inf])
    """

    def __init__(self, event_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.event_shape: tuple[int, ...] = tuple(event_shape)

    def reduced(self, x: Tensor) -> Tensor:
        """The formula: ``(batch, *event_shape)`` to ``(batch,)``; anything where it has no value."""
        raise NotImplementedError(f"{type(self).__name__} must define reduced(x).")

    def reduced_and_gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The formula and its gradient, detached; a subclass that knows a faster way overrides this."""
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            u = self.reduced(x)
            (gradient,) = torch.autograd.grad(u.sum(), x)
        return u.detach(), gradient

    def forward(self, x: Tensor) -> Tensor:
        """Reduced energies.

        Parameters
        ----------
        x
            Points, ``(batch, *event_shape)``, of any floating dtype.

        Returns
        -------
        Tensor
            ``(batch,)`` in the dtype of `x`; +inf, with zero gradient, where the energy is not finite.

        Raises
        ------
        InputError
            If `x` has another shape or holds no floating point numbers.
        """
        self._check(x)
        # A bad row must not enter the graph: its gradient would be 0 * nan = nan, whatever becomes of its value.
        clean = _all_finite(x)
        good = torch.ones(len(x), dtype=torch.bool, device=x.device) if clean else _finite_rows(x)
        u = self.reduced(x) if clean or bool(good.all()) else self._spread(x, good)
        overflow = ~_within_range(u) & good
        if bool(overflow.any()):
            u = self._spread(x, good & ~overflow) if u.requires_grad else torch.where(overflow, torch.inf, u)
        return u

    def value_and_gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Reduced energies ``(batch,)`` and their gradients ``(batch, *event_shape)``, detached, in one pass.

        Rows without a finite energy and gradient come back as +inf and zeros.
        """
        self._check(x)
        x = x.detach()
        u, gradient = self.reduced_and_gradient(x)
        good = _within_range(u)
        # a look at a device waits for it, and cannot be recorded in a CUDA graph: there rows are always masked
        if x.device.type == "cpu" and _all_finite(x) and _all_finite(gradient) and bool(good.all()):
            return u, gradient
        good = good & _finite_rows(x) & _finite_rows(gradient)
        u = torch.where(good, u, torch.inf)
        return u, torch.where(good.view(-1, *(1 for _ in self.event_shape)), gradient, 0.0)

    def _spread(self, x: Tensor, good: Tensor) -> Tensor:
        """Energies of the good rows, +inf in the others."""
        rows = good.nonzero().squeeze(-1)
        values = self.reduced(x.index_select(0, rows)) if len(rows) else x.new_zeros(0)
        return torch.full_like(good, torch.inf, dtype=x.dtype).index_copy(0, rows, values)

    def _check(self, x: Tensor) -> None:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise InputError(f"{type(self).__name__} takes a torch tensor of floating point numbers.")
        if tuple(x.shape[1:]) != self.event_shape or x.ndim == 0:
            wanted = ", ".join(map(str, ("batch", *self.event_shape)))
            raise InputError(f"{type(self).__name__} takes the shape ({wanted}), not {tuple(x.shape)}.")


def largest(dtype: torch.dtype) -> float:
    """The largest |u| that counts as finite: its derivatives still fit (float32: 4e28, float64: 2e231)."""
    return torch.finfo(dtype).max ** 0.75


def _all_finite(x: Tensor) -> bool:
    """Quick and cautious: what is not finite shows in the sum; a sum may also overflow by itself."""
    return bool(torch.isfinite(x.detach().sum()))


def _finite_rows(x: Tensor) -> Tensor:
    return torch.isfinite(x).flatten(1).all(1)


def _within_range(u: Tensor) -> Tensor:
    return u.detach().abs() < largest(u.dtype)
