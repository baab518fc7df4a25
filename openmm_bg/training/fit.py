"""The default recipe: from data, an energy, or both, to a trained generator."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from openmm import unit
from torch import Tensor

from openmm_bg.errors import InputError
from openmm_bg.flows import ContinuousFlow, MolecularFlow
from openmm_bg.generator import BoltzmannGenerator
from openmm_bg.training.budget import Budget
from openmm_bg.training.mass_transport import ConstrainedMassTransport
from openmm_bg.training.objectives import MaximumLikelihood, Objective
from openmm_bg.training.paths import ContinuityResidual
from openmm_bg.training.reverse import ReversePath
from openmm_bg.training.settings import WITHOUT_END, Settings, Stage, TrainingResult
from openmm_bg.training.trainer import Trainer
from openmm_bg.units import thermal_energy


def relabel_rotors(positions: np.ndarray, rotors: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Permute the three hydrogens of every rotor cyclically at random, frame by frame.

    Cyclic permutations are proper rotations of the rotor, so chirality and labels of everything else stay.

    Parameters
    ----------
    positions : ndarray, (n, atoms, 3)
    rotors : ndarray of int, (rotors, 3)
        Atom indices of the hydrogens.
    rng : numpy.random.Generator

    Returns
    -------
    ndarray
        A new array.
    """
    positions = np.array(positions)
    for hydrogens in np.asarray(rotors, dtype=int).reshape(-1, 3):
        turns = rng.integers(3, size=len(positions))
        for turn in (1, 2):
            rows = np.flatnonzero(turns == turn)[:, None]
            positions[rows, hydrogens] = positions[rows, np.roll(hydrogens, -turn)]
    return positions


def to_flow_coordinates(generator: BoltzmannGenerator, positions: Any, rng: np.random.Generator) -> tuple[Tensor, int]:
    """Training data in the coordinates of the flow.

    Parameters
    ----------
    generator : BoltzmannGenerator
        Informed already.
    positions : array or Quantity, (n, atoms, 3)
        nm.
    rng : numpy.random.Generator
        Draws the labels of rotors.

    Returns
    -------
    data : Tensor, (m, dimension), float64
    lost : int
        Frames outside the generator's support, n - m.

    Raises
    ------
    InputError
        If the positions have another shape than the generator's, or if none is in its support.
    """
    data, inside = _flow_coordinates(generator, positions, rng)
    return data, int((~inside).sum())


def _flow_coordinates(generator: BoltzmannGenerator, positions: Any, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """The same, and which frames lie in the support."""
    x = generator._batch(positions)
    if generator.coordinates is not None and generator.coordinates.zmatrix.rotors:
        zmatrix = generator.coordinates.zmatrix
        hydrogens = np.array([[zmatrix.torsions[row][0] for row in rotor] for rotor in zmatrix.rotors])
        x = torch.as_tensor(relabel_rotors(x.numpy(), hydrogens, rng))
    return generator._shapes(x)


def fit(
    generator: BoltzmannGenerator,
    data: Any = None,
    *,
    energies: Any = None,
    steps: int = 8000,
    likelihood_steps: int | None = None,
    transport_steps: int | None = None,
    energy: bool = True,
    objective: Objective | Sequence[tuple[float, Objective]] | None = None,
    budget: Budget | str | None = None,
    settings: Settings | None = None,
    seed: int = 0,
    log: Any = None,
    checkpoint: Any = None,
    resume: bool = False,
    progress: bool = True,
) -> TrainingResult:
    """Train a generator on data, on its energy, or on both.

    With both, maximum likelihood brings the flow near the data, then path gradients on its own samples make it exact
    where it is, while log-variance and a fading likelihood of the torsions keep the weights of the basins. Without data
    the flow of a molecule is first carried to the target by :class:`ConstrainedMassTransport`.

    Parameters
    ----------
    generator : BoltzmannGenerator
        Trained in place; ``provenance`` records how.
    data : array or Quantity, (n, atoms, 3), optional
        Conformations at the generator's temperature, nm (``(n, dimension)`` without coordinates).
    energies : array or Quantity, (n,), optional
        Potential energies of the data in kJ/mol (reduced energies for a generator without a molecule), for objectives
        that use them; where they are not given they are evaluated.
    steps : int
        Steps on the energy, of ``settings.batch_size`` evaluations each.
    likelihood_steps : int, optional
        Steps of maximum likelihood before them; default 400 with data (more would overfit), or all
        where ``energy`` is False.
    transport_steps : int, optional
        Most steps of mass transport before them; default 24,000 for a molecule without data, else none.
    energy : bool
        Whether to use the energy at all.
    objective : Objective or sequence of (float, Objective), optional
        How the energy is learned, or a weighted sum of several: by default :class:`ReversePath`, for a continuous flow
        :class:`ContinuityResidual`.
    budget : Budget or str, optional
        Time or evaluations to spend in place of a number of steps: "10min", "1e7".
    settings, seed, log, checkpoint, resume, progress
        See :class:`Trainer`.

    Returns
    -------
    TrainingResult

    Raises
    ------
    InputError
        If there is neither data nor energy, if the data are not of this molecule or too few, or if a checkpoint belongs
        to another run.

    Warns
    -----
    UserWarning
        If some of the data lie outside the generator's support and are left out.

    Examples
    --------
    >>> import openmm_bg as bg
    >>> well = bg.systems.load("double_well")
    >>> generator = bg.BoltzmannGenerator(well, bg.flows.RealNVP(2, layers=2, hidden=(8,)))
    >>> result = generator.fit(steps=5, progress=False)
    >>> result.steps
    5
    """
    if objective is not None and not energy:
        raise InputError("An objective for the energy was given, but energy=False; leave one of them out.")
    if objective is not None and not callable(objective) and not len(objective):
        raise InputError("objective is an empty list; give pairs (weight, objective), or leave it out.")
    energy = energy and generator.energy is not None
    if data is None and not energy:
        raise InputError("There is nothing to train on: pass data, or a generator with an energy.")
    if data is None and likelihood_steps:
        raise InputError("likelihood_steps need data to be likely; pass some, or train on the energy alone.")
    if data is None and energies is not None:
        raise InputError("energies belong to data; pass those, too.")
    if budget is not None and not isinstance(budget, Budget):
        budget = Budget.parse(str(budget))
    rng = np.random.default_rng(seed)
    rows, known, lost = None, None, 0
    if data is not None:
        if not generator.informed:
            generator.inform(data)
        rows, inside = _flow_coordinates(generator, data, rng)
        lost = int((~inside).sum())
        if energies is not None:
            known = _reduced(generator, energies, inside)
        if lost:
            warnings.warn(
                f"{lost} of {lost + len(rows)} frames are left out: another chirality, other hydrogen labels, broken "
                "constraints, or not finite.",
                stacklevel=2,
            )
        generator._initialize(rows)
    generator._check_informed()
    stages = training_stages(
        generator, rows is not None, energy, objective, steps, likelihood_steps, transport_steps, budget,
        (settings or Settings()).torsion_rate,
    )  # fmt: skip
    trainer = Trainer(
        generator, stages, rows, energies=known, budget=budget, settings=settings, seed=seed, log=log,
        checkpoint=checkpoint, resume=resume, progress=progress,
    )  # fmt: skip
    try:
        return trainer.run()
    finally:  # an interrupted run leaves its weights, too
        result = trainer.result
        generator.provenance["training"] = {
            "frames": 0 if rows is None else len(rows),
            "frames_outside_support": lost,
            "stages": [[stage.name, planned] for stage, planned in zip(trainer.stages, trainer.planned, strict=True)],
            "batch_size": trainer.settings.batch_size,
            "learning_rate": trainer.settings.learning_rate,
            "seed": seed,
            "steps": result.steps,
            "skipped": result.skipped,
            "rollbacks": result.rollbacks,
            "evaluations": result.evaluations,
            "seconds": round(result.seconds, 1),
        }


def training_stages(
    generator: BoltzmannGenerator,
    data: bool,
    energy: bool,
    objective: Objective | Sequence[tuple[float, Objective]] | None,
    steps: int,
    likelihood_steps: int | None,
    transport_steps: int | None,
    budget: Budget | None,
    torsion_rate: float,
) -> list[Stage]:
    """The default recipe, as far as nothing else was asked for."""
    if budget is not None:
        steps = WITHOUT_END
    if likelihood_steps is None:
        likelihood_steps = 0 if not data else (400 if energy else steps)
    if transport_steps is None:
        alone = not data and objective is None and isinstance(generator.flow, MolecularFlow)
        transport_steps = 24_000 if alone else 0
    stages = []
    if data:
        stages.append(Stage("likelihood", likelihood_steps, [(1.0, MaximumLikelihood())]))
    if energy and transport_steps:
        stages.append(Stage("transport", transport_steps, [(1.0, ConstrainedMassTransport())], rate=2e-3))
    if energy:
        if objective is None:
            objective = ContinuityResidual() if isinstance(generator.flow, ContinuousFlow) else ReversePath()
        terms: list = [(1.0, objective)] if callable(objective) else list(objective)
        if data:
            terms.append((0.02, MaximumLikelihood(torsions_only=True, fade=True)))
        stages.append(Stage("energy", steps, terms, torsion_rate=torsion_rate))
    return stages


def _reduced(generator: BoltzmannGenerator, energies: Any, inside: Tensor) -> Tensor:
    """Reduced energies of the frames inside the support."""
    if unit.is_quantity(energies):
        energies = energies.value_in_unit(unit.kilojoules_per_mole)
    values = torch.as_tensor(np.asarray(energies, dtype=np.float64))
    if values.shape != inside.shape:
        raise InputError(f"There are {len(inside)} conformations, but energies of shape {tuple(values.shape)}.")
    scale = 1.0 if generator.temperature is None else thermal_energy(generator.temperature)
    return values[inside] / scale
