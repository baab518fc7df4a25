"""The target of a generator in the latents of its flow: what a path or a second flow is learned on."""

from __future__ import annotations

import torch
from torch import Tensor

from openmm_bg.energies import Energy
from openmm_bg.errors import InputError
from openmm_bg.flows import MolecularFlow
from openmm_bg.generator import BoltzmannGenerator
from openmm_bg.sampling.target import Target


class LatentEnergy(Energy):
    """Reduced energy of the latents of a molecule: free torsions on the circle, everything stiff near N(0, 1).

    The latents of an informed generator that is not trained yet are its internal coordinates, centred and scaled by the
    force constants (or whitened by data): what an integrator of velocities needs. ``exp(-u)`` is the density of the
    latents, volume elements included, and its integral the Z of the generator.

    Parameters
    ----------
    generator : BoltzmannGenerator
        With an energy, informed, of a :class:`~openmm_bg.flows.MolecularFlow`. What its flow has learned becomes part
        of the coordinates.

    Attributes
    ----------
    circular : list of bool
        True for the torsions, which come first.

    Examples
    --------
    >>> import openmm_bg as bg
    >>> molecule = bg.systems.load("alanine_dipeptide")
    >>> generator = bg.BoltzmannGenerator.for_molecule(
    ...     molecule.topology, molecule.system, 300, positions=molecule.positions, compile=False
    ... )
    >>> latent = LatentEnergy(generator)
    >>> latent.event_shape, sum(latent.circular)
    ((60,), 7)
    """

    def __init__(self, generator: BoltzmannGenerator) -> None:
        if generator.energy is None or not isinstance(generator.flow, MolecularFlow):
            raise InputError("A latent energy needs a generator with an energy and a MolecularFlow.")
        if not generator.informed:
            raise InputError("This generator knows neither chirality nor scales yet; give positions to for_molecule.")
        super().__init__((generator.flow.dimension,))
        # a tuple hides the generator from this module's own state
        self._generator = (generator,)
        self._target = Target(generator, torch.float64)
        torsions = 0 if generator.flow.torsions is None else len(generator.flow.chart.free)
        self.circular = [True] * torsions + [False] * (generator.flow.dimension - torsions)

    def internal(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Internal coordinates ``(n, dimension)`` of latents, float64, and the log-determinant of the map."""
        flow = self._generator[0].flow
        torsions = sum(self.circular)
        t, z = w[:, :torsions].double(), w[:, torsions:].double()
        y, log_det = flow.stiff(z, flow.context(t))
        return flow.chart.join(t, y), log_det

    @torch.no_grad()
    def positions(self, w: Tensor) -> Tensor:
        """Conformations of latents, ``(n, atoms, 3)`` in nm, float64."""
        return self._generator[0].place(self.internal(w)[0])

    @torch.no_grad()
    def latents(self, positions: Tensor) -> Tensor:
        """Latents ``(n, dimension)`` of conformations ``(n, atoms, 3)`` in nm, float64: the inverse of `positions`."""
        flow = self._generator[0].flow
        q, _ = self._target.coordinates(positions.double())
        t, y = flow.chart.split(q)
        return torch.cat([t, flow.stiff.inverse(y, flow.context(t))[0]], -1)

    def reduced(self, w: Tensor) -> Tensor:
        u, gradient = self.reduced_and_gradient(w)
        # first derivatives are those of the energy; nothing here needs second ones
        return u + (gradient * (w - w.detach())).sum(-1) if w.requires_grad else u

    def reduced_and_gradient(self, w: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            leaf = w.detach().double().requires_grad_()
            q, log_det = self.internal(leaf)
            u, force = self._target.value_and_gradient(q.detach())
            inside = torch.isfinite(u) & torch.isfinite(q).all(-1)
            work = (torch.where(inside[:, None], force, 0.0) * torch.nan_to_num(q)).sum(-1)
            (gradient,) = torch.autograd.grad((work - log_det).sum(), leaf)
        value = torch.where(inside, u - log_det.detach(), torch.inf)
        return value.to(w.dtype), torch.where(inside[:, None], gradient, 0.0).to(w.dtype)
