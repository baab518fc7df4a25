"""Autoregressive splines on the torus: torsions one after the other, each given those before it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from openmm_bg.flows.base import Transform, wrap
from openmm_bg.flows.networks import PerceptronStack, fourier_features
from openmm_bg.flows.spline import circular_parameters, circular_spline


class AutoregressiveSpline(Transform):
    """One pass of circular rational-quadratic splines over the torus.

    Angle i is ``turn_i + S_i(z_i)``, with the spline S_i set by a small network of the angles before it. The density is
    found in one parallel pass; sampling takes one small step per angle.

    Parameters
    ----------
    multiplicity : sequence of int
        One per angle; m > 1 gives the angle the exact m-fold symmetry of a rotor, also as a condition for later angles.
    bins, hidden, order
        Spline bins, units of the two hidden layers, Fourier order of the conditions.
    """

    def __init__(self, multiplicity: Sequence[int], *, bins: int = 12, hidden: int = 48, order: int = 3):
        dimension = len(multiplicity)
        super().__init__(dimension)
        self.order = order
        self.register_buffer("multiplicity", torch.tensor([float(m) for m in multiplicity]), persistent=False)
        earlier = torch.ones(dimension, dimension).tril(-1).bool()
        self.networks = PerceptronStack(earlier.repeat_interleave(2 * order, 1), hidden, circular_parameters(bins))
        self.turn = nn.Parameter(torch.zeros(dimension))

    def _features(self, angles: Tensor) -> Tensor:
        return fourier_features(angles * self.multiplicity, self.order)

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
        per_angle = 2 * self.order
        features = z.new_zeros(len(z), self.dimension * per_angle)
        angles, log_dets = [], []
        for i in range(self.dimension):
            parameters = self.networks(features, row=i)[:, None]
            multiplicity = self.multiplicity[i : i + 1]
            angle, log_det = circular_spline(z[:, i : i + 1], parameters, multiplicity, inverse=True)
            angle = wrap(angle + self.turn[i])
            if instead is not None:
                which, value = (part[:, i : i + 1] for part in instead)
                angle = torch.where(which, value, angle)
            angles.append(angle)
            log_dets.append(log_det)
            new = fourier_features(angle * multiplicity, self.order)
            later = features.new_zeros(len(z), (self.dimension - i - 1) * per_angle)
            features = torch.cat([features[:, : i * per_angle], new, later], -1)
        return torch.cat(angles, -1), torch.cat(log_dets, -1)

    def conditionals(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Latents and log-derivatives dz_i/dy_i of every angle given those before it, both ``(batch, dimension)``."""
        parameters = self.networks(self._features(y))
        return circular_spline(wrap(y - self.turn), parameters, self.multiplicity)

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        z, log_derivative = self.conditionals(y)
        return z, log_derivative.sum(-1)
