"""The default recipe: from data, an energy, or both, to a trained generator."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

from openmm_bg.errors import InputError
from openmm_bg.flows import ContinuousFlow
from openmm_bg.generator import BoltzmannGenerator
from openmm_bg.training.objectives import MaximumLikelihood, Objective, ReversePath
from openmm_bg.training.paths import ContinuityResidual
from openmm_bg.training.trainer import Settings, Stage, Trainer, TrainingResult


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
    x = generator._batch(positions)
    if generator.coordinates is not None and generator.coordinates.zmatrix.rotors:
        zmatrix = generator.coordinates.zmatrix
        hydrogens = np.array([[zmatrix.torsions[row][0] for row in rotor] for rotor in zmatrix.rotors])
        x = torch.as_tensor(relabel_rotors(x.numpy(), hydrogens, rng))
    data = generator._shapes(x)
    return data, len(x) - len(data)


def fit(
    generator: BoltzmannGenerator,
    data: Any = None,
    *,
    steps: int = 8000,
    likelihood_steps: int | None = None,
    energy: bool = True,
    objective: Objective | None = None,
    settings: Settings | None = None,
    seed: int = 0,
    log: Any = None,
    checkpoint: Any = None,
    resume: bool = False,
    progress: bool = True,
) -> TrainingResult:
    """Train a generator on data, on its energy, or on both.

    With both, maximum likelihood brings the flow near the data, then path gradients on its own samples make it exact
    where it is, while log-variance and a fading likelihood of the torsions keep the weights of the basins.

    Parameters
    ----------
    generator : BoltzmannGenerator
        Trained in place; ``provenance`` records how.
    data : array or Quantity, (n, atoms, 3), optional
        Conformations at the generator's temperature, nm (``(n, dimension)`` without coordinates).
    steps : int
        Steps on the energy, of ``settings.batch_size`` evaluations each.
    likelihood_steps : int, optional
        Steps of maximum likelihood before them; default 400 with data (more would overfit), or all
        where ``energy`` is False.
    energy : bool
        Whether to use the energy at all.
    objective : Objective, optional
        How the energy is learned: by default :class:`ReversePath`, for a continuous flow
        :class:`ContinuityResidual`.
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
    energy = energy and generator.energy is not None
    if data is None and not energy:
        raise InputError("There is nothing to train on: pass data, or a generator with an energy.")
    if data is None and likelihood_steps:
        raise InputError("likelihood_steps need data to be likely; pass some, or train on the energy alone.")
    rng = np.random.default_rng(seed)
    rows, lost = None, 0
    if data is not None:
        if not generator.informed:
            generator.inform(data)
        rows, lost = to_flow_coordinates(generator, data, rng)
        if lost:
            warnings.warn(
                f"{lost} of {lost + len(rows)} frames are left out: another chirality, other hydrogen labels, broken "
                "constraints, or not finite.",
                stacklevel=2,
            )
        generator._initialize(rows)
    generator._check_informed()
    if likelihood_steps is None:
        likelihood_steps = 0 if rows is None else (400 if energy else steps)
    stages = []
    if rows is not None:
        stages.append(Stage("likelihood", likelihood_steps, [(1.0, MaximumLikelihood())]))
    if energy:
        if objective is None:
            objective = ContinuityResidual() if isinstance(generator.flow, ContinuousFlow) else ReversePath()
        terms: list = [(1.0, objective)]
        if rows is not None:
            terms.append((0.02, MaximumLikelihood(torsions_only=True, fade=True)))
        stages.append(Stage("energy", steps, terms))
    trainer = Trainer(
        generator, stages, rows, settings=settings, seed=seed, log=log, checkpoint=checkpoint, resume=resume,
        progress=progress,
    )  # fmt: skip
    try:
        return trainer.run()
    finally:  # an interrupted run leaves its weights, too
        result = trainer.result
        generator.provenance["training"] = {
            "frames": 0 if rows is None else len(rows),
            "frames_outside_support": lost,
            "stages": [[stage.name, stage.steps] for stage in trainer.stages],
            "batch_size": trainer.settings.batch_size,
            "learning_rate": trainer.settings.learning_rate,
            "seed": seed,
            "steps": result.steps,
            "skipped": result.skipped,
            "evaluations": result.evaluations,
            "seconds": round(result.seconds, 1),
        }
