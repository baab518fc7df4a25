"""One run of attempts on the Context of a simulation, which the sampler and the openmmtools move share."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import openmm
from numpy.typing import NDArray
from openmm import unit

from openmm_bg.errors import InputError
from openmm_bg.sampling.metropolis import Attempt, IndependenceProposals, accept, log_acceptance
from openmm_bg.units import GAS_CONSTANT

ALL_GROUPS = -1
CONSTRAINT_TOLERANCE = 1e-6  # relative; a placed proposal is exact to rounding


class ContextWalker:
    """The current conformation of a Context, while proposals of a generator are tried on it one after the other.

    On creation it reads positions and potential energy from the Context, evaluates the generator's density
    once, and places `count` proposals in the frame of the current seed atoms, which no move changes. The
    Context is left in the current conformation after every attempt. Positions only are changed: step count,
    time, box and velocities stay, and who uses the walker must redraw the velocities if `accepted` is not
    zero at the end.

    The potential energy is the Context's own, so every bias, restraint and surrounding particle takes part.

    Parameters
    ----------
    context : openmm.Context
    proposals : IndependenceProposals
    temperature : float
        K, of the ensemble that the simulation samples.
    rng : numpy.random.Generator
        Decides acceptance.
    count : int
        Number of attempts this walker will make at most.
    atoms : sequence of int, optional
        Particle of each of the generator's atoms; None for all particles in order.
    groups : int
        Force groups of the potential energy, as a bit mask; -1 for all.
    virtual_sites : bool
        Whether virtual sites have to follow the proposed positions.
    constraints : tuple of ndarray
        Pairs (m, 2) of generator atoms and distances (m,) in nm that the System constrains: every proposal
        is checked against them.

    Raises
    ------
    InputError
        If the generator violates a constraint of the System.
    ValueError
        If the current conformation has no energy or no density (NaN).
    """

    def __init__(
        self,
        context: openmm.Context,
        proposals: IndependenceProposals,
        *,
        temperature: float,
        rng: np.random.Generator,
        count: int,
        atoms: NDArray[np.int64] | None = None,
        groups: int = ALL_GROUPS,
        virtual_sites: bool = False,
        constraints: tuple[NDArray[np.int64], NDArray[np.float64]] | None = None,
    ):
        self.context = context
        self.accepted = 0
        self._kT = GAS_CONSTANT * temperature
        self._rng = rng
        self._atoms = slice(None) if atoms is None else atoms
        self._groups = groups
        self._virtual_sites = virtual_sites
        state = context.getState(positions=True, energy=True, groups=groups)
        self.positions: NDArray[np.float64] = state.getPositions(asNumpy=True).value_in_unit(unit.nanometer)
        self.potential_energy: float = state.getPotentialEnergy().value_in_unit(unit.kilojoule_per_mole)
        if math.isnan(self.potential_energy):
            raise ValueError(
                "The potential energy of the current conformation is NaN; the simulation has already failed."
            )
        molecule = self.positions[self._atoms]
        self.log_prob = proposals.log_prob(molecule)
        self.refused = math.isinf(self.log_prob) and self.log_prob < 0
        self._next = 0
        if not self.refused:
            self._placed, self._log_prob = proposals.take(count, at=molecule)
            if constraints is not None:
                self._check_constraints(*constraints)

    def attempt(self) -> Attempt:
        """Try the next proposal; the Context ends in the conformation that the attempt left."""
        step = self.context.getStepCount()
        u, log_q = self.potential_energy, self.log_prob
        if self.refused:
            return Attempt(step, False, True, u, math.nan, log_q, math.nan, -math.inf)
        placed, log_q_new = self._placed[self._next], float(self._log_prob[self._next])
        self._next += 1
        proposed = self.positions.copy()
        proposed[self._atoms] = placed
        # Some platforms raise on a NaN coordinate and others answer NaN: neither is asked.
        valid = math.isfinite(log_q_new) and bool(np.isfinite(proposed).all())
        u_new = self._energy(proposed) if valid else math.nan
        ratio = float(log_acceptance(u / self._kT, u_new / self._kT, log_q, log_q_new))
        accepted = accept(ratio, self._rng)
        if accepted:
            if self._virtual_sites:
                proposed = _positions(self.context)
            self.positions, self.potential_energy, self.log_prob = proposed, u_new, log_q_new
            self.accepted += 1
        elif valid:
            self.context.setPositions(self.positions)
        return Attempt(step, accepted, False, u, u_new, log_q, log_q_new, ratio)

    def _energy(self, positions: NDArray[np.float64]) -> float:
        """Potential energy in kJ/mol of positions that are put into the Context; +inf where it cannot be evaluated."""
        self.context.setPositions(positions)
        try:
            if self._virtual_sites:
                self.context.computeVirtualSites()
            state = self.context.getState(energy=True, groups=self._groups)
        except openmm.OpenMMException:
            # Overlapping atoms raise on some platforms. A Context that fails for another reason fails here again.
            self.context.setPositions(self.positions)
            self.context.getState(energy=True, groups=self._groups)
            return math.inf
        energy = state.getPotentialEnergy().value_in_unit(unit.kilojoule_per_mole)
        return energy if math.isfinite(energy) else math.inf

    def _check_constraints(self, pairs: NDArray[np.int64], distances: NDArray[np.float64]) -> None:
        x = self._placed[np.isfinite(self._log_prob)]
        found = np.linalg.norm(x[:, pairs[:, 0]] - x[:, pairs[:, 1]], axis=-1)
        wrong = np.abs(found / distances - 1) > CONSTRAINT_TOLERANCE
        if wrong.any():
            k = int(np.argmax(wrong.any(axis=0)))
            raise InputError(
                f"The System constrains the distance of atoms {pairs[k, 0]} and {pairs[k, 1]} of the generator to "
                f"{distances[k]:.6g} nm, but the generator does not keep it; build the generator for a System with the "
                "same constraints."
            )


def snapshot(generator: Any) -> Any:
    """A copy of a generator that later training does not reach.

    A queue holds densities of the past; were the weights to change meanwhile, those and the density of the current
    conformation would be of two different proposals. Energy and topology, which no move uses, are shared.
    """
    return copy.deepcopy(generator, {id(part): part for part in (generator.energy, generator.topology)})


def _positions(context: openmm.Context) -> NDArray[np.float64]:
    return context.getState(positions=True).getPositions(asNumpy=True).value_in_unit(unit.nanometer)
