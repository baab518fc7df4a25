"""Linear maps fixed by data, and affine maps set by a context: what takes stiff coordinates to near-normal ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from openmm_bg.flows.base import Transform
from openmm_bg.flows.coupling import columns_of, scale_and_shift
from openmm_bg.flows.local import Surroundings
from openmm_bg.flows.networks import perceptron


class ConditionalWhitening(Transform):
    """``y = c_0 + context c + W z``: a linear regression on the context and the square root of the residual covariance.

    Both are found once from data (or set from a reference point) and are not trained. W is the symmetric (ZCA) root,
    which keeps every latent close to the coordinate it stands for.

    Parameters
    ----------
    dimension, context_dimension : int
    """

    def __init__(self, dimension: int, context_dimension: int = 0):
        super().__init__(dimension, context_dimension)
        self.register_buffer("mean", torch.zeros(dimension))
        self.register_buffer("slope", torch.zeros(context_dimension, dimension))
        self.register_buffer("root", torch.eye(dimension))
        self.register_buffer("inverse_root", torch.eye(dimension))
        self.register_buffer("log_det", torch.zeros(()))

    @torch.no_grad()
    def set_scales(self, mean: Tensor, scales: Tensor) -> None:
        """A fixed mean and independent scales, both ``(dimension,)``."""
        self._set(mean, torch.zeros_like(self.slope), torch.diag(scales.square()))

    @torch.no_grad()
    def fit(self, y: Tensor, context: Tensor | None = None, *, ridge: float = 1e-3) -> None:
        """Regression and residual covariance of samples ``(n, dimension)``, in float64 whatever the module's dtype.

        ``ridge`` is relative to the variance of the features: it keeps rarely visited contexts from being extrapolated.
        """
        y = y.double()
        mean, slope = y.mean(0), self.slope.double()
        if context is not None:
            features = context.double()
            centre = features.mean(0)
            centred = features - centre
            gram = centred.T @ centred / len(y) + ridge * torch.eye(len(centre), dtype=y.dtype)
            slope = torch.linalg.solve(gram, centred.T @ (y - mean) / len(y))
            mean = mean - centre @ slope
            residual = y - mean - features @ slope
        else:
            residual = y - mean
        covariance = residual.T @ residual / len(y)
        # shrunk to its diagonal by about its own noise: few samples would leave directions without any spread
        share = min(1.0, (self.dimension + self.context_dimension) / len(y))
        covariance = (1 - share) * covariance + share * torch.diag(covariance.diagonal())
        # a coordinate without spread in the data still needs an invertible scale
        floor = 1e-6 * covariance.diagonal().clamp(min=1e-10)
        self._set(mean, slope, covariance + torch.diag(floor))

    def _set(self, mean: Tensor, slope: Tensor, covariance: Tensor) -> None:
        values, vectors = torch.linalg.eigh(covariance.double())
        roots = values.clamp(min=values.max() * 1e-14).sqrt()
        self.mean.copy_(mean)
        self.slope.copy_(slope)
        self.root.copy_((vectors * roots) @ vectors.T)
        self.inverse_root.copy_((vectors / roots) @ vectors.T)
        self.log_det.copy_(roots.log().sum())

    def _centre(self, context: Tensor | None) -> Tensor:
        # a sample per column, see openmm_bg.flows.columns
        return self.mean[:, None] if context is None else torch.addmm(self.mean[:, None], self.slope.T, context.T)

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return (self._centre(context) + self.root.T @ z.T).T, self.log_det.expand(len(z))

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return (self.inverse_root.T @ (y.T - self._centre(context))).T, -self.log_det.expand(len(y))

    def push_score(self, z: Tensor, score: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        return *self(z, context), (self.inverse_root @ score.T).T


class ConditionalAffine(Transform):
    """``y = z exp(s) + t`` with s and t functions of the context alone; ``|s| <= 2``.

    Parameters
    ----------
    dimension, context_dimension : int
    hidden : sequence of int
    surroundings : Surroundings, optional
        See :class:`~openmm_bg.flows.AffineCoupling`.
    """

    def __init__(
        self,
        dimension: int,
        context_dimension: int,
        hidden: Sequence[int] = (128, 128),
        surroundings: Surroundings | None = None,
    ):
        super().__init__(dimension, context_dimension)
        if surroundings is not None:
            self.network = surroundings.network([], list(range(dimension)), hidden[0])
        else:
            self.network = perceptron(context_dimension, hidden, 2 * dimension)

    def _scale_and_shift(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return scale_and_shift(self.network.columns(z.new_zeros(0, len(z)), columns_of(context)))

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        log_scale, shift = self._scale_and_shift(z, context)
        return torch.addcmul(shift, z.T, log_scale.exp()).T, log_scale.sum(0)

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        log_scale, shift = self._scale_and_shift(y, context)
        return ((y.T - shift) * (-log_scale).exp()).T, -log_scale.sum(0)

    def push_score(self, z: Tensor, score: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        log_scale, shift = self._scale_and_shift(z, context)
        y = torch.addcmul(shift, z.T, log_scale.exp())
        return y.T, log_scale.sum(0), (score.T * (-log_scale.detach()).exp()).T
