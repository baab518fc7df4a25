"""The default flow of a molecule: free torsions first, then bonds, angles and stiff torsions given them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from openmm_bg.flows.base import Base, Composition, Flow, permute, wrap
from openmm_bg.flows.coupling import AffineCoupling, alternating_masks
from openmm_bg.flows.local import Surroundings
from openmm_bg.flows.networks import fourier_features
from openmm_bg.flows.torsions import AffineTorsions, SplineTorsions
from openmm_bg.flows.whitening import ConditionalAffine, ConditionalWhitening


class Chart(nn.Module):
    """Internal coordinates q to (free torsions t, stiff coordinates y), a shear of unit Jacobian.

    A stiff torsion is measured from its centre, in (-pi, pi). A rotor's torsion becomes the mean over its three
    hydrogens, ``t = phi_1 + (d_2 + d_3) / 3`` with d the torsions of the two that hang on the first: relabelling them
    cyclically turns t by exactly 2 pi / 3 and leaves its density alone.

    Parameters
    ----------
    dimension : int
    torsions : sequence of int
        Columns of q that are free torsions.
    rotors : dict of int to (int, int)
        For a free torsion that is a rotor, the columns of the two torsions that hang on it.
    stiff_torsions : sequence of int
        Columns of q that are torsions and not free.
    """

    def __init__(
        self,
        dimension: int,
        torsions: Sequence[int],
        rotors: dict[int, tuple[int, int]],
        stiff_torsions: Sequence[int],
    ):
        super().__init__()
        stiff = [i for i in range(dimension) if i not in set(torsions)]
        siblings = torch.zeros(len(stiff), len(torsions))
        for torsion, (second, third) in rotors.items():
            for other in (second, third):
                siblings[stiff.index(other), list(torsions).index(torsion)] = 1
        periodic = torch.tensor([i in set(stiff_torsions) for i in stiff], dtype=torch.bool)
        self.register_buffer("free", torch.tensor(list(torsions), dtype=torch.long), persistent=False)
        self.register_buffer("stiff", torch.tensor(stiff, dtype=torch.long), persistent=False)
        self.register_buffer("siblings", siblings, persistent=False)
        self.register_buffer("periodic", periodic, persistent=False)
        self.register_buffer("together", torch.cat([self.free, self.stiff]), persistent=False)
        self.register_buffer("order", torch.argsort(self.together), persistent=False)
        self.register_buffer("centre", torch.zeros(len(stiff)))

    @torch.no_grad()
    def set_centre(self, q: Tensor) -> None:
        """Measure stiff torsions from their circular mean over samples ``(n, dimension)``."""
        angles = q[:, self.stiff]
        mean = torch.atan2(angles.sin().mean(0), angles.cos().mean(0))
        self.centre.copy_(torch.where(self.periodic, mean, 0.0))

    def split(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """``(t, y)`` of shapes ``(batch, torsions)`` and ``(batch, stiff)``."""
        free, stiff = permute(q, self.together, self.order).split([len(self.free), len(self.stiff)], 1)
        t = wrap(free + wrap(stiff) @ self.siblings / 3)
        return t, torch.where(self.periodic, wrap(stiff - self.centre), stiff)

    def join(self, t: Tensor, y: Tensor) -> Tensor:
        """The inverse of :meth:`split`; rows of NaN where a stiff torsion has left (-pi, pi) about its centre."""
        stiff = y + self.centre
        inside = ~(self.periodic & (y.abs() >= math.pi)).any(-1, keepdim=True)
        stiff = torch.where(self.periodic, wrap(stiff), stiff)
        q = permute(torch.cat([wrap(t - stiff @ self.siblings / 3), stiff], -1), self.order, self.together)
        return torch.where(inside, q, math.nan)


class MolecularFlow(Flow):
    """A flow shaped by chemistry: ``q(t) q(y | t)``, t the free torsions, y everything stiff.

    Torsions follow :class:`SplineTorsions` (``torsion_model="spline"``) or :class:`AffineTorsions` (``"realnvp"``). The
    stiff coordinates are regressed on cos and sin of the torsions and whitened (both fixed by data), then a conditional
    diagonal affine map and RealNVP couplings with the torsions as context take out what is left. Starts as the fitted
    Gaussian.

    Parameters
    ----------
    dimension, torsions, rotors, stiff_torsions
        See :class:`Chart`.
    torsion_model : {"spline", "realnvp"}
    layers, hidden
        Couplings of the stiff coordinates, and units of their two hidden layers.
    torsion_bins, torsion_hidden, order
        Bins and units of the torsion splines; Fourier order of all conditions on torsions.
    seed : int
        Draws masks and initial weights.
    blocks : sequence of int, optional
        The block (residue) of every coordinate. With it the networks of the stiff coordinates see the blocks within
        ``reach`` and the torsions one block further, ``hidden`` units each, and the cost grows linearly with a chain.
    bonded_blocks : sequence of (int, int)
        Which blocks are bonded to each other.
    reach : int

    Examples
    --------
    >>> flow = MolecularFlow(6, torsions=[5], rotors={}, stiff_torsions=[], layers=2, hidden=16)
    >>> flow.initialize(torch.randn(100, 6) * 0.1)
    >>> q, log_prob = flow.sample(3, torch.Generator().manual_seed(0))
    >>> bool(torch.allclose(flow.log_prob(q), log_prob, atol=1e-4))
    True
    """

    def __init__(
        self,
        dimension: int,
        torsions: Sequence[int],
        rotors: dict[int, tuple[int, int]],
        stiff_torsions: Sequence[int],
        *,
        torsion_model: Literal["spline", "realnvp"] = "spline",
        layers: int = 8,
        hidden: int = 128,
        torsion_bins: int = 12,
        torsion_hidden: int = 48,
        order: int = 3,
        seed: int = 0,
        blocks: Sequence[int] | None = None,
        bonded_blocks: Sequence[Sequence[int]] = (),
        reach: int = 1,
    ):
        nn.Module.__init__(self)
        if torsion_model not in ("spline", "realnvp"):
            raise ValueError(f"torsion_model must be 'spline' or 'realnvp', not {torsion_model!r}")
        self._config = {
            "dimension": dimension,
            "torsions": [int(i) for i in torsions],
            "rotors": [[int(i), int(j), int(k)] for i, (j, k) in rotors.items()],
            "stiff_torsions": [int(i) for i in stiff_torsions],
            "torsion_model": torsion_model,
            "layers": layers,
            "hidden": hidden,
            "torsion_bins": torsion_bins,
            "torsion_hidden": torsion_hidden,
            "order": order,
            "seed": seed,
        }
        if blocks is not None:  # files of joint networks keep the fingerprint they always had
            self._config |= {
                "blocks": [int(b) for b in blocks],
                "bonded_blocks": [[int(i), int(j)] for i, j in bonded_blocks],
                "reach": reach,
            }
        self._dimension, self.order = dimension, order
        self.chart = Chart(dimension, torsions, rotors, stiff_torsions)
        multiplicity = [3 if i in rotors else 1 for i in torsions]
        stiff = dimension - len(torsions)
        if stiff == 0:
            raise ValueError("a MolecularFlow needs at least one stiff coordinate")
        masks = torch.Generator().manual_seed(seed)
        # initial weights come from torch's global stream: borrow it, seeded, and give it back
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if not torsions:
                self.torsions = None
            elif torsion_model == "spline":
                self.torsions = SplineTorsions(multiplicity, bins=torsion_bins, hidden=torsion_hidden, order=order)
            else:
                self.torsions = AffineTorsions(multiplicity, hidden=(hidden, hidden), generator=masks)
            context = 2 * order * len(torsions)
            around = None
            if blocks is not None:
                features = [blocks[i] for i in torsions for _ in range(2 * order)]
                around = Surroundings.of([blocks[i] for i in self.chart.stiff.tolist()], features, bonded_blocks, reach)
            transforms = [
                AffineCoupling(mask, context, (hidden, hidden), surroundings=around)
                for mask in alternating_masks(stiff, layers, masks)
                if mask.any()
            ]
            self.stiff = Composition(
                [
                    *transforms,
                    ConditionalAffine(stiff, context, (hidden, hidden), around),
                    ConditionalWhitening(stiff, context),
                ]
            )
        self.base = Base([False] * stiff)
        self.register_buffer("informed", torch.zeros((), dtype=torch.bool))

    @property
    def dimension(self) -> int:
        return self._dimension

    def config(self) -> dict[str, Any]:
        """Everything that :meth:`from_config` needs to build the same architecture."""
        return dict(self._config)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> MolecularFlow:
        rotors = {i: (j, k) for i, j, k in config["rotors"]}
        return cls(**{**config, "rotors": rotors})

    def context(self, t: Tensor) -> Tensor | None:
        """What the stiff coordinates see of the torsions, ``(batch, 2 * order * torsions)``."""
        return None if self.torsions is None else fourier_features(t, self.order)

    @torch.no_grad()
    def initialize(self, q: Tensor) -> None:
        """Centres, regression, whitening and cuts from samples ``(n, dimension)``; trained weights are left alone."""
        q = q.to(self.chart.centre)
        self.chart.set_centre(q)
        t, y = self.chart.split(q)
        if self.torsions is not None:
            self.torsions.initialize(t)
        self.stiff.transforms[-1].fit(y, self.context(t))
        self.informed.fill_(True)

    @torch.no_grad()
    def initialize_at(self, q: Tensor, scales: Tensor) -> None:
        """Start from one conformation ``(dimension,)`` and a guess of each coordinate's spread."""
        q = q.to(self.chart.centre)
        self.chart.set_centre(q[None])
        _, y = self.chart.split(q[None])
        self.stiff.transforms[-1].set_scales(y[0], scales.to(y)[self.chart.stiff])
        self.informed.fill_(True)

    def draw_torsions(self, n: int, generator: torch.Generator | None = None, *, broadened: bool = False) -> Tensor:
        """Free torsions alone, with gradient, ``(n, torsions)``."""
        if self.torsions is None:
            return self.base._like.new_zeros(n, 0)
        return self.torsions.rsample(n, generator, broadened=broadened)

    def draw_stiff(self, t: Tensor, generator: torch.Generator | None = None, *, broadened: bool = False) -> Tensor:
        """Stiff coordinates given torsions, with gradient, ``(batch, stiff)``."""
        z = self.base.sample(len(t), generator, broadened=broadened)
        return self.stiff(z, self.context(t))[0]

    def draw_stiff_with_score(
        self, t: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As :meth:`draw_stiff`, with the log-density given t and its gradient with respect to y, both detached."""
        z = self.base.sample(len(t), generator)
        y, log_det, score = self.stiff.push_score(z, self.base.score(z), self.context(t))
        return y, (self.base.log_prob(z) - log_det).detach(), score

    def log_prob_torsions(self, t: Tensor) -> Tensor:
        """Log-density of the free torsions, ``(batch,)``."""
        return t.new_zeros(len(t)) if self.torsions is None else self.torsions.log_prob(t)

    def log_prob_stiff(self, y: Tensor, t: Tensor) -> Tensor:
        """Log-density of the stiff coordinates given the torsions, ``(batch,)``."""
        z, log_det = self.stiff.inverse(y, self.context(t))
        return self.base.log_prob(z) + log_det

    def rsample(self, n: int, generator: torch.Generator | None = None, *, broadened: bool = False) -> Tensor:
        t = self.draw_torsions(n, generator, broadened=broadened)
        return self.chart.join(t, self.draw_stiff(t, generator, broadened=broadened))

    @torch.no_grad()
    def sample(
        self, n: int, generator: torch.Generator | None = None, *, broadened: bool = False
    ) -> tuple[Tensor, Tensor]:
        q = self.rsample(n, generator, broadened=broadened)
        # the density comes from the inverse pass, as it will for the current state of a simulation
        return q, self.log_probs(q)[1 if broadened else 0]

    def log_probs(self, y: Tensor) -> tuple[Tensor, Tensor]:
        inside = torch.isfinite(y).all(-1)
        t, stiff = self.chart.split(torch.where(inside[:, None], y, 0.0))
        z, log_det = self.stiff.inverse(stiff, self.context(t))
        plain, broad = (self.base.log_prob(z, broadened=b) + log_det for b in (False, True))
        if self.torsions is not None:
            log_t, log_t_broad = self.torsions.log_probs(t)
            plain, broad = plain + log_t, broad + log_t_broad
        return torch.where(inside, plain, -math.inf), torch.where(inside, broad, -math.inf)
