"""Autoregressive splines on the torus: torsions one after the other, each given those before it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from openmm_bg.flows.base import Transform, permute, wrap
from openmm_bg.flows.networks import PerceptronStack, fourier_features
from openmm_bg.flows.spline import circular_parameters, circular_spline


class AutoregressiveSpline(Transform):
    """One pass of circular rational-quadratic splines over the torus.

    Angle i is ``turn_i + S_i(z_i)``, with the spline S_i set by a small network of the angles before it, or of a few of
    them. The density is found in one parallel pass; sampling takes one step per angle, or per set of angles that do
    not wait for each other.

    Parameters
    ----------
    multiplicity : sequence of int
        One per angle; m > 1 gives the angle the exact m-fold symmetry of a rotor, also as a condition for later angles.
    bins, hidden, order
        Spline bins, units of the two hidden layers, Fourier order of the conditions.
    conditions : sequence of sequences of int, optional
        For every angle those before it that it is given; None for all of them. Where each has few, weights and work
        grow linearly with the number of angles.

    Examples
    --------
    >>> chain = AutoregressiveSpline([1, 1, 1, 3], conditions=[[], [0], [0], [1]])
    >>> chain.steps
    [(0, 1), (1, 3), (3, 4)]
    """

    def __init__(
        self,
        multiplicity: Sequence[int],
        *,
        bins: int = 12,
        hidden: int = 48,
        order: int = 3,
        conditions: Sequence[Sequence[int]] | None = None,
    ):
        dimension = len(multiplicity)
        super().__init__(dimension)
        self.order = order
        self.register_buffer("multiplicity", torch.tensor([float(m) for m in multiplicity]), persistent=False)
        earlier = torch.ones(dimension, dimension).tril(-1).bool()
        places = list(range(dimension))
        self.steps = [(i, i + 1) for i in places]
        if conditions is not None:
            given = torch.zeros_like(earlier)
            depth: list[int] = []
            for i, before in enumerate(conditions):
                if len(conditions) != dimension or not set(before) <= set(range(i)):
                    raise ValueError("conditions must name, for every angle, some of the angles before it")
                given[i, list(before)] = True
                depth.append(1 + max((depth[j] for j in before), default=-1))
            # angles of one depth beside each other
            places.sort(key=depth.__getitem__)
            ends = [k for k in range(1, dimension) if depth[places[k]] > depth[places[k - 1]]]
            self.steps = list(zip([0, *ends], [*ends, dimension], strict=True))
            earlier = given[places][:, places]
        self.arranged = places != sorted(places)
        self.register_buffer("places", torch.tensor(places, dtype=torch.long), persistent=False)
        self.register_buffer("back", torch.argsort(self.places), persistent=False)
        self.networks = PerceptronStack(
            earlier.repeat_interleave(2 * order, 1), hidden, circular_parameters(bins), packed=conditions is not None
        )
        self.turn = nn.Parameter(torch.zeros(dimension))

    def _rows(self, values: Tensor) -> Tensor:
        """Values ``(batch, dimension)`` with a sample per column and angles of one depth beside each other."""
        return permute(values.T, self.places, self.back, 0) if self.arranged else values.T

    def _columns(self, rows: Tensor) -> Tensor:
        return (permute(rows, self.back, self.places, 0) if self.arranged else rows).T

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        angles, log_derivative = self.draw(z)
        return angles, log_derivative.sum(-1)

    def draw(self, z: Tensor, instead: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Angles of latents and the log-derivatives dy_i/dz_i of every one, both ``(batch, dimension)``.

        Parameters
        ----------
        z : Tensor, (batch, dimension)
        instead : (Tensor of bool, Tensor), both (batch, dimension), optional
            Which angles do not follow their latent, and what they are; later angles are drawn given them.
        """
        latents, turns, multiplicity = (self._rows(v) for v in (z, self.turn[None], self.multiplicity[None]))
        others = None if instead is None else [self._rows(part) for part in instead]
        per_angle = 2 * self.order
        features = z.new_zeros(self.dimension * per_angle, len(z))
        angles, log_derivatives = [], []
        for first, last in self.steps:
            mine, known = slice(first, last), first * per_angle
            # what is packed finds its inputs by their place
            given = features if self.networks.packed else features[:known]
            parameters = self.networks.some(given, first, last)
            angle, log_derivative = circular_spline(latents[mine], parameters, multiplicity[mine], inverse=True)
            angle = wrap(angle + turns[mine])
            if others is not None:
                angle = torch.where(others[0][mine], others[1][mine], angle)
            angles.append(angle)
            log_derivatives.append(log_derivative)
            new = fourier_features(angle * multiplicity[mine], self.order)
            if torch.is_grad_enabled():
                features = torch.cat([features[:known], new, features[known + len(new) :]])
            else:
                features[known : known + len(new)] = new
        return self._columns(torch.cat(angles)), self._columns(torch.cat(log_derivatives))

    def conditionals(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Latents and log-derivatives dz_i/dy_i of every angle given those before it, both ``(batch, dimension)``."""
        angles, turns, multiplicity = (self._rows(v) for v in (y, self.turn[None], self.multiplicity[None]))
        parameters = self.networks.columns(fourier_features(angles * multiplicity, self.order), None)
        z, log_derivative = circular_spline(wrap(angles - turns), parameters, multiplicity)
        return self._columns(z), self._columns(log_derivative)

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        z, log_derivative = self.conditionals(y)
        return z, log_derivative.sum(-1)
