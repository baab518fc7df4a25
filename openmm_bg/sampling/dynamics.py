"""Molecular dynamics for data: one Langevin propagator, and `simulate`, which runs it and keeps the frames.

The propagator is the leapfrog-middle scheme of OpenMM's `LangevinMiddleIntegrator` (kick, half drift,
friction and noise, half drift), taken apart: plain leapfrog steps run inside OpenMM, and the
friction-and-noise step is done here, in NumPy, every few steps instead of every step. Two things follow. All
random numbers come from a `numpy.random.Generator`, so a seed reproduces a run on however many threads (the
Reference platform has one random number stream per *process*: two Langevin Contexts there disturb each
other's numbers, and in two threads race for them). And the whole state of a walker is its positions,
velocities and generator, so a checkpoint is a few arrays.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import openmm
from openmm import unit
from tqdm import tqdm

from openmm_bg.errors import InputError
from openmm_bg.sampling.archive import load_arrays, save_arrays
from openmm_bg.units import GAS_CONSTANT, kelvin, nanometers, per_picosecond, picoseconds

__all__ = ["LangevinPropagator", "Trajectory", "fastest_platform", "simulate"]

CONSTRAINT_TOLERANCE = 1e-8
# Between two friction-and-noise steps: at most so many leapfrog steps, and at most so much friction * time.
_MAX_INTERVAL = 25
_MAX_DAMPING = 0.1
# Leapfrog steps between two looks at the clock, at Ctrl-C and at the health of the coordinates.
_CHUNK = 5000


@dataclass(frozen=True)
class Trajectory:
    """Frames of one temperature.

    Attributes
    ----------
    positions : ndarray (frames, atoms, 3), float64
        In nm, unwrapped.
    potential_energy : ndarray (frames,)
        In kJ/mol, of the platform that ran the dynamics.
    temperature : float
        In K.
    force_evaluations : int
        What the frames cost, energies included, minimisation not included.
    seed : int
    """

    positions: np.ndarray
    potential_energy: np.ndarray
    temperature: float
    force_evaluations: int
    seed: int

    def __len__(self) -> int:
        return len(self.positions)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything to one `.npz` file (no pickle inside), replacing it in one step."""
        header = {name: getattr(self, name) for name in ("temperature", "force_evaluations", "seed")}
        save_arrays(path, header, positions=self.positions, potential_energy=self.potential_energy)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Trajectory:
        """Read what `save` wrote."""
        header, arrays = load_arrays(path, ("positions", "potential_energy"))
        return cls(arrays["positions"], arrays["potential_energy"], **header)


def fastest_platform(system: openmm.System) -> str:
    """The platform that runs one small System fastest on one core.

    Reference up to 200 particles; CPU beyond, and with a CustomGBForce (seven times faster there).

    Parameters
    ----------
    system : openmm.System
    """
    custom = any(isinstance(force, openmm.CustomGBForce) for force in system.getForces())
    return "CPU" if custom or system.getNumParticles() > 200 else "Reference"


def check_system(system: openmm.System, positions: Any) -> np.ndarray:
    """Positions (atoms, 3) in nm that fit a System this room can run, or an InputError."""
    if not isinstance(system, openmm.System):
        raise InputError(f"system must be an openmm.System, not {type(system).__name__}.")
    for force in system.getForces():
        name = type(force).__name__
        if "Barostat" in name or name == "AndersenThermostat":
            raise InputError(
                f"The System holds a {name}: remove it, because this dynamics keeps the volume constant "
                "and brings its own thermostat."
            )
    x = nanometers(positions)
    if x.shape != (system.getNumParticles(), 3):
        raise InputError(
            f"positions have the shape {x.shape}, but the System has {system.getNumParticles()} particles: "
            f"give an array of shape ({system.getNumParticles()}, 3)."
        )
    if not np.isfinite(x).all():
        raise InputError("The starting positions contain NaN or infinite coordinates.")
    return x


def interval_of(timestep: float, friction: float) -> int:
    """Leapfrog steps between two friction-and-noise steps."""
    return max(1, min(_MAX_INTERVAL, int(_MAX_DAMPING / (friction * timestep))))


def unstable(temperature: float, timestep: float, why: str) -> InputError:
    """What is raised where dynamics has lost its coordinates."""
    return InputError(
        f"The dynamics at {temperature:g} K became unstable ({why}): "
        f"shorten the time step ({timestep:g} ps) or check the structure for overlapping atoms."
    )


class LangevinPropagator:
    """One walker: a Context with positions, velocities and random numbers of its own.

    The friction-and-noise step v <- c v + sqrt(1 - c^2) sqrt(kT/m) xi, c = exp(-friction n dt), comes after every
    n leapfrog steps (n at most 25, and friction * n * dt at most 0.1), and the positions follow by dt/2 times
    the change of v: with n = 1 this is the LangevinMiddleIntegrator step for step. The accuracy of the sampled
    positions does not depend on n. The velocities are those of the leapfrog scheme, half a step behind the
    positions. Constraints are kept, massless particles stay where they are.

    Parameters
    ----------
    system : openmm.System
        Without barostat or thermostat.
    positions : (atoms, 3), nm
    temperature, timestep, friction : Quantity or float
        K, ps, 1/ps.
    generator : numpy.random.Generator
        Every random number of the walker comes from it.
    platform : str, optional
        An OpenMM platform; by default `fastest_platform(system)`. CPU runs on one thread.

    Notes
    -----
    The leapfrog-middle discretisation: Zhang, Liu, Yan, Tuckerman, Liu, J. Phys. Chem. A 123, 6056 (2019).
    """

    def __init__(
        self,
        system: openmm.System,
        positions: Any,
        *,
        temperature: Any,
        timestep: Any,
        friction: Any,
        generator: np.random.Generator,
        platform: str | None = None,
    ) -> None:
        self.positions = check_system(system, positions)
        self.temperature = kelvin(temperature)
        self.timestep = picoseconds(timestep)
        self.friction = per_picosecond(friction)
        self.generator = generator
        self.force_evaluations = 0
        atoms = range(system.getNumParticles())
        masses = np.array([system.getParticleMass(i).value_in_unit(unit.dalton) for i in atoms])
        with np.errstate(divide="ignore"):
            self._inverse_mass = np.where(masses > 0, 1 / masses, 0)[:, None]
        self._interval = interval_of(self.timestep, self.friction)
        self._constrained = system.getNumConstraints() > 0
        self._virtual = any(system.isVirtualSite(i) for i in atoms)
        self._integrator = openmm.VerletIntegrator(self.timestep)
        self._integrator.setConstraintTolerance(CONSTRAINT_TOLERANCE)
        self.context = _context(system, self._integrator, platform or fastest_platform(system))
        self._place(self.positions)
        self.positions = self._read("positions")
        self.velocities = np.zeros_like(self.positions)

    def minimize(self, tolerance: float = 10.0) -> None:
        """Relax the positions to a root mean square force of `tolerance` kJ/mol/nm."""
        self._place(self.positions)
        openmm.LocalEnergyMinimizer.minimize(self.context, tolerance)
        self.positions = self._read("positions")

    def draw_velocities(self) -> None:
        """Fresh velocities for the positions as they are, in equilibrium with them.

        Leapfrog velocities belong half a step before the positions, v = xi - dt/2 a(x), and in a mode of frequency
        w the on-step part xi has the variance kT/m (1 - (w dt)^2 / 4), not kT/m. The difference is a twelfth for a
        C-H bond at 1 fs; it is taken out, to fourth order in w dt, by a second force half a step along xi.
        """
        half = 0.5 * self.timestep
        self._place(self.positions)
        noise = self._project(self._noise())
        here = self._acceleration(self.positions)
        ahead = self._acceleration(self.positions + half * noise)
        self._place(self.positions)
        self.velocities = self._project(noise + half * (0.5 * (ahead - here) - here))

    def advance(self, steps: int) -> None:
        """Take `steps` leapfrog steps, with friction and noise between and at the end.

        Raises
        ------
        InputError
            Where the coordinates are no longer finite: the time step is too long, or atoms overlap.
        """
        self._place(self.positions)
        self.context.setVelocities(self.velocities)
        done = 0
        while done < steps:
            n = min(self._interval, steps - done)
            try:
                self._integrator.step(n)
                state = self.context.getState(positions=True, velocities=True)
            except openmm.OpenMMException as error:
                raise unstable(self.temperature, self.timestep, str(error)) from None
            done += n
            self.force_evaluations += n
            x = state.getPositions(asNumpy=True)._value
            v = state.getVelocities(asNumpy=True)._value
            keep = math.exp(-self.friction * self.timestep * n)
            new = self._project(keep * v + math.sqrt(1 - keep * keep) * self._noise())
            x = x + 0.5 * self.timestep * (new - v)
            if not np.isfinite(x).all():
                raise unstable(self.temperature, self.timestep, "coordinates are not finite")
            self._place(x)
            if self._constrained or self._virtual:
                x, new = self._read("positions"), self._project(new)
            self.context.setVelocities(new)
            self.positions, self.velocities = x, new

    def potential_energy(self) -> float:
        """The potential energy of the positions, kJ/mol."""
        self._place(self.positions)
        self.force_evaluations += 1
        energy = self.context.getState(energy=True).getPotentialEnergy()._value
        if not math.isfinite(energy):
            raise unstable(self.temperature, self.timestep, f"the potential energy is {energy}")
        return energy

    def _acceleration(self, positions: np.ndarray) -> np.ndarray:
        self._place(positions)
        self.force_evaluations += 1
        forces = self.context.getState(forces=True).getForces(asNumpy=True)._value
        return forces * self._inverse_mass

    def _noise(self) -> np.ndarray:
        scale = np.sqrt(GAS_CONSTANT * self.temperature * self._inverse_mass)
        return scale * self.generator.standard_normal(self.positions.shape)

    def _place(self, positions: np.ndarray) -> None:
        self.context.setPositions(positions)
        if self._constrained:
            self.context.applyConstraints(CONSTRAINT_TOLERANCE)  # also places virtual sites
        elif self._virtual:
            self.context.computeVirtualSites()

    def _project(self, velocities: np.ndarray) -> np.ndarray:
        """The part of the velocities that keeps the constrained distances at the Context's positions."""
        if not self._constrained:
            return velocities
        self.context.setVelocities(velocities)
        self.context.applyVelocityConstraints(CONSTRAINT_TOLERANCE)
        return self._read("velocities")

    def _read(self, what: str) -> np.ndarray:
        state = self.context.getState(**{what: True})
        get = state.getPositions if what == "positions" else state.getVelocities
        return np.array(get(asNumpy=True)._value, dtype=np.float64)


def simulate(
    system: openmm.System,
    positions: Any,
    *,
    temperature: Any,
    n_frames: int,
    steps_per_frame: int,
    timestep: Any = 0.001,
    friction: Any = 1.0,
    equilibration_steps: int = 0,
    seed: int,
    minimize: bool = True,
    platform: str | None = None,
    progress: bool = True,
    callback: Callable[[int, np.ndarray, float], None] | None = None,
) -> Trajectory:
    """Langevin dynamics of one walker; a frame every `steps_per_frame` steps.

    Parameters
    ----------
    system : openmm.System
        Without barostat or thermostat.
    positions : (atoms, 3), nm
        Where to start.
    temperature, timestep, friction : Quantity or float
        K, ps, 1/ps.
    n_frames, steps_per_frame, equilibration_steps : int
        Frames kept, steps between them, and steps thrown away before the first interval.
    seed : int
        The same seed gives bitwise the same frames on the Reference platform.
    minimize : bool
        Relax the start first.
    platform : str, optional
        By default `fastest_platform(system)`.
    progress : bool
        A bar with the remaining time on stderr, where that is a terminal.
    callback : callable, optional
        Called as `callback(frame index, positions, potential energy)` after every frame.

    Returns
    -------
    Trajectory

    Raises
    ------
    InputError
        For input that does not fit, or when the dynamics becomes unstable.

    Examples
    --------
    >>> from openmm_bg import systems
    >>> molecule = systems.load("alanine_dipeptide")
    >>> run = simulate(
    ...     molecule.system, molecule.positions, temperature=300, n_frames=3, steps_per_frame=10, seed=1
    ... )
    >>> run.positions.shape
    (3, 22, 3)
    """
    n_frames = whole_number(n_frames, "n_frames", minimum=1)
    steps_per_frame = whole_number(steps_per_frame, "steps_per_frame", minimum=1)
    equilibration_steps = whole_number(equilibration_steps, "equilibration_steps", minimum=0)
    walker = LangevinPropagator(
        system,
        positions,
        temperature=temperature,
        timestep=timestep,
        friction=friction,
        generator=np.random.default_rng(whole_number(seed, "seed", minimum=0)),
        platform=platform,
    )
    if minimize:
        walker.minimize()
    walker.draw_velocities()
    frames = np.empty((n_frames, *walker.positions.shape))
    energies = np.empty(n_frames)
    total = equilibration_steps + n_frames * steps_per_frame
    with tqdm(total=total, unit="step", unit_scale=True, disable=None if progress else True) as bar:

        def advance(steps: int) -> None:
            # In pieces, so that the bar moves and Ctrl-C is heard.
            while steps > 0:
                walker.advance(min(steps, _CHUNK))
                bar.update(min(steps, _CHUNK))
                steps -= _CHUNK

        advance(equilibration_steps)
        for i in range(n_frames):
            advance(steps_per_frame)
            frames[i], energies[i] = walker.positions, walker.potential_energy()
            if callback is not None:
                callback(i, frames[i], energies[i])
    return Trajectory(frames, energies, walker.temperature, walker.force_evaluations, seed)


def whole_number(value: Any, name: str, *, minimum: int) -> int:
    """`value` as an int of at least `minimum`, or an InputError."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < minimum:
        raise InputError(f"{name} must be a whole number of at least {minimum}, not {value!r}.")
    return int(value)


def platform_named(name: str) -> openmm.Platform:
    """The platform of this name, or an InputError that lists those that are there."""
    try:
        return openmm.Platform.getPlatformByName(name)
    except openmm.OpenMMException:
        known = [openmm.Platform.getPlatform(i).getName() for i in range(openmm.Platform.getNumPlatforms())]
        raise InputError(f"There is no OpenMM platform {name!r} here; choose one of {', '.join(known)}.") from None


def _context(system: openmm.System, integrator: openmm.Integrator, platform: str) -> openmm.Context:
    chosen = platform_named(platform)
    properties = {"Threads": "1"} if platform == "CPU" else {}
    try:
        return openmm.Context(system, integrator, chosen, properties)
    except openmm.OpenMMException as error:
        raise InputError(f"OpenMM cannot run this System on the platform {platform}: {error}.") from None
