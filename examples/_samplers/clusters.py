"""Clusters of identical particles: equivariant fields, and distances blind to labels, direction and origin."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import openmm_bg as bg
from openmm_bg.analysis import cluster_w2, energy_w2, single_pass_w2
from openmm_bg.flows import CentredBase, ContinuousFlow, PairEnergy, PairVelocity
from openmm_bg.sampling import effective_sample_size, log_normalizer, resample
from openmm_bg.training import ContinuityResidual, Objective

from .experiments import Experiment


@dataclass
class Cluster(Experiment):
    """A learned path for a cluster, trained on an energy that is bounded where particles overlap."""

    reach: float = 8.0
    threshold: float = math.inf
    offset: float = 0.0

    def build(self, seed: int) -> tuple[bg.Energy, ContinuousFlow, Objective]:
        target = bg.systems.load(self.target, **self.parameters)
        shape = (target.particles, target.spatial_dimension)
        network = {"features": 24, "densities": 4, "hidden": (self.hidden, self.hidden), "windows": 12}
        flow = ContinuousFlow(
            CentredBase(*shape, scale=self.std),
            PairVelocity(*shape, self.reach, **network, seed=seed),
            perturbation=PairEnergy(*shape, self.reach, **network, seed=seed + 1000),
            steps=20,
        )
        if math.isfinite(self.threshold):
            target = bg.regularize(target, self.threshold, offset=self.offset)
        objective = ContinuityResidual(rate=self.schedule, walkers=256, times=48, moves=4, refresh=100)
        return target, flow, objective


def assess_cluster(
    experiment: Cluster, generator: bg.BoltzmannGenerator, n: int, seed: int, folder: Path, short: bool
) -> dict[str, Any]:
    """The flow by itself, then annealed walkers, resampled and held against a long reference of Hamiltonian moves."""
    target = bg.systems.load(experiment.target, **experiment.parameters)
    samples = generator.sample(2 * n, seed=seed)
    # the weights are those of the true energy, also where training had a bounded one
    log_weights = -target(samples.positions) - samples.log_prob
    row = {"n": 2 * n, "ess": effective_sample_size(log_weights).fraction, "log_z": log_normalizer(log_weights).value}
    walkers = bg.annealed_transport(generator, 2 * n, rate=experiment.schedule, seed=seed + 1, **experiment.annealed)
    true = target(walkers.positions)
    log_weights = walkers.log_weights + walkers.reduced_energy - true
    z = log_normalizer(log_weights)
    row |= {
        "annealed_n": 2 * n, "annealed_ess": effective_sample_size(log_weights).fraction,
        "annealed_log_z": z.value, "annealed_log_z_se": z.error,
    }  # fmt: skip
    chosen = resample(log_weights, n, np.random.default_rng(seed + 2))
    a, b = reference(target, experiment.name, n, folder, short)
    x = walkers.positions[chosen].numpy()
    shape = (target.particles, target.spatial_dimension)
    row |= {
        "w2": single_pass_w2(a, x, *shape), "w2_floor": single_pass_w2(a, b, *shape),
        "energy_w2": energy_w2(target(torch.as_tensor(a)).numpy(), true[chosen].numpy()),
        "energy_w2_floor": energy_w2(*(target(torch.as_tensor(c)).numpy() for c in (a, b))),
        "distance_n": n,
    }  # fmt: skip
    if target.particles <= 4:
        row |= {"aligned_w2": cluster_w2(a, x, *shape), "aligned_w2_floor": cluster_w2(a, b, *shape)}
    return row


def reference(target: bg.Energy, name: str, n: int, folder: Path, short: bool) -> tuple[np.ndarray, np.ndarray]:
    """Two reference sets of ``n`` from independent runs, made once and kept in the folder."""
    path = folder / f"reference_{name.replace(' ', '_')}_{n}.npz"
    if path.exists():
        with np.load(path) as data:
            return data["a"], data["b"]
    settings = {"burn_in": 50, "thinning": 2} if short else {"burn_in": 2000, "thinning": 50}
    sets = [
        target.reference(n, torch.Generator().manual_seed(seed), walkers=min(n, 1000), **settings).numpy()
        for seed in (101, 102)
    ]
    np.savez(path, a=sets[0], b=sets[1])
    return sets[0], sets[1]


CLUSTERS = {
    "dw4": [
        Cluster("dw4", "learned", 1500, std=2.0, hidden=48, schedule=2.0, reach=12.0, batch=512,
                annealed={"steps": 50, "moves": 4}),
    ],
    "lj13": [
        Cluster("lj13", "learned", 1000, {"well_depth": 2.0}, std=0.7, hidden=48, schedule=5.0, reach=4.0, batch=256,
                threshold=200.0, offset=-90.0, annealed={"steps": 200, "moves": 4}),
    ],
}  # fmt: skip
