"""The experiments: a target, a flow that knows nothing of it but its dimension and symmetry, and an objective."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import openmm_bg as bg
from openmm_bg.flows import (
    Base,
    ContinuousFlow,
    GradientFlowVelocity,
    PerceptronEnergy,
    PerceptronVelocity,
)
from openmm_bg.training import ContinuityResidual, NoisedEnergy, Objective, ReversePath


@dataclass
class Experiment:
    """One target under one scheme.

    ``build(seed)`` gives target, flow and objective; the rest is how they are trained and looked at.
    """

    target: str
    scheme: str
    steps: int
    parameters: dict[str, Any] = field(default_factory=dict)
    std: float = 1.0
    hidden: int = 256
    schedule: float = 0.0
    hot: float = 1.0
    first: str = "silu"
    bandwidth: float = 1.0
    odd: bool = False
    circulant: bool = False
    box: float = 0.0
    batch: int = 1024
    rate: float = 4e-3
    solver_steps: int = 20
    annealed: dict[str, Any] = field(default_factory=lambda: {"steps": 50, "moves": 2})
    label: str = ""

    @property
    def name(self) -> str:
        parameters = ",".join(f"{k}={v}" for k, v in self.parameters.items() if k != "sites")
        return self.target + (f" {parameters}" if parameters else "")

    @property
    def scheme_name(self) -> str:
        return self.scheme + (f", {self.label}" if self.label else "")

    def build(self, seed: int) -> tuple[bg.Energy, ContinuousFlow, Objective]:
        target = bg.systems.load(self.target, **self.parameters)
        (dimension,) = target.event_shape
        base = Base([False] * dimension, std=self.std)
        network = {
            "windows": 16, "circulant": self.circulant, "first": self.first, "bandwidth": self.bandwidth,
        }  # fmt: skip
        if self.scheme == "gradient flow":
            energy = PerceptronEnergy(dimension, self.hidden, **{**network, "windows": 24}, seed=seed)
            velocity = GradientFlowVelocity(target, energy, std=self.std, horizon=2.5, shortest=1e-3)
            return target, ContinuousFlow(base, velocity, steps=40), NoisedEnergy(self.box)
        velocity = PerceptronVelocity(dimension, self.hidden, odd=self.odd, **network, seed=seed)
        perturbation = None
        if self.scheme == "learned":
            perturbation = PerceptronEnergy(dimension, self.hidden, even=self.odd, **network, seed=seed + 1000)
        flow = ContinuousFlow(base, velocity, perturbation=perturbation, steps=self.solver_steps)
        if self.scheme == "reverse KL":
            return target, flow, ReversePath(power=0.0)
        return target, flow, ContinuityResidual(rate=self.schedule, moves=2, refresh=100, hot=self.hot)


def _plane(target: str, scheme: str, steps: int, std: float, **settings: Any) -> Experiment:
    """A mixture in the plane, whose modes are small beside the prior."""
    settings = {"first": "sin", "hidden": 256, "schedule": 5.0, **settings}
    return Experiment(target, scheme, steps, std=std, **settings)


PAIR = {"separation": 4.0, "weight": 0.7}

LATTICE = {"hidden": 12, "schedule": 2.0, "hot": 1.5, "odd": True, "circulant": True}

MATE_FLEURET = {
    "pair": [
        Experiment("gmm_pair", "linear", 1500, PAIR, hidden=128),
        Experiment("gmm_pair", "learned", 1500, PAIR, hidden=128),
    ],
    "gmm4": [Experiment("gmm4", scheme, 2000, std=5.0, hidden=128, schedule=3.0) for scheme in ("linear", "learned")],
    "gmm2_unequal": [
        Experiment("gmm2_unequal", scheme, 2000, std=5.0, hidden=128, schedule=3.0) for scheme in ("linear", "learned")
    ],
    "many_well_8": [Experiment("many_well_8", scheme, 4000, std=1.2, schedule=1.0) for scheme in ("learned",)],
    "many_well_8_delta2": [
        Experiment("many_well_8_delta2", scheme, 4000, std=1.2, schedule=1.0) for scheme in ("learned",)
    ],
    "lattice": [
        Experiment("lattice_double_well", scheme, steps, {"sites": 16, "m": m}, **settings, **LATTICE)
        for m in (1.5, 3.0, 4.5, 6.0)
        # the baseline differentiates through its integrator, so its steps are few and cost about as much in all
        for scheme, steps, settings in (
            ("linear", 1500, {}), ("reverse KL", 250, {"rate": 4e-3, "batch": 128, "solver_steps": 8}),
        )
    ],
    "lattice_free": [
        Experiment(
            "lattice_double_well", "linear", 1500, {"sites": 16, "m": m}, label="no symmetry of signs",
            **(LATTICE | {"odd": False}),
        )
        for m in (1.5, 6.0)
    ],
}  # fmt: skip

CHEMSEDDINE = {
    "gmm40": [
        _plane("gmm40", "gradient flow", 14_000, 24.0, hidden=384, bandwidth=15.0, box=45.0, batch=512, rate=6e-3),
        _plane("gmm40", "learned", 4000, 24.0, bandwidth=0.7),
        _plane("gmm40", "linear", 4000, 24.0, bandwidth=0.7),
    ],
    "many_well_8": [Experiment("many_well_8", "linear", 4000, std=1.2, schedule=1.0)],
}
