"""One run of attempts on the Context of a simulation, which the sampler and the openmmtools move share."""

from __future__ import annotations

import copy
import math
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import openmm
from numpy.typing import NDArray
from openmm import unit

from openmm_bg.errors import InputError
from openmm_bg.sampling.metropolis import Attempt, accept, log_acceptance
from openmm_bg.sampling.proposals import Proposals
from openmm_bg.sampling.two_stage import Potential, scan
from openmm_bg.units import GAS_CONSTANT

ALL_GROUPS = -1
CONSTRAINT_TOLERANCE = 1e-6  # relative; a placed proposal is exact to rounding


class ContextWalker:
    """The current conformation of a Context, while proposals are tried on it one after the other.

    On creation it reads positions and potential energy from the Context. Then it makes one or more series of attempts,
    each with proposals of one kind. The Context is left in the current conformation after every attempt. Positions only
    are changed: step count, time, box and velocities stay, and who uses the walker must redraw the velocities if
    `accepted` is not zero at the end.

    The potential energy is the Context's own, so every bias, restraint and surrounding particle takes part.

    Parameters
    ----------
    context : openmm.Context
    series : sequence of (Proposals, int)
        Sources of proposals, and how many of each are tried.
    temperature : float
        K, of the ensemble that the simulation samples.
    rng : numpy.random.Generator
        Decides acceptance.
    potential : callable, optional
        A cheap energy of the generator's atoms, see :data:`openmm_bg.sampling.two_stage.Potential`. With it a whole
        series is scanned on that energy, and is one attempt.
    atoms : sequence of int, optional
        Particle of each of the generator's atoms; None for all particles in order.
    groups : int
        Force groups of the potential energy, as a bit mask; -1 for all.
    virtual_sites : bool
        Whether virtual sites have to follow the proposed positions.
    constraints : tuple of ndarray
        Pairs (m, 2) of generator atoms and distances (m,) in nm that the System constrains: every proposal
        is checked against them.

    Attributes
    ----------
    positions : ndarray, shape (particles, 3)
        nm, of the current conformation.
    potential_energy : float
        kJ/mol.
    accepted : int
    finished : bool
        Whether all attempts are made.

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
        series: Sequence[tuple[Proposals, int]],
        *,
        temperature: float,
        rng: np.random.Generator,
        potential: Potential | None = None,
        atoms: NDArray[np.int64] | None = None,
        groups: int = ALL_GROUPS,
        virtual_sites: bool = False,
        constraints: tuple[NDArray[np.int64], NDArray[np.float64]] | None = None,
    ):
        self.context = context
        self.accepted = 0
        self._kT = GAS_CONSTANT * temperature
        self._rng = rng
        self._potential = potential
        self._atoms = slice(None) if atoms is None else atoms
        self._groups = groups
        self._virtual_sites = virtual_sites
        self._constraints = constraints
        state = context.getState(positions=True, energy=True, groups=groups)
        self.positions: NDArray[np.float64] = state.getPositions(asNumpy=True).value_in_unit(unit.nanometer)
        self.potential_energy: float = state.getPotentialEnergy().value_in_unit(unit.kilojoule_per_mole)
        if math.isnan(self.potential_energy):
            raise ValueError(
                "The potential energy of the current conformation is NaN; the simulation has already failed."
            )
        self._proposed = self.positions
        self._series = [(proposals, count) for proposals, count in series if count > 0]
        self._begin()

    @property
    def finished(self) -> bool:
        return self._left == 0

    def _begin(self) -> None:
        """Turn to the next series, if there is one."""
        self._left = 0
        self._drawn: deque[tuple[NDArray[np.float64], float]] = deque()
        if self._series:
            self._proposals, self._left = self._series.pop(0)
            self.refused = False
            if self._potential is None:
                self.log_prob = self._proposals.log_prob(self.positions[self._atoms])
                self.refused = self.log_prob == -math.inf

    def attempt(self) -> Attempt:
        """Try the next proposal, or the next series; the Context ends in the conformation that the attempt left."""
        attempt = self._one() if self._potential is None else self._two_stages(self._potential)
        self._left = 0 if self._potential is not None else self._left - 1
        if self._left == 0:
            self._begin()
        return attempt

    def _one(self) -> Attempt:
        log_q = self.log_prob
        if self.refused:
            return self._refusal(log_q)
        if not self._drawn:
            placed, log_probs = self._proposals.take(self._left, self.positions[self._atoms])
            self._check_constraints(placed[np.isfinite(log_probs)])
            self._drawn = deque(zip(placed, log_probs.tolist(), strict=True))
        placed, log_q_new = self._drawn.popleft()
        u = self.potential_energy
        u_new = self._energy(placed) if math.isfinite(log_q_new) else math.nan
        ratio = float(log_acceptance(u / self._kT, u_new / self._kT, log_q, log_q_new))
        accepted = self._decide(u_new, ratio)
        if accepted:
            self.log_prob = log_q_new
            if self._proposals.state_dependent:
                self._drawn.clear()
        kind, step = self._proposals.kind, self.context.getStepCount()
        return Attempt(step, accepted, False, u, u_new, log_q, log_q_new, ratio, kind, 1, int(accepted))

    def _two_stages(self, potential: Potential) -> Attempt:
        at = self.positions[self._atoms]
        end = scan(self._proposals, potential, self._kT, self._left, at, self._rng)
        if end.refused:
            return self._refusal(end.log_prob_start)
        u, u_new, ratio, accepted = self.potential_energy, math.nan, -math.inf, False
        if end.moved:
            self._check_constraints(end.positions[None])
            u_new = self._energy(end.positions)
            excess, excess_new = (u - end.potential_start) / self._kT, (u_new - end.potential) / self._kT
            # the densities of the proposals were used up by the scan
            ratio = float(log_acceptance(excess, excess_new, 0.0, 0.0))
            accepted = self._decide(u_new, ratio)
        return Attempt(
            self.context.getStepCount(), accepted, False, u, u_new, end.log_prob_start, end.log_prob, ratio,
            self._proposals.kind, end.tried, end.moved,
        )  # fmt: skip

    def _refusal(self, log_q: float) -> Attempt:
        step, kind = self.context.getStepCount(), self._proposals.kind
        return Attempt(step, False, True, self.potential_energy, math.nan, log_q, math.nan, -math.inf, kind, 0, 0)

    def _decide(self, u_new: float, ratio: float) -> bool:
        """Take the conformation that was evaluated last, or put back the current one."""
        accepted = accept(ratio, self._rng)
        if accepted:
            self.positions = _positions(self.context) if self._virtual_sites else self._proposed
            self.potential_energy = u_new
            self.accepted += 1
        elif not math.isnan(u_new):
            self.context.setPositions(self.positions)
        return accepted

    def _energy(self, placed: NDArray[np.float64]) -> float:
        """Potential energy in kJ/mol with the molecule placed anew in the Context; +inf where there is none.

        NaN, and the Context untouched, for coordinates that are not finite: some platforms raise on them and others
        answer NaN.
        """
        proposed = self.positions.copy()
        proposed[self._atoms] = placed
        if not np.isfinite(proposed).all():
            return math.nan
        self._proposed = proposed
        self.context.setPositions(proposed)
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

    def _check_constraints(self, x: NDArray[np.float64]) -> None:
        """An InputError where conformations (n, atoms, 3) break a constraint of the System."""
        if self._constraints is None:
            return
        pairs, distances = self._constraints
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
