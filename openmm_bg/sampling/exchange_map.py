"""The map between two ensembles of one molecule that two generators make."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from openmm_bg.errors import InputError
from openmm_bg.flows import AffineTorsions, Base, ContinuousFlow, MolecularFlow, wrap
from openmm_bg.generator import BoltzmannGenerator
from openmm_bg.sampling.latents import latents_of

__all__ = ["ExchangeMap", "GeneratorMap", "Mapped"]

ROUND_TRIP_TOLERANCE = 1e-6
"""Largest error of a latent that was decoded and encoded again; float64 leaves some 1e-12."""


class Mapped(NamedTuple):
    """Configurations that a map has made.

    Attributes
    ----------
    positions : Tensor
        As many as went in, in nm; NaN where the map is not defined.
    log_det : Tensor, (n,)
        Log-determinant of the direction taken; -inf where the map is not defined.
    """

    positions: Tensor
    log_det: Tensor


class ExchangeMap(Protocol):
    """An invertible map between the configurations of two ensembles, fast to target."""

    def forward(self, x: Tensor) -> Mapped:
        """T x with log|det T'(x)|."""
        ...

    def inverse(self, x: Tensor) -> Mapped:
        """T^-1 x with log|det (T^-1)'(x)|."""
        ...


class GeneratorMap:
    r"""The map between two ensembles of one molecule that two generators make, each trained on one of them.

    Both flows start from the same noise: what one encodes, the other decodes,

    .. math::

        T = F_t \circ F_h^{-1}, \qquad \log|\det T'(x)| = \log q_h(x) - \log q_t(T x),

    q being the plain densities of the flows in Cartesian coordinates, with volume elements and, where bonds are
    constrained, mass-metric terms. The pose of the seed atoms stays. A density may sum over several latents of one
    conformation; a map may not:

    - the flows are used without the broadened copies that a generator mixes in;
    - a threefold rotor keeps its image. Splines cover the circle three times over and turn with it; where a flow knows
      one image only and draws one of three at random (:class:`~openmm_bg.flows.AffineTorsions`), the image of T x is
      that of x;
    - hydrogens keep their labels and centres their chirality: both generators must have the same, and conformations
      with others are outside the domain;
    - T x and T^-1 x have to lead back, to ``ROUND_TRIP_TOLERANCE`` in the latents, or the map is not defined there.

    Parameters
    ----------
    fast : BoltzmannGenerator or None
        Of the fast ensemble. None: noise, the base density of the target's flow. Its configurations are then the
        latents themselves, ``(n, columns)``, of reduced energy ``-map.fast.log_prob(z)`` and drawn by
        ``map.fast.sample(n)``; exchange with them is the independence move of the target's generator.
    target : BoltzmannGenerator
        Of the target ensemble. Both are used as they are at every call: see that they are not trained meanwhile.

    Raises
    ------
    InputError
        If the generators differ in their coordinates, constraints, chirality, hydrogen labels or latents, are not
        informed, or have a flow that is no bijection to rounding.

    Examples
    --------
    >>> import openmm_bg as bg
    >>> fast, target = (bg.BoltzmannGenerator(None, bg.flows.RealNVP(2, layers=2, seed=s)) for s in (1, 2))
    >>> x = torch.tensor([[0.3, -1.2]], dtype=torch.float64)
    >>> y, log_det = GeneratorMap(fast, target).forward(x)
    >>> back, log_det_inverse = GeneratorMap(fast, target).inverse(y)
    >>> bool(torch.allclose(back, x)), bool(torch.allclose(log_det, -log_det_inverse))
    (True, True)
    """

    def __init__(self, fast: BoltzmannGenerator | None, target: BoltzmannGenerator):
        self.target = _Generator(target)
        self.fast: _Generator | _Noise = _Noise(self.target) if fast is None else _Generator(fast)
        if fast is not None:
            _check_same_coordinates(fast, target)
            if not self.fast.starts_as(self.target):
                raise InputError(
                    "The flows of the two generators do not start from the same noise; build both with the same "
                    "settings."
                )

    @torch.no_grad()
    def forward(self, x: Tensor, frame: Any = None) -> Mapped:
        """T x with log|det T'(x)|.

        Parameters
        ----------
        x : Tensor, (n, atoms, 3)
            nm, in the ensemble of `fast`.
        frame : Frame, optional
            Where T x is placed; by default where x stands.
        """
        z, log_q = self.fast.encode(x)
        _, made = self._decode(z, log_q, self.fast.frame(x) if frame is None else frame)
        return made

    @torch.no_grad()
    def inverse(self, x: Tensor, frame: Any = None) -> Mapped:
        """T^-1 x with log|det (T^-1)'(x)|; see :meth:`forward`."""
        z, log_q = self.target.encode(x)
        made, _ = self._decode(z, log_q, self.target.frame(x) if frame is None else frame)
        return made

    @torch.no_grad()
    def exchange(self, fast: Tensor, target: Tensor) -> tuple[Mapped, Mapped]:
        """``forward(fast)`` and ``inverse(target)``, each flow called once for both; for two generators.

        What networks cost for a few conformations is the call, so this takes two thirds of the time.
        """
        (z, log_q), (other, other_log_q) = self.fast.encode(fast), self.target.encode(target)
        here, there = self.fast.frame(fast), self.target.frame(target)
        frame = None if here is None else type(here)(*(torch.cat(part) for part in zip(here, there, strict=True)))
        up, down = self._decode(torch.cat([z, other]), torch.cat([log_q, other_log_q]), frame)
        n = len(z)
        return Mapped(*(part[:n] for part in down)), Mapped(*(part[n:] for part in up))

    def _decode(self, latents: Tensor, log_q: Tensor, frame: Any) -> tuple[Mapped, Mapped]:
        """What either flow makes of latents, whose conformation has the log density `log_q` under its own flow."""
        defined = torch.isfinite(log_q)
        latents = torch.where(defined[:, None], latents, 0.0)
        made = [space.decode(latents, frame) for space in (self.fast, self.target)]
        found = [space.encode(x) for space, x in zip((self.fast, self.target), made, strict=True)]
        # both flows have to lead back, whichever way is taken: what may be entered may be left
        for z, log_q_new in found:
            near = self.target.distance(z, latents) <= ROUND_TRIP_TOLERANCE
            defined = defined & torch.isfinite(log_q_new) & near
        return tuple(
            Mapped(
                torch.where(defined.view(-1, *[1] * (x.ndim - 1)), x, math.nan),
                torch.where(defined, log_q - log_q_new, -math.inf),
            )
            for x, (_, log_q_new) in zip(made, found, strict=True)
        )


class _Generator:
    """Conformations and latents of a generator, one to one.

    Latents are one tensor ``(n, columns)``: those of the flow, then the images of rotors that they do not tell.
    """

    def __init__(self, generator: BoltzmannGenerator):
        if not generator.informed:
            raise InputError(
                "This generator knows neither chirality nor scales yet; give positions to for_molecule, or fit it."
            )
        flow = generator.flow
        if any(p.dtype != torch.float64 for p in flow.parameters()):
            raise InputError("The flow is not in float64, so its two directions do not agree; call flow.double().")
        if isinstance(flow, ContinuousFlow):
            raise InputError(
                "A continuous flow is integrated both ways and no bijection to rounding, so nothing can be exchanged "
                "through it; use a flow of couplings or splines."
            )
        self.generator = generator
        self.latents = latents_of(flow)
        torsions = flow.torsions if isinstance(flow, MolecularFlow) else flow
        self.images = torch.ones(0, dtype=torch.float64)
        if isinstance(torsions, AffineTorsions):
            self.images = torsions.multiplicity
        self.base = Base(self.latents.circular.tolist(), self.latents.std).double()

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Latents (n, columns) of conformations and the plain log density; -inf outside the support."""
        coordinates = self.generator.coordinates
        if coordinates is None:
            inside = torch.isfinite(x).all(-1)
            q, log_volume = torch.where(inside[:, None], x, 0.0), x.new_zeros(len(x))
        else:
            q, log_volume = coordinates(x)
            inside = torch.isfinite(log_volume)
        z, image, log_q = self.latents.inverse(q)
        return torch.cat([z, image], 1), torch.where(inside, log_q - log_volume, -math.inf)

    def decode(self, latents: Tensor, frame: Any = None) -> Tensor:
        """Conformations (n, atoms, 3) of latents; NaN outside the support."""
        z, image = latents.tensor_split([self.base.dimension], 1)
        return self.generator.place(self.latents.forward(z, image), frame)

    def frame(self, x: Tensor) -> Any:
        return self.generator.frame(x)

    def distance(self, one: Tensor, other: Tensor) -> Tensor:
        """Largest difference of any latent, (n,): on the circle for angles, modulo all images for images."""
        z, image = (one - other).tensor_split([self.base.dimension], 1)
        z = torch.where(self.base.circular, wrap(z), z)
        worst = torch.cat([z, wrap(image / self.images)], 1).abs().amax(-1)
        return torch.nan_to_num(worst, nan=math.inf)

    def starts_as(self, other: _Generator) -> bool:
        """Whether the latents of two generators mean the same, so that one may decode what the other encoded."""
        mine, theirs = (getattr(space.generator.flow, "chart", None) for space in (self, other))
        if (mine is None) != (theirs is None):
            return False
        pairs = [(self.base.circular, other.base.circular), (self.images, other.images)]
        if mine is not None:
            pairs += [(mine.free, theirs.free), (mine.siblings, theirs.siblings)]
        return self.base.std == other.base.std and all(torch.equal(a, b) for a, b in pairs)


class _Noise:
    """The latents of a generator as configurations of their own."""

    def __init__(self, space: _Generator):
        self.space = space

    def encode(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return z, self.log_prob(z)

    def decode(self, latents: Tensor, frame: Any = None) -> Tensor:
        return latents

    def frame(self, z: Tensor) -> None:
        return None

    def log_prob(self, z: Tensor) -> Tensor:
        """Log density of the base, (n,), all images of a rotor being equally likely."""
        return self.space.base.log_prob(z[:, : self.space.base.dimension]) - self.space.images.log().sum()

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Independent draws, (n, columns)."""
        z = self.space.base.sample(n, generator)
        image = torch.rand(n, len(self.space.images), generator=generator, dtype=torch.float64)
        return torch.cat([z, 2 * math.pi * torch.floor(image * self.space.images)], 1)


def _check_same_coordinates(fast: BoltzmannGenerator, target: BoltzmannGenerator) -> None:
    one, other = fast.coordinates, target.coordinates
    if (one is None) != (other is None):
        raise InputError("One of the two generators has internal coordinates and the other has none.")
    if one is not None:
        if one.zmatrix != other.zmatrix:
            raise InputError("The two generators have different z-matrices; build both from the same topology.")
        if one.constraints != other.constraints or (one.constraints and one.masses.tolist() != other.masses.tolist()):
            raise InputError(
                "The two generators were built for different constraints or masses; build both with the same System."
            )
        if one.half_turns.tolist() != other.half_turns.tolist():
            raise InputError(
                "The two generators keep different chirality or hydrogen labels; build both with the same positions."
            )
    if fast.flow.dimension != target.flow.dimension:
        raise InputError(
            f"The flows of the two generators have {fast.flow.dimension} and {target.flow.dimension} dimensions; give "
            "two generators of one molecule."
        )
