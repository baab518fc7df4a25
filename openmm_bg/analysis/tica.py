"""The slowest directions of a reference, by time-lagged independent component analysis (TICA), and distances there."""

from __future__ import annotations

import importlib.util

import numpy as np
from numpy.typing import ArrayLike

from openmm_bg.analysis.distances import transport
from openmm_bg.analysis.statistics import Array
from openmm_bg.errors import InputError

DIMENSION = 2
_BINS = 24


def tica_is_there() -> bool:
    """Whether deeptime is installed."""
    return importlib.util.find_spec("deeptime") is not None


def tica_projection(
    reference: ArrayLike, samples: ArrayLike, *, lag: int = 1, dimension: int = DIMENSION
) -> tuple[Array, Array]:
    """Both ensembles along the slowest directions of the reference.

    The features are cosine and sine of every angle. Components are scaled to unit variance in the reference
    (Pérez-Hernández et al., J. Chem. Phys. 139, 015102 (2013); by deeptime, which has to be installed).

    Parameters
    ----------
    reference, samples : (n, d) and (m, d) arrays
        Radians; the reference in the order in which it was made.
    lag : int
        In frames.
    dimension : int

    Returns
    -------
    (n, dimension) and (m, dimension) arrays
        Fewer columns where the angles have fewer directions.

    Raises
    ------
    InputError
        Without deeptime, or where the reference is not longer than the lag.
    """
    if not tica_is_there():
        raise InputError("TICA needs deeptime; install it with `pip install deeptime`.")
    x, y = (np.asarray(angles, dtype=np.float64) for angles in (reference, samples))
    if lag < 1 or len(x) <= lag + 1:
        raise InputError(f"A lag of {lag} frames needs more than {lag + 1} reference frames; there are {len(x)}.")
    from deeptime.decomposition import TICA

    features = [np.concatenate([np.cos(angles), np.sin(angles)], axis=1) for angles in (x, y)]
    model = TICA(lagtime=lag, dim=min(dimension, features[0].shape[1])).fit(features[0]).fetch_model()
    a, b = (np.asarray(model.transform(part), dtype=np.float64).reshape(len(part), -1) for part in features)
    scale = a.std(0)
    return a / scale, b / scale


def planar_w2(a: ArrayLike, b: ArrayLike) -> float:
    """Wasserstein-2 distance between two sets of points, (n, d) and (m, d), in their own unit.

    >>> planar_w2([[0.0, 0.0]], [[3.0, 4.0]])
    5.0
    """
    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    cost = np.zeros((len(x), len(y)))
    for k in range(x.shape[1]):  # one axis at a time keeps the memory at one matrix
        cost += np.subtract.outer(x[:, k], y[:, k]) ** 2
    return transport(cost)


def jensen_shannon(a: ArrayLike, b: ArrayLike, *, bins: int = _BINS) -> float:
    """Jensen-Shannon distance of two histograms, (n, d) and (m, d) points: 0 for equal ones, 1 for disjoint ones.

    The root of the divergence in bits, a metric (Endres & Schindelin, IEEE Trans. Inf. Theory 49, 1858 (2003)).
    Bins divide the range of both sets evenly along every axis.
    """
    from scipy.spatial.distance import jensenshannon

    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    low, high = np.minimum(x.min(0), y.min(0)), np.maximum(x.max(0), y.max(0))
    width = np.where(high > low, high - low, 1.0)
    counts = []
    for points in (x, y):
        cells = np.minimum(((points - low) / width * bins).astype(np.intp), bins - 1)
        flat = np.ravel_multi_index(tuple(cells.T), (bins,) * x.shape[1])
        counts.append(np.bincount(flat, minlength=bins ** x.shape[1]))
    return float(jensenshannon(*counts, base=2))
