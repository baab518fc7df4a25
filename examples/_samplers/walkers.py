"""Spline couplings taught by annealed walkers: likelihood to begin with, then the variance of log q + u.

The walkers have found the modes and roughly their weights; the energies say the rest (Midgley et al., Flow Annealed
Importance Sampling Bootstrap, ICLR 2023, train on such walkers by likelihood alone).
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

import openmm_bg as bg
from openmm_bg.flows import Base, ContinuousFlow, Flow, PerceptronVelocity, SplineFlow
from openmm_bg.sampling import effective_sample_size, log_normalizer, resample
from openmm_bg.training import LogVariance, Objective

from .experiments import Experiment


@dataclass
class FromWalkers(Experiment):
    """Annealed walkers without a velocity field, then a flow of spline couplings."""

    walkers: int = 20_000
    temperatures: int = 200
    moves: int = 2
    layers: int = 2
    bins: int = 24
    bound: float = 4.5
    likelihood_steps: int = 400

    def build(self, seed: int) -> tuple[bg.Energy, Flow, Objective]:
        target = bg.systems.load(self.target, **self.parameters)
        flow = SplineFlow(
            [False] * target.event_shape[0], layers=self.layers, bins=self.bins, bound=self.bound,
            hidden=(self.hidden, self.hidden), seed=seed,
        )  # fmt: skip
        return target, flow, LogVariance()

    def data(self, target: bg.Energy, seed: int) -> tuple[Tensor, dict[str, Any]]:
        """Walkers resampled by their weights, and what they cost and knew."""
        started = time.perf_counter()
        (dimension,) = target.event_shape
        # the velocity is left out; the flow is here for its base
        still = ContinuousFlow(Base([False] * dimension, std=self.std), PerceptronVelocity(dimension, 1))
        samples = bg.annealed_transport(
            bg.BoltzmannGenerator(target, still, defensive=0.0), self.walkers, steps=self.temperatures,
            moves=self.moves, rate=self.schedule, transport=False, resample_below=0.5, chunk=self.walkers, seed=seed,
        )  # fmt: skip
        z = log_normalizer(samples.log_weights)
        chosen = resample(samples.log_weights, self.walkers, np.random.default_rng(seed))
        return samples.positions[chosen], {
            # not the columns of walkers on top of a trained field: these were resampled, and their ESS says little
            "walkers": self.walkers,
            "walker_ess": effective_sample_size(samples.log_weights).fraction,
            "walker_log_z_error": z.value - target.log_z,
            # without a velocity only the start and the moves ask for energies (those that tune the moves aside)
            "walker_evaluations": self.walkers * (1 + self.temperatures * self.moves),
            "seconds_walkers": round(time.perf_counter() - started, 1),
        }


def _many_well(target: str, steps: int = 1200) -> FromWalkers:
    return FromWalkers(target, "walkers, log-variance", steps, std=1.2, schedule=1.0, hidden=128, rate=3e-3)


WALKERS = {
    "many_well_8": [_many_well("many_well_8")],
    "many_well_8_delta2": [_many_well("many_well_8_delta2")],
    "many_well_32": [_many_well("many_well_32")],
}
