"""The data of a first generator: ladders of replica exchange whose walkers start hot, and bursts from their frames."""

from __future__ import annotations

from pathlib import Path

from openmm_bg.errors import InputError
from openmm_bg.generator import BoltzmannGenerator
from openmm_bg.sampling import ReplicaExchangeResult, geometric_temperatures, replica_exchange
from openmm_bg.sampling.batched import batchable
from openmm_bg.systems import Molecule
from openmm_bg.workflow.settings import RunSettings

TIMESTEP = 0.001
"""ps, of all dynamics in a run."""


def settle(settings: RunSettings, molecule: Molecule, generator: BoltzmannGenerator) -> RunSettings:
    """Settings with a number for everything that was left to the molecule.

    Raises
    ------
    InputError
        For several ladders of a System that no batch can run, a temperature above the ladder's highest one, and where
        the data would be too few for the generator's coordinates.
    """
    why = batchable(molecule.system)
    settled = settings.for_molecule(len(generator.flow.chart.free), molecule.num_atoms, batched=why is None)
    if settled.ladders > 1 and why:
        raise InputError(f"Several ladders run in one batch, which cannot run {molecule.name}: {why}; give one ladder.")
    if molecule.temperature >= settled.highest_temperature:
        raise InputError(
            f"The temperature, {molecule.temperature:g} K, must lie below the highest one of the replica exchange, "
            f"{settled.highest_temperature:g} K."
        )
    dimension = generator.flow.dimension
    if settled.training_conformations < 2 * dimension:
        raise InputError(
            f"{settled.training_conformations} training conformations are too few for {dimension} coordinates; "
            "give more exchange_iterations."
        )
    return settled


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
