"""Trained linear maps between couplings."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from openmm_bg.flows.base import Transform


class Mixing(Transform):
    """``y = L U z`` with L and U unit triangular and trained, the identity at first: of unit Jacobian.

    Couplings scale what they move and add to it; a rotation of all dimensions costs them many layers, this one a matrix
    product (Kingma & Dhariwal, 2018).

    Parameters
    ----------
    dimension : int
    context_dimension : int
        Of a context that is taken and not looked at.

    Examples
    --------
    >>> mixing = Mixing(3)
    >>> y, log_det = mixing(torch.ones(2, 3))
    >>> y.tolist()
    [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]
    """

    def __init__(self, dimension: int, context_dimension: int = 0):
        super().__init__(dimension, context_dimension)
        self.lower = nn.Parameter(torch.zeros(dimension, dimension))
        self.upper = nn.Parameter(torch.zeros(dimension, dimension))
        self.register_buffer("unit", torch.eye(dimension), persistent=False)

    def _factors(self) -> tuple[Tensor, Tensor]:
        return self.lower.tril(-1) + self.unit, self.upper.triu(1) + self.unit

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        # a sample per column, see openmm_bg.flows.columns
        lower, upper = self._factors()
        return ((lower @ upper) @ z.T).T, z.new_zeros(len(z))

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        lower, upper = self._factors()
        z = torch.linalg.solve_triangular(lower, y.T, upper=False, unitriangular=True)
        z = torch.linalg.solve_triangular(upper, z, upper=True, unitriangular=True)
        return z.T, y.new_zeros(len(y))

    def push_score(self, z: Tensor, score: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        with torch.no_grad():
            lower, upper = self._factors()
            pushed = torch.linalg.solve_triangular(upper.T, score.T, upper=False, unitriangular=True)
            pushed = torch.linalg.solve_triangular(lower.T, pushed, upper=True, unitriangular=True)
        return *self(z, context), pushed.T
