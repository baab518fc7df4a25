"""Boltzmann generator moves for openmmtools.

openmmtools copies and stores moves through ``__getstate__``: once per thermodynamic state when a sampler is
created, and at every iteration in its storage file. A move therefore writes nothing but plain numbers and
strings, among them where its generator lies and the sha256 of it; within one process all copies share one
network.
"""

from __future__ import annotations

import os
import secrets
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openmm
from numpy.typing import NDArray
from openmm import unit
from openmmtools import mcmc

from openmm_bg.app.matching import Constraints, check_constraints, has_virtual_sites, particle_indices
from openmm_bg.app.walker import ALL_GROUPS, ContextWalker, snapshot
from openmm_bg.errors import InputError
from openmm_bg.generator import BoltzmannGenerator
from openmm_bg.sampling.latent_moves import LatentProposals
from openmm_bg.sampling.proposals import IndependenceProposals, Proposals
from openmm_bg.sampling.two_stage import potential_of

__all__ = ["BoltzmannGeneratorMove"]

# Keys that keep two kinds of derived random streams apart.
_COPY, _CONTINUED = 0, 1

_COUNTERS = (
    "n_accepted", "n_proposed", "n_refused", "n_latent_accepted", "n_latent_proposed", "n_tried", "n_moved",
)  # fmt: skip

_generators: weakref.WeakValueDictionary[str, BoltzmannGenerator] = weakref.WeakValueDictionary()


class BoltzmannGeneratorMove(mcmc.MCMCMove):
    """Proposals of whole conformations by a Boltzmann generator, as an openmmtools move.

    Each application tries `n_proposals` conformations x' in place of the current x, one after the other,
    and accepts with

        log alpha = -(U(x') - U(x)) / kT + log_prob(x) - log_prob(x'),

    U and T being those of the thermodynamic state at that moment. The frame of the molecule's seed atoms,
    and all other particles, stay in place. After an accepted proposal all velocities are drawn anew. Use it
    beside dynamics, which moves what the generator does not::

        move = mcmc.SequenceMove([BoltzmannGeneratorMove(generator), mcmc.LangevinDynamicsMove(n_steps=500)])
        sampler = ReplicaExchangeSampler(mcmc_moves=move, number_of_iterations=1000)

    For replica exchange give a list of moves, one per state, so that only states near the generator's
    temperature use it.

    Parameters
    ----------
    generator : BoltzmannGenerator or path
        A generator, or the file of one.
    n_proposals : int
        Attempts in one application.
    seed : int, optional
        Reproduces this move's part of a run. (openmmtools itself uses global random numbers and integrator
        seeds of its own.)
    atom_subset : list of int, optional
        Particle of each atom of the generator; None if the generator's molecule is the whole System.
    two_stage : bool
        Try all proposals on the generator's own energy, in one batch, and evaluate the energy of the thermodynamic
        state where that chain ends only; exact for any generator, see
        :class:`~openmm_bg.BoltzmannGeneratorSampler`, which takes other cheap energies as well: what a move holds must
        fit into a storage file.
    latent_share : float
        Share of the proposals that are small steps in the latent space of the flow, 0 to 1.
    latent_step : float
        Their length, between 0 and 1. A move does not adapt it; find it with a sampler.
    directory : path, optional
        Where a generator that was not given as a file is stored when the move is copied or stored: as
        ``<sha256>.bg``, written once. It must still be there when a simulation is resumed. By default
        ``openmm_bg/generators`` in the user's cache folder (``$XDG_CACHE_HOME``, else ``~/.cache``).

    Attributes
    ----------
    n_accepted, n_proposed, n_refused : int
        Attempts accepted; all attempts; those refused because the generator could not have made the current
        conformation. With two stages all proposals of one kind in an application are one attempt.
    n_latent_accepted, n_latent_proposed : int
        Those among them that were steps in latent space.
    n_tried, n_moved : int
        Proposals, and those accepted; on the generator's own energy, where it decides first.

    Notes
    -----
    Copies of a move share the network and draw different proposals: every copy derives a random stream of
    its own from the seed of the original, and so does a move read from storage. Proposals drawn and not yet
    tried are not stored; this has no influence on the distribution. A move keeps the generator as it was
    when the move was made; training it further changes nothing.
    """

    def __init__(
        self,
        generator: BoltzmannGenerator | str | os.PathLike[str],
        n_proposals: int = 10,
        seed: int | None = None,
        atom_subset: Sequence[int] | None = None,
        directory: str | os.PathLike[str] | None = None,
        two_stage: bool = False,
        latent_share: float = 0.0,
        latent_step: float = 0.2,
    ):
        super().__init__()
        if isinstance(n_proposals, bool) or not isinstance(n_proposals, (int, np.integer)) or n_proposals < 1:
            raise InputError(f"n_proposals must be a positive whole number, not {n_proposals!r}.")
        if not 0 <= latent_share <= 1:
            raise InputError(f"latent_share must lie between 0 and 1, not at {latent_share}.")
        self.n_proposals = int(n_proposals)
        self.atom_subset = None if atom_subset is None else [int(i) for i in atom_subset]
        self.two_stage, self.latent_share, self.latent_step = bool(two_stage), float(latent_share), float(latent_step)
        self._set_counters({})
        if isinstance(generator, (str, os.PathLike)):
            self._path = Path(generator).absolute()
            self._generator = BoltzmannGenerator.load(self._path)
            self._fingerprint = self._generator.fingerprint
            self._stored = True
        else:
            self._generator = snapshot(generator)
            self._fingerprint = generator.fingerprint
            folder = _cache_folder() if directory is None else Path(directory).absolute()
            self._path = folder / f"{self._fingerprint}.bg"
            self._stored = False
        self._generator = _generators.setdefault(self._fingerprint, self._generator)
        if self.two_stage and self._generator.energy is None:
            raise InputError("two_stage=True needs a generator with an energy; this one has none.")
        self._start_stream(secrets.randbits(128) if seed is None else int(seed), ())

    @property
    def generator(self) -> BoltzmannGenerator:
        """The generator, shared by all copies of this move in the process."""
        return self._generator

    @property
    def statistics(self) -> dict[str, int]:
        """Counters as a dict."""
        return {name: getattr(self, name) for name in _COUNTERS}

    @statistics.setter
    def statistics(self, value: dict[str, int]) -> None:
        n_proposed = int(value["n_proposed"])
        if n_proposed != self.n_proposed:
            # Another process applied its copy of this move; do not repeat the numbers it used.
            self._start_stream(self._entropy, (*self._key, _CONTINUED, n_proposed))
        self._set_counters(value)

    def _set_counters(self, values: Mapping[str, Any]) -> None:
        # a storage file of an earlier version lacks those that came later
        for name in _COUNTERS:
            setattr(self, name, int(values.get(name, 0)))

    def apply(self, thermodynamic_state: Any, sampler_state: Any, context_cache: Any = None) -> None:
        """Try `n_proposals` conformations; `sampler_state` is changed if one is accepted.

        Parameters
        ----------
        thermodynamic_state : openmmtools.states.ThermodynamicState
        sampler_state : openmmtools.states.SamplerState
        context_cache : openmmtools.cache.ContextCache, optional
            The global one by default.

        Raises
        ------
        InputError
            If the generator does not fit the System.
        """
        context, _ = self._get_context_cache(context_cache).get_context(thermodynamic_state)
        sampler_state.apply_to_context(context, ignore_velocities=True)
        atoms, constraints, virtual_sites = self._fit(context)
        temperature = thermodynamic_state.temperature.value_in_unit(unit.kelvin)
        series: list[tuple[Proposals, int]] = [(self._proposals, self.n_proposals)]
        if self._latent is not None:
            steps = int(self._random.binomial(self.n_proposals, self.latent_share))
            series = [(self._proposals, self.n_proposals - steps), (self._latent, steps)]
        walker = ContextWalker(
            context,
            series,
            temperature=temperature,
            rng=self._random,
            potential=self._potential,
            atoms=atoms,
            groups=ALL_GROUPS,
            virtual_sites=virtual_sites,
            constraints=constraints,
        )
        while not walker.finished:
            attempt = walker.attempt()
            self.n_proposed += 1
            self.n_accepted += attempt.accepted
            self.n_refused += attempt.refused
            self.n_latent_proposed += attempt.kind == "latent"
            self.n_latent_accepted += attempt.kind == "latent" and attempt.accepted
            self.n_tried += attempt.tried
            self.n_moved += attempt.moved
        if walker.accepted:
            context.setVelocitiesToTemperature(temperature, int(self._random.integers(1, 2**31 - 1)))
            sampler_state.update_from_context(context)

    def __getstate__(self) -> dict[str, Any]:
        self._store()
        child = (*self._key, _COPY, self._copies)
        self._copies += 1
        return {
            "generator_path": str(self._path),
            "generator_sha256": self._fingerprint,
            "n_proposals": self.n_proposals,
            "atom_subset": None if self.atom_subset is None else list(self.atom_subset),
            "two_stage": self.two_stage,
            "latent_share": self.latent_share,
            "latent_step": self.latent_step,
            # As text: storage formats cut long integers.
            "seed": str(self._entropy),
            "stream": list(child),
            **self.statistics,
        }

    def __setstate__(self, serialization: dict[str, Any]) -> None:
        self._path = Path(serialization["generator_path"])
        self._fingerprint = str(serialization["generator_sha256"])
        self._generator = _load(self._path, self._fingerprint)
        self._stored = True
        self.n_proposals = int(serialization["n_proposals"])
        subset = serialization["atom_subset"]
        self.atom_subset = None if subset is None else [int(i) for i in subset]
        self.two_stage = bool(serialization.get("two_stage", False))
        self.latent_share = float(serialization.get("latent_share", 0.0))
        self.latent_step = float(serialization.get("latent_step", 0.2))
        self._set_counters(serialization)
        self._start_stream(int(serialization["seed"]), tuple(int(k) for k in serialization["stream"]))

    def __deepcopy__(self, memo: dict[int, Any]) -> BoltzmannGeneratorMove:
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        own = ("_proposals", "_latent", "_potential", "_random", "_checked")
        new.__dict__.update({name: value for name, value in self.__dict__.items() if name not in own})
        new.atom_subset = None if self.atom_subset is None else list(self.atom_subset)
        new._start_stream(self._entropy, (*self._key, _COPY, self._copies))
        self._copies += 1
        return new

    def _fit(self, context: openmm.Context) -> tuple[NDArray[np.int64], Constraints | None, bool]:
        """Particles, constraints and presence of virtual sites; worked out once for every Context."""
        if context not in self._checked:
            system = context.getSystem()
            atoms = particle_indices(self.atom_subset, system, self._generator)
            constraints = check_constraints(self._generator, system, atoms)
            self._checked[context] = atoms, constraints, has_virtual_sites(system)
        return self._checked[context]

    def _start_stream(self, entropy: int, key: tuple[int, ...]) -> None:
        """Begin the random stream that seed and key name, with an empty queue."""
        self._entropy, self._key, self._copies = entropy, key, 0
        self._checked: weakref.WeakKeyDictionary[openmm.Context, Any] = weakref.WeakKeyDictionary()
        state = np.random.SeedSequence(entropy, spawn_key=key).generate_state(5, np.uint64)
        self._random = np.random.default_rng(state[1:4])
        self._proposals = IndependenceProposals(self._generator, int(state[0] >> np.uint64(1)))
        self._latent = None
        if self.latent_share > 0:
            self._latent = LatentProposals(self._generator, int(state[4] >> np.uint64(1)), self.latent_step)
        self._potential = potential_of(self._generator.energy, self._generator) if self.two_stage else None

    def _store(self) -> None:
        """Make sure that the generator's file exists."""
        if self._stored:
            return
        if not self._path.exists():
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._generator.save(self._path)
        self._stored = True


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "openmm_bg" / "generators"


def _load(path: Path, fingerprint: str) -> BoltzmannGenerator:
    """The generator of this fingerprint: the one in the process, or the one in the file."""
    generator = _generators.get(fingerprint)
    if generator is None:
        if not path.is_file():
            raise InputError(f"The generator of a stored BoltzmannGeneratorMove is gone: put its file back at {path}.")
        generator = BoltzmannGenerator.load(path)
        if generator.fingerprint != fingerprint:
            raise InputError(f"{path} holds another generator than the stored move used; put the right one back.")
        generator = _generators.setdefault(fingerprint, generator)
    return generator
