"""The acceptance rule, the queue of proposals and the acceptance of an independence chain.

A Boltzmann generator proposes a whole conformation x' that does not depend on the current one, x. Such a
move leaves exp(-u) invariant when it is accepted with probability min(1, alpha),

    log alpha = -(u(x') - u(x)) + log q(x) - log q(x'),

where q is the complete density of the proposal: base density and Jacobians. Leaving part of q out, or
adding a kinetic energy that the proposal did not draw, samples another distribution without any warning;
that is why both densities are mandatory here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
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
    """What one attempted move was and how it ended.

    Attributes
    ----------
    step : int
        Time steps the simulation had made; moves do not advance it.
    accepted : bool
    refused : bool
        The current state lies outside the generator's support, so nothing was proposed.
    potential_energy, proposed_potential_energy : float
        kJ/mol, before the decision. The proposed one is NaN where it was not evaluated (refused, or an
        invalid draw).
    log_prob, proposed_log_prob : float
        The generator's log densities of both states.
    log_acceptance : float
        Logarithm of the Metropolis-Hastings ratio, -inf for certain rejection.
    """

    step: int
    accepted: bool
    refused: bool
    potential_energy: float
    proposed_potential_energy: float
    log_prob: float
    proposed_log_prob: float
    log_acceptance: float


class ProposalGenerator(Protocol):
    """What the moves need of a generator; :class:`openmm_bg.BoltzmannGenerator` offers it."""

    coordinates: Any
    """None where the density is one of plain Cartesian coordinates."""

    def sample_internal(self, n: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Internal coordinates (n, dimension) and their final log density (n,), -inf for invalid draws."""
        ...

    def place(self, q: torch.Tensor, frame: Any) -> torch.Tensor:
        """Positions (n, atoms, 3) in nm of internal coordinates in a frame."""
        ...

    def frame(self, x: torch.Tensor) -> Any:
        """Frame of the seed atoms of positions (n, atoms, 3)."""
        ...

    def log_prob(self, x: torch.Tensor) -> torch.Tensor:
        """Log density (n,) of positions (n, atoms, 3)."""
        ...


class IndependenceProposals:
    """A queue of conformations drawn from a generator in batches.

    One network call per proposal is slow; the queue draws `batch_size` at a time and hands them out one
    after the other. What it holds depends on nothing but the seed, so it may be stored, restored or thrown
    away at any moment without a bias.

    Parameters
    ----------
    generator : BoltzmannGenerator
    seed : int or torch.Generator
        A seed, or a generator of random numbers that the queue then owns.
    batch_size : int
        Conformations drawn at once.
    """

    def __init__(self, generator: ProposalGenerator, seed: int | torch.Generator, batch_size: int = 256):
        if batch_size < 1:
            raise InputError(f"batch_size must be at least 1, not {batch_size}.")
        self.generator = generator
        self.batch_size = int(batch_size)
        self._random = seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(int(seed))
        self._drawn: tuple[torch.Tensor, torch.Tensor] | None = None

    def __len__(self) -> int:
        """Conformations drawn and not yet used."""
        return 0 if self._drawn is None else len(self._drawn[1])

    def take(self, n: int, at: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """The next `n` conformations, standing where the molecule stands now, and their log densities.

        Parameters
        ----------
        n : int
        at : ndarray, shape (atoms, 3)
            Current positions in nm. Their seed atoms give the frame, which a move does not change; so all
            `n` may be tried one after the other, whether earlier ones are accepted or not.

        Returns
        -------
        positions : ndarray, shape (n, atoms, 3)
            nm; NaN for invalid draws.
        log_prob : ndarray, shape (n,)
            -inf for invalid draws.
        """
        q, log_prob = self._drawn or self.generator.sample_internal(self.batch_size, self._random)
        while len(log_prob) < n:
            more = self.generator.sample_internal(self.batch_size, self._random)
            q, log_prob = torch.cat([q, more[0]]), torch.cat([log_prob, more[1]])
        self._drawn = q[n:], log_prob[n:]
        frame = self.generator.frame(torch.cat([self._batch(at)] * n))
        placed = self.generator.place(q[:n], frame).numpy(force=True).astype(np.float64).reshape(n, -1, 3)
        return placed, log_prob[:n].numpy(force=True).astype(np.float64)

    def log_prob(self, positions: NDArray[np.float64]) -> float:
        """Log density of one conformation (atoms, 3) in nm; -inf outside the generator's support."""
        return float(self.generator.log_prob(self._batch(positions))[0])

    def _batch(self, positions: NDArray[np.float64]) -> torch.Tensor:
        x = torch.from_numpy(np.array(positions, dtype=np.float64))[None]
        return x if self.generator.coordinates is not None else x.reshape(1, -1)

    def state_dict(self) -> dict[str, NDArray[Any]]:
        """Arrays from which :meth:`load_state_dict` continues with exactly the same proposals."""
        q, log_prob = self._drawn or (torch.zeros(0), torch.zeros(0))
        return {
            "random": self._random.get_state().numpy().copy(),
            "q": q.numpy(force=True).copy(),
            "log_prob": log_prob.numpy(force=True).copy(),
        }

    def load_state_dict(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Continue from what :meth:`state_dict` returned."""
        self._random.set_state(torch.from_numpy(np.array(state["random"], dtype=np.uint8)))
        q, log_prob = (torch.from_numpy(np.array(state[name])) for name in ("q", "log_prob"))
        self._drawn = (q, log_prob) if len(log_prob) else None


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
    weights = np.sort(_relative_weights(log_weights, at_least=2))
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
    relative = _relative_weights(log_weights, at_least=2)
    with np.errstate(divide="ignore"):
        log_w = np.log(relative)
    thresholds = log_w + rng.standard_exponential(len(log_w))
    current = first = int(np.argmax(relative > 0))
    indices = np.full(len(log_w), first, dtype=np.int64)
    accepted = 0
    for i in range(first + 1, len(log_w)):
        if thresholds[i] >= log_w[current]:
            current = i
            accepted += 1
        indices[i] = current
    return IndependenceChain(indices, accepted / max(1, len(log_w) - 1 - first))


def _relative_weights(log_weights: ArrayLike, at_least: int) -> NDArray[np.float64]:
    log_w = np.asarray(log_weights, dtype=np.float64)
    if log_w.ndim != 1 or len(log_w) < at_least:
        raise InputError(f"Log weights must be one row of at least {at_least} numbers, not of shape {log_w.shape}.")
    if np.any(np.isnan(log_w) | np.isposinf(log_w)):
        raise InputError("Log weights hold NaN or +inf; find the faulty energy or density first.")
    if np.all(np.isneginf(log_w)):
        raise InputError("All weights are zero; the proposal and the target do not overlap.")
    return np.exp(log_w - log_w.max())
