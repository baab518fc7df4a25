"""Wasserstein distances of the experiments; a large one takes half a minute, so none is computed twice."""

import hashlib
import math

import numpy as np
import ot

from openmm_bg.analysis import torus_w2
from openmm_bg.analysis.distances import Metric


def remembered(metric: Metric) -> Metric:
    """The metric, with its values kept: flows measured with equal random numbers share their floor."""
    known: dict[bytes, float] = {}

    def look_up(a: np.ndarray, b: np.ndarray) -> float:
        key = hashlib.sha256(a.tobytes() + b"|" + b.tobytes()).digest()
        if key not in known:
            known[key] = metric(a, b)
        return known[key]

    return look_up


def plane_w2(a: np.ndarray, b: np.ndarray) -> float:
    """Wasserstein-2 distance of two sets of points of R^d, exact."""
    # POT's cost is squared, and so is what emd2 returns
    squared, log = ot.emd2([], [], ot.dist(a, b), numItermax=10_000_000, log=True)
    if log["warning"] is not None:
        raise RuntimeError(f"The optimal transport did not converge: {log['warning']}")
    return math.sqrt(squared)


PLANE = remembered(plane_w2)
TORUS = remembered(torus_w2)
