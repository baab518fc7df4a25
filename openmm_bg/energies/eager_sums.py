"""Generalised Born models in torch: the plain form of `PairwiseSums`, differentiable as often as wanted."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from openmm_bg.energies import expression
from openmm_bg.energies.eager_terms import HoistedExpression, distance
from openmm_bg.energies.model import PairwiseSums


class SumsEnergy(torch.nn.Module):
    """The energy of `PairwiseSums`.

    Parameters
    ----------
    sums
        The model.
    global_parameters
        Values of its global parameters.
    """

    def __init__(self, sums: PairwiseSums, global_parameters: Mapping[str, float]) -> None:
        super().__init__()
        own, now = sums.parameters, global_parameters
        self.values = [sums.first[0], *(name for name, _ in sums.further)]
        inner = [*self.values, *(axis for axis in "xyz" if axis not in own and axis not in self.values)]
        ordered = np.concatenate((sums.pairs, sums.pairs[:, ::-1]))
        self.first = _Paired(sums.first[1], ["r"], own, ordered, now)
        self.further = torch.nn.ModuleList(HoistedExpression(node, inner, own, now) for _, node in sums.further)
        single = sum(sums.single, expression.number(0.0))
        self.single = HoistedExpression(single, inner, own, now)
        both = ["r", *(f"{name}{side}" for name in self.values for side in (1, 2))]
        self.paired = torch.nn.ModuleList(_Paired(node, both, own, pairs, now) for node, pairs in sums.paired)

    def set_global_parameters(self, values: Mapping[str, float]) -> None:
        """Take other values of the global parameters."""
        for part in (self.first, *self.further, self.single, *self.paired):
            part.set_global_parameters(values)

    def forward(self, x: Tensor) -> Tensor:
        """Energies in kJ/mol, ``(batch,)``, of x in nm, ``(atoms, 3, batch)``."""
        collected = torch.zeros_like(x[:, 0])
        inner = {self.values[0]: collected.index_add(0, self.first.pairs[:, 0], self.first(x, {}))}
        inner |= {axis: x[:, k] for k, axis in enumerate("xyz") if axis not in self.values}
        for name, value in zip(self.values[1:], self.further, strict=True):
            inner[name] = value(inner)
        energy = self.single(inner).sum(0)
        for pair in self.paired:
            energy = energy + pair(x, {name: inner[name] for name in self.values}).sum(0)
        return energy


class _Paired(torch.nn.Module):
    """An expression in the distance and the values of two particles, over pairs."""

    pairs: Tensor

    def __init__(
        self,
        node: expression.Node,
        inner: list[str],
        parameters: Mapping[str, np.ndarray],
        pairs: np.ndarray,
        global_parameters: Mapping[str, float],
    ) -> None:
        super().__init__()
        self.register_buffer("pairs", torch.as_tensor(pairs, dtype=torch.int64), persistent=False)
        by_pair = {f"{name}{side}": v[pairs[:, side - 1]] for name, v in parameters.items() for side in (1, 2)}
        self.expression = HoistedExpression(node, inner, by_pair, global_parameters)

    def set_global_parameters(self, values: Mapping[str, float]) -> None:
        self.expression.set_global_parameters(values)

    def forward(self, x: Tensor, values: Mapping[str, Tensor]) -> Tensor:
        i, j = self.pairs.unbind(1)
        inner = {"r": distance(x.index_select(0, i), x.index_select(0, j))}
        for name, value in values.items():
            inner[f"{name}1"], inner[f"{name}2"] = value.index_select(0, i), value.index_select(0, j)
        return self.expression(inner)
