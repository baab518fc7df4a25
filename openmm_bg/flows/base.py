"""Invertible transforms, base densities, and the flow that joins the two.

Everything in this room works on tensors of shape ``(batch, dimension)`` and knows no molecule. A transform carries
latents ``z`` to samples ``y``; both directions return the log-determinant of the direction taken, so that the two of a
round trip add up to zero. Densities follow ``torch.distributions``: ``sample``, ``log_prob``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from openmm_bg.errors import InputError

TWO_PI = 2 * math.pi


def wrap(angle: Tensor) -> Tensor:
    """Angles in radian, of any shape, brought into [-pi, pi) (unit derivative everywhere)."""
    return angle - TWO_PI * torch.floor((angle + math.pi) / TWO_PI)


class _Permute(torch.autograd.Function):
    # plain indexing scatters in its backward pass, which takes ten times as long as the permutation it undoes

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor, dim: int) -> Tensor:
        ctx.save_for_backward(order, inverse)
        ctx.dim = dim
        return x.index_select(dim, order)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        order, inverse = ctx.saved_tensors
        return _Permute.apply(gradient, inverse, order, ctx.dim), None, None, None


def permute(x: Tensor, order: Tensor, inverse: Tensor, dim: int = 1) -> Tensor:
    """Columns (or rows, ``dim=0``) of a matrix in another order; ``inverse`` is ``argsort(order)``."""
    return _Permute.apply(x, order, inverse, dim)


class Transform(nn.Module):
    """An invertible map of R^d, of the torus, or of a product of both.

    Subclasses implement both directions; ``context`` is a ``(batch, features)`` tensor that they may depend on.

    Attributes
    ----------
    dimension : int
    context_dimension : int
        0 where the transform takes no context.
    """

    def __init__(self, dimension: int, context_dimension: int = 0):
        super().__init__()
        self.dimension = dimension
        self.context_dimension = context_dimension

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Latents to samples: ``(y, log|det dy/dz|)`` of shapes ``(batch, dimension)`` and ``(batch,)``."""
        raise NotImplementedError

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Samples to latents: ``(z, log|det dz/dy|)``."""
        raise NotImplementedError

    def push_score(self, z: Tensor, score: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Latents to samples, and with them the gradient of the log-density that they have.

        Parameters
        ----------
        z : Tensor, (batch, dimension)
            With a graph, which ``y`` continues.
        score : Tensor, (batch, dimension)
            Gradient of the log-density of the latents, at z.

        Returns
        -------
        y, log_det : Tensor
            As from :meth:`forward`.
        score : Tensor, (batch, dimension)
            Gradient of ``log q(y) = log q(z) - log|det dy/dz|`` with respect to y; detached.

        Notes
        -----
        Here through the inverse and autograd. Transforms that know better override it, and save a second pass through
        their networks (Vaitl, Winkler, Richter & Kessel, ICLR 2024, arXiv:2403.15881).
        """
        y, log_det = self(z, context)
        with torch.enable_grad():
            leaf = y.detach().requires_grad_()
            back, inverse_log_det = self.inverse(leaf, None if context is None else context.detach())
            (pulled,) = torch.autograd.grad((back * score.detach()).sum() + inverse_log_det.sum(), leaf)
        return y, log_det, pulled


class Composition(Transform):
    """Transforms applied one after the other, the first of the list to the latents first.

    Parameters
    ----------
    transforms : iterable of Transform
        At least one, all of one dimension.
    """

    def __init__(self, transforms: Iterable[Transform]):
        transforms = list(transforms)
        if not transforms or len({t.dimension for t in transforms}) != 1:
            raise ValueError("a Composition needs at least one transform, all of one dimension")
        super().__init__(transforms[0].dimension, max(t.context_dimension for t in transforms))
        self.transforms = nn.ModuleList(transforms)

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        total = z.new_zeros(len(z))
        for transform in self.transforms:
            z, log_det = transform(z, context if transform.context_dimension else None)
            total = total + log_det
        return z, total

    def push_score(self, z: Tensor, score: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        total = z.new_zeros(len(z))
        for transform in self.transforms:
            z, log_det, score = transform.push_score(z, score, context if transform.context_dimension else None)
            total = total + log_det
        return z, total, score

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        total = y.new_zeros(len(y))
        for transform in reversed(self.transforms):
            y, log_det = transform.inverse(y, context if transform.context_dimension else None)
            total = total + log_det
        return y, total


class Base(nn.Module):
    """A product of normals and of uniform densities on the circle [-pi, pi).

    Its *broadened* copy replaces each normal by ``(1 - share) N(0, 1) + share N(0, scale^2)``: independent heavy tails,
    which cost almost nothing where the flow is right and keep the density from vanishing where a few coordinates are
    off.

    Parameters
    ----------
    circular : sequence of bool
        One entry per dimension: True for a uniform angle, False for a normal.
    std : float
        Standard deviation of the normals.

    Examples
    --------
    >>> base = Base([False, True])
    >>> z = base.sample(3, torch.Generator().manual_seed(0))
    >>> base.log_prob(z).shape
    torch.Size([3])
    """

    share = 0.02
    scale = 4.0

    def __init__(self, circular: Iterable[bool], std: float = 1.0):
        super().__init__()
        self.std = float(std)
        if not 0 < self.std < math.inf:
            raise InputError(f"std must be a positive finite number, not {std}.")
        circular = [bool(c) for c in circular]
        self.register_buffer("circular", torch.tensor(circular, dtype=torch.bool), persistent=False)
        # known without asking the device
        self._angles = any(circular)
        # follows the module through .to(dtype)
        self.register_buffer("_like", torch.zeros(1), persistent=False)

    @property
    def dimension(self) -> int:
        return len(self.circular)

    def sample(self, n: int, generator: torch.Generator | None = None, *, broadened: bool = False) -> Tensor:
        """``n`` independent draws, ``(n, dimension)``, in the dtype of the module."""
        like = self._like
        options = {"generator": generator, "dtype": like.dtype, "device": like.device}
        z = torch.randn(n, self.dimension, **options)
        if broadened:
            wide = torch.rand(n, self.dimension, **options) < self.share
            z = torch.where(wide, self.scale * z, z)
        z = self.std * z
        if self._angles:
            angle = (torch.rand(n, self.dimension, **options) * 2 - 1) * math.pi
            z = torch.where(self.circular, angle, z)
        return z

    def score(self, z: Tensor) -> Tensor:
        """Gradient of the log-density, ``(batch, dimension)``."""
        normal = -z / self.std**2
        return torch.where(self.circular, 0.0, normal) if self._angles else normal

    def log_prob(self, z: Tensor, *, broadened: bool = False) -> Tensor:
        """Log-density, ``(batch,)``; -inf for angles outside [-pi, pi] and for values that are not finite."""
        unit = z / self.std
        constant = 0.5 * math.log(TWO_PI) + math.log(self.std)
        normal = -0.5 * unit.square() - constant
        if broadened:
            wide = -0.5 * (unit / self.scale).square() - constant - math.log(self.scale)
            normal = torch.logaddexp(normal + math.log1p(-self.share), wide + math.log(self.share))
        if self._angles:
            # as tensors, filled where they live: two plain numbers would meet in float32
            inside, outside = z.new_full((), -math.log(TWO_PI)), z.new_full((), -math.inf)
            uniform = torch.where(z.abs() <= math.pi * (1 + 1e-6), inside, outside)
            normal = torch.where(self.circular, uniform, normal)
        value = normal.sum(-1)
        return torch.where(torch.isfinite(z).all(-1), value, -math.inf)


class Flow(nn.Module):
    """A density that can be sampled and evaluated: a base pushed through a transform.

    Subclasses may factorise instead; what the other rooms rely on is ``dimension``, :meth:`sample`, :meth:`rsample`,
    :meth:`log_probs` and :meth:`log_prob`.

    Parameters
    ----------
    base : Base
    transform : Transform

    Examples
    --------
    >>> from openmm_bg.flows import AffineCoupling
    >>> flow = Flow(Base([False] * 2), Composition([AffineCoupling(torch.tensor([True, False]))]))
    >>> y, log_prob = flow.sample(5, torch.Generator().manual_seed(0))
    >>> bool(torch.allclose(flow.log_prob(y), log_prob))
    True
    """

    def __init__(self, base: Base, transform: Transform):
        super().__init__()
        if base.dimension != transform.dimension:
            raise ValueError(f"the base has {base.dimension} dimensions and the transform {transform.dimension}")
        self.base = base
        self.transform = transform

    @property
    def dimension(self) -> int:
        return self.base.dimension

    def rsample(self, n: int, generator: torch.Generator | None = None, *, broadened: bool = False) -> Tensor:
        """``n`` draws that carry the gradient to the parameters, ``(n, dimension)``."""
        return self.transform(self.base.sample(n, generator, broadened=broadened))[0]

    @torch.no_grad()
    def sample(
        self, n: int, generator: torch.Generator | None = None, *, broadened: bool = False
    ) -> tuple[Tensor, Tensor]:
        """``n`` draws and their log-density: ``(n, dimension)`` and ``(n,)``."""
        z = self.base.sample(n, generator, broadened=broadened)
        y, log_det = self.transform(z)
        return y, self.base.log_prob(z, broadened=broadened) - log_det

    def log_probs(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Log-densities of the flow and of its broadened copy at ``y``, from one pass; -inf outside the support."""
        inside = torch.isfinite(y).all(-1)
        z, log_det = self.transform.inverse(torch.where(inside[:, None], y, 0.0))
        plain, broad = (self.base.log_prob(z, broadened=b) + log_det for b in (False, True))
        return torch.where(inside, plain, -math.inf), torch.where(inside, broad, -math.inf)

    def log_prob(self, y: Tensor) -> Tensor:
        """Log-density at ``y``, ``(batch,)``; -inf outside the support."""
        return self.log_probs(y)[0]
