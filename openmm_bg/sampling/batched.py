"""Many walkers at once: Langevin dynamics on a torch energy, one batched evaluation per step.

The same leapfrog-middle scheme as :mod:`openmm_bg.sampling.dynamics`, with all walkers in one tensor. Where an OpenMM
Context pays its overhead for one conformation, a compiled kernel here pays it once for hundreds: on a small molecule
one core takes several times the steps that a loop over Contexts would.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import openmm
import torch
from openmm import unit
from torch import Tensor

from openmm_bg.energies import ForceFieldEnergy
from openmm_bg.errors import InputError
from openmm_bg.sampling.dynamics import interval_of, unstable
from openmm_bg.units import GAS_CONSTANT, kelvin, nanometers, per_picosecond, picoseconds

__all__ = ["BatchedLangevin", "batchable"]


def batchable(system: openmm.System) -> str | None:
    """None where `BatchedLangevin` can run a System; else why it cannot."""
    if system.getNumConstraints():
        return "it has constraints"
    atoms = range(system.getNumParticles())
    if any(system.isVirtualSite(i) for i in atoms):
        return "it has virtual sites"
    if any(system.getParticleMass(i)._value <= 0 for i in atoms):
        return "it has particles without mass"
    if system.usesPeriodicBoundaryConditions():
        return "it is periodic"
    with warnings.catch_warnings():
        # which forces have no torch form is what is asked here
        warnings.simplefilter("ignore")
        rest = ForceFieldEnergy(system, 300.0, compile=False).fallback
    return f"{', '.join(rest)} has no torch form" if rest else None


class BatchedLangevin:
    """Walkers with positions, velocities and temperatures of their own, moved together.

    Parameters
    ----------
    energy : ForceFieldEnergy
        Of a System without constraints, virtual sites or massless particles. Its temperature does not matter.
    positions : (walkers, atoms, 3), nm
    temperature : Quantity, float, or one number in K per walker
    timestep, friction : Quantity or float
        ps, 1/ps.
    generator : torch.Generator
        Every random number comes from it; walkers live on its device.
    dtype : torch.dtype
        float32 is twice as fast; its rounding is far below the noise of the thermostat.

    Attributes
    ----------
    positions, velocities : Tensor (walkers, atoms, 3)
        nm and nm/ps; velocities half a step behind the positions.
    temperatures : Tensor (walkers,)
        K.
    force_evaluations : int

    Examples
    --------
    >>> import openmm_bg as bg
    >>> molecule = bg.systems.load("alanine_dipeptide")
    >>> energy = bg.ForceFieldEnergy(molecule.system, 300, compile=False)
    >>> walkers = BatchedLangevin(
    ...     energy, molecule.positions[None].repeat(8, 0), temperature=300, timestep=0.001, friction=1.0,
    ...     generator=torch.Generator().manual_seed(1),
    ... )
    >>> walkers.draw_velocities()
    >>> walkers.advance(2)
    >>> walkers.potential_energy().shape
    torch.Size([8])
    """

    def __init__(
        self,
        energy: ForceFieldEnergy,
        positions: Any,
        *,
        temperature: Any,
        timestep: Any,
        friction: Any,
        generator: torch.Generator,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        why = batchable(energy.system)
        if why:
            raise InputError(f"Batched dynamics cannot run this System: {why}; use simulate or replica_exchange.")
        self.energy, self.generator = energy, generator
        device = generator.device
        if not isinstance(positions, Tensor):
            positions = torch.as_tensor(np.array(nanometers(positions)))
        x = positions.detach().to(device, dtype, copy=True)
        if x.ndim != 3 or x.shape[1:] != (energy.num_atoms, 3) or len(x) == 0:
            raise InputError(
                f"positions have the shape {tuple(x.shape)}; give an array of shape (walkers, {energy.num_atoms}, 3)."
            )
        if not bool(torch.isfinite(x).all()):
            raise InputError("The starting positions contain NaN or infinite coordinates.")
        self.positions, self.velocities = x, torch.zeros_like(x)
        self.timestep, self.friction = picoseconds(timestep), per_picosecond(friction)
        self._interval = interval_of(self.timestep, self.friction)
        masses = [energy.system.getParticleMass(i).value_in_unit(unit.dalton) for i in range(energy.num_atoms)]
        self._inverse_mass = 1 / torch.tensor(masses, device=device, dtype=dtype)[:, None]
        self._centre = torch.tensor(masses, device=device, dtype=dtype)[:, None] / sum(masses)
        # gradients come in units of the energy's kT
        self._pull = -energy.thermal_energy * self._inverse_mass
        self.set_temperature(temperature)
        self.force_evaluations = 0
        self._floats = self._is_translation_invariant()

    def __len__(self) -> int:
        return len(self.positions)

    def set_temperature(self, temperature: Any) -> None:
        """One temperature, or one per walker, in K. Velocities stay as they are."""
        if isinstance(temperature, Tensor | np.ndarray | list | tuple):
            values = [kelvin(float(t)) for t in temperature]
            if len(values) != len(self):
                raise InputError(f"There are {len(values)} temperatures for {len(self)} walkers; give one for each.")
        else:
            values = [kelvin(temperature)] * len(self)
        self.temperatures = torch.tensor(values, dtype=torch.float64, device=self.positions.device)
        thermal = GAS_CONSTANT * self.temperatures[:, None, None].to(self.positions)
        self._spread = torch.sqrt(thermal * self._inverse_mass)

    def draw_velocities(self) -> None:
        """Fresh velocities in equilibrium with the positions as they are; see `LangevinPropagator.draw_velocities`."""
        half = 0.5 * self.timestep
        noise = self._noise()
        here = self._acceleration(self.positions)
        ahead = self._acceleration(self.positions + half * noise)
        self.velocities = noise + half * (0.5 * (ahead - here) - here)

    def advance(self, steps: int) -> None:
        """Take `steps` leapfrog steps with all walkers, with friction and noise between and at the end.

        Raises
        ------
        InputError
            Where a walker's energy is no longer finite: the time step is too long, or atoms overlap.
        """
        x, v, dt = self.positions.clone(), self.velocities.clone(), self.timestep
        worst = torch.full((len(x),), -math.inf, dtype=x.dtype, device=x.device)
        done = 0
        while done < steps:
            n = min(self._interval, steps - done)
            for _ in range(n):
                u, gradient = self.energy.value_and_gradient(x)
                # looked at once, at the end: a broken walker has +inf and no force
                worst = torch.maximum(worst, u)
                v.addcmul_(gradient, self._pull, value=dt)
                x.add_(v, alpha=dt)
            done += n
            keep = math.exp(-self.friction * dt * n)
            new = keep * v + math.sqrt(1 - keep * keep) * self._noise()
            x.add_(new - v, alpha=0.5 * dt)
            v = new
        self.force_evaluations += steps * len(x)
        broken = ~torch.isfinite(worst) | ~torch.isfinite(x).flatten(1).all(1)
        if bool(broken.any()):
            walker = int(broken.nonzero()[0, 0])
            raise unstable(float(self.temperatures[walker]), self.timestep, f"the energy of walker {walker} is lost")
        if self._floats:
            # a free molecule diffuses away, and float32 with it
            x = x - (self._centre * x).sum(1, keepdim=True)
        self.positions, self.velocities = x, v

    def potential_energy(self) -> Tensor:
        """Potential energies of the positions, ``(walkers,)`` in kJ/mol, float64."""
        self.force_evaluations += len(self)
        energy = self.energy(self.positions).double() * self.energy.thermal_energy
        if not bool(torch.isfinite(energy).all()):
            walker = int((~torch.isfinite(energy)).nonzero()[0, 0])
            raise unstable(float(self.temperatures[walker]), self.timestep, f"the energy of walker {walker} is lost")
        return energy

    def permute(self, order: Tensor) -> None:
        """Walker i goes on from where walker ``order[i]`` stands, velocities scaled to its own temperature."""
        scale = torch.sqrt(self.temperatures / self.temperatures[order])[:, None, None].to(self.velocities)
        self.positions, self.velocities = self.positions[order], self.velocities[order] * scale

    def _acceleration(self, x: Tensor) -> Tensor:
        self.force_evaluations += len(x)
        return self._pull * self.energy.value_and_gradient(x)[1]

    def _noise(self) -> Tensor:
        x = self.positions
        return self._spread * torch.randn(x.shape, generator=self.generator, dtype=x.dtype, device=x.device)

    def _is_translation_invariant(self) -> bool:
        x = self.positions[:1].double()
        here, there = self.energy(x), self.energy(x + 1.0)
        return bool((here - there).abs() < 1e-6 * (1 + here.abs()))
