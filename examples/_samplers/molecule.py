"""The learned path on alanine dipeptide in internal coordinates: no data, energies and forces alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

import openmm_bg as bg
from openmm_bg.analysis import backbone_dihedrals
from openmm_bg.flows import Base, ContinuousFlow, PerceptronEnergy, PerceptronVelocity
from openmm_bg.sampling import LatentEnergy, effective_sample_size, log_normalizer, reweighted_mean
from openmm_bg.training import ContinuityResidual, Objective

from .experiments import Experiment


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
        lowest = float(start.energy(x) - start.coordinates(x)[1])
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
            ContinuityResidual(rate=self.schedule, walkers=512, times=64, moves=3, refresh=100, groups=32),
        )


def assess_molecule(experiment: MoleculePath, generator: bg.BoltzmannGenerator, n: int, seed: int) -> dict[str, Any]:
    """Shares of effective samples, and the population of phi > 0."""
    latent = experiment.latent
    row: dict[str, Any] = {"n": n, "annealed_n": n}
    draws = generator.sample(n, seed=seed)
    walkers = bg.annealed_transport(generator, n, rate=experiment.schedule, seed=seed + 1, **experiment.annealed)
    for name, samples in (("", draws), ("annealed_", walkers)):
        with torch.no_grad():
            true = latent(samples.positions)
        log_weights = samples.log_weights + samples.reduced_energy - true
        row[f"{name}ess"] = effective_sample_size(log_weights).fraction
        z = log_normalizer(log_weights)
        row[f"{name}log_z"], row[f"{name}log_z_se"] = z.value, z.error
    phi = backbone_dihedrals(latent.positions(walkers.positions).numpy(), experiment.molecule.topology).phi[:, 0]
    # beyond 150 degrees the sheet leaks over the cut without a barrier
    left = reweighted_mean(((phi > 0) & (phi < np.radians(150))).astype(float), log_weights)
    row["left_handed"], row["left_handed_se"] = float(left.value), float(left.error)
    return row


MOLECULE = {
    "alanine": [
        MoleculePath("alanine_dipeptide", "learned", 1500, hidden=256, schedule=3.0, batch=1024, rate=2e-3,
                     annealed={"steps": 200, "moves": 3}),
    ],
}  # fmt: skip
