"""Replica exchange through the maps of generators, for openmmtools."""

from __future__ import annotations

import copy
import math
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mpiplus
import numpy as np
import openmm
from numpy.typing import NDArray
from openmm import unit
from openmmtools import multistate

from openmm_bg.app.exchange_maps import StateMaps
from openmm_bg.app.move import _cache_folder
from openmm_bg.errors import InputError
from openmm_bg.generator import BoltzmannGenerator
from openmm_bg.sampling.learned_exchange import ExchangeAttempt, ExchangeStatistics, log_exchange_acceptance
from openmm_bg.sampling.metropolis import accept

__all__ = ["MultiStateLearnedExchangeSampler"]


class MultiStateLearnedExchangeSampler(multistate.ReplicaExchangeSampler):
    """openmmtools' ReplicaExchangeSampler with exchanges through the maps of generators.

    Every mixing of the replicas is the one of openmmtools, by `replica_mixing_scheme`, followed by one attempt for each
    pair of states that have generators: the molecule of the one replica is carried to the state of the other through
    the map of :class:`~openmm_bg.sampling.GeneratorMap`, and back, and both are accepted together; see
    :class:`LearnedReplicaExchangeSampler` for the rule. Each of the two steps leaves the joint distribution of the
    replicas invariant, and so does the sequence. Reduced potentials are openmmtools' own, pV included.

    ::

        sampler = MultiStateLearnedExchangeSampler(generators=["cold.bg", "hot.bg"], seed=1, mcmc_moves=move)
        sampler.create([state, hot_state], SamplerState(positions), storage=MultiStateReporter("exchange.nc"))
        sampler.run(1000)
        print(sampler.statistics.acceptance[0, 1])

    Velocities are drawn anew after an accepted exchange through a map. openmmtools does not rescale them after its own:
    use moves with reassign_velocities=True where temperatures differ.

    Parameters
    ----------
    generators : list of BoltzmannGenerator, path or None
        One per thermodynamic state, trained on that state's ensemble; None for a state without. At least two states
        need generators, of flows with the same settings. The storage file holds their paths: they must still be there
        when a simulation is resumed.
    atom_subset : list of int, optional
        Particle of each atom of the generators; None if their molecule is the whole System.
    seed : int, optional
        Reproduces what is random in exchanges through maps. (openmmtools itself uses global random numbers and
        integrator seeds of its own.)
    directory : path, optional
        Where generators that were not given as files are stored, as ``<sha256>.bg``. By default
        ``openmm_bg/generators`` in the user's cache folder.
    **kwargs
        Those of ReplicaExchangeSampler. `locality` cannot be used: an exchange needs the energies of all states.

    Attributes
    ----------
    statistics : ExchangeStatistics
        Of the exchanges through maps, since the sampler was created or resumed; round trips count all exchanges.

    Raises
    ------
    InputError
        If generators and thermodynamic states do not fit, with `locality`, or on more than one MPI process.

    Notes
    -----
    The matrices of swaps that openmmtools stores at every iteration count both kinds of exchange. Random numbers depend
    on the seed, the iteration and the number of mixings since the sampler was made, so that a resumed simulation does
    not repeat any.
    """

    def __init__(
        self,
        generators: Sequence[BoltzmannGenerator | str | os.PathLike[str] | None] | None = None,
        atom_subset: Sequence[int] | None = None,
        seed: int | None = None,
        directory: str | os.PathLike[str] | None = None,
        **kwargs: Any,
    ):
        if not generators:
            raise InputError("Give generators=[...], one per thermodynamic state, and None for a state without.")
        if kwargs.get("locality") is not None:
            raise InputError("locality cannot be used here: a learned exchange needs the energies of all states.")
        communicator = mpiplus.get_mpicomm()
        if communicator is not None and communicator.size > 1:
            raise InputError("Learned exchanges run on one process; start openmmtools without MPI.")
        super().__init__(**kwargs)
        # The names of these attributes are those of the parameters: openmmtools stores and restores them by name.
        self._directory = None if directory is None else str(Path(directory).absolute())
        self._generators = [_stored(generator, self._directory) for generator in generators]
        self._atom_subset = None if atom_subset is None else [int(i) for i in atom_subset]
        self._seed = secrets.randbits(62) if seed is None else int(seed)
        self._mixings = 0

    def _pre_write_create(self, thermodynamic_states: Any, sampler_states: Any, *args: Any, **kwargs: Any) -> None:
        super()._pre_write_create(thermodynamic_states, sampler_states, *args, **kwargs)
        self._prepare()

    def _restore_sampler_from_reporter(self, reporter: Any) -> None:
        super()._restore_sampler_from_reporter(reporter)
        self._prepare()

    def _prepare(self) -> None:
        """Read the generators and make the maps, once the thermodynamic states are known."""
        known = {path: BoltzmannGenerator.load(path) for path in set(self._generators) - {None}}
        generators = [None if path is None else known[path] for path in self._generators]
        systems = [state.system for state in self._thermodynamic_states]
        self._maps = StateMaps(generators, systems, self._atom_subset)
        self.statistics = ExchangeStatistics(self.n_states)

    def _mix_replicas(self) -> NDArray[np.int64]:
        """Exchanges as they are, then one attempt through every map."""
        self.statistics.visit(self._replica_thermodynamic_states)
        self._replica_thermodynamic_states = super()._mix_replicas()
        self._mixings += 1
        rng = np.random.default_rng(np.random.SeedSequence(self._seed, spawn_key=(self._iteration, self._mixings)))
        for pair in rng.permutation(self._maps.pairs).tolist():
            attempt = self._attempt_mapped_swap(*pair, rng)
            self.statistics.count(attempt)
            for i, j in (pair, pair[::-1]):
                self._n_proposed_matrix[i, j] += 1
                self._n_accepted_matrix[i, j] += attempt.accepted
        return self._replica_thermodynamic_states

    def _attempt_mapped_swap(self, si: int, sj: int, rng: np.random.Generator) -> ExchangeAttempt:
        """Try to exchange the replicas that are in two states, through the map between these."""
        i, j = (int(np.flatnonzero(self._replica_thermodynamic_states == s)[0]) for s in (si, sj))
        carried = self._maps.exchange(si, sj, (self._positions(i), self._positions(j)))
        if carried is None:
            return ExchangeAttempt((si, sj), True, False, True, -math.inf)
        before = [self._sampler_states[k] for k in (i, j)]
        energies = [self._evaluate(k, positions) for k, (positions, _) in zip((i, j), carried, strict=True)]
        old = self._energy_thermodynamic_states
        (new_i, _), (new_j, _) = energies
        ratio = float(
            log_exchange_acceptance(old[i, si], old[j, sj], new_j[si], new_i[sj], *(log_det for _, log_det in carried))
        )
        accepted = accept(ratio, rng)
        for k, state, energy, saved in zip((i, j), (sj, si), energies, before, strict=True):
            if accepted:
                self._replica_thermodynamic_states[k] = state
                self._energy_thermodynamic_states[k], self._energy_unsampled_states[k] = energy
                self._draw_velocities(k, rng)
            else:
                self._sampler_states[k] = saved
        return ExchangeAttempt((si, sj), True, accepted, False, ratio)

    def _positions(self, replica: int) -> NDArray[np.float64]:
        return np.asarray(self._sampler_states[replica].positions.value_in_unit(unit.nanometer))

    def _evaluate(self, replica: int, positions: NDArray[np.float64]) -> tuple[NDArray[np.float64], Any]:
        """Put a replica at new positions; its reduced potentials in all states, infinite where there are none."""
        state = copy.deepcopy(self._sampler_states[replica])
        state.positions = positions * unit.nanometer
        self._sampler_states[replica] = state
        try:
            if self._maps.virtual_sites:
                context = self._context(replica)
                context.computeVirtualSites()
                state.update_from_context(context, ignore_velocities=True)
            return self._compute_replica_energies(replica)
        except openmm.OpenMMException:
            # Overlapping atoms raise on some platforms; what fails for another reason will fail again in dynamics.
            return np.full(self.n_states, math.inf), None

    def _draw_velocities(self, replica: int, rng: np.random.Generator) -> None:
        """Velocities of a replica that was mapped, at the temperature of the state it is in now."""
        context = self._context(replica)
        temperature = self._thermodynamic_states[self._replica_thermodynamic_states[replica]].temperature
        context.setVelocitiesToTemperature(temperature, int(rng.integers(1, 2**31 - 1)))
        self._sampler_states[replica].update_from_context(context)

    def _context(self, replica: int) -> openmm.Context:
        """A Context with the positions of a replica in its state."""
        state = self._thermodynamic_states[self._replica_thermodynamic_states[replica]]
        context, _ = self.energy_context_cache.get_context(state)
        self._sampler_states[replica].apply_to_context(context, ignore_velocities=True)
        return context


def _stored(generator: Any, directory: str | None) -> str | None:
    """The path of a generator, which is written there if it was not given as a file."""
    if generator is None or isinstance(generator, (str, os.PathLike)):
        return None if generator is None else str(Path(generator).absolute())
    path = (_cache_folder() if directory is None else Path(directory)) / f"{generator.fingerprint}.bg"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        generator.save(path)
    return str(path)
