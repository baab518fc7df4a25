"""The energy as OpenMM itself computes it, one conformation after another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import openmm
import torch
from openmm import unit
from torch import Tensor

from openmm_bg import units
from openmm_bg.energies.base import Energy
from openmm_bg.energies.terms import contributes_nothing
from openmm_bg.errors import InputError


class ContextEnergy(Energy):
    """Reduced energy of an OpenMM System, or of some of its forces, evaluated in a Context.

    Works for every force OpenMM knows. Slow: one call per conformation; differentiable once, and a second
    derivative raises. Global parameters have their default values, the box is the System's default box.
    Virtual sites are placed from their parent particles, whatever `x` says, and have zero gradient.
    Thermostats, barostats and CMMotionRemover contribute nothing. A conformation whose energy or forces
    OpenMM finds not finite has the energy +inf and zero gradient, on every platform.

    Parameters
    ----------
    system
        Copied: later changes to it are not seen.
    temperature
        Quantity, or a number in K.
    forces
        Indices of the forces to include; all by default.
    platform
        Name of the platform. By default CPU (one thread) if there is a CustomGBForce, which Reference
        evaluates slowly; Reference in double precision otherwise.

    Attributes
    ----------
    system : openmm.System
    temperature : float
        K.
    thermal_energy : float
        kT in kJ/mol.
    num_atoms : int
    platform : str

    Examples
    --------
    >>> system = openmm.System()
    >>> _ = system.addParticle(12.0)
    >>> spring = openmm.CustomExternalForce("50*x^2")
    >>> _ = spring.addParticle(0)
    >>> _ = system.addForce(spring)
    >>> energy = ContextEnergy(system, 300)
    >>> round(float(energy.potential(torch.tensor([[[0.1, 0.0, 0.0]]], dtype=torch.float64))), 6)
    0.5
    """

    def __init__(
        self,
        system: openmm.System,
        temperature: Any,
        *,
        forces: Sequence[int] | None = None,
        platform: str | None = None,
    ) -> None:
        super().__init__((system.getNumParticles(), 3))
        self.system: openmm.System = copy_system(system)
        self.temperature: float = units.kelvin(temperature)
        self.thermal_energy: float = units.thermal_energy(self.temperature)
        self.num_atoms: int = system.getNumParticles()

        chosen = range(system.getNumForces()) if forces is None else [int(i) for i in forces]
        for i in chosen:
            if not 0 <= i < system.getNumForces():
                raise InputError(f"Force {i} does not exist: the System has {system.getNumForces()} forces.")
        self.forces: tuple[int, ...] = tuple(
            i for i in sorted(set(chosen)) if not contributes_nothing(self.system.getForce(i))
        )
        included = [self.system.getForce(i) for i in self.forces]
        slow_on_reference = any(isinstance(force, openmm.CustomGBForce) for force in included)
        self.platform: str = find_platform(platform or ("CPU" if slow_on_reference else "Reference"))
        self._virtual = np.array([system.isVirtualSite(i) for i in range(self.num_atoms)], dtype=bool)
        self._context: openmm.Context | None = None

    def __getstate__(self) -> dict[str, Any]:
        # A Context can neither be copied nor sent to another process; it is made again where it is needed.
        return {**self.__dict__, "_context": None}

    def potential(self, x: Tensor) -> Tensor:
        """Potential energies in kJ/mol, ``(batch,)``."""
        return self(x) * self.thermal_energy

    def reduced(self, x: Tensor) -> Tensor:
        return known_gradient(self.reduced_and_gradient, x)

    def reduced_and_gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        positions = x.detach().to(device="cpu", dtype=torch.float64).numpy()
        energies = np.full(len(positions), np.inf)
        gradients = np.zeros_like(positions)
        for row in np.flatnonzero(np.isfinite(positions).all((1, 2))):
            energy, force = self._evaluate(positions[row])
            if np.isfinite(energy) and np.isfinite(force).all():
                energies[row], gradients[row] = energy, -force
        energies /= self.thermal_energy
        gradients /= self.thermal_energy
        return torch.as_tensor(energies).to(x), torch.as_tensor(gradients).to(x)

    def _evaluate(self, positions: np.ndarray) -> tuple[float, np.ndarray]:
        """Energy in kJ/mol and forces in kJ/mol/nm; NaN where a platform finds NaN and raises."""
        if self._context is None:
            self._context = self._create_context()
        self._context.setPositions(positions)
        try:
            if self._virtual.any():
                self._context.computeVirtualSites()
            state = self._context.getState(energy=True, forces=True)
        except openmm.OpenMMException as error:
            if "coordinate is NaN" not in str(error):
                raise
            return np.nan, np.zeros_like(positions)
        energy = state.getPotentialEnergy().value_in_unit(unit.kilojoule_per_mole)
        forces = state.getForces(asNumpy=True).value_in_unit(unit.kilojoule_per_mole / unit.nanometer)
        return energy, np.where(self._virtual[:, None], 0.0, forces)

    def _create_context(self) -> openmm.Context:
        system = copy_system(self.system)
        for i in reversed(range(system.getNumForces())):
            if i not in self.forces:
                system.removeForce(i)
        properties = {"Threads": "1"} if self.platform == "CPU" else {}
        integrator = openmm.VerletIntegrator(0.001)
        return openmm.Context(system, integrator, openmm.Platform.getPlatform(self.platform), properties)


def find_platform(name: str) -> str:
    """The name, if OpenMM has a platform of this name here."""
    available = [openmm.Platform.getPlatform(i).getName() for i in range(openmm.Platform.getNumPlatforms())]
    if name not in available:
        raise InputError(f"There is no platform {name!r} here; choose one of {', '.join(available)}.")
    return name


def copy_system(system: openmm.System) -> openmm.System:
    """A deep copy, so that later changes to the original are not seen."""
    if not isinstance(system, openmm.System):
        raise InputError(f"An openmm.System is needed, not {type(system).__name__}.")
    return openmm.XmlSerializer.clone(system)


class _KnownGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, u: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(x, gradient)
        return u.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        x, gradient = ctx.saved_tensors
        return _FirstDerivative.apply(x, upstream, gradient), None, None


class _FirstDerivative(torch.autograd.Function):
    """Keeps the gradient attached to x, so that a derivative of it raises instead of coming out as zero."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, upstream: Tensor, gradient: Tensor) -> Tensor:
        return upstream.view(-1, *(1 for _ in x.shape[1:])) * gradient

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None]:
        raise RuntimeError(
            "Second derivatives were asked of an energy that gives first derivatives only "
            "(forces evaluated in an OpenMM Context, or compile=True)."
        )


def known_gradient(function: Callable[[Tensor], tuple[Tensor, Tensor]], x: Tensor) -> Tensor:
    """The u of ``function(x) -> (u, gradient)``, differentiable with that gradient; a second derivative raises."""
    u, gradient = function(x)
    return _KnownGradient.apply(x, u, gradient)
