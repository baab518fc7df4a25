"""Where a flow's samples come from: latents, and what latents alone do not tell.

A flow is one bijection between latents z and samples q. Rotors of :class:`~openmm_bg.flows.SplineTorsions` need nothing
more: their spline covers the circle three times over and each image of a rotor has latents of its own.
:class:`~openmm_bg.flows.AffineTorsions` map all images of a rotor to the same z and draw one at random; there the
bijection is between q and (z, image).
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from openmm_bg.errors import InputError
from openmm_bg.flows import (
    AffineTorsions,
    Base,
    ContinuousFlow,
    Flow,
    MolecularFlow,
    RealNVP,
    SplineFlow,
    SplineTorsions,
    wrap,
)


class Latents(Protocol):
    """The bijection of a flow, with the images of its rotors.

    Attributes
    ----------
    circular : Tensor of bool, (dimension,)
        Uniform on the circle; the others are normal.
    std : float
        Of the normals.
    """

    circular: Tensor
    std: float

    def inverse(self, q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Latents, images, both (n, ...), and the flow's log density (n,) of finite samples (n, dimension)."""
        ...

    def forward(self, z: Tensor, image: Tensor) -> Tensor:
        """Samples (n, dimension); rows outside the support are NaN."""
        ...


def latents_of(flow: Flow) -> Latents:
    """The latents of a flow.

    Raises
    ------
    InputError
        For a flow of another kind than those of :mod:`openmm_bg.flows` with a normal or circular base.
    """
    if isinstance(flow, MolecularFlow):
        return _Molecular(flow)
    if isinstance(flow, AffineTorsions):
        return _Unrolled(flow)
    # a subclass may have another density than that of its transform
    known = type(flow) is Flow or isinstance(flow, (RealNVP, SplineFlow, SplineTorsions, ContinuousFlow))
    if known and type(flow.base) is Base:
        return _Plain(flow)
    raise InputError(
        f"Steps in latent space need a flow with normal or circular latents, not a {type(flow).__name__}; use "
        "independent proposals."
    )


class _Plain:
    def __init__(self, flow: Flow):
        self.flow = flow
        self.circular, self.std = flow.base.circular, flow.base.std

    def inverse(self, q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z, log_det = self.flow.transform.inverse(q)
        return z, q.new_zeros(len(q), 0), self.flow.base.log_prob(z) + log_det

    def forward(self, z: Tensor, image: Tensor) -> Tensor:
        return self.flow.transform(z)[0]


class _Unrolled:
    """Circles that are cut open; the image is the whole turns that the unrolled angle lost."""

    def __init__(self, flow: AffineTorsions):
        self.flow = flow
        self.circular, self.std = flow.base.circular, flow.base.std

    def inverse(self, q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        flow = self.flow
        turned = q * flow.multiplicity - flow.centre
        unrolled = wrap(turned)
        z, log_det = flow.transform.inverse(unrolled / flow.scale)
        return z, turned - unrolled, flow.base.log_prob(z) + log_det - flow.scale.log().sum()

    def forward(self, z: Tensor, image: Tensor) -> Tensor:
        flow = self.flow
        unrolled = flow.transform(z)[0] * flow.scale
        inside = (unrolled.abs() < torch.pi).all(-1, keepdim=True)
        return torch.where(inside, wrap((unrolled + image + flow.centre) / flow.multiplicity), torch.nan)


class _Molecular:
    """Torsions first, then what is stiff given them."""

    def __init__(self, flow: MolecularFlow):
        self.flow = flow
        self.torsions = None if flow.torsions is None else latents_of(flow.torsions)
        parts = [flow.base.circular] if self.torsions is None else [self.torsions.circular, flow.base.circular]
        self.circular, self.std = torch.cat(parts), flow.base.std

    def inverse(self, q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        flow = self.flow
        t, y = flow.chart.split(q)
        z, log_det = flow.stiff.inverse(y, flow.context(t))
        log_prob = flow.base.log_prob(z) + log_det
        if self.torsions is None:
            return z, q.new_zeros(len(q), 0), log_prob
        z_t, image, log_prob_t = self.torsions.inverse(t)
        return torch.cat([z_t, z], 1), image, log_prob + log_prob_t

    def forward(self, z: Tensor, image: Tensor) -> Tensor:
        flow = self.flow
        free = len(flow.chart.free)
        t = z[:, :0] if self.torsions is None else self.torsions.forward(z[:, :free], image)
        return flow.chart.join(t, flow.stiff(z[:, free:], flow.context(t))[0])
