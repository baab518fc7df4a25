"""The target in the coordinates of the flow: what an objective differentiates."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor

from openmm_bg.generator import BoltzmannGenerator


class Target:
    """Reduced energy of internal coordinates, ``u(x(q)) - log_volume(q)``: minus the log of the density of q, up to Z.

    ``scale`` multiplies the energy alone, not the volume: the target at T / scale, where T is the temperature of the
    generator. Counts what it evaluates in ``evaluations``.
    """

    def __init__(self, generator: BoltzmannGenerator, dtype: torch.dtype, device: torch.device | str = "cpu"):
        self.energy = generator.energy
        if torch.device(device).type != "cpu":
            self.energy = copy.deepcopy(self.energy).to(device)
        self.coordinates = None
        if generator.coordinates is not None:
            self.coordinates = type(generator.coordinates).from_config(generator.coordinates.config()).to(device, dtype)
        self.evaluations = 0

    def value_and_gradient(self, q: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        """``(n,)`` and ``(n, dimension)``, detached; +inf and zero where q is outside the support."""
        self.evaluations += len(q)
        if self.coordinates is None:
            energy, force = self.energy.value_and_gradient(q)
            return scale * energy, scale * force
        inside = torch.isfinite(q).all(-1)
        q = torch.where(inside[:, None], q.detach(), 0.0).requires_grad_()
        x, log_volume = self.coordinates.inverse(q)
        inside = inside & torch.isfinite(log_volume)
        energy, force = self.energy.value_and_gradient(torch.where(inside[:, None, None], x.detach(), math.nan))
        inside = inside & torch.isfinite(energy)
        work = (torch.where(inside[:, None, None], force, 0.0) * torch.nan_to_num(x)).sum((1, 2))
        pulled = scale * work - torch.where(inside, log_volume, 0.0)
        (gradient,) = torch.autograd.grad(pulled.sum(), q)
        value = torch.where(inside, scale * energy - log_volume, math.inf)
        return value.detach(), torch.where(inside[:, None], gradient, 0.0)

    @torch.no_grad()
    def value(self, q: Tensor, scale: float = 1.0) -> Tensor:
        """``(n,)``; +inf outside the support."""
        self.evaluations += len(q)
        if self.coordinates is None:
            return scale * self.energy(q)
        x, log_volume = self.coordinates.inverse(q)
        return torch.where(torch.isfinite(log_volume), scale * self.energy(x) - log_volume, math.inf)

    @torch.no_grad()
    def from_energies(self, q: Tensor, energy: Tensor, scale: float = 1.0) -> Tensor:
        """What :meth:`value` gives, from reduced energies ``(n,)`` that are known already: nothing is evaluated."""
        energy = scale * energy
        if self.coordinates is None:
            return energy
        _, log_volume = self.coordinates.inverse(q)
        return torch.where(torch.isfinite(log_volume), energy - log_volume, math.inf)
