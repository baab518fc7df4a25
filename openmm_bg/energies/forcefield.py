"""The energy of an OpenMM System in torch: batched, differentiable, equal to OpenMM's own."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import openmm
import torch
from torch import Tensor

from openmm_bg import units
from openmm_bg.energies.base import Energy
from openmm_bg.energies.context import ContextEnergy, contributes_nothing, copy_system, find_platform, known_gradient
from openmm_bg.energies.eager_sums import SumsEnergy
from openmm_bg.energies.eager_terms import TermsEnergy
from openmm_bg.energies.kernel import Kernel, NoCompiler
from openmm_bg.energies.model import Model, NotNative
from openmm_bg.energies.readers import read
from openmm_bg.energies.sites import VirtualSites
from openmm_bg.errors import InputError

# Conformations at a time in the plain form, so that its arrays stay in a processor's cache and memory stays flat.
_EAGER_ELEMENTS = 2**17


class ForceFieldEnergy(Energy):
    """Reduced energy U/kT of an OpenMM System as a batched torch function.

    Computed in torch, equal to OpenMM's Reference platform up to rounding, are: HarmonicBondForce,
    HarmonicAngleForce, PeriodicTorsionForce, RBTorsionForce, CMAPTorsionForce, NonbondedForce and GBSAOBCForce
    (without cutoff or with CutoffNonPeriodic), CustomBondForce, CustomAngleForce, CustomTorsionForce,
    CustomExternalForce, CustomCompoundBondForce, CustomNonbondedForce and CustomGBForce, with their tabulated
    functions, global parameters and parameter offsets; virtual sites are placed from their parents. Any other
    force, and whatever is periodic, is left to OpenMM in a `ContextEnergy`, after one warning that names it: slow,
    and differentiable once.

    Rows with NaN or infinite coordinates, and conformations without a finite energy (coincident atoms,
    collinear dihedrals), have the energy +inf and zero gradient. Nothing is remembered between calls.

    Parameters
    ----------
    system
        Copied: later changes to it are not seen.
    temperature
        Quantity, or a number in K.
    platform
        Name of the OpenMM platform for what is left to OpenMM; see `ContextEnergy` for the default.
    compile
        Evaluate energy and gradient by one compiled kernel, ten times faster or more. It is generated at the first
        call, which takes some seconds, and kept on disk (``$OPENMM_BG_CACHE``) for every System with the same kinds
        of forces. Where no C++ compiler works, a warning says so and the plain torch form is used, as with False.
        Second derivatives always come from the plain form.

    Attributes
    ----------
    system : openmm.System
    temperature : float
        K.
    thermal_energy : float
        kT in kJ/mol.
    num_atoms : int
    native, fallback : tuple of str
        Class names of the forces computed by torch, and of those left to OpenMM.
    global_parameters : dict
        The values in force; see `set_global_parameters`.

    Examples
    --------
    >>> system = openmm.System()
    >>> for _ in range(2):
    ...     _ = system.addParticle(12.0)
    >>> bond = openmm.HarmonicBondForce()
    >>> _ = bond.addBond(0, 1, 0.15, 1000.0)
    >>> _ = system.addForce(bond)
    >>> energy = ForceFieldEnergy(system, temperature=300)
    >>> x = torch.tensor([[[0.0, 0.0, 0.0], [0.25, 0.0, 0.0]]], dtype=torch.float64)
    >>> round(float(energy.potential(x)), 6)
    5.0
    """

    def __init__(
        self,
        system: openmm.System,
        temperature: Any,
        *,
        platform: str | None = None,
        compile: bool = True,
    ) -> None:
        own_system = copy_system(system)
        super().__init__((own_system.getNumParticles(), 3))
        self.system: openmm.System = own_system
        self.temperature: float = units.kelvin(temperature)
        self.thermal_energy: float = units.thermal_energy(self.temperature)
        self.num_atoms: int = own_system.getNumParticles()
        if platform is not None:
            find_platform(platform)

        self._model, native, fallback = _read_system(own_system)
        self.native: tuple[str, ...] = tuple(native)
        self.fallback: tuple[str, ...] = tuple(name for name, _ in fallback.values())
        self._sites: VirtualSites | None = VirtualSites(own_system) if native else None
        globals_now = dict(self._model.global_parameters)
        self.terms = torch.nn.ModuleList(
            [
                *(TermsEnergy(terms, globals_now) for terms in self._model.terms),
                *(SumsEnergy(sums, globals_now) for sums in self._model.sums),
            ]
        )
        self._widest: int = max((_rows(part) for part in (*self._model.terms, *self._model.sums)), default=1)
        self._rest: ContextEnergy | None = None
        if fallback:
            self._rest = ContextEnergy(system, temperature, forces=list(fallback), platform=platform)
            named = ", ".join(f"{name} ({reason})" for name, reason in fallback.values())
            warnings.warn(
                f"These forces are evaluated by OpenMM on the {self._rest.platform} platform, one conformation "
                f"after another and with first derivatives only: {named}.",
                stacklevel=2,
            )
        self._rest_parameters: set[str] = set()
        for index in fallback:
            for name, value in _global_parameters(own_system.getForce(index)).items():
                self._rest_parameters.add(name)
                globals_now.setdefault(name, value)
        self.global_parameters: dict[str, float] = globals_now
        self._kernel: Kernel | None = Kernel(self._model, globals_now) if compile and native else None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ForceFieldEnergy:
        # Constants follow to another device but stay float64: `.to(torch.float32)` must not round them.
        return super()._apply(lambda t: t.to(fn(t).device), recurse)

    def set_global_parameters(self, values: Mapping[str, float]) -> None:
        """Give global parameters of the forces other values, such as the lambdas of an alchemical System.

        Nothing is compiled again.

        Parameters
        ----------
        values
            New values by name; parameters not named keep theirs.

        Raises
        ------
        InputError
            If no force has a parameter of that name, or a value is not finite.
        """
        for name, value in values.items():
            if name not in self.global_parameters:
                known = ", ".join(sorted(self.global_parameters)) or "none at all"
                raise InputError(f"There is no global parameter {name!r}; this System has {known}.")
            if not abs(float(value)) < float("inf"):
                raise InputError(f"The global parameter {name!r} must be a finite number, not {value!r}.")
        new = {name: float(value) for name, value in values.items()}
        self.global_parameters.update(new)
        for term in self.terms:
            term.set_global_parameters(self.global_parameters)
        if self._kernel is not None:
            self._kernel.set_global_parameters(self.global_parameters)
        rest = {name: value for name, value in new.items() if name in self._rest_parameters}
        if self._rest is not None and rest:
            self._rest.set_global_parameters(rest)

    def potential(self, x: Tensor) -> Tensor:
        """Potential energies in kJ/mol, ``(batch,)``; x as in `forward`."""
        return self(x) * self.thermal_energy

    def reduced(self, x: Tensor) -> Tensor:
        u: Tensor | None = None
        if len(self.terms) and len(x):
            placed = self._placed(x)
            if self._kernel is None:
                u = self._plain(placed)
            elif placed.requires_grad and torch.is_grad_enabled():
                u = known_gradient(self._native_gradient, placed, self._plain)
            else:
                u, _ = self._native(placed, gradient=False)
        if u is None:
            u = x.new_zeros(len(x))
        return u if self._rest is None else u + self._rest.reduced(x)

    def reduced_and_gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.detach()
        if not (len(self.terms) and len(x)):
            u, gradient = x.new_zeros(len(x)), torch.zeros_like(x)
        else:
            if self._sites is not None and self._sites.any:
                with torch.enable_grad():
                    x.requires_grad_()
                    placed = self._placed(x)
                    u, on_placed = self._native_gradient(placed.detach())
                    (gradient,) = torch.autograd.grad(placed, x, on_placed)
                x = x.detach()
            else:
                u, gradient = self._native_gradient(x)
        if self._rest is not None:
            rest, rest_gradient = self._rest.reduced_and_gradient(x)
            u, gradient = u + rest, gradient + rest_gradient
        return u, gradient

    def _placed(self, x: Tensor) -> Tensor:
        return self._sites.place(x) if self._sites is not None and self._sites.any else x

    def _native_gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        u, gradient = self._native(x, gradient=True)
        assert gradient is not None
        return u, gradient

    def _native(self, x: Tensor, gradient: bool) -> tuple[Tensor, Tensor | None]:
        """Reduced energies of what is native, detached, from the kernel or, without one, from the plain form."""
        if self._kernel is not None:
            try:
                u, g = self._kernel(x, gradient, 1 / self.thermal_energy)
                return u.to(x.dtype), None if g is None else g.to(x.dtype)
            except NoCompiler as reason:
                self._kernel = None
                warnings.warn(
                    f"The energy is not compiled, and some ten times slower than it could be: {reason}.", stacklevel=2
                )
        if not gradient:
            with torch.no_grad():
                return self._plain(x), None
        values, gradients = [], []
        for part in x.detach().split(self._rows_at_a_time()):
            with torch.enable_grad():
                part = part.requires_grad_()
                u = self._plain(part)
                gradients += torch.autograd.grad(u.sum(), part)
            values.append(u.detach())
        return torch.cat(values), torch.cat(gradients)

    def _plain(self, x: Tensor) -> Tensor:
        """Reduced energies of what is native, as torch operations that can be differentiated again and again."""
        parts = x.permute(1, 2, 0).split(self._rows_at_a_time(), dim=-1)
        return torch.cat([self._sum(part.contiguous()) for part in parts]) / self.thermal_energy

    def _sum(self, x: Tensor) -> Tensor:
        """x is (atoms, 3, batch): batch last."""
        return sum((term(x) for term in self.terms), x.new_zeros(x.shape[-1]))

    def _rows_at_a_time(self) -> int:
        return min(4096, max(16, _EAGER_ELEMENTS // self._widest))


def _read_system(system: openmm.System) -> tuple[Model, list[str], dict[int, tuple[str, str]]]:
    """The model, the names of the forces in it, and by index those that are not, with the reason."""
    model = Model(system.getNumParticles())
    native: list[str] = []
    fallback: dict[int, tuple[str, str]] = {}
    try:
        VirtualSites(system)
        sites = None
    except NotNative as reason:
        sites = str(reason)
    for index, force in enumerate(system.getForces()):
        if contributes_nothing(force):
            continue
        name = type(force).__name__
        if sites is not None:
            fallback[index] = (name, sites)
            continue
        try:
            contribution = read(force, system)
        except NotNative as reason:
            fallback[index] = (name, str(reason))
            continue
        native.append(name)
        model.terms += [terms for terms in contribution.terms if len(terms.particles)]
        model.sums += contribution.sums
        for parameter, value in contribution.global_parameters.items():
            model.global_parameters.setdefault(parameter, value)
    return model, native, fallback


def _rows(part: Any) -> int:
    return len(part.particles) if hasattr(part, "particles") else len(part.pairs)


def _global_parameters(force: openmm.Force) -> dict[str, float]:
    count = getattr(force, "getNumGlobalParameters", lambda: 0)()
    return {force.getGlobalParameterName(k): force.getGlobalParameterDefaultValue(k) for k in range(count)}
