"""The energy of an OpenMM System in torch: batched, differentiable, equal to OpenMM's own."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import openmm
import torch
from torch import Tensor

from openmm_bg import units
from openmm_bg.energies.base import Energy
from openmm_bg.energies.context import ContextEnergy, copy_system, find_platform, known_gradient
from openmm_bg.energies.geometry import Catalogue, Geometry
from openmm_bg.energies.terms import Formula, NotNative, Tables, contributes_nothing, native_term

# Conformations at a time, so that memory stays flat: the eager arrays fit a processor's cache, and compiled
# code is made for one size (a new size would be compiled again, for many seconds).
_EAGER_ELEMENTS = 2**17
_COMPILED_ROWS = 256


class ForceFieldEnergy(Energy):
    """Reduced energy U/kT of an OpenMM System as a batched torch function.

    HarmonicBondForce, HarmonicAngleForce, PeriodicTorsionForce, NonbondedForce and GBSAOBCForce (both without
    cutoff) are computed in torch, equal to OpenMM's Reference platform up to rounding, and are differentiable
    twice. Any other force, and any feature outside the formulas (cutoffs, periodic boundaries, parameter
    offsets), is left to OpenMM in a `ContextEnergy`, after one warning that names it: slow, and differentiable
    once. With virtual sites every force goes there, since only OpenMM places them.

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
        Compile the torch part with `torch.compile`: several times faster after some twenty seconds of
        compilation per dtype, differentiable once. Where no compiler works, a warning says so and the plain
        form is used.

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

    pairs: Tensor
    angles: Tensor
    torsions: Tensor

    def __init__(
        self,
        system: openmm.System,
        temperature: Any,
        *,
        platform: str | None = None,
        compile: bool = False,
    ) -> None:
        own_system = copy_system(system)
        super().__init__((own_system.getNumParticles(), 3))
        self.system: openmm.System = own_system
        self.temperature: float = units.kelvin(temperature)
        self.thermal_energy: float = units.thermal_energy(self.temperature)
        self.num_atoms: int = own_system.getNumParticles()
        if platform is not None:
            find_platform(platform)

        virtual = any(own_system.isVirtualSite(i) for i in range(self.num_atoms))
        catalogue = Catalogue()
        terms, native, fallback = [], [], {}
        for index, force in _in_order(own_system):
            try:
                if virtual:
                    raise NotNative("virtual sites")
                terms.append(_Term(*native_term(force, catalogue)))
                native.append(type(force).__name__)
            except NotNative as reason:
                fallback[index] = (type(force).__name__, str(reason))
        self.native: tuple[str, ...] = tuple(native)
        self.fallback: tuple[str, ...] = tuple(name for name, _ in fallback.values())
        self.terms = torch.nn.ModuleList(terms)
        for name, table in catalogue.tables().items():
            self.register_buffer(name, table, persistent=False)
        self._rest: ContextEnergy | None = None
        if fallback:
            self._rest = ContextEnergy(system, temperature, forces=list(fallback), platform=platform)
            named = ", ".join(f"{name} ({reason})" for name, reason in fallback.values())
            warnings.warn(
                f"These forces are evaluated by OpenMM on the {self._rest.platform} platform, one conformation "
                f"after another and with first derivatives only: {named}.",
                stacklevel=2,
            )
        self._compile: bool = compile
        self._compiled: dict[str, Callable[..., Any]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_compiled": {}}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ForceFieldEnergy:
        # Constants follow to another device but stay float64: `.to(torch.float32)` must not round them.
        return super()._apply(lambda t: t.to(fn(t).device), recurse)

    def potential(self, x: Tensor) -> Tensor:
        """Potential energies in kJ/mol, ``(batch,)``; x as in `forward`."""
        return self(x) * self.thermal_energy

    def reduced(self, x: Tensor) -> Tensor:
        if self._compile and x.requires_grad and torch.is_grad_enabled():
            return known_gradient(self.reduced_and_gradient, x)
        u = x.new_zeros(len(x))
        if len(self.terms) and len(x):
            parts = x.permute(1, 2, 0).split(self._rows_at_a_time(), dim=-1)
            evaluate = self._compiled_value if self._compile else self._native
            u = torch.cat([evaluate(part.contiguous()) for part in parts])
        return u if self._rest is None else u + self._rest.reduced(x)

    def reduced_and_gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.detach()
        u, gradient = x.new_zeros(len(x)), torch.zeros_like(x)
        if len(self.terms) and len(x):
            parts = x.permute(1, 2, 0).split(self._rows_at_a_time(), dim=-1)
            evaluate = self._compiled_gradient if self._compile else self._native_gradient
            values, gradients = zip(*(evaluate(part.contiguous()) for part in parts), strict=True)
            u, gradient = torch.cat(values), torch.cat(gradients, -1).permute(2, 0, 1).contiguous()
        if self._rest is not None:
            rest, rest_gradient = self._rest.reduced_and_gradient(x)
            u, gradient = u + rest, gradient + rest_gradient
        return u, gradient

    # From here on the batch comes last: positions and gradients are (atoms, 3, batch).

    def _native(self, x: Tensor) -> Tensor:
        """Reduced energies of the native terms: all that is computed in torch."""
        geometry = Geometry(x, self.pairs, self.angles, self.torsions)
        energy = sum(term(geometry, x.dtype) for term in self.terms)
        return energy / self.thermal_energy

    def _native_gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            u = self._native(x)
            (gradient,) = torch.autograd.grad(u.sum(), x)
        return u.detach(), gradient

    def _traced_gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`_native_gradient` in the form that compiles into a single graph."""

        def total(x: Tensor) -> tuple[Tensor, Tensor]:
            u = self._native(x)
            return u.sum(), u

        gradient, (_, u) = torch.func.grad_and_value(total, has_aux=True)(x)
        return u, gradient

    def _rows_at_a_time(self) -> int:
        if self._compile:
            return _COMPILED_ROWS
        return min(4096, max(16, _EAGER_ELEMENTS // max(1, len(self.pairs))))

    def _compiled_value(self, x: Tensor) -> Tensor:
        return self._run_compiled(self._native, self._native, x)[: x.shape[-1]]

    def _compiled_gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        u, gradient = self._run_compiled(self._traced_gradient, self._native_gradient, x)
        return u[: x.shape[-1]], gradient[..., : x.shape[-1]]

    def _run_compiled(self, traced: Callable[..., Any], plain: Callable[..., Any], x: Tensor) -> Any:
        """The compiled form of a function, on a batch filled up to the one size it is made for."""
        if not self._compile:  # it failed at an earlier piece
            return plain(x)
        filled = torch.cat((x, x[..., -1:].expand(-1, -1, _COMPILED_ROWS - x.shape[-1])), -1)
        compiled = self._compiled.get(traced.__name__)
        if compiled is None:
            compiled = torch.compile(traced, dynamic=False, fullgraph=True)
            self._compiled[traced.__name__] = compiled
        try:
            with torch.no_grad():
                return compiled(filled)
        except torch._dynamo.exc.TorchDynamoException as error:
            self._compile = False
            reason = str(error).strip().splitlines()[0]
            warnings.warn(f"torch.compile does not work here, going on without it: {reason}", stacklevel=2)
            return plain(filled)


class _Term(torch.nn.Module):
    """A formula with its tables: float64 and integer buffers, cast to the dtype of x when used."""

    def __init__(self, formula: Formula, tables: Tables) -> None:
        super().__init__()
        self.formula = formula
        self.names = tuple(tables)
        for name, table in tables.items():
            if _is_range(table):
                setattr(self, name, slice(int(table[0]), int(table[-1]) + 1))
            else:
                self.register_buffer(name, torch.as_tensor(table), persistent=False)

    def forward(self, geometry: Geometry, dtype: torch.dtype) -> Tensor:
        return self.formula(geometry, **{name: _cast(getattr(self, name), dtype) for name in self.names})


def _cast(table: Tensor | slice, dtype: torch.dtype) -> Tensor | slice:
    return table.to(dtype) if isinstance(table, Tensor) and table.is_floating_point() else table


def _is_range(table: np.ndarray) -> bool:
    """Whether a table of row numbers counts up by ones, so that a view does for a gather."""
    rows = table.dtype.kind == "i" and table.ndim == 1 and len(table) > 0
    return rows and bool((np.diff(table) == 1).all())


def _in_order(system: openmm.System) -> list[tuple[int, openmm.Force]]:
    """The forces with an energy, NonbondedForce first: its pairs are then numbered consecutively."""
    forces = [(i, force) for i, force in enumerate(system.getForces()) if not contributes_nothing(force)]
    return sorted(forces, key=lambda item: not isinstance(item[1], openmm.NonbondedForce))
