"""phi and psi of alanine dipeptide, section 6.2: an affine flow of the plane and a spline flow of the torus."""

import math
from dataclasses import dataclass

import numpy as np
import torch

import openmm_bg as bg
from _rehman_friesecke.double_well import architecture, parameters
from _rehman_friesecke.metrics import TORUS
from _rehman_friesecke.tables import Row, distance_row
from openmm_bg.analysis import Distance, measure, populations, total_variation
from openmm_bg.flows import Flow, SplineFlow
from openmm_bg.training import MaximumLikelihood, Stage, Trainer

PUBLISHED_W2, PUBLISHED_N = 9.21, 1000
"""Degrees, and the points on either side."""
KINDS = ("RealNVP", "circular spline")


@dataclass(frozen=True)
class Effort:
    """Training steps, draws of each flow, and points on either side of a W2: few in every row, many in the last."""

    steps: int = 2500
    draws: int = 100_000
    few: int = 2500
    many: int = 10_000


def make(kind: str, seed: int) -> Flow:
    """The paper's RealNVP over a normal in the plane, or splines of the circle over a uniform torus."""
    if kind == "RealNVP":
        return architecture("split", seed)
    return SplineFlow([True, True], layers=4, bins=12, hidden=(64, 64), seed=seed)


def resolution(train: np.ndarray, test: np.ndarray, effort: Effort) -> list[Row]:
    """How well the reference knows itself: the two runs against each other, which no flow can be asked to beat."""
    same = {"part": "dihedrals", "table": "w2", "flow": "none: MD 1 against MD 2", "seed": 0, "against": "MD 2"}
    sizes = ((PUBLISHED_N, 5), (effort.few, 5), (effort.many, 2))
    return [same | {"asked": n} | distance_row(_w2(test, train, n, repeats)) for n, repeats in sizes]


def _w2(reference: np.ndarray, samples: np.ndarray, n: int, repeats: int, blocks: int = 10) -> Distance:
    """W2 on the torus with random numbers that do not depend on the flow, so that all flows share their floors."""
    rng = np.random.default_rng(n)
    return measure("W2", TORUS, reference, samples, rng, n=n, repeats=repeats, blocks=blocks, unit="degrees")


def study(
    kind: str, seed: int, train: np.ndarray, test: np.ndarray, effort: Effort, *, largest: bool
) -> tuple[list[Row], np.ndarray]:
    """Train one flow by maximum likelihood on one run and hold it against the other.

    Returns
    -------
    rows : list of dict
        ``fit``, ``w2`` and ``population`` rows.
    samples : ndarray, (draws, 2)
        Radians, as the flow made them: those of RealNVP may lie outside [-pi, pi).
    """
    generator = bg.BoltzmannGenerator(None, make(kind, seed), defensive=0.0)
    stages = [Stage("likelihood", effort.steps, [(1.0, MaximumLikelihood())])]
    result = Trainer(generator, stages, torch.as_tensor(train), seed=seed, progress=False).run()
    samples = generator.flow.sample(effort.draws, torch.Generator().manual_seed(seed))[0].numpy()
    same = {"part": "dihedrals", "flow": kind, "seed": seed}
    # the likeness of histograms needs many points; independent draws have no blocks to speak of
    tv = measure("histograms", total_variation, test, samples, np.random.default_rng(seed), n=effort.many, repeats=5)
    rows = [
        same
        | {
            "table": "fit",
            "parameters": parameters(generator.flow),
            "nll_train": _nll(generator, train),
            "nll_test": _nll(generator, test),
            "outside": float((np.abs(samples) > math.pi).any(axis=1).mean()),
            "tv": tv.value,
            "tv_floor": tv.floor,
            "tv_within_floor": tv.within_floor,
            "seconds": round(result.seconds, 1),
        }
    ]
    # as many draws as frames: then all sides use the same random numbers
    drawn = samples[: len(train)]
    # the run not seen, in blocks; the frames it learned from, shuffled, which tests the fit and nothing else
    plan = [("MD 2", test, 10, PUBLISHED_N, 5), ("MD 2", test, 10, effort.few, 5)]
    if largest:
        plan.append(("MD 2", test, 10, effort.many, 2))
    shuffled = np.random.default_rng(0).permutation(train)
    plan.append(("MD 1 shuffled: fit alone", shuffled, 2, effort.few, 5))
    for against, reference, blocks, n, repeats in plan:
        distance = _w2(reference, drawn, n, repeats, blocks)
        rows.append(same | {"table": "w2", "against": against, "asked": n} | distance_row(distance))
    return rows + _populations(same, train, test, samples), samples


def _nll(generator: bg.BoltzmannGenerator, angles: np.ndarray) -> float:
    """Nats a frame. A density of the plane wastes what lies outside one turn, and pays for it here."""
    return float(-generator.log_prob(angles).mean())


def _populations(same: Row, train: np.ndarray, test: np.ndarray, samples: np.ndarray) -> list[Row]:
    """Per cent in each basin. The flow's error is that of its draws and of the run it learned from."""
    rows = []
    sides = [populations(angles[:, 0], angles[:, 1]) for angles in (train, test, samples)]
    for first, second, drawn in zip(*sides, strict=True):
        error = math.hypot(first.error, drawn.error)
        rows.append(
            same
            | {
                "table": "population",
                "basin": first.name,
                "train": 100 * first.value,
                "train_error": 100 * first.error,
                "test": 100 * second.value,
                "test_error": 100 * second.error,
                "drawn": 100 * drawn.value,
                "drawn_error": 100 * error,
                "sigmas": (drawn.value - second.value) / math.hypot(error, second.error),
            }
        )
    return rows
