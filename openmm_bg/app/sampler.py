"""Boltzmann generator moves beside an OpenMM Simulation."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TextIO

import numpy as np
import openmm
from numpy.typing import NDArray
from openmm import app, unit

from openmm_bg.app.checkpoint import load_checkpoint, save_checkpoint
from openmm_bg.app.matching import check_constraints, check_molecule, has_virtual_sites, particle_indices
from openmm_bg.app.output import AttemptLog, IterationTrajectory, WeightedTrajectory, refuse_existing
from openmm_bg.app.walker import ContextWalker, snapshot
from openmm_bg.energies import Energy
from openmm_bg.errors import InputError
from openmm_bg.sampling.adaptation import Adaptation, proposals_needed
from openmm_bg.sampling.latent_moves import LatentProposals
from openmm_bg.sampling.metropolis import Attempt, MoveStatistics
from openmm_bg.sampling.proposals import IndependenceProposals
from openmm_bg.sampling.two_stage import potential_of
from openmm_bg.units import kelvin


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

        sampler = BoltzmannGeneratorSampler(generator, simulation, stepsPerIteration=500)

    Then call simulation.step() as usual. The sampler adds a reporter to the simulation that makes the moves
    as it runs.

        simulation.step(100000)
        print(sampler.acceptanceRate)

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

    Two stages. Where an energy evaluation in the Context is dear, pass a cheap `energy` V of the molecule alone, such
    as generator.energy. All proposals of an iteration are then tried on V, in one batch, and only the conformation
    where that chain ends is evaluated in the Context and accepted with probability min(1, alpha),

        log alpha = -((U - V)(x') - (U - V)(x)) / kT.

    This is exact for any V. A V close to U makes hundreds of proposals cost as much as one; with solvent or restraints
    U - V is what they add.

    Latent moves. A molecule for which few whole conformations are accepted may still take small steps in the latent
    space of its flow: `latentShare` is the share of the proposals that are such steps of length `latentStep`. They are
    accepted by the rule above, log_prob being the density of the flow at the two ends.

    Adaptation. During the first `adaptationIterations` iterations the sampler learns the length of the latent steps
    (for an acceptance of 1/4) and the number of proposals (so that an iteration moves the molecule with a probability
    of 95 %, but no more than stepsPerIteration). What is sampled in this phase is not exact; set it aside. Then
    adaptation closes, for good, and production begins.

    Solvent and other molecules. With atoms=[...] the generator moves these particles of a larger System,
    given in the order of its own atoms, and everything else stays in place. Keep the molecule whole:
    periodic images are not searched.

    The following files can be written.

    - A log file with one line per attempt: step, iteration, outcome, both potential energies, both log
      densities and the log of the acceptance ratio; with two stages or latent moves also the kind of move and how many
      proposals were tried and accepted in it.
    - A DCD trajectory with one frame per iteration, written after the moves.
    - A DCD trajectory of every conformation that an attempt ended in, each once, and beside it, under the same name
      with .csv at the end, the step and the number of attempts that it lasted: its weight.
    - A checkpoint file that holds the state of the Context and of the sampler. With resume=True a simulation
      that was built in the same way continues from it: log and trajectories are cut back to the checkpoint,
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
        Iterations completed, each of `stepsPerIteration` time steps and `proposalsPerIteration` proposals.
    numProposed : int
        Attempts made, refused ones included. With two stages all proposals of one kind and iteration are one attempt.
    numAccepted, numRefused : int
    statistics : dict of str to MoveStatistics
        The same and more for each kind of move, "independent" and "latent".
    adaptationIterations : int
        Iterations after which adaptation was, or will be, closed.
    reporters : list of callable
        Each is called with the sampler after the moves of every iteration.

    Examples
    --------
    >>> import openmm, openmm_bg as bg
    >>> molecule = bg.systems.load("alanine_dipeptide")
    >>> generator = bg.BoltzmannGenerator.for_molecule(
    ...     molecule.topology, molecule.system, 300, positions=molecule.positions, compile=False
    ... )
    >>> integrator = openmm.LangevinMiddleIntegrator(300, 1.0, 0.001)
    >>> simulation = openmm.app.Simulation(molecule.topology, molecule.system, integrator)
    >>> simulation.context.setPositions(molecule.positions)
    >>> sampler = bg.BoltzmannGeneratorSampler(
    ...     generator, simulation, 10, 20, energy=generator.energy, latentShare=0.5, seed=1
    ... )
    >>> simulation.step(20)
    >>> sum(kind.tried for kind in sampler.statistics.values())
    40

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
        energy: Energy | None = None,
        latentShare: float = 0.0,
        latentStep: float = 0.2,
        adaptationIterations: int = 0,
        statesFile: str | os.PathLike[str] | None = None,
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
            Proposals tried after each of them.
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
            Continue from `checkpointFile`, with the same arguments. Without it, files that exist and are not empty are
            refused.
        energy : Energy, optional
            A cheap energy of the generator's atoms, with a method potential(x) in kJ/mol, for two-stage acceptance.
            None evaluates every proposal in the Context.
        latentShare : float
            Share of the proposals that are latent steps, 0 to 1; in each series they are drawn to be so.
        latentStep : float
            Their length, between 0 and 1.
        adaptationIterations : int
            Iterations in which length and number are adapted.
        statesFile : path, optional
            The trajectory of all conformations, with weights in statesFile.csv.

        Raises
        ------
        InputError
            If generator and simulation do not fit, the integrator has no temperature, or a file is in the
            way.
        """
        for name, value, least in (
            ("stepsPerIteration", stepsPerIteration, 1),
            ("proposalsPerIteration", proposalsPerIteration, 1),
            ("checkpointInterval", 10 * stepsPerIteration if checkpointInterval is None else checkpointInterval, 1),
            ("adaptationIterations", adaptationIterations, 0),
        ):
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
                wanted = "a positive whole number" if least else "a whole number of at least 0"
                raise InputError(f"{name} must be {wanted}, not {value!r}.")
        if not 0 <= latentShare <= 1:
            raise InputError(f"latentShare must lie between 0 and 1, not at {latentShare}.")
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
        kinds = {"independent": latentShare < 1, "latent": latentShare > 0}
        self.statistics = {kind: MoveStatistics() for kind, used in kinds.items() if used}
        self.adaptationIterations = int(adaptationIterations)
        self._temperature()

        # What is moved.

        system = simulation.system
        particles = particle_indices(atoms, system, generator)
        check_molecule(generator, simulation.topology, system, atoms)
        self._constraints = check_constraints(generator, system, particles)
        self._atoms: NDArray[np.int64] | None = None if atoms is None else particles
        self._virtualSites = has_virtual_sites(system)
        self._walker: ContextWalker | None = None

        # What is proposed. Three streams of random numbers: the generator's draws, decisions and velocities, and the
        # latent steps.

        draws, decisions, steps = np.random.SeedSequence(seed).spawn(3)
        self._random = np.random.default_rng(decisions)
        fixed = snapshot(generator)
        self._proposals = IndependenceProposals(fixed, _torchSeed(draws))
        self._latentShare = float(latentShare)
        self._latent = LatentProposals(fixed, _torchSeed(steps), latentStep) if latentShare else None
        self._potential = None if energy is None else potential_of(energy, generator)
        self._number = Adaptation()
        self._settings = {
            "stepsPerIteration": self.stepsPerIteration,
            "proposalsPerIteration": self.proposalsPerIteration,
            "latentShare": self._latentShare,
            "latentStep": float(latentStep),
            "twoStage": self.twoStage,
            "adaptationIterations": self.adaptationIterations,
        }
        if adaptationIterations == 0:
            self.closeAdaptation()

        # Restore from the checkpoint, or start new files.

        self._checkpointFile = checkpointFile
        self._checkpointInterval = int(checkpointInterval)
        self._log: AttemptLog | None = None
        self._trajectory: IterationTrajectory | None = None
        self._states: WeightedTrajectory | None = None
        if resume:
            self._openOutput(logFile, trajectoryFile, statesFile, load_checkpoint(self, checkpointFile))
        else:
            refuse_existing(checkpointFile)
            self._openOutput(logFile, trajectoryFile, statesFile, {})
        simulation.reporters.append(_Actor(self))

    @property
    def acceptanceRate(self) -> float:
        """Fraction of all attempts that were accepted; NaN before the first."""
        return self.numAccepted / self.numProposed if self.numProposed else math.nan

    @property
    def twoStage(self) -> bool:
        """Whether proposals are tried on a cheap energy first."""
        return self._potential is not None

    @property
    def latentStep(self) -> float | None:
        """Length of the latent steps, as given or as adapted; None without latent moves."""
        return None if self._latent is None else self._latent.step

    @property
    def adapting(self) -> bool:
        """Whether the adaptation phase is open."""
        return not self._number.closed

    def closeAdaptation(self) -> None:
        """End the adaptation phase now, for good. What follows is production; a second call changes nothing."""
        if self.adapting:
            self.adaptationIterations = self.currentIteration
        self._number.close()
        if self._latent is not None:
            self._latent.adaptation.close()

    def step(self, steps: int) -> None:
        """Advance the simulation, moves included; the same as simulation.step(steps)."""
        self.simulation.step(steps)

    def attemptMove(self) -> Attempt:
        """Try one proposal in place of the current conformation, or with two stages a series of them. Called
        automatically during the simulation.

        You can create subclasses that override this method to make other moves. It must leave the Context in
        the conformation it decided for and return the Attempt; counting, logging and drawing velocities are
        done by the caller. Called on its own, it makes one complete attempt, velocities included.
        """
        if self._walker is None:
            return self.attemptMoves(1)[0]
        return self._walker.attempt()

    def attemptMoves(self, proposals: int | None = None) -> list[Attempt]:
        """Try a number of proposals, as at the end of every iteration; redraw the velocities if one was accepted."""
        count = self.proposalsPerIteration if proposals is None else proposals
        temperature = self._temperature()
        context = self.simulation.context
        series: list[tuple[Any, int]] = [(self._proposals, count)]
        if self._latent is not None:
            latent = int(self._random.binomial(count, self._latentShare))
            series = [(self._proposals, count - latent), (self._latent, latent)]
        self._walker = ContextWalker(
            context,
            series,
            temperature=temperature,
            rng=self._random,
            potential=self._potential,
            atoms=self._atoms,
            groups=self.simulation.integrator.getIntegrationForceGroups(),
            virtual_sites=self._virtualSites,
            constraints=self._constraints,
        )
        attempts: list[Attempt] = []
        if self._states is not None:
            self._states.begin()
        try:
            while not self._walker.finished:
                attempts.append(self.attemptMove())
                if self._states is not None:
                    self._states.visit(context, attempts[-1].accepted)
        finally:
            self._walker = None
        accepted = sum(attempt.accepted for attempt in attempts)
        if accepted:
            context.setVelocitiesToTemperature(temperature, int(self._random.integers(1, 2**31 - 1)))
        self.numProposed += len(attempts)
        self.numAccepted += accepted
        self.numRefused += sum(attempt.refused for attempt in attempts)
        for attempt in attempts:
            self.statistics[attempt.kind].add(attempt)
        if self._log is not None:
            self._log.write(self.currentIteration, attempts)
        if self._states is not None:
            self._states.write(self.simulation.currentStep)
        return attempts

    def _iterate(self) -> None:
        """End one iteration: moves, then output, then the checkpoint that knows all of it."""
        self.currentIteration += 1
        attempts = self.attemptMoves()
        if self.adapting:
            self._adapt(attempts)
        if self._trajectory is not None:
            self._trajectory.write(self.simulation.context.getState(positions=True))
        for reporter in self.reporters:
            reporter(self)
        if self._checkpointFile is not None and self.simulation.currentStep % self._checkpointInterval == 0:
            save_checkpoint(self, self._checkpointFile)

    def _adapt(self, attempts: Sequence[Attempt]) -> None:
        """Learn from one iteration, and close the phase when it is over."""
        tried, moved = (sum(getattr(a, name) for a in attempts) for name in ("tried", "moved"))
        steps = [a for a in attempts if a.kind == "latent" and a.tried]
        if self._latent is not None and steps:
            self._latent.learn(sum(a.moved for a in steps) / sum(a.tried for a in steps))
        if tried:
            self._number.observe(moved / tried)
            self.proposalsPerIteration = proposals_needed(self._number.acceptance, self.stepsPerIteration)
        if self.currentIteration >= self.adaptationIterations:
            self.closeAdaptation()

    def _temperature(self) -> float:
        integrator = self.simulation.integrator
        if not hasattr(integrator, "getTemperature"):
            raise InputError(
                f"The {type(integrator).__name__} has no temperature, so no Boltzmann distribution is defined; use an "
                "integrator with a thermostat, such as LangevinMiddleIntegrator."
            )
        return kelvin(integrator.getTemperature())

    def _openOutput(self, logFile: Any, trajectoryFile: Any, statesFile: Any, header: Mapping[str, Any]) -> None:
        """Begin the output files, or continue those that the header of a checkpoint knows."""
        isPath = isinstance(logFile, (str, os.PathLike))
        length, marks = header.get("logLength"), header.get("states", (0, None, None, None))
        weightsFile = None if statesFile is None else f"{os.fspath(statesFile)}.csv"
        refuse_existing(
            logFile if isPath and length is None else None,
            None if "trajectory" in header else trajectoryFile,
            *(() if "states" in header else (statesFile, weightsFile)),
        )
        if logFile is not None:
            plain = self._latent is None and self._potential is None
            self._log = AttemptLog(logFile, length, header=isPath or not header, kinds=not plain)
        if trajectoryFile is not None:
            self._trajectory = self._openTrajectory(trajectoryFile, *header.get("trajectory", (0, None, None)))
        if statesFile is not None:
            self._states = WeightedTrajectory(self._openTrajectory(statesFile, *marks[:3]), weightsFile, marks[3])

    def _openTrajectory(self, path: Any, frames: int, length: int | None, first: int | None) -> IterationTrajectory:
        simulation = self.simulation
        return IterationTrajectory(
            path,
            simulation.topology,
            simulation.integrator.getStepSize().value_in_unit(unit.picosecond),
            self.stepsPerIteration,
            simulation.currentStep + self.stepsPerIteration if first is None else first,
            length,
            frames,
        )


def _torchSeed(sequence: np.random.SeedSequence) -> int:
    return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))


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
