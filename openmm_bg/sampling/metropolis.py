"""The acceptance rule, the record of an attempt and the acceptance of an independence chain.

A Boltzmann generator proposes a whole conformation x' that does not depend on the current one, x. Such a
move leaves exp(-u) invariant when it is accepted with probability min(1, alpha),

    log alpha = -(u(x') - u(x)) + log q(x) - log q(x'),

where q is the complete density of the proposal: base density and Jacobians. Leaving part of q out, or
adding a kinetic energy that the proposal did not draw, samples another distribution without any warning;
that is why both densities are mandatory here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from openmm_bg.errors import InputError


def log_acceptance(
    reduced_energy_old: ArrayLike,
    reduced_energy_new: ArrayLike,
    log_prob_old: ArrayLike,
    log_prob_new: ArrayLike,
) -> Any:
    """Logarithm of the Metropolis-Hastings ratio of an independent proposal, elementwise.

    ``-(u' - u) + log_prob(x) - log_prob(x')``; accept with probability ``min(1, exp(...))``.

    A proposal that cannot be weighed is rejected: the result is -inf where u' or log_prob(x') is not
    finite. A current state outside the proposal's support (log_prob(x) = -inf) can never be proposed again,
    so leaving it would break detailed balance: the result is -inf there as well, and a sampler counts it
    apart, as *refused*.

    Parameters
    ----------
    reduced_energy_old, reduced_energy_new : array_like
        U/kT of the current and of the proposed state. The current one may be +inf (a clash): every sound
        proposal is accepted.
    log_prob_old, log_prob_new : array_like
        Log density of both states under the generator, from the same bijection.

    Returns
    -------
    float or ndarray
        Broadcast shape of the arguments, float64.

    Raises
    ------
    ValueError
        If the current state has no energy (NaN, -inf) or no density (NaN, +inf): nothing right can be
        computed from it.

    References
    ----------
    Hastings, Biometrika 57, 97 (1970); Tierney, Ann. Stat. 22, 1701 (1994).

    Examples
    --------
    >>> float(log_acceptance(1.0, 3.0, -5.0, -6.0))
    -1.0
    >>> float(log_acceptance(1.0, float("nan"), -5.0, -6.0))
    -inf
    """
    u, u_new, log_q, log_q_new = np.broadcast_arrays(
        *(np.asarray(a, dtype=np.float64) for a in (reduced_energy_old, reduced_energy_new, log_prob_old, log_prob_new))
    )
    if np.any(np.isnan(u) | np.isneginf(u)):
        raise ValueError("The energy of the current state is NaN or -inf; the simulation has already failed.")
    if np.any(np.isnan(log_q) | np.isposinf(log_q)):
        raise ValueError("The generator's log density of the current state is NaN or +inf; the generator is faulty.")
    possible = np.isfinite(u_new) & np.isfinite(log_q_new) & np.isfinite(log_q)
    with np.errstate(invalid="ignore"):  # inf - inf in rows that are rejected anyway
        ratio = np.where(possible, -(u_new - u) + log_q - log_q_new, -np.inf)
    return ratio[()]


def accept(log_ratio: float, rng: np.random.Generator) -> bool:
    """Decide one proposal; always consumes one random number, so that the stream does not depend on the outcome."""
    return bool(-rng.standard_exponential() <= log_ratio)


class Attempt(NamedTuple):
    """What one attempted move was and how it ended: one decision by the energy that is sampled.

    Attributes
    ----------
    step : int
        Time steps the simulation had made; moves do not advance it.
    accepted : bool
    refused : bool
        The current state lies outside the generator's support, or has no finite cheap energy: nothing was proposed.
    potential_energy, proposed_potential_energy : float
        kJ/mol, before the decision. The proposed one is NaN where it was not evaluated: refused, an invalid draw, or a
        scan of the cheap energy that ended where it began.
    log_prob, proposed_log_prob : float
        Log densities of both states, as the move proposes.
    log_acceptance : float
        Logarithm of the Metropolis-Hastings ratio of this decision, -inf for certain rejection.
    kind : str
        "independent" or "latent".
    tried, moved : int
        Proposals that were tried, and those of them that were accepted. With two stages these are steps on the cheap
        energy, which the decision then takes or leaves as a whole; otherwise one, and 0 or 1.
    """

    step: int
    accepted: bool
    refused: bool
    potential_energy: float
    proposed_potential_energy: float
    log_prob: float
    proposed_log_prob: float
    log_acceptance: float
    kind: str = "independent"
    tried: int = 1
    moved: int = 0


@dataclass
class MoveStatistics:
    """Counts of one kind of move.

    Attributes
    ----------
    attempts, refused, accepted : int
        Decisions, those refused, and those that changed the conformation.
    evaluated : int
        Energies that were evaluated for them.
    tried, moved : int
        Proposals, and those accepted; on the cheap energy, where there is one.
    """

    attempts: int = 0
    refused: int = 0
    accepted: int = 0
    evaluated: int = 0
    tried: int = 0
    moved: int = 0

    def add(self, attempt: Attempt) -> None:
        """Count one attempt."""
        self.attempts += 1
        self.refused += attempt.refused
        self.accepted += attempt.accepted
        self.evaluated += not math.isnan(attempt.proposed_potential_energy)
        self.tried += attempt.tried
        self.moved += attempt.moved

    @property
    def acceptance(self) -> float:
        """Fraction of the attempts that were accepted; NaN before the first."""
        return self.accepted / self.attempts if self.attempts else math.nan


def independence_acceptance(log_weights: ArrayLike) -> float:
    """Stationary acceptance rate of the independence sampler, from the log weights of draws of its proposal.

    Started in equilibrium it accepts with probability E_p E_q[min(1, w'/w)] = E_q E_q[min(w, w')] / E_q[w].
    The double average runs over all pairs of distinct draws; after sorting it is one sum, so the cost is
    O(n log n).

    Parameters
    ----------
    log_weights : array_like, shape (n,)
        log w = -u - log_prob of at least two draws; -inf allowed.

    Returns
    -------
    float
        Between 0 and 1. An optimistic figure while the draws have not seen the largest weights.

    Examples
    --------
    >>> round(independence_acceptance([0.0, 0.0, 0.0]), 12)
    1.0
    """
    log_w = np.sort(_checked(log_weights))
    weights = np.exp(log_w - log_w[-1])
    n = len(weights)
    # The i-th smallest of n weights is the smaller one in n - 1 - i of the pairs.
    smaller = np.dot(weights, np.arange(n - 1, -1, -1, dtype=np.float64))
    return float(2.0 * smaller / ((n - 1) * weights.sum()))


class IndependenceChain(NamedTuple):
    """Indices of the draws that the chain stood on, (n,), and the fraction of accepted steps."""

    indices: NDArray[np.int64]
    acceptance_rate: float


def independence_chain(log_weights: ArrayLike, rng: np.random.Generator) -> IndependenceChain:
    """Run the independence sampler over draws that were made, and weighed, beforehand.

    The chain starts on the first draw of positive weight and tries the others in order; a rejected draw
    repeats the current one. It turns independent draws of the generator into a (correlated, asymptotically
    exact) sample of the Boltzmann distribution.

    Parameters
    ----------
    log_weights : array_like, shape (n,)
        log w = -u - log_prob; -inf allowed.
    rng : numpy.random.Generator

    Returns
    -------
    IndependenceChain
        ``indices`` (n,) point into the draws; draws before the first of positive weight are replaced by it.
    """
    log_w = _checked(log_weights)
    thresholds = log_w + rng.standard_exponential(len(log_w))
    current = first = int(np.argmax(np.isfinite(log_w)))
    indices = np.full(len(log_w), first, dtype=np.int64)
    accepted = 0
    for i in range(first + 1, len(log_w)):
        if thresholds[i] >= log_w[current]:
            current = i
            accepted += 1
        indices[i] = current
    return IndependenceChain(indices, accepted / max(1, len(log_w) - 1 - first))


def _checked(log_weights: ArrayLike) -> NDArray[np.float64]:
    log_w = np.asarray(log_weights, dtype=np.float64)
    if log_w.ndim != 1 or len(log_w) < 2:
        raise InputError(f"Log weights must be one row of at least 2 numbers, not of shape {log_w.shape}.")
    if np.any(np.isnan(log_w) | np.isposinf(log_w)):
        raise InputError("Log weights hold NaN or +inf; find the faulty energy or density first.")
    if np.all(np.isneginf(log_w)):
        raise InputError("All weights are zero; the proposal and the target do not overlap.")
    return log_w
