"""The Boltzmann generator: an energy, internal coordinates and a flow, with one exact density.

The density is :mod:`openmm_bg.generator_density`'s; here are the energy that it is weighed with, the molecule and the
file.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import openmm
import torch
from openmm import app
from torch import Tensor

from openmm_bg import generator_file
from openmm_bg.coordinates import InternalCoordinates, ZMatrix
from openmm_bg.energies import Energy, ForceFieldEnergy
from openmm_bg.errors import InputError
from openmm_bg.flows import Flow, MolecularFlow
from openmm_bg.generator_density import CHUNK, ShapeDensity
from openmm_bg.generator_molecule import (
    constraint_distances,
    harmonic_scales,
    internal_coordinates,
    molecular_flow,
)
from openmm_bg.units import nanometers


@dataclass
class Samples:
    """Independent draws of a generator, float64.

    Attributes
    ----------
    positions : Tensor, (n, atoms, 3)
        nm; for a generator without coordinates ``(n, dimension)``. Rows of NaN are draws outside the support: they
        count.
    log_prob : Tensor, (n,)
        Log-density; -inf outside the support.
    reduced_energy : Tensor, (n,)
        U/kT; +inf outside the support.
    log_weights : Tensor, (n,)
        ``-reduced_energy - log_prob``; -inf outside the support.
    """

    positions: Tensor
    log_prob: Tensor
    reduced_energy: Tensor
    log_weights: Tensor

    def __len__(self) -> int:
        return len(self.positions)


class BoltzmannGenerator(ShapeDensity):
    """An invertible network that proposes conformations together with their exact probability density.

    Parameters
    ----------
    energy : Energy or None
        The reduced energy of the target. None leaves a generator that can propose but not weigh.
    flow : Flow
        Density of the internal coordinates (or of the plain ones).
    coordinates : InternalCoordinates, optional
        None where the flow's samples are the configurations themselves: analytic densities.
    topology : openmm.app.Topology, optional
        Atoms and bonds, by which a simulation is matched.
    defensive : float
        Share of the broadened copy in the density, 0 to 1.

    Attributes
    ----------
    provenance : dict
        How the generator was trained; JSON, kept in its file.

    Examples
    --------
    >>> import openmm_bg as bg
    >>> well = bg.systems.load("double_well")
    >>> generator = bg.BoltzmannGenerator(well, bg.flows.RealNVP(2, layers=2, hidden=(8,)))
    >>> samples = generator.sample(4, seed=1)
    >>> samples.log_weights.shape
    torch.Size([4])
    """

    def __init__(
        self,
        energy: Energy | None,
        flow: Flow,
        coordinates: InternalCoordinates | None = None,
        *,
        topology: app.Topology | None = None,
        defensive: float = 0.005,
    ):
        super().__init__(flow, coordinates, defensive)
        shape = self._event_shape
        if energy is not None and tuple(energy.event_shape) != shape:
            raise InputError(f"The energy takes points of shape {tuple(energy.event_shape)}, but samples have {shape}.")
        if topology is not None and coordinates is not None and topology.getNumAtoms() != coordinates.num_atoms:
            raise InputError(
                f"The topology has {topology.getNumAtoms()} atoms, but the coordinates have {coordinates.num_atoms}."
            )
        self.energy = energy
        self.topology = topology
        self.provenance: dict[str, Any] = {}
        self.eval()

    @classmethod
    def for_molecule(
        cls,
        topology: app.Topology,
        system: openmm.System,
        temperature: Any = 300.0,
        *,
        positions: Any = None,
        flow: Literal["spline", "realnvp"] | Flow = "spline",
        local: bool = False,
        defensive: float = 0.005,
        seed: int = 0,
        compile: bool = True,
    ) -> BoltzmannGenerator:
        """A generator for one molecule, with internal coordinates and a flow that its chemistry suggests.

        Parameters
        ----------
        topology : openmm.app.Topology
        system : openmm.System
            Constrained bonds leave the flow and are kept exactly.
        temperature : float or Quantity
            K.
        positions : array or Quantity, (atoms, 3), optional
            A reasonable conformation in nm. It fixes the chirality of every centre and the labels of equivalent
            hydrogens; without it the generator learns them from the first data it is fitted to and cannot be sampled
            before.
        flow : {"spline", "realnvp"} or Flow
        local : bool
            Networks of each residue see the residues beside it and no others: their cost grows linearly with the chain.
            Joint networks are faster on short chains.
        defensive, seed, compile
            Share of the broadened copy; seed of the initial weights; whether the energy is compiled.

        Raises
        ------
        InputError
            If topology and System do not belong together, or if there is more than one molecule.
        """
        atoms = topology.getNumAtoms()
        if atoms != system.getNumParticles():
            raise InputError(
                f"The topology has {atoms} atoms, but the System has {system.getNumParticles()} particles; "
                "create the System from this topology."
            )
        if system.usesPeriodicBoundaryConditions():
            raise InputError(
                "The System is periodic; a generator is made for a molecule in vacuum or implicit solvent: "
                "create the System with nonbondedMethod=NoCutoff."
            )
        zmatrix = ZMatrix.from_topology(topology)
        reference = None if positions is None else _reference(positions, atoms)
        energy = ForceFieldEnergy(system, temperature, compile=compile)
        coordinates = internal_coordinates(zmatrix, system, reference)
        if isinstance(flow, str):
            flow = molecular_flow(topology, zmatrix, coordinates, flow, seed, local)
        generator = cls(energy, flow, coordinates, topology=topology, defensive=defensive)
        if reference is not None:
            generator._inform_at(reference)
        return generator

    def _inform_at(self, reference: np.ndarray) -> None:
        x = torch.as_tensor(reference)[None]
        q, log_volume = self.coordinates(x)
        if not torch.isfinite(log_volume).all():
            raise InputError(
                "The positions do not satisfy the System's constraints or hold collinear or coincident atoms; "
                "minimise them first, or call applyConstraints(1e-6) of a Context of this System."
            )
        if isinstance(self.flow, MolecularFlow):
            self.flow.initialize_at(q[0], harmonic_scales(self.coordinates, self.system, self.temperature))

    # -- what it is about

    @property
    def system(self) -> openmm.System | None:
        """The OpenMM System of the target; None for analytic densities."""
        return self.energy.system if isinstance(self.energy, ForceFieldEnergy) else None

    @property
    def temperature(self) -> float | None:
        """K; None for analytic densities."""
        return self.energy.temperature if isinstance(self.energy, ForceFieldEnergy) else None

    # -- draws and weights

    def sample(self, n: int, *, seed: int | None = None, generator: torch.Generator | None = None) -> Samples:
        """``n`` independent draws with density, energy and weight.

        Parameters
        ----------
        n : int
        seed : int, optional
            Makes the draw reproducible; or pass a torch ``generator`` whose state goes on.

        Raises
        ------
        InputError
            If the generator is not informed yet or has no energy.
        """
        if self.energy is None:
            raise InputError("This generator has no energy; use sample_internal, or give it one.")
        generator = _random(seed, generator)
        parts = []
        for size in _chunks(n):
            q, log_prob = self.sample_internal(size, generator)
            x = self.place(q)
            with torch.no_grad():
                energy = self.energy(x)
            # a NaN of broken weights stays a NaN
            weights = torch.where(log_prob == -math.inf, -math.inf, -energy - log_prob)
            parts.append((x, log_prob, energy, weights))
        return Samples(*(torch.cat(column) for column in zip(*parts, strict=True)))

    def log_weights(self, x: Tensor | np.ndarray) -> Tensor:
        """``-u(x) - log_prob(x)`` of given conformations, ``(n,)``: the log of p/q up to the constant log Z."""
        if self.energy is None:
            raise InputError("This generator has no energy, so it cannot weigh conformations.")
        x = self._batch(x)
        log_prob = self.log_prob(x)
        with torch.no_grad():
            energy = torch.cat([self.energy(part) for part in x.split(CHUNK)])
        return torch.where(torch.isfinite(energy), -energy - log_prob, -math.inf)

    # -- matching a simulation

    def matches(self, topology: app.Topology, system: openmm.System, atoms: Sequence[int] | None = None) -> bool:
        """Whether this is the molecule of a simulation, by elements, bonds and constraints.

        See :meth:`check_simulation`, which says what differs.
        """
        try:
            with warnings.catch_warnings():
                # asked for a yes or no: a System that merely differs is a yes
                warnings.simplefilter("ignore")
                self.check_simulation(topology, system, atoms)
        except InputError:
            return False
        return True

    def check_simulation(
        self, topology: app.Topology, system: openmm.System, atoms: Sequence[int] | None = None
    ) -> None:
        """Refuse a simulation of another molecule; warn where only the force field differs.

        A move stays exact with any System of the same atoms, bonds and constraints, since it takes energies from the
        simulation; what suffers is its acceptance.

        Parameters
        ----------
        topology, system
            Of the simulation.
        atoms : sequence of int, optional
            Particles of the simulation that are the generator's atoms, in its order; None for all.
        """
        if self.topology is None or self.coordinates is None:
            raise InputError("This generator has no molecule, so it cannot be matched to a simulation.")
        index = list(range(topology.getNumAtoms())) if atoms is None else [int(i) for i in atoms]
        if len(index) != self.num_atoms:
            raise InputError(
                f"The generator has {self.num_atoms} atoms, but {len(index)} atoms of the simulation were given; "
                "use the same molecule, or name its atoms with atoms=."
            )
        if min(index) < 0 or max(index) >= topology.getNumAtoms() or len(set(index)) < len(index):
            raise InputError("atoms= names particles that the simulation does not have, or one of them twice.")
        theirs, ours = list(topology.atoms()), list(self.topology.atoms())
        for mine, i in zip(ours, index, strict=True):
            if mine.element is not theirs[i].element:
                raise InputError(
                    f"Atom {mine.index} ({mine.name}) of the generator does not match atom {i} ({theirs[i].name}) of "
                    "the simulation; the atoms must be the same in the same order."
                )
        place = {i: k for k, i in enumerate(index)}
        their_bonds = {
            frozenset((place[a.index], place[b.index]))
            for a, b in topology.bonds()
            if a.index in place and b.index in place
        }
        if their_bonds != {frozenset((a.index, b.index)) for a, b in self.topology.bonds()}:
            raise InputError("The simulation's molecule has other bonds than the generator's.")
        their_constraints = constraint_distances(system, place)
        our_constraints = {frozenset((i, j)): d for i, j, d in self.coordinates.constraints}
        if their_constraints.keys() != our_constraints.keys() or any(
            abs(d - our_constraints[pair]) > 1e-6 for pair, d in their_constraints.items()
        ):
            raise InputError(
                "The simulation constrains other bonds than the System the generator was made for; make a generator "
                "for this System."
            )
        if atoms is None and self.system is not None and not _same_system(system, self.system):
            warnings.warn(
                "The simulation's System differs from the one this generator was made for: moves stay exact, but fewer "
                "may be accepted.",
                stacklevel=3,
            )

    # -- files

    @property
    def fingerprint(self) -> str:
        """sha256 of everything that :meth:`save` writes."""
        return generator_file.pack(self)[1]

    def save(self, path: Any) -> str:
        """Write one file that rebuilds this generator without its data, never pickle, and return its fingerprint."""
        return generator_file.save(self, path)

    @classmethod
    def load(cls, path: Any, *, energy: Energy | None = None) -> BoltzmannGenerator:
        """Read a file written by :meth:`save`.

        Parameters
        ----------
        path : path-like
        energy : Energy, optional
            For generators of analytic densities, whose energy no file can hold.

        Raises
        ------
        InputError
            If the file is missing, truncated, altered, of another kind, or holds a PythonForce (which would run code).
        """
        return generator_file.load(cls, path, energy)


def _random(seed: int | None, generator: torch.Generator | None) -> torch.Generator:
    if generator is not None:
        if seed is not None:
            raise InputError("Give either seed or generator, not both.")
        return generator
    fresh = torch.Generator()
    fresh.seed() if seed is None else fresh.manual_seed(seed)
    return fresh


def _chunks(n: int) -> list[int]:
    if n < 1:
        raise InputError(f"The number of samples must be at least 1, not {n}.")
    return [min(CHUNK, n - start) for start in range(0, n, CHUNK)]


def _reference(positions: Any, atoms: int) -> np.ndarray:
    reference = nanometers(positions)
    if reference.shape != (atoms, 3) or not np.isfinite(reference).all():
        raise InputError(f"positions must be {atoms} finite points in nm, not an array of shape {reference.shape}.")
    return reference


def _same_system(one: openmm.System, other: openmm.System) -> bool:
    try:
        return generator_file.system_hash(one) == generator_file.system_hash(other)
    except openmm.OpenMMException:  # a PythonForce around a function that cannot be written
        return False
