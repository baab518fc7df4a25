"""The default flow of a molecule: free torsions first, then bonds, angles and stiff torsions given them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from openmm_bg.flows.base import Base, Composition, Flow, Transform
from openmm_bg.flows.chart import Chart
from openmm_bg.flows.coupling import AffineCoupling, SplineCoupling
from openmm_bg.flows.local import Surroundings
from openmm_bg.flows.masks import alternating_masks, graph_masks
from openmm_bg.flows.mixing import Mixing
from openmm_bg.flows.networks import fourier_features
from openmm_bg.flows.torsions import AffineTorsions, SplineTorsions
from openmm_bg.flows.whitening import ConditionalAffine, ConditionalWhitening


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
    torsion_conditions : sequence of sequences of int, optional
        For every free torsion the ones before it, by their place in ``torsions``, that its spline is given; see
        :func:`~openmm_bg.flows.local.nearby_conditions`. None for all of them.
    neighbours : sequence of (int, int), optional
        Pairs of stiff coordinates that belong in opposite halves, so that a coupling sees the neighbours of what it
        moves; None for random halves.
    spline_layers, spline_bins, spline_bound
        Spline couplings between the affine ones and the conditional affine map, for densities that are skewed or
        anharmonic; their bins, on [-bound, bound] in units of standard deviations.
    mixing : bool
        A trained linear map of all stiff coordinates behind every second affine coupling. What few data leave wrong in
        the whitening, it takes out.

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
        torsion_conditions: Sequence[Sequence[int]] | None = None,
        neighbours: Sequence[Sequence[int]] | None = None,
        spline_layers: int = 0,
        spline_bins: int = 8,
        spline_bound: float = 5.0,
        mixing: bool = False,
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
        # what is not asked for is not written: files keep the fingerprint they always had
        if blocks is not None:
            self._config |= {
                "blocks": [int(b) for b in blocks],
                "bonded_blocks": [[int(i), int(j)] for i, j in bonded_blocks],
                "reach": reach,
            }
        if torsion_conditions is not None:
            if torsion_model != "spline":
                raise ValueError("torsion_conditions need the torsion_model 'spline'")
            self._config["torsion_conditions"] = [[int(j) for j in before] for before in torsion_conditions]
        if neighbours is not None:
            self._config["neighbours"] = [[int(i), int(j)] for i, j in neighbours]
        if spline_layers:
            self._config |= {
                "spline_layers": spline_layers,
                "spline_bins": spline_bins,
                "spline_bound": spline_bound,
            }
        if mixing:
            self._config["mixing"] = True
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
                self.torsions = SplineTorsions(
                    multiplicity, bins=torsion_bins, hidden=torsion_hidden, order=order, conditions=torsion_conditions
                )
            else:
                self.torsions = AffineTorsions(multiplicity, hidden=(hidden, hidden), generator=masks)
            context = 2 * order * len(torsions)
            around = None
            if blocks is not None:
                features = [blocks[i] for i in torsions for _ in range(2 * order)]
                around = Surroundings.of([blocks[i] for i in self.chart.stiff.tolist()], features, bonded_blocks, reach)
            edges = None
            if neighbours is not None:
                place = {column: i for i, column in enumerate(self.chart.stiff.tolist())}
                if not {i for pair in self._config["neighbours"] for i in pair} <= place.keys():
                    raise ValueError("neighbours must be pairs of stiff coordinates")
                edges = [(place[i], place[j]) for i, j in self._config["neighbours"]]

            def halves(count: int) -> list[Tensor]:
                if edges is None:
                    return [mask for mask in alternating_masks(stiff, count, masks) if mask.any()]
                return [mask for mask in graph_masks(stiff, edges, count, masks) if mask.any()]

            wide, real = (hidden, hidden), torch.zeros(stiff, dtype=torch.bool)
            spline = {"bins": spline_bins, "bound": spline_bound, "hidden": wide, "surroundings": around}
            couplings: list[Transform] = []
            for i, mask in enumerate(halves(layers)):
                couplings.append(AffineCoupling(mask, context, wide, surroundings=around))
                if mixing and i % 2:
                    couplings.append(Mixing(stiff, context))
            self.stiff = Composition(
                [
                    *couplings,
                    *(SplineCoupling(mask, real, context, **spline) for mask in halves(spline_layers)),
                    ConditionalAffine(stiff, context, wide, around),
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
        return None if self.torsions is None else fourier_features(t.T, self.order).T

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
