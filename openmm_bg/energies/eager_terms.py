"""Sums of terms in torch: the plain form of the formulas, differentiable as often as wanted."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from openmm_bg.energies import expression, formula
from openmm_bg.energies.model import Coordinate, Terms

# rows x batch at a time: beyond, rows are taken in portions and computed again for the gradient
_ELEMENTS = 2**22


class HoistedExpression(torch.nn.Module):
    """An expression whose parts without geometry are computed once, in float64.

    Parameters
    ----------
    node
        The expression.
    inner
        Names of its geometric variables.
    parameters
        Per-row parameters, ``(rows,)`` each.
    global_parameters
        Values of the other variables.
    """

    def __init__(
        self,
        node: expression.Node,
        inner: list[str],
        parameters: Mapping[str, np.ndarray],
        global_parameters: Mapping[str, float],
    ) -> None:
        super().__init__()
        (self.node,), self.hoisted = expression.hoist([node], inner)
        self.parameters_by_name = {name: torch.as_tensor(v, dtype=torch.float64) for name, v in parameters.items()}
        self.register_buffer("columns", torch.zeros(0, dtype=torch.float64), persistent=False)
        self.set_global_parameters(global_parameters)

    columns: Tensor

    def set_global_parameters(self, values: Mapping[str, float]) -> None:
        """Compute the hoisted parts again."""
        named = dict(self.parameters_by_name)
        rows = max((len(v) for v in named.values()), default=1)
        named |= {k: torch.tensor(float(v), dtype=torch.float64) for k, v in values.items() if k not in named}
        like = torch.zeros(rows, dtype=torch.float64)
        computed = expression.evaluate(list(self.hoisted.values()), named, like)
        columns = torch.stack([c.expand(rows) for c in computed]) if computed else torch.zeros(0, rows).double()
        self.columns = columns[:, :, None].to(self.columns.device)

    def forward(self, inner: Mapping[str, Tensor], rows: slice = slice(None)) -> Tensor:
        """Values for geometric variables ``(rows, batch)``."""
        like = next(iter(inner.values()))
        outer = {
            name: (column if len(column) == 1 else column[rows]).to(like.dtype)
            for name, column in zip(self.hoisted, self.columns, strict=True)
        }
        return formula.value(self.node, inner, outer)


class TermsEnergy(torch.nn.Module):
    """The energy of `Terms`.

    Parameters
    ----------
    terms
        The expression, its atoms and parameters.
    global_parameters
        Values of its global parameters.

    Examples
    --------
    >>> from openmm_bg.energies.lepton import parse
    >>> bond = Terms("bond", np.array([[0, 1]]), {"r": Coordinate("distance", (0, 1))}, {}, parse("2*r^2"))
    >>> TermsEnergy(bond, {})(torch.tensor([0.0, 0, 0, 3, 0, 0]).view(2, 3, 1))
    tensor([18.])
    """

    particles: Tensor

    def __init__(self, terms: Terms, global_parameters: Mapping[str, float]) -> None:
        super().__init__()
        self.coordinates: dict[str, Coordinate] = terms.coordinates
        self.register_buffer("particles", torch.as_tensor(terms.particles, dtype=torch.int64), persistent=False)
        self.energy = HoistedExpression(terms.energy, list(terms.coordinates), terms.parameters, global_parameters)

    def set_global_parameters(self, values: Mapping[str, float]) -> None:
        """Take other values of the global parameters."""
        self.energy.set_global_parameters(values)

    def forward(self, x: Tensor) -> Tensor:
        """Energies in kJ/mol, ``(batch,)``, of x in nm, ``(atoms, 3, batch)``."""
        rows = len(self.particles)
        portion = max(1, _ELEMENTS // max(1, x.shape[-1]))
        if rows <= portion:
            return self._part(x, 0, rows)
        total = x.new_zeros(x.shape[-1])
        for start in range(0, rows, portion):
            arguments = (x, start, min(rows, start + portion))
            recorded = torch.is_grad_enabled() and x.requires_grad
            if recorded:
                total = total + checkpoint(self._part, *arguments, use_reentrant=False)
            else:
                total = total + self._part(*arguments)
        return total

    def _part(self, x: Tensor, start: int, end: int) -> Tensor:
        atoms = self.particles[start:end]
        position = [x.index_select(0, column) for column in atoms.unbind(1)]
        inner = {
            name: coordinate_value(c.kind, [position[place] for place in c.particles])
            for name, c in self.coordinates.items()
        }
        return self.energy(inner, slice(start, end)).sum(0)


def coordinate_value(kind: str, positions: list[Tensor]) -> Tensor:
    """A geometric variable, ``(rows, batch)``, of positions ``(rows, 3, batch)`` each."""
    if kind in ("x", "y", "z"):
        return positions[0][:, "xyz".index(kind)]
    if kind == "distance":
        return distance(positions[0], positions[1])
    if kind == "angle":
        return angle(*positions)
    return dihedral(*positions)


def distance(a: Tensor, b: Tensor) -> Tensor:
    """|a - b|; zero, with zero gradient, where they coincide."""
    return _norm(a - b)


def angle(i: Tensor, j: Tensor, k: Tensor) -> Tensor:
    """The angle at j, with zero gradient where it is flat; NaN where an arm has no length."""
    a, b = i - j, k - j
    value = torch.atan2(_norm(_cross(a, b)), _dot(a, b))
    return value.masked_fill(~(_dot(a, a) * _dot(b, b) > 0), torch.nan)


def dihedral(i: Tensor, j: Tensor, k: Tensor, m: Tensor) -> Tensor:
    """The dihedral, in (-pi, pi]; NaN where three successive atoms are collinear."""
    b1, b2, b3 = j - i, k - j, m - k
    c1, c2 = _cross(b1, b2), _cross(b2, b3)
    value = torch.atan2(_dot(b1, c2) * _norm(b2), _dot(c1, c2))
    return value.masked_fill(~(_dot(c1, c1) * _dot(c2, c2) > 0), torch.nan)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(1)


def _cross(a: Tensor, b: Tensor) -> Tensor:
    (ax, ay, az), (bx, by, bz) = a.unbind(1), b.unbind(1)
    return torch.stack((ay * bz - az * by, az * bx - ax * bz, ax * by - ay * bx), 1)


def _norm(a: Tensor) -> Tensor:
    square = _dot(a, a)
    zero = square == 0
    return torch.sqrt(square.masked_fill(zero, 1.0)).masked_fill(zero, 0.0)
