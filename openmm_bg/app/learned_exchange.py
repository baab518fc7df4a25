"""Replica exchange through the maps of generators, beside openmm.app."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import openmm
from numpy.typing import NDArray
from openmm import app, unit

from openmm_bg.app.checkpoint import weights_hash
from openmm_bg.app.exchange_maps import StateMaps
from openmm_bg.errors import InputError
from openmm_bg.sampling.archive import load_arrays, save_arrays
from openmm_bg.sampling.learned_exchange import ExchangeAttempt, ExchangeStatistics, log_exchange_acceptance
from openmm_bg.sampling.metropolis import accept
from openmm_bg.units import GAS_CONSTANT, kelvin

__all__ = ["LearnedReplicaExchangeSampler"]

CHECKPOINT_FORMAT = 1


class LearnedReplicaExchangeSampler(app.ReplicaExchangeSampler):
    r"""Replica exchange between states that need not overlap: configurations are exchanged through a learned map.

    Hot replicas cross barriers that hold a cold one for ever, but exchange with it only through a ladder of
    temperatures in between, and the ladder grows with the size of the system. Here every state may have a Boltzmann
    generator, trained on the ensemble of that state. Two of them make an invertible map T from the configurations of
    one state, h, to those of the other, t, and an attempted exchange proposes T x_h to the one and T^-1 x_t to the
    other. It is accepted with probability min(1, alpha),

    .. math::

        \log\alpha = u_t(x_t) + u_h(x_h) - u_t(T x_h) - u_h(T^{-1} x_t)
            + \log|\det T'(x_h)| - \log|\det T'(T^{-1} x_t)|,

    where u = U/kT comes from the Context and the determinants are those of Cartesian coordinates. Generators that
    learned little cost acceptance, never correctness. Two states, one fast and one of interest, are the usual case::

        states = [{'temperature':300*kelvin}, {'temperature':600*kelvin}]
        sampler = LearnedReplicaExchangeSampler(states, simulation, 500, generators=[cold, hot], seed=1)
        sampler.simulate(1000)
        print(sampler.statistics.acceptance[0, 1], sampler.statistics.round_trips.sum())

    States may differ in temperature, in Context parameters, or in both. With more than two of them, pairs that have
    generators exchange through their map and all others as they are; so generators at two states of a ladder add a
    short cut to it. States that share one generator exchange as they are.

    What an exchange changes. The replicas swap their states, as in every replica exchange. With a map, the molecule of
    the generators also takes its new conformation, standing where its seed atoms (the position of one and the
    orientation of the first angle) stood; all other particles and the box of a replica stay. Velocities of replicas
    that were mapped are drawn anew, which constraints require; after an exchange without a map they are rescaled, or
    drawn anew with reinitializeVelocities=True.

    What is refused. A conformation that a generator cannot have made (other hydrogen labels, broken constraints) and
    one that the map would carry out of the support have no image: the attempt is refused and counted, nothing is
    exchanged. See :class:`~openmm_bg.sampling.GeneratorMap` for what makes T a bijection.

    Reporters, ReplicaExchangeReporter among them, work as they do for the base class: they are called before the
    exchanges and describe the state that generated the sample. With the map, the trajectory of a replica is no longer
    continuous.

    The sampler keeps the generators as they were when it was created.

    Attributes
    ----------
    exchangesPerIteration : int
        Exchanges attempted per iteration, each between two random replicas; initialized to the number of pairs. With
        two states that is one. More would undo what they have done: the map leads back.
    statistics : ExchangeStatistics
        Attempts, accepted and refused ones per pair of states, acceptance, and round trips of each replica between the
        first and the last state.
    lastAttempts : list of ExchangeAttempt
        What was tried after the last iteration.

    References
    ----------
    Invernizzi, Kraemer, Clementi & Noe, J. Phys. Chem. Lett. 13, 11643 (2022).
    """

    def __init__(
        self,
        states: list[dict[str, Any]],
        simulation: app.Simulation,
        stepsPerIteration: int,
        generators: Sequence[Any],
        atoms: Sequence[int] | None = None,
        reinitializeVelocities: bool = False,
        seed: int | None = None,
    ):
        """Create a sampler.

        Parameters
        ----------
        states : list of dict
            The states to sample, see ReplicaExchangeSampler. 'groups' are not supported: OpenMM evaluates their
            energies, but its integrators do not follow them.
        simulation : openmm.app.Simulation
        stepsPerIteration : int
            Time steps of each replica between exchanges.
        generators : list of BoltzmannGenerator or None
            One per state, trained on that state's ensemble; None for a state without. At least two states need
            generators, of flows with the same settings.
        atoms : list of int, optional
            Particle of each atom of the generators; None if their molecule is the whole System. Keep the molecule
            whole: periodic images are not searched.
        reinitializeVelocities : bool
            Draw velocities anew, rather than rescale them, after exchanges without a map as well.
        seed : int, optional
            Reproduces pairs, decisions and velocities (the integrator has a seed of its own). None draws one.

        Raises
        ------
        InputError
            If generators, states and simulation do not fit.
        """
        if any("groups" in state for state in states):
            raise InputError(
                "States with 'groups' cannot be used: the integrator would go on with all forces; scale the forces by "
                "Context parameters instead."
            )
        super().__init__(states, simulation, stepsPerIteration, reinitializeVelocities)
        _checkForceGroups(simulation)
        self._checkBarostat()
        otherHamiltonians = any(key != "temperature" for key in states[0])
        self._maps = StateMaps(
            generators, [simulation.system] * len(states), atoms, simulation.topology, otherHamiltonians
        )
        self.exchangesPerIteration = len(states) * (len(states) - 1) // 2
        self.statistics = ExchangeStatistics(len(states))
        self.lastAttempts: list[ExchangeAttempt] = []
        self._random = np.random.default_rng(seed)
        self._mapped: set[int] = set()

    def exchangeReplicas(self) -> None:
        """Attempt exchangesPerIteration exchanges, each between two random replicas. Called by simulate()."""
        before = self.replicaStateIndex[:]
        self.statistics.visit(before)
        self._mapped = set()
        self.lastAttempts = []
        for _ in range(self.exchangesPerIteration):
            i, j = self._random.choice(len(self.states), 2, replace=False).tolist()
            attempt = self.attemptExchange(i, j)
            self.statistics.count(attempt)
            self.lastAttempts.append(attempt)
        for index, (old, new) in enumerate(zip(before, self.replicaStateIndex, strict=True)):
            if index in self._mapped or old != new:
                self._setVelocities(index, old, new)
        # velocities fit their states already: the base class has nothing left to rescale
        self._previousReplicaStateIndex = self.replicaStateIndex[:]

    def attemptExchange(self, i: int, j: int) -> ExchangeAttempt:
        """Try to exchange the states of two replicas, through the map of these states if there is one.

        You can create subclasses that override this method. It must leave replicaStateIndex, replicaConformation and
        replicaStateEnergy as it decided and return the ExchangeAttempt; counting is done by the caller.

        Parameters
        ----------
        i, j : int
            Indices of the replicas.
        """
        si, sj = self.replicaStateIndex[i], self.replicaStateIndex[j]
        mapped = self._maps.joins(si, sj)
        energies, conformations = (self.replicaStateEnergy[i], self.replicaStateEnergy[j]), None
        determinants = (0.0, 0.0)
        if mapped:
            carried = self._maps.exchange(si, sj, (self._positions(i), self._positions(j)))
            if carried is None:
                return ExchangeAttempt((si, sj), True, False, True, -math.inf)
            determinants = tuple(log_det for _, log_det in carried)
            trials = [self._evaluate(k, positions) for k, (positions, _) in zip((i, j), carried, strict=True)]
            energies, conformations = zip(*trials, strict=True)
        ratio = float(
            log_exchange_acceptance(
                self._reduced(self.replicaStateEnergy[i], si),
                self._reduced(self.replicaStateEnergy[j], sj),
                self._reduced(energies[1], si),
                self._reduced(energies[0], sj),
                *determinants,
            )
        )
        accepted = accept(ratio, self._random)
        if accepted:
            self.replicaStateIndex[i], self.replicaStateIndex[j] = sj, si
            if conformations is not None:
                for k, energy, conformation in zip((i, j), energies, conformations, strict=True):
                    self.replicaStateEnergy[k], self.replicaConformation[k] = energy, conformation
                self._mapped |= {i, j}
        return ExchangeAttempt((si, sj), mapped, accepted, False, ratio)

    def saveCheckpoint(self, file: str | os.PathLike[str]) -> None:
        """Write everything from which loadCheckpoint() continues with the same numbers, between calls of simulate().

        Like every OpenMM checkpoint it belongs to one platform and one machine type.
        """
        header = {
            "format": CHECKPOINT_FORMAT,
            "generators": self._hashes(),
            "currentIteration": self.currentIteration,
            "replicaStateIndex": self.replicaStateIndex,
            "previousReplicaStateIndex": self._previousReplicaStateIndex,
            "statistics": self.statistics.state_dict(),
            "random": self._random.bit_generator.state,
            "conformations": [openmm.XmlSerializer.serialize(state) for state in self.replicaConformation],
        }
        context = np.frombuffer(self.simulation.context.createCheckpoint(), dtype=np.uint8)
        save_arrays(file, header, context=context)

    def loadCheckpoint(self, file: str | os.PathLike[str]) -> None:
        """Continue from a file of saveCheckpoint(), in a sampler that was built in the same way.

        Raises
        ------
        InputError
            If the file does not fit this sampler.
        """
        header, arrays = load_arrays(file, ("context",))
        if header.get("format") != CHECKPOINT_FORMAT:
            raise InputError(f"{file} was written by another version of openmm_bg.")
        if header["generators"] != self._hashes():
            raise InputError(f"{file} belongs to other states or generators; resume with those it was made with.")
        try:
            self.simulation.context.loadCheckpoint(arrays["context"].tobytes())
        except openmm.OpenMMException as error:
            raise InputError(
                f"{file} does not fit this simulation (a checkpoint needs the same System, integrator and platform): "
                f"{error}"
            ) from None
        self.currentIteration = header["currentIteration"]
        self.replicaStateIndex = header["replicaStateIndex"]
        self._previousReplicaStateIndex = header["previousReplicaStateIndex"]
        self.replicaConformation = [openmm.XmlSerializer.deserialize(state) for state in header["conformations"]]
        self.replicaStateEnergy = None
        self.statistics.load_state_dict(header["statistics"])
        self._random.bit_generator.state = header["random"]

    def _hashes(self) -> list[str | None]:
        return [None if g is None else weights_hash(g) for g in self._maps.generators]

    # -- one replica

    def _positions(self, index: int) -> NDArray[np.float64]:
        return self.replicaConformation[index].getPositions(asNumpy=True).value_in_unit(unit.nanometer)

    def _reduced(self, energies: Any, state: int) -> float:
        """U/kT of a state, from the energies of a configuration in all states."""
        return energies[state].value_in_unit(unit.kilojoule_per_mole) / (GAS_CONSTANT * self._temperature(state))

    def _temperature(self, state: int) -> float:
        """K; states may share the integrator's."""
        if "temperature" in self.states[state]:
            return kelvin(self.states[state]["temperature"])
        return kelvin(self.simulation.integrator.getTemperature())

    def _evaluate(self, index: int, positions: NDArray[np.float64]) -> tuple[Any, openmm.State]:
        """Energies in all states of a replica at new positions, infinite where there are none, and its new State."""
        context = self.simulation.context
        context.setState(self.replicaConformation[index])
        context.setPositions(positions)
        try:
            if self._maps.virtual_sites:
                context.computeVirtualSites()
            conformation = _stateOf(context)
            return self._sampler.computeAllEnergies(), conformation
        except openmm.OpenMMException:
            # Overlapping atoms raise on some platforms. A Context that fails for another reason fails here again.
            context.setState(self.replicaConformation[index])
            self._sampler.computeAllEnergies()
            return [math.inf] * len(self.states) * unit.kilojoule_per_mole, self.replicaConformation[index]

    def _setVelocities(self, index: int, old: int, new: int) -> None:
        """Velocities of a replica that has come from state `old` to state `new`, or was mapped."""
        context = self.simulation.context
        context.setState(self.replicaConformation[index])
        if index in self._mapped or self.reinitializeVelocities:
            context.setVelocitiesToTemperature(self._temperature(new), int(self._random.integers(1, 2**31 - 1)))
        else:
            scale = math.sqrt(self._temperature(new) / self._temperature(old))
            context.setVelocities(self.replicaConformation[index].getVelocities(asNumpy=True) * scale)
        self.replicaConformation[index] = _stateOf(context)

    def _checkBarostat(self) -> None:
        """Refuse what the energies of the base class do not hold: the work of volumes that differ in their states."""
        for force in self.simulation.system.getForces():
            if "Barostat" in type(force).__name__ and any(
                key == "temperature" or "Pressure" in key or "Tension" in key for key in self.states[0]
            ):
                raise InputError(
                    f"The System holds a {type(force).__name__} and the states differ in temperature or pressure, but "
                    "OpenMM's replica exchange leaves pV out of its energies; run it at constant volume."
                )


def _stateOf(context: openmm.Context) -> openmm.State:
    return context.getState(positions=True, velocities=True, parameters=True, integratorParameters=True)


def _checkForceGroups(simulation: app.Simulation) -> None:
    """Refuse an integrator that leaves out forces which the energies of the exchange would hold."""
    groups = simulation.integrator.getIntegrationForceGroups()
    left = [force for force in simulation.system.getForces() if not groups >> force.getForceGroup() & 1]
    if left:
        raise InputError(
            f"The integrator leaves out the {type(left[0]).__name__} of force group {left[0].getForceGroup()}, whose "
            "energy would enter the exchange; remove that force or let the integrator use its group."
        )
