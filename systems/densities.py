"""Analytic densities in the plane, with exact samples and exact normalisation."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from openmm_bg.energies import Energy
from openmm_bg.errors import InputError

__all__ = ["DoubleWell", "GaussianMixture", "gmm40"]


class DoubleWell(Energy):
    r"""Two wells at x1 = -1 and +1: u(x) = beta [(x1^2 - 1)^2 / 4 + x2^2 / 2].

    The barrier is beta/4: at beta = 1 nothing is metastable. Target of Rehman & Friesecke.

    Parameters
    ----------
    beta : float
        Inverse temperature, positive.

    Examples
    --------
    >>> well = DoubleWell(beta=1.0)
    >>> well(torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
    tensor([0.0000, 0.2500])
    >>> round(well.log_z, 6)
    2.031231
    """

    def __init__(self, beta: float = 1.0) -> None:
        super().__init__((2,))
        beta = float(beta)
        if not (math.isfinite(beta) and beta > 0):
            raise InputError(f"beta must be a positive finite number, not {beta}.")
        self.beta = beta

    def reduced(self, x: Tensor) -> Tensor:
        x1, x2 = x.unbind(-1)
        return self.beta * ((x1 * x1 - 1) ** 2 / 4 + x2 * x2 / 2)

    @property
    def log_z(self) -> float:
        """log of the integral of exp(-u), by quadrature to 12 digits."""
        # The trapezoidal rule converges exponentially here: the integrand is analytic and vanishes at both ends.
        edge = math.sqrt(1 + math.sqrt(4 * 750 / self.beta))
        x = np.linspace(-edge, edge, 200_001)
        integral = np.sum(np.exp(-self.beta * (x * x - 1) ** 2 / 4)) * (x[1] - x[0])
        return math.log(integral) + 0.5 * math.log(2 * math.pi / self.beta)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """Exact independent samples, (n, 2) float64.

        For r = |x1|, (r^2 - 1)^2 = (r - 1)^2 (r + 1)^2 >= (r - 1)^2, so a Gaussian around 1, cut at 0, is an envelope
        for rejection.
        """
        radius = torch.empty(0, dtype=torch.float64)
        while len(radius) < n:
            r = 1 + math.sqrt(2 / self.beta) * _normal(4 * n + 16, generator)
            excess = (r - 1) ** 2 * ((r + 1) ** 2 - 1) / 4
            keep = (r >= 0) & (_uniform(len(r), generator) < torch.exp(-self.beta * excess))
            radius = torch.cat([radius, r[keep]])
        sign = torch.where(_uniform(n, generator) < 0.5, -1.0, 1.0).double()
        return torch.stack([sign * radius[:n], _normal(n, generator) / math.sqrt(self.beta)], dim=-1)


class GaussianMixture(Energy):
    """Isotropic Gaussians of equal width: exp(-u) is the normalised density, log_z = 0.

    Parameters
    ----------
    means : (modes, dimension)
    scale : float
        Standard deviation of every mode.
    weights : (modes,), optional
        Positive, of any sum; equal by default.

    Examples
    --------
    >>> mixture = GaussianMixture([[-4.0, 0.0], [4.0, 0.0]], scale=1.0)
    >>> mixture.sample(3, torch.Generator().manual_seed(0)).shape
    torch.Size([3, 2])
    """

    means: Tensor
    log_weights: Tensor

    def __init__(self, means: object, scale: float, weights: object | None = None) -> None:
        centres = torch.as_tensor(means, dtype=torch.float64)
        if centres.ndim != 2 or not torch.isfinite(centres).all():
            raise InputError("means must be a finite array of shape (modes, dimension).")
        if not (math.isfinite(scale) and scale > 0):
            raise InputError(f"scale must be a positive finite number, not {scale}.")
        share = torch.ones(len(centres)).double() if weights is None else torch.as_tensor(weights).double()
        if share.shape != (len(centres),) or not (share > 0).all() or not torch.isfinite(share).all():
            raise InputError(f"weights must be {len(centres)} positive finite numbers, one per mode.")
        super().__init__((centres.shape[1],))
        self.scale = float(scale)
        self.log_z = 0.0
        self.register_buffer("means", centres)
        self.register_buffer("log_weights", torch.log(share / share.sum()))

    def reduced(self, x: Tensor) -> Tensor:
        dimension = self.means.shape[1]
        distance = ((x[:, None, :] - self.means.to(x.dtype)) / self.scale).square().sum(-1)
        constant = dimension * (math.log(self.scale) + 0.5 * math.log(2 * math.pi))
        return constant - torch.logsumexp(self.log_weights.to(x.dtype) - 0.5 * distance, dim=-1)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """Exact independent samples, (n, dimension) float64."""
        mode = torch.multinomial(self.log_weights.exp(), n, replacement=True, generator=generator)
        noise = torch.randn(n, self.means.shape[1], dtype=torch.float64, generator=generator)
        return self.means[mode] + self.scale * noise


def gmm40() -> GaussianMixture:
    """The 40 Gaussians of Midgley et al., Flow Annealed Importance Sampling Bootstrap (ICLR 2023).

    Means uniform in [-40, 40]^2, from torch's CPU generator with seed 0; standard deviation softplus(1) = 1.31326.
    """
    means = (torch.rand(40, 2, generator=torch.Generator().manual_seed(0)) - 0.5) * 80
    return GaussianMixture(means, scale=math.log1p(math.e))


def _normal(n: int, generator: torch.Generator) -> Tensor:
    return torch.randn(n, dtype=torch.float64, generator=generator)


def _uniform(n: int, generator: torch.Generator) -> Tensor:
    return torch.rand(n, dtype=torch.float64, generator=generator)
