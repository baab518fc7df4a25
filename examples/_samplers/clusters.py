"""Clusters of identical particles: equivariant fields, and distances blind to labels, direction and origin."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

import openmm_bg as bg
from openmm_bg.analysis import cluster_w2, energy_w2, single_pass_w2
from openmm_bg.flows import CentredBase, ContinuousFlow, PairEnergy, PairVelocity
from openmm_bg.sampling import effective_sample_size, log_normalizer
from openmm_bg.sampling.annealing import systematic
from openmm_bg.training import ContinuityResidual, Objective

from .experiments import Experiment


@dataclass
class Cluster(Experiment):
    """A path to a cluster, trained on an energy that is bounded where particles overlap."""

    reach: float = 8.0
    threshold: float = math.inf
    offset: float = 0.0
    draws: int = 4000
    moves: dict[str, int] = field(default_factory=lambda: {"moves": 4})

    def build(self, seed: int) -> tuple[bg.Energy, ContinuousFlow, Objective]:
        target = bg.systems.load(self.target, **self.parameters)
        shape = (target.particles, target.spatial_dimension)
        network = {"features": 24, "densities": 4, "hidden": (self.hidden, self.hidden), "windows": 12}
        psi = PairEnergy(*shape, self.reach, **network, seed=seed + 1000) if self.scheme == "learned" else None
        flow = ContinuousFlow(
            CentredBase(*shape, scale=self.std),
            PairVelocity(*shape, self.reach, **network, seed=seed),
            perturbation=psi,
            steps=20,
        )
        if math.isfinite(self.threshold):
            target = bg.regularize(target, self.threshold, offset=self.offset)
        objective = ContinuityResidual(rate=self.schedule, walkers=256, times=48, refresh=100, **self.moves)
        return target, flow, objective


def assess_cluster(
    experiment: Cluster, generator: bg.BoltzmannGenerator, n: int, seed: int, folder: Path, short: bool
) -> dict[str, Any]:
    """The flow by itself, then annealed walkers, resampled and held against a long reference of Hamiltonian moves."""
    target = bg.systems.load(experiment.target, **experiment.parameters)
    draws = min(2 * n, experiment.draws)
    samples = generator.sample(draws, seed=seed)
    # the weights are those of the true energy, also where training had a bounded one
    log_weights = -target(samples.positions) - samples.log_prob
    row = {"n": draws, "ess": effective_sample_size(log_weights).fraction, "log_z": log_normalizer(log_weights).value}
    a, b, w2_floor = reference(target, experiment.name, n, folder, short)
    shape = (target.particles, target.spatial_dimension)
    ways = {"": {}}
    if experiment.annealed.get("resample_below"):
        # resampled walkers owe much to their moves: what would they be without the velocity?
        ways["still_"] = {"transport": False}
    # since the last resampling a share of walkers says little, and does not belong in the column of the others
    share = "ess_since_resampling" if len(ways) > 1 else "annealed_ess"
    for prefix, how in ways.items():
        started = time.perf_counter()
        walkers = bg.annealed_transport(
            generator, 2 * n, rate=experiment.schedule, seed=seed + 1, **experiment.annealed, **how
        )
        true = target(walkers.positions)
        log_weights = walkers.log_weights + walkers.reduced_energy - true
        z = log_normalizer(log_weights)
        # in even steps of the weights: a walker drawn twice is a point less, and W2 knows
        random = torch.Generator().manual_seed(seed + 2)
        chosen = systematic(log_weights, random)[torch.randperm(2 * n, generator=random)[:n]]
        x = walkers.positions[chosen].numpy()
        row |= {
            f"{prefix}annealed_n": 2 * n, f"{prefix}{share}": effective_sample_size(log_weights).fraction,
            f"{prefix}annealed_log_z": z.value, f"{prefix}annealed_log_z_se": z.error,
            f"{prefix}annealed_seconds": round(time.perf_counter() - started, 1),
            f"{prefix}w2": single_pass_w2(a, x, *shape),
            f"{prefix}energy_w2": energy_w2(target(torch.as_tensor(a)).numpy(), true[chosen].numpy()),
        }  # fmt: skip
        if target.particles <= 4:
            # exact over all labels
            row[f"{prefix}aligned_w2"] = cluster_w2(a, x, *shape)
    row |= {
        "w2_floor": w2_floor, "distance_n": n,
        "energy_w2_floor": energy_w2(*(target(torch.as_tensor(c)).numpy() for c in (a, b))),
    }  # fmt: skip
    if target.particles <= 4:
        row["aligned_w2_floor"] = cluster_w2(a, b, *shape)
    return row


def reference(target: bg.Energy, name: str, n: int, folder: Path, short: bool) -> tuple[np.ndarray, np.ndarray, float]:
    """Two reference sets of ``n`` from independent runs and their distance, made once and kept in the folder."""
    path = folder / f"reference_{name.replace(' ', '_')}_{n}.npz"
    if path.exists():
        with np.load(path) as data:
            return data["a"], data["b"], float(data["w2"])
    settings = {"burn_in": 50, "thinning": 2} if short else {"burn_in": 2000, "thinning": 50}
    a, b = (
        target.reference(n, torch.Generator().manual_seed(seed), walkers=min(n, 1000), **settings).numpy()
        for seed in (101, 102)
    )
    w2 = single_pass_w2(a, b, target.particles, target.spatial_dimension)
    np.savez(path, a=a, b=b, w2=w2)
    return a, b, w2


CLUSTERS = {
    "dw4": [
        Cluster("dw4", "learned", 1500, std=2.0, hidden=48, schedule=2.0, reach=12.0, batch=512,
                annealed={"steps": 50, "moves": 4}),
    ],
    "lj13": [
        Cluster("lj13", "linear", 800, {"well_depth": 2.0}, std=0.7, hidden=48, schedule=5.0, reach=4.0, batch=512,
                threshold=1000.0, offset=-90.0, draws=1000, moves={"moves": 1, "leapfrog": 4},
                annealed={"steps": 25, "moves": 4, "leapfrog": 8, "resample_below": 1.0}),
    ],
}  # fmt: skip
