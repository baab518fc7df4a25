r"""Exchange of two replicas through a learned map, and the figures by which such a run is judged.

Replicas of a fast ensemble h (hot, or of another Hamiltonian) and of a target t swap configurations only where the two
ensembles overlap, and so a ladder of replicas between them is usual. An invertible map T that carries the one ensemble
towards the other takes the ladder's place: T x_h is proposed to the target and T^-1 x_t to the fast one, and both are
accepted together with probability min(1, alpha),

.. math::

    \log\alpha = u_t(x_t) + u_h(x_h) - u_t(T x_h) - u_h(T^{-1} x_t)
        + \log|\det T'(x_h)| - \log|\det T'(T^{-1} x_t)|.

u are reduced energies and the determinants are those of Cartesian coordinates. Whatever T has learned, the product of
both Boltzmann distributions is kept exactly; with T = 1 this is ordinary replica exchange, and with noise in place of
the fast replica it is the independence move of a Boltzmann generator.

References
----------
Invernizzi, Kraemer, Clementi & Noe, Skipping the replica exchange ladder with normalizing flows, J. Phys. Chem. Lett.
13, 11643 (2022).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["ExchangeAttempt", "ExchangeStatistics", "log_exchange_acceptance"]


def log_exchange_acceptance(
    fast_energy: ArrayLike,
    target_energy: ArrayLike,
    fast_energy_new: ArrayLike,
    target_energy_new: ArrayLike,
    log_det: ArrayLike = 0.0,
    log_det_inverse: ArrayLike = 0.0,
) -> Any:
    r"""Logarithm of the Metropolis-Hastings ratio of an exchange through a map T, elementwise.

    .. math::

        u_h(x_h) + u_t(x_t) - u_h(T^{-1} x_t) - u_t(T x_h) + \log|\det T'(x_h)| + \log|\det (T^{-1})'(x_t)|

    An exchange that cannot be weighed is rejected: the result is -inf where a new energy or a determinant is not
    finite.

    Parameters
    ----------
    fast_energy, target_energy : array_like
        u_h(x_h) and u_t(x_t), U/kT of the current states. They may be +inf (a clash): every sound exchange is accepted.
    fast_energy_new, target_energy_new : array_like
        u_h(T^-1 x_t) and u_t(T x_h).
    log_det, log_det_inverse : array_like
        log|det T'(x_h)|, and log|det (T^-1)'(x_t)| = -log|det T'(T^-1 x_t)|, of one and the same T. Zero where
        configurations are exchanged as they are.

    Returns
    -------
    float or ndarray
        Broadcast shape of the arguments, float64.

    Raises
    ------
    ValueError
        If a current state has no energy (NaN, -inf).

    Examples
    --------
    >>> float(log_exchange_acceptance(1.0, 2.0, 2.5, 1.0))
    -0.5
    >>> float(log_exchange_acceptance(1.0, 2.0, 2.5, 1.0, log_det=0.75, log_det_inverse=-0.25))
    0.0
    """
    u_h, u_t, u_h_new, u_t_new, forward, inverse = np.broadcast_arrays(
        *(
            np.asarray(a, dtype=np.float64)
            for a in (fast_energy, target_energy, fast_energy_new, target_energy_new, log_det, log_det_inverse)
        )
    )
    if any(np.any(np.isnan(u) | np.isneginf(u)) for u in (u_h, u_t)):
        raise ValueError("The energy of a current state is NaN or -inf; the simulation has already failed.")
    possible = np.isfinite(u_h_new) & np.isfinite(u_t_new) & np.isfinite(forward) & np.isfinite(inverse)
    with np.errstate(invalid="ignore"):  # inf - inf in rows that are rejected anyway
        ratio = np.where(possible, u_h + u_t - u_h_new - u_t_new + forward + inverse, -np.inf)
    return ratio[()]


class ExchangeAttempt(NamedTuple):
    """One attempted exchange of two replicas and how it ended.

    Attributes
    ----------
    states : (int, int)
        Of the two replicas, before it.
    mapped : bool
        Whether through a map or as they are.
    accepted : bool
    refused : bool
        A replica was outside the domain of the map, so nothing was tried.
    log_acceptance : float
        Logarithm of the Metropolis-Hastings ratio, -inf for certain rejection.
    """

    states: tuple[int, int]
    mapped: bool
    accepted: bool
    refused: bool
    log_acceptance: float


class ExchangeStatistics:
    """How many exchanges were tried and accepted, and how well the replicas travelled.

    Parameters
    ----------
    states : int
        Number of states, and of replicas.

    Attributes
    ----------
    attempts, accepted, refused : ndarray of int, (states, states)
        Per pair of states, symmetric. Refused attempts are attempts.
    round_trips : ndarray of int, (states,)
        How often each replica went from the first state to the last and back.

    Examples
    --------
    >>> statistics = ExchangeStatistics(2)
    >>> statistics.count(ExchangeAttempt((0, 1), True, True, False, -0.1))
    >>> statistics.acceptance[0, 1]
    np.float64(1.0)
    >>> for states in ([0, 1], [1, 0], [0, 1]):
    ...     statistics.visit(states)
    >>> statistics.round_trips
    array([1, 0])
    """

    def __init__(self, states: int):
        self.attempts, self.accepted, self.refused = (np.zeros((states, states), dtype=np.int64) for _ in range(3))
        self.round_trips = np.zeros(states, dtype=np.int64)
        # the end each replica was at last: -1 the first state, 1 the last, 0 neither, and whether it began at the first
        self._end = np.zeros(states, dtype=np.int64)
        self._outward = np.zeros(states, dtype=np.int64)

    @property
    def acceptance(self) -> NDArray[np.float64]:
        """Accepted share of the attempts of each pair of states, (states, states); NaN where none was made."""
        return self.accepted / np.where(self.attempts > 0, self.attempts, np.nan)

    def count(self, attempt: ExchangeAttempt) -> None:
        """Add one attempt."""
        i, j = attempt.states
        for table, yes in ((self.attempts, True), (self.accepted, attempt.accepted), (self.refused, attempt.refused)):
            table[i, j] += yes
            table[j, i] += yes

    def visit(self, states: Sequence[int] | NDArray[np.int64]) -> None:
        """Add one iteration: the state each replica is in, (replicas,)."""
        states = np.asarray(states)
        first, last = states == 0, states == len(self._end) - 1
        self.round_trips += first & (self._end == 1) & (self._outward == 1)
        self._outward[first] = 1
        self._end = np.where(first, -1, np.where(last, 1, self._end))

    def state_dict(self) -> dict[str, Any]:
        """Everything as plain lists, fit for JSON."""
        return {name.strip("_"): getattr(self, name).tolist() for name in self._names}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what :meth:`state_dict` returned."""
        for name in self._names:
            setattr(self, name, np.array(state[name.strip("_")], dtype=np.int64))

    _names = ("attempts", "accepted", "refused", "round_trips", "_end", "_outward")
