"""Virtual sites: particles whose place follows from those of others."""

from __future__ import annotations

import numpy as np
import openmm
import torch
from openmm import unit
from torch import Tensor

from openmm_bg.energies.model import NotNative


class VirtualSites(torch.nn.Module):
    """The virtual sites of a System.

    TwoParticleAverageSite, ThreeParticleAverageSite, OutOfPlaneSite and LocalCoordinatesSite, placed as OpenMM does.

    Parameters
    ----------
    system
        Its sites are read once.

    Attributes
    ----------
    any : bool
        Whether there are sites at all.

    Raises
    ------
    NotNative
        If a site is of another kind, or depends on itself.
    """

    def __init__(self, system: openmm.System) -> None:
        super().__init__()
        self._sites = [_read(system, i) for i in range(system.getNumParticles()) if system.isVirtualSite(i)]
        self._order()
        self.any: bool = bool(self._sites)

    def _order(self) -> None:
        """Sites whose parents are sites come after them."""
        waiting, ordered = {site.index: site for site in self._sites}, []
        while waiting:
            ready = [site for site in waiting.values() if not any(p in waiting for p in site.parents)]
            if not ready:
                raise NotNative("virtual sites that depend on each other in a circle")
            ordered += ready
            for site in ready:
                del waiting[site.index]
        self._sites = ordered

    def place(self, x: Tensor) -> Tensor:
        """Positions with every site computed from its parents; what `x` says of the sites is ignored.

        Parameters
        ----------
        x
            ``(batch, atoms, 3)`` in nm; not changed.

        Returns
        -------
        Tensor
            The same shape, differentiable in the parents.
        """
        if not self.any:
            return x
        columns = list(x.unbind(1))
        for site in self._sites:
            columns[site.index] = site.position([columns[p] for p in site.parents])
        return torch.stack(columns, 1)


class _Average:
    """A weighted mean of its parents."""

    def __init__(self, index: int, parents: list[int], weights: list[float]) -> None:
        self.index, self.parents, self.weights = index, parents, weights

    def position(self, parents: list[Tensor]) -> Tensor:
        return sum((w * p for w, p in zip(self.weights, parents, strict=True)), torch.zeros_like(parents[0]))


class _OutOfPlane:
    """From the first of three parents, along the vectors to the others and their cross product."""

    def __init__(self, index: int, parents: list[int], weights: list[float]) -> None:
        self.index, self.parents, self.weights = index, parents, weights

    def position(self, parents: list[Tensor]) -> Tensor:
        origin, second, third = parents
        a, b = second - origin, third - origin
        w12, w13, cross = self.weights
        return origin + w12 * a + w13 * b + cross * torch.linalg.cross(a, b)


class _Local:
    """A fixed place in a frame that the parents span."""

    def __init__(
        self, index: int, parents: list[int], origin: list[float], x: list[float], y: list[float], place: list[float]
    ) -> None:
        self.index, self.parents, self.place = index, parents, place
        self.origin, self.x, self.y = (_Average(index, parents, weights) for weights in (origin, x, y))

    def position(self, parents: list[Tensor]) -> Tensor:
        first, toward = self.x.position(parents), self.y.position(parents)
        z = torch.linalg.cross(first, toward)
        z = z / torch.linalg.vector_norm(z, dim=-1, keepdim=True)
        first = first / torch.linalg.vector_norm(first, dim=-1, keepdim=True)
        second = torch.linalg.cross(z, first)
        a, b, c = self.place
        return self.origin.position(parents) + a * first + b * second + c * z


def _read(system: openmm.System, index: int) -> _Average | _OutOfPlane | _Local:
    site = system.getVirtualSite(index)
    parents = [site.getParticle(k) for k in range(site.getNumParticles())]
    if index in parents:
        raise NotNative("a virtual site that depends on itself")
    match type(site).__name__:
        case "TwoParticleAverageSite" | "ThreeParticleAverageSite":
            return _Average(index, parents, [site.getWeight(k) for k in range(len(parents))])
        case "OutOfPlaneSite":
            return _OutOfPlane(index, parents, [site.getWeight12(), site.getWeight13(), site.getWeightCross()])
        case "LocalCoordinatesSite":
            place = np.asarray(site.getLocalPosition().value_in_unit(unit.nanometer), dtype=np.float64)
            weights = [list(w) for w in (site.getOriginWeights(), site.getXWeights(), site.getYWeights())]
            return _Local(index, parents, *weights, [float(v) for v in place])
        case kind:
            raise NotNative(f"virtual sites of the kind {kind}")
