"""Densities on the torus of the free torsions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from openmm_bg.flows.autoregressive import AutoregressiveSpline
from openmm_bg.flows.base import TWO_PI, Base, Composition, Flow, wrap
from openmm_bg.flows.coupling import AffineCoupling
from openmm_bg.flows.masks import alternating_masks


class SplineTorsions(Flow):
    """Autoregressive circular splines over a uniform base.

    The broadened copy mixes every conditional with the uniform density, ``(1 - share) q_i + share / 2 pi``: no torsion
    is out of reach, and a torsion that is missed costs the same however many others there are.

    Parameters
    ----------
    multiplicity : sequence of int
        3 for a methyl rotor, else 1.
    bins, hidden, order, conditions
        See :class:`AutoregressiveSpline`.
    """

    share = 0.02

    def __init__(
        self,
        multiplicity: Sequence[int],
        *,
        bins: int = 12,
        hidden: int = 48,
        order: int = 3,
        conditions: Sequence[Sequence[int]] | None = None,
    ):
        super().__init__(
            Base([True] * len(multiplicity)),
            AutoregressiveSpline(multiplicity, bins=bins, hidden=hidden, order=order, conditions=conditions),
        )

    @property
    def multiplicity(self) -> Tensor:
        """``(dimension,)``, 3 for a rotor."""
        return self.transform.multiplicity

    @torch.no_grad()
    def initialize(self, angles: Tensor) -> None:
        """Turn every circle so that its emptiest place, in samples ``(n, dimension)``, is the cut."""
        multiplicity = self.transform.multiplicity
        cuts = emptiest_angle(wrap(angles * multiplicity)) / multiplicity
        self.transform.turn.copy_(wrap(cuts + math.pi))

    def rsample(self, n: int, generator: torch.Generator | None = None, *, broadened: bool = False) -> Tensor:
        if not broadened:
            return super().rsample(n, generator)
        like = self.base._like
        options = {"generator": generator, "dtype": like.dtype, "device": like.device}
        z = self.base.sample(n, generator)
        loose = torch.rand(n, self.dimension, **options) < self.share
        anywhere = (torch.rand(n, self.dimension, **options) * 2 - 1) * math.pi
        return self.transform.draw(z, (loose, anywhere))[0]

    @torch.no_grad()
    def sample(
        self, n: int, generator: torch.Generator | None = None, *, broadened: bool = False
    ) -> tuple[Tensor, Tensor]:
        if not broadened:
            return super().sample(n, generator)
        angles = self.rsample(n, generator, broadened=True)
        return angles, self.log_probs(angles)[1]

    def log_probs(self, y: Tensor) -> tuple[Tensor, Tensor]:
        inside = torch.isfinite(y).all(-1)
        _, log_derivative = self.transform.conditionals(torch.where(inside[:, None], y, 0.0))
        log_conditionals = log_derivative - math.log(TWO_PI)
        floor = log_derivative.new_full((), math.log(self.share / TWO_PI))
        broad = torch.logaddexp(log_conditionals + math.log1p(-self.share), floor).sum(-1)
        plain = log_conditionals.sum(-1)
        return torch.where(inside, plain, -math.inf), torch.where(inside, broad, -math.inf)


class AffineTorsions(Flow):
    """RealNVP on the unrolled torus: each circle is cut at its emptiest place and treated as part of the real line.

    What falls outside one turn is out of the support: such draws come back as NaN with a log-density of -inf, and are
    rejected by whoever asked for them. Rotors draw one of their equivalent turns at random.

    Parameters
    ----------
    multiplicity : sequence of int
    layers, hidden
        Affine couplings and the units of their networks.
    generator : torch.Generator
        Draws which half each coupling moves.
    """

    def __init__(
        self,
        multiplicity: Sequence[int],
        *,
        layers: int = 8,
        hidden: Sequence[int] = (128, 128),
        generator: torch.Generator,
    ):
        dimension = len(multiplicity)
        masks = alternating_masks(dimension, layers, generator)
        transforms = [AffineCoupling(mask, hidden=hidden) for mask in masks if mask.any()]
        super().__init__(Base([False] * dimension), Composition(transforms))
        self.register_buffer("multiplicity", torch.tensor([float(m) for m in multiplicity]), persistent=False)
        self.register_buffer("centre", torch.zeros(dimension))
        self.register_buffer("scale", torch.ones(dimension))

    @torch.no_grad()
    def initialize(self, angles: Tensor) -> None:
        """Cut every circle at its emptiest place and take the spread of samples ``(n, dimension)`` as its scale."""
        turned = wrap(angles * self.multiplicity)
        centre = wrap(emptiest_angle(turned) + math.pi)
        offset = wrap(turned - centre)
        # the mean moves into the couplings' shift; the cut must stay where it is
        self.centre.copy_(centre)
        self.scale.copy_(offset.std(0).clamp(min=0.05, max=1.0))

    def rsample(self, n: int, generator: torch.Generator | None = None, *, broadened: bool = False) -> Tensor:
        unrolled = self.transform(self.base.sample(n, generator, broadened=broadened))[0] * self.scale
        inside = (unrolled.abs() < math.pi).all(-1, keepdim=True)
        turn = torch.rand(n, self.dimension, generator=generator, dtype=unrolled.dtype, device=unrolled.device)
        turn = torch.floor(turn * self.multiplicity)
        angles = wrap((wrap(unrolled + self.centre) + TWO_PI * turn) / self.multiplicity)
        return torch.where(inside, angles, math.nan)

    @torch.no_grad()
    def sample(
        self, n: int, generator: torch.Generator | None = None, *, broadened: bool = False
    ) -> tuple[Tensor, Tensor]:
        angles = self.rsample(n, generator, broadened=broadened)
        return angles, self.log_probs(angles)[1 if broadened else 0]

    def log_probs(self, y: Tensor) -> tuple[Tensor, Tensor]:
        inside = torch.isfinite(y).all(-1)
        turned = wrap(torch.where(inside[:, None], y, 0.0) * self.multiplicity)
        z, log_det = self.transform.inverse(wrap(turned - self.centre) / self.scale)
        # the factor m of turning and 1/m of drawing one of m turns cancel
        log_det = log_det - self.scale.log().sum()
        plain, broad = (self.base.log_prob(z, broadened=b) + log_det for b in (False, True))
        return torch.where(inside, plain, -math.inf), torch.where(inside, broad, -math.inf)


def emptiest_angle(angles: Tensor, bins: int = 72) -> Tensor:
    """For every column of ``(n, d)`` angles the middle of the widest, emptiest stretch of its smoothed histogram."""
    index = ((angles + math.pi) / TWO_PI * bins).long().clamp(0, bins - 1)
    counts = torch.zeros(bins, angles.shape[1], dtype=torch.float64)
    counts.scatter_add_(0, index.cpu(), torch.ones(index.shape, dtype=torch.float64))
    window = torch.arange(-9, 10)
    kernel = torch.exp(-0.5 * (window / 3.0) ** 2)
    smooth = sum(k * counts.roll(int(w), 0) for w, k in zip(window, kernel, strict=True))
    return ((smooth.argmin(0) + 0.5) / bins * TWO_PI - math.pi).to(angles)
