"""The learned path on alanine dipeptide in internal coordinates: no data, energies and forces alone."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

import openmm_bg as bg
from openmm_bg.analysis import backbone_dihedrals
from openmm_bg.flows import Base, ContinuousFlow, PerceptronEnergy, PerceptronVelocity
from openmm_bg.sampling import LatentEnergy, effective_sample_size
from openmm_bg.training import ContinuityResidual, Objective

from .experiments import Experiment

POPULATIONS = 8


@dataclass
class MoleculePath(Experiment):
    """A path from uniform torsions and harmonic bonds and angles to the Boltzmann distribution.

    The energy is bounded above ``threshold`` kT, where atoms overlap; the weights at the end are those of the true one.
    """

    threshold: float = 150.0

    def build(self, seed: int) -> tuple[bg.Energy, ContinuousFlow, Objective]:
        self.molecule = bg.systems.load(self.target)
        start = bg.BoltzmannGenerator.for_molecule(
            self.molecule.topology, self.molecule.system, 300, positions=self.molecule.positions
        )
        self.latent = LatentEnergy(start)
        x = torch.as_tensor(np.asarray(self.molecule.positions), dtype=torch.float64)[None]
        # volumes of all maps included, as the path has them
        lowest = float(self.latent(self.latent.latents(x)))
        target = bg.regularize(self.latent, self.threshold, offset=lowest)
        circular, network = self.latent.circular, {"windows": 16}
        flow = ContinuousFlow(
            Base(circular),
            PerceptronVelocity(len(circular), self.hidden, circular=circular, **network, seed=seed),
            perturbation=PerceptronEnergy(len(circular), self.hidden, circular=circular, **network, seed=seed + 1000),
            steps=20,
        )
        return (
            target,
            flow,
            ContinuityResidual(rate=self.schedule, walkers=256, times=48, leapfrog=4, refresh=100),
        )


def assess_molecule(experiment: MoleculePath, generator: bg.BoltzmannGenerator, n: int, seed: int) -> dict[str, Any]:
    """Shares of effective samples, log Z and the population of phi > 0; the last two over independent populations."""
    latent = experiment.latent
    row: dict[str, Any] = {"n": n, "annealed_n": n, "populations": POPULATIONS}
    resampled = bool(experiment.annealed.get("resample_below"))
    how = {"rate": experiment.schedule, "seed": seed + 1, "chunk": -(-n // POPULATIONS), **experiment.annealed}
    for name, draw in {
        "": lambda: generator.sample(n, seed=seed),
        "annealed_": lambda: bg.annealed_transport(generator, n, **how),
        # resampled walkers owe much to their moves: what would they be without the velocity?
        "still_annealed_": lambda: bg.annealed_transport(generator, n, transport=False, **how),
    }.items():
        started = time.perf_counter()
        samples = draw()
        with torch.no_grad():
            true = latent(samples.positions)
        log_weights = (samples.log_weights + samples.reduced_energy - true).numpy()
        phi = backbone_dihedrals(latent.positions(samples.positions).numpy(), experiment.molecule.topology).phi[:, 0]
        # beyond 150 degrees the sheet leaks over the cut without a barrier
        left = ((phi > 0) & (phi < np.radians(150))).astype(float)
        row |= {
            f"{name}{key}": value
            for key, value in {
                # since the last resampling a share says little, and does not belong in the column of the others
                "share" if resampled and name else "ess": effective_sample_size(log_weights).fraction,
                "drawing_seconds": round(time.perf_counter() - started, 1),
                **over_populations(log_weights, {"left_handed": left, "energy": true.numpy()}, how["chunk"]),
            }.items()
        }
    return row


def over_populations(log_weights: np.ndarray, observables: dict[str, np.ndarray], size: int) -> dict[str, float]:
    """log Z and weighted means, their errors by leaving out one population of ``size`` at a time.

    Walkers resampled together are not independent; populations are.
    """
    shift = log_weights.max()
    w = np.exp(log_weights - shift)
    at = np.arange(0, len(w), size)
    total = np.add.reduceat(w, at)
    number = np.add.reduceat(np.ones_like(w), at)

    def left_out(parts: np.ndarray) -> np.ndarray:
        return parts.sum() - parts

    def error(values: np.ndarray) -> float:
        return float(np.sqrt((len(at) - 1) * np.mean((values - values.mean()) ** 2)))

    row = {
        "log_z": float(shift + np.log(w.mean())),
        "log_z_se": error(np.log(left_out(total) / left_out(number))),
    }
    for name, values in observables.items():
        parts = np.add.reduceat(w * values, at)
        row[name] = float(parts.sum() / total.sum())
        row[f"{name}_se"] = error(left_out(parts) / left_out(total))
    return row


MOLECULE = {
    "alanine": [
        MoleculePath("alanine_dipeptide", "learned", 800, hidden=256, schedule=3.0, batch=512, rate=2e-3,
                     annealed={"steps": 50, "leapfrog": 4, "resample_below": 0.5}),
    ],
}  # fmt: skip
