"""Samples of several states, such as the temperatures of an exchange, as one weighted ensemble: MBAR, by pymbar."""

from __future__ import annotations

import importlib.util
import logging
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from openmm_bg.analysis.statistics import kish_size
from openmm_bg.errors import InputError

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Multistate:
    """What :func:`multistate` found.

    Attributes
    ----------
    free_energies, errors : (states,) arrays
        kT, above the target state, with standard errors.
    log_weights : (frames,) array
        Of every frame in the target state; their exponentials sum to one.
    overlap : float
        One minus the second eigenvalue of the overlap matrix: 1 where all states are the same, 0 where some are cut off
        from others, and then nothing here means anything.
    effective_frames : float
        Kish's effective size of the weights; correlation between frames is not in it.
    """

    free_energies: Array
    errors: Array
    log_weights: Array
    overlap: float
    effective_frames: float


def multistate(
    reduced_energies: ArrayLike, counts: ArrayLike, *, target: int = 0, inefficiency: float = 1.0
) -> Multistate:
    """Weights of frames of several states in one of them, and the free energies between all.

    The multistate Bennett acceptance ratio, Shirts & Chodera, J. Chem. Phys. 129, 124105 (2008).

    Parameters
    ----------
    reduced_energies : (states, frames) array
        u_k(x_n) of every frame in every state, kT of that state: for temperatures U_n / (k T_k).
    counts : (states,) array of int
        How many of the frames were drawn from each state, in that order: they add up to the frames.
    target : int
        The state that is wanted.
    inefficiency : float
        Statistical inefficiency of the frames: errors grow with its root.

    Raises
    ------
    InputError
        For shapes that do not fit, energies that are not finite, or without pymbar.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> x = np.concatenate([rng.normal(size=2000), 2 * rng.normal(size=2000)])
    >>> found = multistate([x**2 / 2, x**2 / 8], [2000, 2000])     # exactly -log 2 apart
    >>> bool(abs(found.free_energies[1] + np.log(2)) < 3 * found.errors[1])
    True
    """
    u, n = np.asarray(reduced_energies, dtype=np.float64), np.asarray(counts)
    if u.ndim != 2 or n.shape != (len(u),) or not np.issubdtype(n.dtype, np.integer):
        raise InputError(
            f"reduced_energies has the shape {u.shape} and counts {n.shape}; give (states, frames) and a whole number "
            "for each state."
        )
    if (n < 0).any() or n.sum() != u.shape[1] or not u.shape[1]:
        raise InputError(
            f"counts add up to {n.sum()}, but there are {u.shape[1]} frames; say how many each state made."
        )
    if not 0 <= target < len(u):
        raise InputError(f"There is no state {target}; there are {len(u)}, counted from 0.")
    if not np.isfinite(u).all():
        raise InputError("reduced_energies hold numbers that are not finite; leave those frames out.")
    if not inefficiency >= 1:
        raise InputError(f"inefficiency must be 1 or more, not {inefficiency}.")
    if importlib.util.find_spec("pymbar") is None:
        raise InputError("Several states need pymbar; install it with `pip install pymbar`.")
    mbar = _quiet_mbar(u, n)
    differences = mbar.compute_free_energy_differences()
    log_weights = np.asarray(mbar._computeUnnormalizedLogWeights(u[target]))
    log_weights -= np.logaddexp.reduce(log_weights)
    return Multistate(
        np.asarray(differences["Delta_f"][target], dtype=np.float64),
        np.asarray(differences["dDelta_f"][target], dtype=np.float64) * math.sqrt(inefficiency),
        log_weights, float(mbar.compute_overlap()["scalar"]), kish_size(np.exp(log_weights)),
    )  # fmt: skip


def _quiet_mbar(u: Array, n: NDArray[np.integer]) -> object:
    """pymbar greets whoever imports it, in its log; nobody here asked about JAX."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        from pymbar import MBAR

        return MBAR(u, n)
    finally:
        logging.disable(level)
