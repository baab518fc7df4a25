"""Switching moves on the Context of a simulation, one after the other."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import openmm
from numpy.typing import NDArray
from openmm import unit

from openmm_bg.app.decoupling import ELECTROSTATICS, STERICS, propagate
from openmm_bg.sampling.metropolis import accept
from openmm_bg.sampling.proposals import Proposals
from openmm_bg.sampling.switching import Middle, Switch, choose, switch
from openmm_bg.units import GAS_CONSTANT


class SwitchingAttempt(NamedTuple):
    """What one attempted switching move was and how it ended.

    Attributes
    ----------
    step : int
        Time steps the simulation had made; moves do not advance it.
    accepted : bool
    refused : bool
        The conformation at the decoupled end lay outside the generator's support, so nothing was proposed.
    potential_energy, proposed_potential_energy : float
        kJ/mol, of the whole System at the start and at the end of the protocol; NaN where it did not come to an end.
    log_prob, proposed_log_prob : float
        The generator's log densities of the conformations at the decoupled end.
    log_acceptance : float
        Minus the total work in units of kT; -inf for certain rejection.
    decoupling_work, recoupling_work : float
        In units of kT. What is missing to the total work is the proposal's share.
    kind : str
        "switching".
    tried, moved : int
        Conformations proposed at the decoupled end; whether one was accepted.
    """

    step: int
    accepted: bool
    refused: bool
    potential_energy: float
    proposed_potential_energy: float
    log_prob: float
    proposed_log_prob: float
    log_acceptance: float
    decoupling_work: float
    recoupling_work: float
    kind: str
    tried: int
    moved: int


class SwitchingWalker:
    """The current conformation of a Context, while switching moves are tried on it one after the other.

    It is the :class:`openmm_bg.sampling.switching.SwitchedDynamics` of two Contexts: the simulation's gives the true
    energy of the two ends and is otherwise left alone; everything in between happens in that of the decoupled System.
    After every attempt the simulation's Context is in the current conformation. Its velocities, box and step count do
    not change, and who uses the walker must redraw the velocities if `accepted` is not zero at the end.

    Parameters
    ----------
    context : openmm.Context
        Of the simulation.
    decoupled : openmm.Context
        Of :func:`openmm_bg.app.decoupling.decoupled_system`, with a switching integrator. It is given the box, and the
        values of the parameters, that the simulation has at this moment.
    couplings : ndarray, shape (steps, 2)
        Those of the integrator; the last row is the decoupled end.
    proposals : Proposals
    temperature : float
        K.
    rng : numpy.random.Generator
        Draws velocities, and decides.
    atoms : int array
        Particle of each of the generator's atoms.
    tries : int
        Conformations proposed in every attempt.
    groups : int
        Force groups of the true energy.
    """

    def __init__(
        self,
        context: openmm.Context,
        decoupled: openmm.Context,
        couplings: NDArray[np.float64],
        proposals: Proposals,
        *,
        temperature: float,
        rng: np.random.Generator,
        atoms: NDArray[np.int64],
        tries: int = 1,
        groups: int = -1,
    ):
        self.accepted = 0
        self._context, self._decoupled, self._couplings = context, decoupled, couplings
        self._proposals, self._rng, self._atoms, self._tries, self._groups = proposals, rng, atoms, tries, groups
        self._temperature, self._kT = temperature, GAS_CONSTANT * temperature
        state = context.getState(positions=True, energy=True, parameters=True, groups=groups)
        self.positions: NDArray[np.float64] = state.getPositions(asNumpy=True).value_in_unit(unit.nanometer)
        self.potential_energy: float = state.getPotentialEnergy().value_in_unit(unit.kilojoule_per_mole)
        if math.isnan(self.potential_energy):
            raise ValueError(
                "The potential energy of the current conformation is NaN; the simulation has already failed."
            )
        decoupled.setPeriodicBoxVectors(*state.getPeriodicBoxVectors())
        own = set(decoupled.getParameters())
        for name, value in state.getParameters().items():
            if name in own:
                decoupled.setParameter(name, value)

    def attempt(self) -> SwitchingAttempt:
        """Run the protocol once; the simulation's Context ends in the conformation that was decided for."""
        self._refused, self._log_prob, self._proposed_log_prob = False, math.nan, math.nan
        self._end, self._end_energy = self.positions, self.potential_energy
        self._decoupled.setPositions(self.positions)
        try:
            outcome = switch(self, len(self._couplings))
        except openmm.OpenMMException:
            # Some platforms raise where a trajectory has become NaN. A Context that fails for another reason fails
            # here again.
            self._decoupled.setPositions(self.positions)
            self._decoupled.getState(energy=True)
            outcome = Switch(math.nan, math.nan, -math.inf)
        log_acceptance = float(outcome.log_acceptance)
        accepted = accept(log_acceptance, self._rng)
        finished = not math.isnan(outcome.recoupling_work)
        before, after = self.potential_energy, self._end_energy if finished else math.nan
        if accepted:
            self.positions, self.potential_energy = self._end, self._end_energy
            self.accepted += 1
        else:
            self._context.setPositions(self.positions)
        return SwitchingAttempt(
            self._context.getStepCount(), accepted, self._refused, before, after, self._log_prob,
            self._proposed_log_prob, log_acceptance, float(outcome.decoupling_work), float(outcome.recoupling_work),
            "switching", 0 if self._refused else self._tries, int(accepted),
        )  # fmt: skip

    # -- the dynamics

    def energy(self) -> float:
        self._end = _positions(self._decoupled)
        self._end_energy = self._potential(self._context, self._end, self._groups)
        return self._end_energy / self._kT

    def kinetic_energy(self) -> float:
        state = self._decoupled.getState(energy=True, groups=0)
        return state.getKineticEnergy().value_in_unit(unit.kilojoule_per_mole) / self._kT

    def draw_velocities(self) -> None:
        self._decoupled.setVelocitiesToTemperature(self._temperature, int(self._rng.integers(1, 2**31 - 1)))

    def propagate(self, steps: range) -> None:
        propagate(self._decoupled.getIntegrator(), steps)

    def propose(self) -> Middle:
        x = _positions(self._decoupled)
        if not np.isfinite(x).all():
            return Middle(math.nan, math.nan, -math.inf)
        for name, coupling in zip((ELECTROSTATICS, STERICS), self._couplings[-1].tolist(), strict=True):
            self._decoupled.setParameter(name, coupling)
        u = self._potential(self._decoupled, x) / self._kT
        self._log_prob = self._proposals.log_prob(x[self._atoms])
        if math.isnan(self._log_prob) or self._log_prob == math.inf:
            raise ValueError("The generator's log density of a conformation is NaN or +inf; the generator is faulty.")
        self._refused = self._log_prob == -math.inf
        if self._refused:
            return Middle(u, math.nan, -math.inf)
        placed, log_probs = self._proposals.take(self._tries, x[self._atoms])
        proposed = np.repeat(x[None], len(placed), axis=0)
        proposed[:, self._atoms] = placed
        energies = np.array([self._potential(self._decoupled, y) for y in proposed]) / self._kT
        with np.errstate(invalid="ignore"):
            log_weights = np.where(np.isfinite(log_probs) & np.isfinite(energies), -energies - log_probs, -np.inf)
        index, log_ratio = choose(log_weights, -u - self._log_prob, self._rng)
        if math.isfinite(log_weights[index]):
            self._proposed_log_prob = float(log_probs[index])
            self._potential(self._decoupled, proposed[index])
        return Middle(u, float(energies[index]), float(log_ratio))

    def _potential(self, context: openmm.Context, positions: NDArray[np.float64], groups: int = -1) -> float:
        """Potential energy in kJ/mol of positions that are put into a Context; +inf where there is none."""
        if not np.isfinite(positions).all():
            return math.inf
        context.setPositions(positions)
        try:
            context.computeVirtualSites()
            energy = context.getState(energy=True, groups=groups).getPotentialEnergy()
        except openmm.OpenMMException:
            # Overlapping atoms raise on some platforms. A Context that fails for another reason fails here again.
            context.setPositions(self.positions)
            context.getState(energy=True, groups=groups)
            return math.inf
        value = energy.value_in_unit(unit.kilojoule_per_mole)
        return value if math.isfinite(value) else math.inf


def _positions(context: openmm.Context) -> NDArray[np.float64]:
    return context.getState(positions=True).getPositions(asNumpy=True).value_in_unit(unit.nanometer)
