"""Boltzmann generator moves in explicit solvent: decouple the molecule, propose, couple it again."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any, TextIO

import numpy as np
from openmm import app

from openmm_bg.app.decoupling import decoupled_context, decoupled_system, switching_integrator
from openmm_bg.app.matching import check_constraints, particle_indices
from openmm_bg.app.output import AttemptLog, refuse_existing
from openmm_bg.app.sampler import BoltzmannGeneratorSampler
from openmm_bg.app.switching_walker import SwitchingAttempt, SwitchingWalker
from openmm_bg.errors import InputError
from openmm_bg.sampling.metropolis import MoveStatistics
from openmm_bg.sampling.switching import schedule
from openmm_bg.units import picoseconds

CONSTRAINT_TOLERANCE = 1e-6  # relative; what single precision can hold


class SwitchingSampler(BoltzmannGeneratorSampler):
    """Molecular dynamics and Boltzmann generator moves for one molecule in explicit solvent.

    In a liquid there is no room for a conformation that was made elsewhere: placed directly, almost every proposal
    overlaps with the solvent and is rejected. This class first decouples the molecule from everything else, in
    `switchingSteps` time steps (the charges, then soft-core Lennard-Jones); there, in vacuum, the generator proposes a
    conformation x' in place of x, in the frame of the seed atoms as they stand; and the same steps in reverse order
    couple it again, while the solvent makes room. The end is accepted in place of the start with probability
    min(1, alpha),

        log alpha = -(W_decouple + W_recouple) + log_ratio,
        log_ratio = -(U_0(x') - U_0(x)) / kT + log_prob(x) - log_prob(x'),

    U_0 being the energy at the decoupled end. The work W is the change of the total energy in units of kT, with the
    true energy at the two ends; see :mod:`openmm_bg.sampling.switching`, which also says why it is exact for any time
    step, schedule and number of steps: what these decide is the acceptance. It grows with `switchingSteps`, which
    should be as large as the decorrelation it buys is worth, and with `proposalsPerMove`.

    Use it as BoltzmannGeneratorSampler, with the particles of the molecule:

        sampler = SwitchingSampler(generator, simulation, atoms=range(22), switchingSteps=5000, stepsPerIteration=5000)
        simulation.step(1000000)
        print(sampler.acceptanceRate, sampler.workMean, sampler.workStd)

    The generator should know the molecule in vacuum: then what it proposes at the decoupled end is what is found there.

    What a move changes. All particles have moved after an accepted move, and the velocities are drawn anew. A rejected
    one leaves positions and velocities exactly as they were. Step count, time and box do not change; at constant
    pressure the barostat acts in the dynamics and the move is made in the box of that moment. Constraints hold
    throughout, rigid water included. Time spent in moves shows in the speed that reporters print: one move costs
    2 `switchingSteps` steps.

    A second Context, of the decoupled System, lives on the same platform. In single precision the protocol is
    reversible to that precision only.

    Attributes
    ----------
    switchingSteps : int
        Time steps of the decoupling, and again of the recoupling.
    switchingStepSize : float
        ps.
    movesPerIteration, proposalsPerMove : int
    numProposed, numAccepted, numRefused : int
        Moves; those accepted; those in which the generator could not have made the conformation at the decoupled end.

    All other attributes are those of BoltzmannGeneratorSampler.

    Examples
    --------
    >>> import openmm, openmm_bg as bg
    >>> from openmm import app, unit
    >>> molecule = bg.systems.load("alanine_dipeptide")
    >>> generator = bg.BoltzmannGenerator.for_molecule(
    ...     molecule.topology, molecule.system, 300, positions=molecule.positions, compile=False
    ... )
    >>> forcefield = app.ForceField("amber99sbildn.xml", "tip3p.xml")
    >>> modeller = app.Modeller(molecule.topology, molecule.positions * unit.nanometer)
    >>> modeller.addSolvent(forcefield, boxSize=openmm.Vec3(2, 2, 2) * unit.nanometer)
    >>> system = forcefield.createSystem(
    ...     modeller.topology, nonbondedMethod=app.PME, nonbondedCutoff=0.8 * unit.nanometer
    ... )
    >>> simulation = app.Simulation(modeller.topology, system, openmm.LangevinMiddleIntegrator(300, 1.0, 0.001))
    >>> simulation.context.setPositions(modeller.positions)
    >>> sampler = SwitchingSampler(generator, simulation, range(22), switchingSteps=2, stepsPerIteration=5, seed=1)
    >>> simulation.step(5)
    >>> sampler.numProposed
    1

    References
    ----------
    Nilmeier, Crooks, Minh and Chodera, PNAS 108, E1009 (2011). Gill et al. (BLUES), J. Phys. Chem. B 122, 5579 (2018).
    """

    def __init__(
        self,
        generator: Any,
        simulation: app.Simulation,
        atoms: Sequence[int],
        switchingSteps: int = 5000,
        stepsPerIteration: int = 5000,
        movesPerIteration: int = 1,
        proposalsPerMove: int = 10,
        switchingStepSize: Any = None,
        couplings: Any = None,
        seed: int | None = None,
        logFile: str | os.PathLike[str] | TextIO | None = None,
        trajectoryFile: str | os.PathLike[str] | None = None,
        checkpointFile: str | os.PathLike[str] | None = None,
        checkpointInterval: int | None = None,
        resume: bool = False,
        statesFile: str | os.PathLike[str] | None = None,
    ):
        """Create a sampler and add it to a Simulation.

        Parameters
        ----------
        generator : BoltzmannGenerator
        simulation : openmm.app.Simulation
            Its integrator must have a temperature.
        atoms : sequence of int
            Particle of each atom of the generator.
        switchingSteps : int
            Time steps of the decoupling, and again of the recoupling.
        stepsPerIteration : int
            Time steps of dynamics between two series of moves.
        movesPerIteration : int
        proposalsPerMove : int
            Conformations among which each move chooses at the decoupled end, by weight.
        switchingStepSize : float or Quantity, optional
            ps; that of the simulation's integrator by default. Errors of the time step cost acceptance only.
        couplings : array, shape (switchingSteps, 2), optional
            Electrostatics and sterics at every step of the decoupling, between 1 and 0; the proposal is made at those
            of the last row. By default :func:`openmm_bg.sampling.switching.schedule`.
        seed : int, optional
            Reproduces moves, decisions and velocities. None draws one.
        logFile, trajectoryFile, checkpointFile, checkpointInterval, resume, statesFile
            As for BoltzmannGeneratorSampler; the log has the two works beside.

        Raises
        ------
        InputError
            If generator and simulation do not fit, a force would keep the molecule coupled to its surroundings, the
            integrator has no temperature, or a file is in the way.
        """
        for name, value in (
            ("switchingSteps", switchingSteps),
            ("movesPerIteration", movesPerIteration),
            ("proposalsPerMove", proposalsPerMove),
        ):
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
                raise InputError(f"{name} must be a positive whole number, not {value!r}.")
        if atoms is None:
            raise InputError("Give atoms=[...]: which particles of the System are the generator's molecule.")
        integrator, system = simulation.integrator, simulation.system
        self.switchingSteps, self.proposalsPerMove = int(switchingSteps), int(proposalsPerMove)
        self.switchingStepSize = picoseconds(
            integrator.getStepSize() if switchingStepSize is None else switchingStepSize, "switchingStepSize"
        )
        self._couplings = schedule(self.switchingSteps) if couplings is None else np.array(couplings, dtype=np.float64)
        if (
            self._couplings.shape != (self.switchingSteps, 2)
            or not ((0 <= self._couplings) & (self._couplings <= 1)).all()
        ):
            raise InputError(f"couplings must be numbers between 0 and 1 of shape ({self.switchingSteps}, 2).")
        atoms = list(atoms)
        particles = particle_indices(atoms, system, generator)
        _check_distances(generator, check_constraints(generator, system, particles))
        self._decoupled = decoupled_context(
            simulation.context,
            decoupled_system(system, particles, integrator.getIntegrationForceGroups()),
            switching_integrator(
                self._couplings,
                self.switchingStepSize,
                min(CONSTRAINT_TOLERANCE, integrator.getConstraintTolerance()),
                seed=1 + int(np.random.SeedSequence(seed, spawn_key=(0, 0)).generate_state(1)[0] >> 2),
            ),
        )
        self._works: list[float] = []
        super().__init__(
            generator,
            simulation,
            stepsPerIteration,
            movesPerIteration,
            atoms=atoms,
            seed=seed,
            logFile=logFile,
            trajectoryFile=trajectoryFile,
            checkpointFile=checkpointFile,
            checkpointInterval=checkpointInterval,
            resume=resume,
            statesFile=statesFile,
        )
        self.statistics = {"switching": self.statistics.get("switching", MoveStatistics())}

    @property
    def movesPerIteration(self) -> int:
        """Moves tried after each stretch of dynamics."""
        return self.proposalsPerIteration

    @property
    def workMean(self) -> float:
        """Mean total work, -log alpha, in units of kT, of the moves that came to an end since the sampler was made."""
        return float(np.mean(self._works)) if self._works else math.nan

    @property
    def workStd(self) -> float:
        """Its standard deviation."""
        return float(np.std(self._works, ddof=1)) if len(self._works) > 1 else math.nan

    def attemptMoves(self, proposals: int | None = None) -> list[SwitchingAttempt]:
        """Try a number of moves, as at the end of every iteration; redraw the velocities if one was accepted."""
        temperature = self._temperature()
        context = self.simulation.context
        self._walker = walker = SwitchingWalker(
            context,
            self._decoupled,
            self._couplings,
            self._proposals,
            temperature=temperature,
            rng=self._random,
            atoms=self._atoms,
            tries=self.proposalsPerMove,
            groups=self.simulation.integrator.getIntegrationForceGroups(),
        )
        attempts: list[SwitchingAttempt] = []
        if self._states is not None:
            self._states.begin()
        try:
            for _ in range(self.movesPerIteration if proposals is None else proposals):
                attempts.append(self.attemptMove())
                if self._states is not None:
                    self._states.visit(context, attempts[-1].accepted)
        finally:
            self._walker = None
        if walker.accepted:
            context.setVelocitiesToTemperature(temperature, int(self._random.integers(1, 2**31 - 1)))
        self.numProposed += len(attempts)
        self.numAccepted += walker.accepted
        self.numRefused += sum(attempt.refused for attempt in attempts)
        for attempt in attempts:
            self.statistics["switching"].add(attempt)
        self._works += [-a.log_acceptance for a in attempts if math.isfinite(a.log_acceptance)]
        if self._log is not None:
            self._log.write(self.currentIteration, attempts)
        if self._states is not None:
            self._states.write(self.simulation.currentStep)
        return attempts

    def _openOutput(self, logFile: Any, *others: Any) -> None:
        header = others[-1]
        length = header.get("logLength")
        isPath = isinstance(logFile, (str, os.PathLike))
        refuse_existing(logFile if isPath and length is None else None)
        super()._openOutput(None, *others)
        if logFile is not None:
            self._log = SwitchingLog(logFile, length, header=isPath or not header)


class SwitchingLog(AttemptLog):
    """One line per move; the log of attempts with the two works."""

    HEADER = AttemptLog.HEADER + ',"Decoupling Work (kT)","Recoupling Work (kT)"'

    def write(self, iteration: int, attempts: Sequence[SwitchingAttempt]) -> None:
        """Append the moves of one iteration."""
        rows = (
            f"{a.step},{iteration},{int(a.accepted)},{int(a.refused)}," + ",".join(repr(float(v)) for v in a[3:10])
            for a in attempts
        )
        self._append("".join(row + "\n" for row in rows))


def _check_distances(generator: Any, constraints: Any) -> None:
    """An InputError where the generator makes other distances than the System constrains."""
    if constraints is None:
        return
    made = {frozenset((i, j)): distance for i, j, distance in generator.coordinates.constraints}
    for (i, j), distance in zip(constraints[0].tolist(), constraints[1].tolist(), strict=True):
        if abs(made[frozenset((i, j))] / distance - 1) > CONSTRAINT_TOLERANCE:
            raise InputError(
                f"The System constrains atoms {i} and {j} of the generator to {distance:.6g} nm, but the generator "
                f"makes {made[frozenset((i, j))]:.6g} nm; build it for a System with the same constraints."
            )
