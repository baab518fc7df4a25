"""Boltzmann generator moves beside an OpenMM Simulation."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Sequence
from typing import Any, TextIO

import numpy as np
import openmm
from numpy.typing import NDArray
from openmm import app, unit

from openmm_bg.app.matching import check_constraints, check_molecule, has_virtual_sites, particle_indices
from openmm_bg.app.output import AttemptLog, IterationTrajectory, refuse_existing
from openmm_bg.app.walker import ContextWalker, snapshot
from openmm_bg.errors import InputError
from openmm_bg.sampling.dynamics import load_arrays, save_arrays
from openmm_bg.sampling.metropolis import Attempt, IndependenceProposals
from openmm_bg.units import kelvin

CHECKPOINT_FORMAT = 1


class BoltzmannGeneratorSampler:
    """Molecular dynamics and Boltzmann generator moves in one simulation.

    Molecular dynamics explores the surroundings of a conformation well and crosses barriers rarely. A
    trained Boltzmann generator proposes whole conformations from anywhere, and knows the probability
    density of each of them. This class alternates the two: after every `stepsPerIteration` time steps it
    tries `proposalsPerIteration` conformations of the generator, one after the other, and accepts a
    conformation x' in place of the current x with probability min(1, alpha),

        log alpha = -(U(x') - U(x)) / kT + log_prob(x) - log_prob(x').

    A generator that learned little costs acceptance, never correctness: what is sampled is the Boltzmann
    distribution of the System. U is the potential energy of the simulation's own Context, with all the
    force groups that its integrator uses, so that restraints, biases and solvent take part, and T is the
    temperature of the integrator at that moment. The move is exact; the dynamics beside it keeps the error
    of its own time step.

    Create a Simulation in the normal way, set its positions, and create the sampler:

    >>> sampler = BoltzmannGeneratorSampler(generator, simulation, stepsPerIteration=500)

    Then call simulation.step() as usual. The sampler adds a reporter to the simulation that makes the moves
    as it runs.

    >>> simulation.step(100000)
    >>> print(sampler.acceptanceRate)

    What a move changes. The seed atoms' frame stays where it is (the position of one atom and the
    orientation of the first angle), which is what makes the move exact in a box, in solvent and next to
    restraints; every other coordinate of the molecule is new. After an accepted move the velocities of all
    particles are drawn anew. Step count, time and box do not change. A rejected proposal leaves positions
    and velocities exactly as they were. If the current conformation is one that the generator could not
    have made, the attempt is refused: nothing is proposed, and `numRefused` counts it.

    What reporters see. Reporters due at the same step write the conformation before the moves, wherever
    they stand in simulation.reporters; the accepted conformations then show in the dynamics that follows.
    Every such frame is a fair sample. Use `trajectoryFile`, or a function in `reporters`, for the
    conformations right after the moves.

    Solvent and other molecules. With atoms=[...] the generator moves these particles of a larger System,
    given in the order of its own atoms, and everything else stays in place. Keep the molecule whole:
    periodic images are not searched.

    The following files can be written.

    - A log file with one line per attempt: step, iteration, outcome, both potential energies, both log
      densities and the log of the acceptance ratio.
    - A DCD trajectory with one frame per iteration, written after the moves.
    - A checkpoint file that holds the state of the Context and of the sampler. With resume=True a simulation
      that was built in the same way continues from it: log and trajectory are cut back to the checkpoint,
      and on the Reference platform the numbers are those of a run that was never interrupted. Like every
      OpenMM checkpoint it belongs to one platform and one machine type. Output of your own reporters is not
      cut back.

    The sampler keeps the generator as it was when the sampler was created: training it further changes
    nothing in a simulation that runs, so that what is sampled stays one and the same distribution.

    Attributes
    ----------
    generator : BoltzmannGenerator
    simulation : openmm.app.Simulation
    stepsPerIteration : int
    proposalsPerIteration : int
    currentIteration : int
        Iterations completed, each of `stepsPerIteration` time steps and `proposalsPerIteration` attempts.
    numProposed : int
        Attempts made, refused ones included.
    numAccepted, numRefused : int
    reporters : list of callable
        Each is called with the sampler after the moves of every iteration.

    References
    ----------
    Noe, Olsson, Koehler and Wu, Science 365, eaaw1147 (2019). Gabrie, Rotskoff and Vanden-Eijnden, PNAS
    119, e2109420119 (2022).
    """

    def __init__(
        self,
        generator: Any,
        simulation: app.Simulation,
        stepsPerIteration: int = 500,
        proposalsPerIteration: int = 10,
        atoms: Sequence[int] | None = None,
        seed: int | None = None,
        logFile: str | os.PathLike[str] | TextIO | None = None,
        trajectoryFile: str | os.PathLike[str] | None = None,
        checkpointFile: str | os.PathLike[str] | None = None,
        checkpointInterval: int | None = None,
        resume: bool = False,
    ):
        """Create a sampler and add it to a Simulation.

        Parameters
        ----------
        generator : BoltzmannGenerator
            Its molecule must be the System's, or the part of it given by `atoms`.
        simulation : openmm.app.Simulation
            Its integrator must have a temperature.
        stepsPerIteration : int
            Time steps between two series of attempts.
        proposalsPerIteration : int
            Attempts in one series.
        atoms : list of int, optional
            Particle of each atom of the generator; None if the generator's molecule is the whole System.
        seed : int, optional
            Reproduces the proposals, the decisions and the velocities (the integrator has a seed of its
            own). None draws one.
        logFile : path or file-like, optional
        trajectoryFile : path, optional
        checkpointFile : path, optional
        checkpointInterval : int, optional
            Time steps between checkpoints, a multiple of stepsPerIteration. Ten iterations by default.
        resume : bool
            Continue from `checkpointFile`. Without it, files that exist and are not empty are refused.

        Raises
        ------
        InputError
            If generator and simulation do not fit, the integrator has no temperature, or a file is in the
            way.
        """
        for name, value in (
            ("stepsPerIteration", stepsPerIteration),
            ("proposalsPerIteration", proposalsPerIteration),
            ("checkpointInterval", checkpointInterval if checkpointInterval is not None else 10 * stepsPerIteration),
        ):
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
                raise InputError(f"{name} must be a positive whole number, not {value!r}.")
        if checkpointInterval is None:
            checkpointInterval = 10 * stepsPerIteration
        if checkpointInterval % stepsPerIteration != 0:
            raise InputError("checkpointInterval must be a multiple of stepsPerIteration.")
        if resume and checkpointFile is None:
            raise InputError("resume=True needs the checkpointFile to resume from.")
        self.generator = generator
        self.simulation = simulation
        self.stepsPerIteration = int(stepsPerIteration)
        self.proposalsPerIteration = int(proposalsPerIteration)
        self.reporters: list[Callable[[BoltzmannGeneratorSampler], None]] = []
        self.currentIteration = 0
        self.numProposed = 0
        self.numAccepted = 0
        self.numRefused = 0
        self._temperature()

        # What is moved.

        system = simulation.system
        particles = particle_indices(atoms, system, generator)
        check_molecule(generator, simulation.topology, system, atoms)
        self._constraints = check_constraints(generator, system, particles)
        self._atoms: NDArray[np.int64] | None = None if atoms is None else particles
        self._virtualSites = has_virtual_sites(system)
        self._walker: ContextWalker | None = None

        # Two streams of random numbers: the generator's draws, and decisions and velocities.

        draws, decisions = np.random.SeedSequence(seed).spawn(2)
        self._random = np.random.default_rng(decisions)
        torchSeed = int(draws.generate_state(1, np.uint64)[0] >> np.uint64(1))
        self._proposals = IndependenceProposals(snapshot(generator), torchSeed)

        # Restore from the checkpoint, or start new files.

        self._checkpointFile = checkpointFile
        self._checkpointInterval = int(checkpointInterval)
        self._log: AttemptLog | None = None
        self._trajectory: IterationTrajectory | None = None
        if resume:
            self._resume(checkpointFile, logFile, trajectoryFile)
        else:
            refuse_existing(checkpointFile)
            self._openOutput(logFile, trajectoryFile, {})
        simulation.reporters.append(_Actor(self))

    @property
    def acceptanceRate(self) -> float:
        """Fraction of all attempts that were accepted; NaN before the first."""
        return self.numAccepted / self.numProposed if self.numProposed else math.nan

    def step(self, steps: int) -> None:
        """Advance the simulation, moves included; the same as simulation.step(steps)."""
        self.simulation.step(steps)

    def attemptMove(self) -> Attempt:
        """Try one proposal in place of the current conformation. Called automatically during the simulation.

        You can create subclasses that override this method to make other moves. It must leave the Context in
        the conformation it decided for and return the Attempt; counting, logging and drawing velocities are
        done by the caller. Called on its own, it makes one complete attempt, velocities included.
        """
        if self._walker is None:
            return self.attemptMoves(1)[0]
        return self._walker.attempt()

    def attemptMoves(self, proposals: int | None = None) -> list[Attempt]:
        """Make one series of attempts, as at the end of every iteration; redraw the velocities if one was accepted."""
        count = self.proposalsPerIteration if proposals is None else proposals
        temperature = self._temperature()
        context = self.simulation.context
        self._walker = ContextWalker(
            context,
            self._proposals,
            temperature=temperature,
            rng=self._random,
            count=count,
            atoms=self._atoms,
            groups=self.simulation.integrator.getIntegrationForceGroups(),
            virtual_sites=self._virtualSites,
            constraints=self._constraints,
        )
        try:
            attempts = [self.attemptMove() for _ in range(count)]
        finally:
            self._walker = None
        accepted = sum(attempt.accepted for attempt in attempts)
        if accepted:
            context.setVelocitiesToTemperature(temperature, int(self._random.integers(1, 2**31 - 1)))
        self.numProposed += len(attempts)
        self.numAccepted += accepted
        self.numRefused += sum(attempt.refused for attempt in attempts)
        if self._log is not None:
            self._log.write(self.currentIteration, attempts)
        return attempts

    def _iterate(self) -> None:
        """End one iteration: moves, then output, then the checkpoint that knows all of it."""
        self.currentIteration += 1
        self.attemptMoves()
        if self._trajectory is not None:
            self._trajectory.write(self.simulation.context)
        for reporter in self.reporters:
            reporter(self)
        if self._checkpointFile is not None and self.simulation.currentStep % self._checkpointInterval == 0:
            self._saveCheckpoint(self._checkpointFile)

    def _temperature(self) -> float:
        integrator = self.simulation.integrator
        if not hasattr(integrator, "getTemperature"):
            raise InputError(
                f"The {type(integrator).__name__} has no temperature, so no Boltzmann distribution is defined; use an "
                "integrator with a thermostat, such as LangevinMiddleIntegrator."
            )
        return kelvin(integrator.getTemperature())

    def _openOutput(self, logFile: Any, trajectoryFile: Any, header: dict[str, Any]) -> None:
        """Begin the output files, or continue those that the header of a checkpoint knows."""
        simulation = self.simulation
        isPath = isinstance(logFile, (str, os.PathLike))
        length = header.get("logLength")
        frames, size, first = header.get("trajectory", (0, None, None))
        refuse_existing(logFile if isPath and length is None else None, trajectoryFile if size is None else None)
        if logFile is not None:
            self._log = AttemptLog(logFile, length, header=isPath or not header)
        if trajectoryFile is not None:
            self._trajectory = IterationTrajectory(
                trajectoryFile,
                simulation.topology,
                simulation.integrator.getStepSize().value_in_unit(unit.picosecond),
                self.stepsPerIteration,
                simulation.currentStep + self.stepsPerIteration if first is None else first,
                size,
                frames,
            )

    def _saveCheckpoint(self, path: str | os.PathLike[str]) -> None:
        header: dict[str, Any] = {
            "format": CHECKPOINT_FORMAT,
            "generator": _weightsHash(self._proposals.generator),
            "stepsPerIteration": self.stepsPerIteration,
            "currentIteration": self.currentIteration,
            "numProposed": self.numProposed,
            "numAccepted": self.numAccepted,
            "numRefused": self.numRefused,
            "random": self._random.bit_generator.state,
        }
        if self._log is not None:
            header["logLength"] = self._log.length
        if self._trajectory is not None:
            output = self._trajectory
            header["trajectory"] = (output.frames, output.length, output.first_step)
        context = np.frombuffer(self.simulation.context.createCheckpoint(), dtype=np.uint8)
        queue = {f"proposals_{name}": array for name, array in self._proposals.state_dict().items()}
        save_arrays(path, header, context=context, **queue)

    def _resume(self, path: Any, logFile: Any, trajectoryFile: Any) -> None:
        queue = ("random", "q", "log_prob")
        header, arrays = load_arrays(path, ("context", *(f"proposals_{name}" for name in queue)))
        if header.get("format") != CHECKPOINT_FORMAT:
            raise InputError(f"{path} was written by another version of openmm_bg.")
        if header["generator"] != _weightsHash(self._proposals.generator):
            raise InputError(f"{path} belongs to another generator; resume with the one it was made with.")
        if header["stepsPerIteration"] != self.stepsPerIteration:
            raise InputError(
                f"{path} was made with stepsPerIteration={header['stepsPerIteration']}; resume with the same."
            )
        try:
            self.simulation.context.loadCheckpoint(arrays["context"].tobytes())
        except openmm.OpenMMException as error:
            raise InputError(
                f"{path} does not fit this simulation (a checkpoint needs the same System, integrator and platform): "
                f"{error}"
            ) from None
        self.currentIteration = header["currentIteration"]
        self.numProposed, self.numAccepted = header["numProposed"], header["numAccepted"]
        self.numRefused = header["numRefused"]
        self._random.bit_generator.state = header["random"]
        self._proposals.load_state_dict({name: arrays[f"proposals_{name}"] for name in queue})
        self._openOutput(logFile, trajectoryFile, header)


def _weightsHash(generator: Any) -> str:
    """sha256 of the weights; unlike a generator's fingerprint it exists for flows that cannot be saved, too."""
    digest = hashlib.sha256()
    for name, tensor in generator.flow.state_dict().items():
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        digest.update(tensor.numpy(force=True).tobytes())
    return digest.hexdigest()


class _Actor:
    """The reporter that makes the moves.

    It asks for no positions: so it runs after all trajectory reporters due at the same step, whatever its
    place in the list, and none of them is handed a State that the Context has left already.
    """

    def __init__(self, sampler: BoltzmannGeneratorSampler):
        self._sampler = sampler

    def describeNextReport(self, simulation: app.Simulation) -> dict[str, Any]:
        interval = self._sampler.stepsPerIteration
        return {"steps": interval - simulation.currentStep % interval, "periodic": None, "include": []}

    def report(self, simulation: app.Simulation, state: openmm.State) -> None:
        self._sampler._iterate()
