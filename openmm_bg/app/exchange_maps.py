"""Which states of a replica exchange have generators, and how a molecule is carried from one to the other."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import openmm
import torch
from numpy.typing import NDArray
from openmm import app

from openmm_bg.app.matching import check_constraints, check_molecule, has_virtual_sites, particle_indices
from openmm_bg.app.walker import CONSTRAINT_TOLERANCE, snapshot
from openmm_bg.errors import InputError
from openmm_bg.sampling.exchange_map import GeneratorMap


class StateMaps:
    """The maps between the states of a replica exchange, made of one generator for each of them.

    Parameters
    ----------
    generators : sequence of BoltzmannGenerator or None
        One for every state; None where there is none. A snapshot is taken.
    systems : sequence of openmm.System
        Of every state.
    atoms : sequence of int, optional
        Particle of each of the generators' atoms; None for all particles in order.
    topology : openmm.app.Topology, optional
        Of the simulation, where it is known.
    other_hamiltonians : bool
        Whether generators may be of Systems that differ from the simulation's.

    Attributes
    ----------
    generators : list of BoltzmannGenerator or None
        The snapshots.
    pairs : list of (int, int)
        States that are joined by a map, the lower one first.
    virtual_sites : bool
        Whether virtual sites have to follow the particles that are mapped.

    Raises
    ------
    InputError
        If fewer than two states have generators of their own, or one does not fit its System or the others.
    """

    def __init__(
        self,
        generators: Sequence[Any],
        systems: Sequence[openmm.System],
        atoms: Sequence[int] | None = None,
        topology: app.Topology | None = None,
        other_hamiltonians: bool = False,
    ):
        if len(generators) != len(systems):
            raise InputError(
                f"{len(generators)} generators were given for {len(systems)} states; give one per state, and None for "
                "a state without."
            )
        known: dict[int, Any] = {}
        self.generators = []
        for generator, system in zip(generators, systems, strict=True):
            if generator is not None:
                particles = particle_indices(atoms, system, generator)
                if topology is not None:
                    with warnings.catch_warnings():
                        if other_hamiltonians:
                            warnings.simplefilter("ignore")
                        check_molecule(generator, topology, system, atoms)
                _check_distances(generator, system, particles)
                self.atoms: NDArray[np.int64] = particles
                generator = known.setdefault(id(generator), snapshot(generator))
            self.generators.append(generator)
        self.virtual_sites = any(has_virtual_sites(system) for system in systems)
        # One generator of two states maps conformations to themselves: that is the ordinary exchange.
        self._maps = {
            (i, j): GeneratorMap(first, self.generators[j])
            for i, first in enumerate(self.generators)
            for j in range(i + 1, len(systems))
            if not (first is None or self.generators[j] is None or self.generators[j] is first)
        }
        self.pairs = sorted(self._maps)
        if not self.pairs:
            raise InputError("A learned exchange needs at least two states with generators of their own.")

    def joins(self, i: int, j: int) -> bool:
        """Whether there is a map between two states."""
        return (min(i, j), max(i, j)) in self._maps

    def exchange(
        self, i: int, j: int, positions: tuple[NDArray[np.float64], NDArray[np.float64]]
    ) -> tuple[tuple[NDArray[np.float64], float], tuple[NDArray[np.float64], float]] | None:
        """A configuration of state i carried to state j, and one of j to i.

        Parameters
        ----------
        i, j : int
            Two states that are joined.
        positions : (ndarray, ndarray), (particles, 3) each
            nm, in state i and in state j.

        Returns
        -------
        two pairs of (ndarray, float), or None
            New positions and log-determinant of either map. The seed frame of the molecule and all other particles stay
            where they are. None: one of the two is outside the domain of the map.
        """
        molecules = [torch.from_numpy(np.array(x[self.atoms], dtype=np.float64))[None] for x in positions]
        if self.generators[i].coordinates is None:
            molecules = [x.reshape(1, -1) for x in molecules]
        step = 1 if i < j else -1
        made = self._maps[min(i, j), max(i, j)].exchange(*molecules[::step])[::step]
        if any(math.isinf(log_det) for _, log_det in made):
            return None
        new = [np.array(x, dtype=np.float64) for x in positions]
        for x, (molecule, _) in zip(new, made, strict=True):
            x[self.atoms] = molecule.numpy(force=True).reshape(-1, 3)
        return tuple((x, float(log_det)) for x, (_, log_det) in zip(new, made, strict=True))


def _check_distances(generator: Any, system: openmm.System, particles: NDArray[np.int64]) -> None:
    """Refuse a generator that keeps other constraints than the System, or other lengths of them."""
    constraints = check_constraints(generator, system, particles)
    if constraints is None:
        return
    ours = {frozenset((i, j)): distance for i, j, distance in generator.coordinates.constraints}
    for pair, distance in zip(*constraints, strict=True):
        if abs(ours[frozenset(pair.tolist())] / distance - 1) > CONSTRAINT_TOLERANCE:
            raise InputError(
                f"The System constrains the distance of atoms {pair[0]} and {pair[1]} of the generator to "
                f"{distance:.6g} nm, but the generator keeps {ours[frozenset(pair.tolist())]:.6g} nm; build it for a "
                "System with the same constraints."
            )
