"""Energies bounded from above: finite at every collision, and the true energy below a threshold."""

from __future__ import annotations

import math
from numbers import Real
from typing import Literal, get_args

import torch
from torch import Tensor

from openmm_bg.energies.base import Energy
from openmm_bg.energies.forcefield import ForceFieldEnergy
from openmm_bg.energies.softcore import Softened, soften
from openmm_bg.errors import InputError

Kind = Literal["rational", "smooth"]


class ThresholdSchedule:
    """A threshold that changes while a generator learns: low at first, where the energy must be gentle.

    Parameters
    ----------
    start, end
        Thresholds in kT, positive.
    steps
        After so many steps the threshold stays at `end`. In between it moves geometrically.

    Examples
    --------
    >>> schedule = ThresholdSchedule(10.0, 1000.0, steps=100)
    >>> [round(schedule(step), 6) for step in (0, 50, 100, 200)]
    [10.0, 100.0, 1000.0, 1000.0]

    In a training loop, before each step: ``soft.set_threshold(schedule(step))``.
    """

    def __init__(self, start: float, end: float, steps: int) -> None:
        for name, value in (("start", start), ("end", end)):
            if not isinstance(value, Real) or not 0 < value < math.inf:
                raise InputError(f"{name} must be a positive finite number, in kT, not {value!r}.")
        if not isinstance(steps, int) or steps < 1:
            raise InputError(f"steps must be a positive whole number, not {steps!r}.")
        self.start, self.end, self.steps = float(start), float(end), steps

    def __call__(self, step: int) -> float:
        """The threshold of a step, in kT."""
        part = min(max(step / self.steps, 0.0), 1.0)
        return self.start ** (1 - part) * self.end**part


class RegularizedEnergy(Energy):
    """See `regularize`."""

    def __init__(self, energy: Energy, threshold: float, kind: Kind = "rational", *, offset: float = 0.0) -> None:
        super().__init__(energy.event_shape)
        if kind not in get_args(Kind):
            raise InputError(f"There is no kind {kind!r}; choose one of {', '.join((*get_args(Kind), 'pairwise'))}.")
        if not isinstance(offset, Real) or not math.isfinite(offset):
            raise InputError(f"offset must be a finite reduced energy, in kT, not {offset!r}.")
        self.energy: Energy = energy
        self.set_threshold(threshold)
        self.kind: Kind = kind
        self.offset: float = float(offset)

    def set_threshold(self, threshold: float) -> None:
        """Take another threshold, in kT; see `ThresholdSchedule`."""
        if not isinstance(threshold, Real) or not 0 < threshold < math.inf:
            raise InputError(f"threshold must be a positive finite number, in kT, not {threshold!r}.")
        self.threshold: float = float(threshold)

    def reduced(self, x: Tensor) -> Tensor:
        return self._bounded(self.energy(x))

    def reduced_and_gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        u, gradient = self.energy.value_and_gradient(x)
        with torch.enable_grad():
            u.requires_grad_()
            bounded = self._bounded(u)
            (slope,) = torch.autograd.grad(bounded.sum(), u)
        return bounded.detach(), slope.view(-1, *(1 for _ in self.event_shape)) * gradient

    def _bounded(self, u: Tensor) -> Tensor:
        c, v = self.threshold, u - self.offset
        continued = (_rational if self.kind == "rational" else _smooth)(v, c) + self.offset
        return torch.where(v <= c, u, continued)


class PairwiseRegularizedEnergy(Energy):
    """See `regularize`.

    Attributes
    ----------
    energy : ForceFieldEnergy
        Of the softened System.
    softened : Softened
        The System, with its radii and the pairs exempt from property (iv).
    """

    def __init__(
        self, energy: ForceFieldEnergy, threshold: float, *, offset: float = 0.0, other_depth: float | None = None
    ) -> None:
        if not isinstance(energy, ForceFieldEnergy):
            raise InputError(f"The per-pair form needs a ForceFieldEnergy, not {type(energy).__name__}.")
        super().__init__(energy.event_shape)
        self.softened: Softened = soften(
            energy.system, energy.temperature, threshold, offset=offset, other_depth=other_depth
        )
        self.threshold: float = float(threshold)
        self.energy = ForceFieldEnergy(self.softened.system, energy.temperature)

    @property
    def exempt_pairs(self) -> list[tuple[int, int]]:
        """Pairs of opposite charge without repulsion, changed whatever the energy."""
        return self.softened.exempt_pairs

    def potential(self, x: Tensor) -> Tensor:
        """Potential energies in kJ/mol, ``(batch,)``."""
        return self.energy.potential(x)

    def reduced(self, x: Tensor) -> Tensor:
        return self.energy.reduced(x)

    def reduced_and_gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.energy.reduced_and_gradient(x)


def regularize(
    energy: Energy,
    threshold: float,
    kind: Kind | Literal["pairwise"] = "rational",
    *,
    offset: float = 0.0,
    other_depth: float | None = None,
) -> RegularizedEnergy | PairwiseRegularizedEnergy:
    """The regularised energy u_eps, 1/eps = threshold (Theorem 1 of Rehman & Friesecke).

    ``"rational"`` and ``"smooth"`` bound the total; ``"pairwise"`` continues each Coulomb and Lennard-Jones pair of a
    `ForceFieldEnergy` inside its own radius, which costs nothing and does not grow with the molecule; see
    `softcore.soften`. They serve training; acceptance and reweighting use the true energy.

    On the total: with v = u - offset and c = threshold, both in kT, the result is bitwise u where v <= c, continuously
    differentiable in v, and never above offset + 2c. Above the threshold, with y = (v - c)/c,

    - ``"rational"``: c + c y/(1 + y), which approaches 2c and keeps a gradient at every finite energy: it is
      the one for training;
    - ``"smooth"``: (1 - s) v + 2 c s with s = 3y^2 - 2y^3, and 2c from v = 2c on: the cutoff of the proof.

    A collision (u = +inf) has the energy offset + 2c and zero gradient. Coordinates that are not finite are
    no conformation and keep +inf.

    Parameters
    ----------
    energy
        Any `Energy`.
    threshold
        1/eps, in kT above `offset`. It bounds the total, so it has to lie above the thermal energies, which
        grow with the number of atoms.
    kind
        The continuation.
    offset
        Reduced energy from which v is counted, best that of a minimised conformation: an absolute force-field
        energy means nothing.
    other_depth
        Only for ``"pairwise"``: kJ/mol, see `softcore.soften`.

    Examples
    --------
    >>> class Wall(Energy):
    ...     def reduced(self, x):
    ...         return x[:, 0] ** -12.0
    >>> soft = regularize(Wall((1,)), threshold=10.0)
    >>> soft(torch.tensor([[1.0], [0.1], [0.0]]))
    tensor([ 1., 20., 20.])
    """
    if kind == "pairwise":
        return PairwiseRegularizedEnergy(energy, threshold, offset=offset, other_depth=other_depth)
    if other_depth is not None:
        raise InputError('other_depth is only for kind="pairwise".')
    return RegularizedEnergy(energy, threshold, kind, offset=offset)


def _rational(v: Tensor, c: float) -> Tensor:
    # c + c y/(1 + y) with 1 + y = v/c, in the form that has a limit at v = inf
    return 2 * c - c * (c / v.clamp(min=c))


def _smooth(v: Tensor, c: float) -> Tensor:
    y = ((v - c) / c).clamp(0, 1)
    s = y * y * (3 - 2 * y)
    return (1 - s) * v.clamp(max=2 * c) + 2 * c * s
