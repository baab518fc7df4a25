"""The double well in the plane and Gaussian mixtures, with exact samples and exact normalisation."""

from __future__ import annotations

import math

import numpy as np
import torch
from openmm_bg.systems._helpers import normal, positive, uniform
from torch import Tensor

from openmm_bg.energies import Energy
from openmm_bg.errors import InputError

__all__ = ["DoubleWell", "GaussianMixture", "gmm2_unequal", "gmm4", "gmm9", "gmm40", "gmm_pair"]


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
        self.beta = positive("beta", beta)

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
        radius = torch.empty(0, dtype=torch.float64, device=generator.device)
        while len(radius) < n:
            r = 1 + math.sqrt(2 / self.beta) * normal(4 * n + 16, generator=generator)
            excess = (r - 1) ** 2 * ((r + 1) ** 2 - 1) / 4
            keep = (r >= 0) & (uniform(len(r), generator=generator) < torch.exp(-self.beta * excess))
            radius = torch.cat([radius, r[keep]])
        sign = torch.where(uniform(n, generator=generator) < 0.5, -1.0, 1.0).double()
        return torch.stack([sign * radius[:n], normal(n, generator=generator) / math.sqrt(self.beta)], dim=-1)


class GaussianMixture(Energy):
    """Isotropic Gaussians: exp(-u) is the normalised density, log_z = 0.

    Every mode is normalised by its own scale^dimension, so `weights` are at once the masses of the modes under
    exp(-u) and the shares in which `sample` visits them.

    Parameters
    ----------
    means : (modes, dimension)
    scale : float or (modes,)
        Standard deviation of every mode, or of each.
    weights : (modes,), optional
        Positive, of any sum; equal by default.

    Attributes
    ----------
    means, scales
        Tensors (modes, dimension) and (modes,), float64.
    log_z : float
        0.

    Examples
    --------
    >>> mixture = GaussianMixture([[-4.0, 0.0], [4.0, 0.0]], scale=[1.0, 0.5], weights=[3, 1])
    >>> mixture.sample(3, torch.Generator().manual_seed(0)).shape
    torch.Size([3, 2])
    >>> mixture.weights
    tensor([0.7500, 0.2500], dtype=torch.float64)
    >>> mixture.nearest_mode(torch.tensor([[3.0, 1.0], [-7.0, 0.0]]))
    tensor([1, 0])
    """

    means: Tensor
    scales: Tensor
    log_weights: Tensor

    def __init__(self, means: object, scale: object, weights: object | None = None) -> None:
        centres = torch.as_tensor(means, dtype=torch.float64)
        if centres.ndim != 2 or 0 in centres.shape or not torch.isfinite(centres).all():
            raise InputError("means must be a finite array of shape (modes, dimension).")
        modes = len(centres)
        scales = torch.as_tensor(scale, dtype=torch.float64)
        if not (torch.isfinite(scales).all() and (scales > 0).all()):
            raise InputError(f"scale must be a positive finite number, or one per mode, not {scale}.")
        if scales.shape not in ((), (modes,)):
            raise InputError(f"scale must be one number or {modes}, one per mode, not of shape {tuple(scales.shape)}.")
        share = torch.ones(modes).double() if weights is None else torch.as_tensor(weights).double()
        if share.shape != (modes,) or not (share > 0).all() or not torch.isfinite(share).all():
            raise InputError(f"weights must be {modes} positive finite numbers, one per mode.")
        super().__init__((centres.shape[1],))
        self.log_z = 0.0
        self.register_buffer("means", centres)
        self.register_buffer("scales", scales.expand(modes).clone())
        self.register_buffer("log_weights", torch.log(share / share.sum()))

    @property
    def weights(self) -> Tensor:
        """The share of each mode, (modes,), of sum 1."""
        return self.log_weights.exp()

    def reduced(self, x: Tensor) -> Tensor:
        return -torch.logsumexp(self._log_terms(x), dim=-1)

    def reduced_and_gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            terms = self._log_terms(x)
            u = -torch.logsumexp(terms, dim=-1)
            pull = torch.exp(terms + u[:, None]) / self.scales.to(x.dtype).square()
            return u, x * pull.sum(-1, keepdim=True) - pull @ self.means.to(x.dtype)

    def nearest_mode(self, x: Tensor) -> Tensor:
        """The mode most likely to have made each point, (n, dimension) to (n,) int64.

        That is the mode with the largest weight times density at the point, which for modes of equal weight and
        scale is the one with the nearest mean.
        """
        self._check(x)
        return self._log_terms(x).argmax(dim=-1)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """Exact independent samples, (n, dimension) float64."""
        mode = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        noise = normal(n, self.means.shape[1], generator=generator)
        return self.means[mode] + self.scales[mode, None] * noise

    def noised(self, time: float, prior_scale: float = 1.0) -> GaussianMixture:
        r"""The mixture after an Ornstein-Uhlenbeck process has run for some time: exact, and again a mixture.

        The process dX = -X / s^2 dt + sqrt(2) dW forgets where it started and tends to N(0, s^2). Every mode keeps
        its weight, shrinks its mean to exp(-t / s^2) mu and changes its variance to
        exp(-2 t / s^2) sigma^2 + s^2 (1 - exp(-2 t / s^2)).

        Parameters
        ----------
        time : float
            t, not negative; 0 gives the same density back.
        prior_scale : float
            s, the standard deviation of the limit.

        Examples
        --------
        >>> start = GaussianMixture([[8.0]], scale=2.0)
        >>> later = start.noised(math.log(2.0))
        >>> later.means.item(), round(later.scales.item() ** 2, 12)
        (4.0, 1.75)
        """
        time = float(time)
        if not (math.isfinite(time) and time >= 0):
            raise InputError(f"time must be a finite number of at least 0, not {time}.")
        variance = positive("prior_scale", prior_scale) ** 2
        kept = math.exp(-2 * time / variance)
        scales = torch.sqrt(kept * self.scales.square() - variance * math.expm1(-2 * time / variance))
        return GaussianMixture(math.exp(-time / variance) * self.means, scales, self.weights)

    def _log_terms(self, x: Tensor) -> Tensor:
        """log of weight times density of every mode, (n, modes)."""
        # one coordinate after the other: arrays of (n, modes) stay in the cache, and no precision is lost
        means, distance = self.means.to(x.dtype), torch.zeros(1, dtype=x.dtype, device=x.device)
        for k in range(means.shape[1]):
            distance = distance + (x[:, k, None] - means[:, k]).square()
        distance = distance / self.scales.to(x.dtype).square()
        constant = self.log_weights - self.means.shape[1] * (self.scales.log() + 0.5 * math.log(2 * math.pi))
        return constant.to(x.dtype) - 0.5 * distance


def gmm40() -> GaussianMixture:
    """The 40 Gaussians of Midgley et al., Flow Annealed Importance Sampling Bootstrap (ICLR 2023).

    Means uniform in [-40, 40]^2, from torch's CPU generator with seed 0; standard deviation softplus(1) = 1.31326.
    The entropy is 6.8590.
    """
    means = (torch.rand(40, 2, generator=torch.Generator().manual_seed(0)) - 0.5) * 80
    return GaussianMixture(means, scale=math.log1p(math.e))


def gmm4() -> GaussianMixture:
    """Four Gaussians of equal weight at (+-8, +-8), standard deviation 1.

    A target of Mate & Fleuret, Learning Interpolations between Boltzmann Densities (TMLR 2023).

    >>> gmm4().weights.tolist()
    [0.25, 0.25, 0.25, 0.25]
    """
    return GaussianMixture([[-8.0, -8.0], [-8.0, 8.0], [8.0, -8.0], [8.0, 8.0]], scale=1.0)


def gmm2_unequal() -> GaussianMixture:
    """Two Gaussians of standard deviation 1: (4, 4) with weight 1/3 and (-8, -8) with weight 2/3.

    A target of Mate & Fleuret, Learning Interpolations between Boltzmann Densities (TMLR 2023).

    >>> gmm2_unequal().weights
    tensor([0.3333, 0.6667], dtype=torch.float64)
    """
    return GaussianMixture([[4.0, 4.0], [-8.0, -8.0]], scale=1.0, weights=[1.0, 2.0])


def gmm9() -> GaussianMixture:
    """Nine Gaussians of equal weight on the grid {-1, 0, 1}^2, variance 0.012.

    A target of Tian, Panda & Lin, Liouville Flow Importance Sampler (ICML 2024).

    >>> gmm9().means.shape
    torch.Size([9, 2])
    """
    axis = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)
    return GaussianMixture(torch.cartesian_prod(axis, axis), scale=math.sqrt(0.012))


def gmm_pair(separation: float = 4.0, weight: float = 0.7) -> GaussianMixture:
    """Two Gaussians on the line: w N(m, 1) + (1 - w) N(-m, 1).

    Along the linear path from N(0, 1) the mass has to jump from one mode to the other unless w = 1/2.

    Parameters
    ----------
    separation : float
        m, positive: half the distance of the means.
    weight : float
        w, between 0 and 1.

    Examples
    --------
    >>> gmm_pair(separation=4.0, weight=0.75).weights
    tensor([0.7500, 0.2500], dtype=torch.float64)
    """
    m = positive("separation", separation)
    w = positive("weight", weight)
    if w >= 1:
        raise InputError(f"weight must lie between 0 and 1, both excluded, not {weight}.")
    return GaussianMixture([[m], [-m]], scale=1.0, weights=[w, 1 - w])
