"""The data of a first generator: ladders of replica exchange whose walkers start hot, and bursts from their frames."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from openmm_bg.energies import ForceFieldEnergy
from openmm_bg.errors import InputError
from openmm_bg.generator import BoltzmannGenerator
from openmm_bg.sampling import BatchedLangevin, ReplicaExchange, ReplicaExchangeResult, geometric_temperatures
from openmm_bg.sampling.batched import batchable
from openmm_bg.systems import Molecule
from openmm_bg.workflow.settings import RunSettings

TIMESTEP = 0.001
"""ps, of all dynamics in a run."""
_PIECE = 500


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

    Walkers that all start from one structure need longer to forget it than a short ladder runs: the coldest wait for
    exchanges that bring them something else. Many ladders therefore start from conformations of the highest
    temperature, one for each walker.
    """
    s = settings
    run = _HotExchange(
        molecule.system, molecule.positions,
        temperatures=geometric_temperatures(molecule.temperature, s.highest_temperature, s.replicas),
        steps_per_iteration=s.exchange_steps, timestep=TIMESTEP, seed=s.seed, ladders=s.ladders,
        device=device,
    )  # fmt: skip
    if checkpoint.exists():
        run.restore(checkpoint)
    elif s.ladders > 1 and s.heating_steps:
        run.heat(
            ForceFieldEnergy(molecule.system, molecule.temperature), s.heating_steps, device=device, progress=progress
        )
    warming = max(0, s.equilibration_iterations - run.attempts)
    run.run(warming, record=False, checkpoint=checkpoint, progress=progress)
    run.run(max(0, s.exchange_iterations - len(run)), checkpoint=checkpoint, progress=progress)
    return run.result()


class _HotExchange(ReplicaExchange):
    """Ladders in one batch whose walkers can leave their common start."""

    def heat(self, energy: ForceFieldEnergy, steps: int, *, device: str = "cpu", progress: bool) -> None:
        """Move all walkers for some steps at the highest temperature, then slow each down to its own."""
        header, arrays = self._replicas.save()
        top = self.temperatures[-1]
        walkers = BatchedLangevin(
            energy.to(device), arrays["positions"], temperature=top, timestep=TIMESTEP, friction=1.0,
            generator=torch.Generator(device).manual_seed(self.seed),
        )  # fmt: skip
        walkers.draw_velocities()
        with tqdm(total=steps, desc="heating", unit="step", disable=None if progress else True) as bar:
            for done in range(0, steps, _PIECE):  # so that the bar moves and Ctrl-C is heard
                piece = min(_PIECE, steps - done)
                walkers.advance(piece)
                bar.update(piece)
        slower = np.sqrt(np.tile(self.temperatures / top, self.ladders))[:, None, None]
        header["force_evaluations"] += walkers.force_evaluations
        arrays["positions"] = walkers.positions.numpy(force=True)
        arrays["velocities"] = (walkers.velocities.numpy(force=True) * slower).astype(np.float32)
        self._replicas.restore(header, arrays)
