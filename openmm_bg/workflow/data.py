"""What a generator learns from: walkers that it moves itself, or replica exchange and bursts from its frames."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from openmm_bg.errors import InputError
from openmm_bg.generator import BoltzmannGenerator
from openmm_bg.sampling import (
    ReplicaExchangeResult,
    Trajectory,
    geometric_temperatures,
    replica_exchange,
)
from openmm_bg.sampling.archive import load_arrays, save_arrays
from openmm_bg.sampling.batched import batchable
from openmm_bg.systems import Molecule
from openmm_bg.training import AdaptiveSettings, AdaptiveTraining, Budget
from openmm_bg.workflow.diagnosis import backbone_regions
from openmm_bg.workflow.settings import RunSettings

LOOK = 20_000
"""Draws by which a generator is judged while it is trained."""

TIMESTEP = 0.001
"""ps, of all dynamics in a run."""


def settle(settings: RunSettings, molecule: Molecule, generator: BoltzmannGenerator) -> RunSettings:
    """Settings with a number for everything that was left to the molecule.

    Raises
    ------
    InputError
        For several ladders of a System that no batch can run, a temperature above the highest one, a budget too small
        for its walkers, and where the data would be too few for the generator's coordinates.
    """
    why = batchable(molecule.system)
    settled = settings.for_molecule(len(generator.flow.chart.free), molecule.num_atoms, batched=why is None)
    if settled.data == "exchange" and settled.ladders > 1 and why:
        raise InputError(f"Several ladders run in one batch, which cannot run {molecule.name}: {why}; give one ladder.")
    if molecule.temperature >= settled.highest_temperature:
        raise InputError(
            f"The temperature, {molecule.temperature:g} K, must lie below the highest one, at which walkers start, "
            f"{settled.highest_temperature:g} K."
        )
    if settled.data == "adaptive":
        adaptive_settings(settled)
        check_budget(settled)
    dimension = generator.flow.dimension
    if settled.training_conformations < 2 * dimension:
        raise InputError(
            f"{settled.training_conformations} training conformations are too few for {dimension} coordinates; "
            f"give more {'walkers' if settled.data == 'adaptive' else 'exchange_iterations'}."
        )
    return settled


def check_budget(settings: RunSettings) -> None:
    """Refuse a budget of which the walkers of an adaptive run would leave nothing to training."""
    if settings.data == "adaptive" and settings.budget is not None:
        adaptive_settings(settings).check_budget(Budget.parse(settings.budget))


def adaptive_settings(settings: RunSettings) -> AdaptiveSettings:
    """What the settings of a run ask of adaptive training."""
    s = settings
    return AdaptiveSettings(
        walkers=s.walkers, heating_temperature=s.highest_temperature, heating_steps=s.heating_steps,
        settling_steps=s.settling_steps, steps=s.round_steps, interval=s.frame_interval, timestep=TIMESTEP,
        proposals=s.proposals_per_iteration, likelihood_steps=s.likelihood_steps,
        training_steps=s.round_training_steps, closing_steps=s.training_steps, rounds=s.rounds,
        draws=min(s.samples, LOOK),
    )  # fmt: skip


def adaptation(
    generator: BoltzmannGenerator, molecule: Molecule, settings: RunSettings, checkpoint: Path, **options: Any
) -> AdaptiveTraining:
    """The adaptive training of a run, or the rest of one that a checkpoint holds.

    Parameters
    ----------
    options
        executor, training, log, progress, callback of :class:`~openmm_bg.training.AdaptiveTraining`.
    """

    def regions(positions: np.ndarray) -> dict[str, np.ndarray]:
        return backbone_regions(torch.as_tensor(positions, dtype=torch.float64), molecule.topology)

    # without a backbone, thirds of the free torsions
    known = regions(molecule.positions[None])
    return AdaptiveTraining(
        generator, molecule.positions, regions=regions if known else None, settings=adaptive_settings(settings),
        budget=settings.budget, seed=settings.seed, checkpoint=checkpoint, resume=True, **options,
    )  # fmt: skip


def save_held_out(path: Path, frames: np.ndarray) -> None:
    """Frames of walkers, (walkers, frames, atoms, 3), that training never saw."""
    save_arrays(path, {"walkers": len(frames)}, positions=frames.reshape(-1, *frames.shape[2:]))


def held_out_frames(folder: Path, settings: RunSettings) -> np.ndarray:
    """The frames of a run that training never saw, (n, atoms, 3) in nm; chain by chain."""
    if settings.data == "adaptive":
        return load_arrays(folder / "walkers.npz", ("positions",))[1]["positions"].astype(np.float64)
    return settings.split(Trajectory.load(folder / "exchange_frames.npz").positions)[1]


def exchange(
    molecule: Molecule, settings: RunSettings, checkpoint: Path, *, device: str = "cpu", progress: bool = True
) -> ReplicaExchangeResult:
    """Replica exchange as the settings have it, or the rest of one that a checkpoint holds.

    Walkers start hot where the settings say so, each from a conformation of its own
    (:meth:`openmm_bg.sampling.ReplicaExchange.heat`).
    """
    s = settings
    return replica_exchange(
        molecule.system, molecule.positions,
        temperatures=geometric_temperatures(molecule.temperature, s.highest_temperature, s.replicas),
        n_iterations=s.exchange_iterations, heating_steps=s.heating_steps,
        equilibration_iterations=s.equilibration_iterations, steps_per_iteration=s.exchange_steps, timestep=TIMESTEP,
        seed=s.seed, ladders=s.ladders, device=device, checkpoint=checkpoint, resume=True, progress=progress,
    )  # fmt: skip
