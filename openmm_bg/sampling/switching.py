"""Nonequilibrium candidate moves: uncouple a molecule, propose, couple it again, accept on the total work.

In a dense surrounding almost every new conformation of a molecule overlaps with something and is rejected, whatever
its merit. So the coupling of molecule and surroundings is first switched off in n steps of dynamics; the proposal is
made there; and the same n steps in reverse order switch the coupling on again around the new conformation::

    x_0, v_0 drawn | step 1, ..., step n | x -> x', v' drawn | step n, ..., step 1 | x_n, v_n

Each step is a map of positions and velocities at a fixed coupling that preserves volume and that reversed velocities
undo. Read backwards, with reversed velocities, the whole protocol is therefore the same protocol from x_n to x_0, and
it leaves exp(-u) invariant if x_n is accepted with probability min(1, alpha)::

    log alpha = -W_decouple + log_ratio - W_recouple
    W_decouple = [u_0(x) + k(v)] - [u(x_0) + k(v_0)]
    W_recouple = [u(x_n) + k(v_n)] - [u_0(x') + k(v')]
    log_ratio = -(u_0(x') - u_0(x)) + log_prob(x) - log_prob(x')

with the true potential energy u, the potential energy u_0 at the decoupled end and the kinetic energy k, all in units
of kT. Both W are differences of total energy. So they hold the work of every change of the coupling, the shadow work
of the finite time step, and whatever separates the true energy from that of the switched dynamics at full coupling;
nothing is accumulated on the way, and u_0 drops out. The heat of drawing velocities is not work. The rule is exact for
any schedule, any number of steps and any time step; these decide how much is accepted.

The mirror image is essential. Proposing first and letting the surroundings relax afterwards has no path back, and
samples another distribution without any warning.

References
----------
Nilmeier, Crooks, Minh and Chodera, PNAS 108, E1009 (2011); Chen and Roux, J. Chem. Phys. 142, 024101 (2015).
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import logsumexp

from openmm_bg.errors import InputError


class Middle(NamedTuple):
    """What happened at the decoupled end.

    Attributes
    ----------
    energy, proposed_energy : float or ndarray
        u_0/kT before and after the proposal.
    log_ratio : float or ndarray
        Logarithm of the Metropolis-Hastings ratio of the proposal at this end; -inf if there is none that counts.
    """

    energy: Any
    proposed_energy: Any
    log_ratio: Any


class SwitchedDynamics(Protocol):
    """A molecule whose coupling to its surroundings can be switched; energies are in units of kT.

    They may be floats, or arrays with one entry for each of many walkers.
    """

    def energy(self) -> Any:
        """The true potential energy of the current positions, which no coupling influences."""
        ...

    def kinetic_energy(self) -> Any:
        """The kinetic energy of the current velocities."""
        ...

    def draw_velocities(self) -> None:
        """Draw all velocities from the Maxwell-Boltzmann distribution at the current positions."""
        ...

    def propagate(self, steps: range) -> None:
        """Make the steps of these numbers, in this order: 0 is next to full coupling, the last is decoupled.

        Step k must preserve volume, and after a reversal of the velocities make itself undone.
        """
        ...

    def propose(self) -> Middle:
        """Replace the conformation at the decoupled end."""
        ...


class Switch(NamedTuple):
    """The outcome of one protocol, in units of kT.

    Attributes
    ----------
    decoupling_work, recoupling_work : float or ndarray
        W_decouple and W_recouple; NaN for a half that was not made.
    log_acceptance : float or ndarray
        log alpha, which is minus the total work; -inf for certain rejection.
    """

    decoupling_work: Any
    recoupling_work: Any
    log_acceptance: Any


def switch(dynamics: SwitchedDynamics, steps: int) -> Switch:
    """Run the protocol once and weigh it; the decision, and going back to the start, are the caller's.

    Parameters
    ----------
    dynamics : SwitchedDynamics
        Left at the end of the protocol, or in its middle where the proposal is certain to be rejected.
    steps : int
        n, of the decoupling and again of the recoupling.

    Raises
    ------
    ValueError
        If the current state has no energy (NaN, -inf).

    Examples
    --------
    A molecule x and a solvent y that wants to be where x is. The proposal is x's own distribution without solvent.

    >>> class Pair:
    ...     def __init__(self, rng, walkers):
    ...         self.rng, self.x, self.y, self.v = rng, np.zeros(walkers), np.zeros(walkers), None
    ...     def energy(self):
    ...         return 0.5 * self.x**2 + 18 * (self.y - self.x) ** 2
    ...     def kinetic_energy(self):
    ...         return 0.5 * self.v**2
    ...     def draw_velocities(self):
    ...         self.v = self.rng.normal(size=self.x.shape)
    ...     def propagate(self, steps):
    ...         for k in steps:
    ...             strength = 36 * (1 - (k + 1) / 32) + 1
    ...             self.y = self.y + 0.05 * self.v
    ...             self.v = self.v - 0.1 * strength * (self.y - self.x)
    ...             self.y = self.y + 0.05 * self.v
    ...     def propose(self):
    ...         self.x = self.rng.normal(size=self.x.shape)
    ...         return Middle(0.5 * self.y**2, 0.5 * self.y**2, np.zeros(self.x.shape))
    >>> outcome = switch(Pair(np.random.default_rng(0), 1000), 32)
    >>> outcome.log_acceptance.shape
    (1000,)
    """
    if steps < 1:
        raise InputError(f"The coupling must be switched off in at least one step, not {steps}.")
    order = range(steps)
    dynamics.draw_velocities()
    start = dynamics.energy() + dynamics.kinetic_energy()
    if np.any(np.isnan(start) | np.isneginf(start)):
        raise ValueError("The energy of the current state is NaN or -inf; the simulation has already failed.")
    dynamics.propagate(order)
    arrived = dynamics.kinetic_energy()
    middle = dynamics.propose()
    down = middle.energy + arrived - start
    if np.all(np.isneginf(middle.log_ratio)):
        return Switch(down, np.full_like(down, np.nan)[()], middle.log_ratio)
    dynamics.draw_velocities()
    begun = middle.proposed_energy + dynamics.kinetic_energy()
    dynamics.propagate(order[::-1])
    up = dynamics.energy() + dynamics.kinetic_energy() - begun
    with np.errstate(invalid="ignore"):  # a state that has no energy, which is rejected
        total = middle.log_ratio - down - up
    return Switch(down, up, np.where(np.isnan(total), -np.inf, total)[()])


def schedule(steps: int) -> NDArray[np.float64]:
    """The usual order of decoupling: charges first, while the repulsive cores still keep opposite ones apart.

    Returns
    -------
    ndarray, shape (steps, 2)
        Couplings of electrostatics and of sterics at every step. The last row, (0, 0), is the decoupled end.

    Examples
    --------
    >>> schedule(4).tolist()
    [[0.5, 1.0], [0.0, 1.0], [0.0, 0.5], [0.0, 0.0]]
    """
    progress = np.arange(1, steps + 1) / steps
    return np.clip(np.stack([1 - 2 * progress, 2 - 2 * progress], axis=1), 0.0, 1.0)


def choose(log_weights: ArrayLike, current: ArrayLike, rng: np.random.Generator) -> tuple[NDArray[np.int64], Any]:
    """Pick one of n independent proposals, in proportion to their weights: multiple-try Metropolis.

    The ratio that makes it exact is the sum of the proposals' weights over the same sum with the current weight in
    the place of the chosen one. With n = 1 this is the ordinary ratio w'/w; with many it tends to one, however uneven
    the weights: the choice is then a draw from the Boltzmann distribution itself.

    Parameters
    ----------
    log_weights : array_like, shape (n, ...)
        log w = -u - log_prob of the proposals; -inf allowed.
    current : array_like, shape (...)
        log w of the current state; +inf if it lies outside the proposals' support, and is then never left.
    rng : numpy.random.Generator

    Returns
    -------
    index : int array, shape (...)
        Of the chosen proposal.
    log_ratio : float or ndarray, shape (...)
        -inf where no proposal has a weight, or the current state may not be left.

    References
    ----------
    Liu, Liang and Wong, J. Am. Stat. Assoc. 95, 121 (2000), with proposals that do not depend on the current state.

    Examples
    --------
    >>> index, log_ratio = choose([-3.0], -2.0, np.random.default_rng(0))
    >>> int(index), float(log_ratio)
    (0, -1.0)
    """
    log_w, current = np.asarray(log_weights, dtype=np.float64), np.asarray(current, dtype=np.float64)
    if np.any(np.isnan(log_w) | np.isposinf(log_w)) or np.any(np.isnan(current)):
        raise ValueError("A weight is NaN, or a proposal's is +inf; find the faulty energy or density first.")
    index = np.argmax(log_w + rng.gumbel(size=log_w.shape), axis=0)
    others = log_w.copy()
    np.put_along_axis(others, index[None], current[None], axis=0)
    with np.errstate(invalid="ignore"):
        possible = np.isfinite(log_w.max(axis=0)) & ~np.isposinf(current)
        log_ratio = np.where(possible, logsumexp(log_w, axis=0) - logsumexp(others, axis=0), -np.inf)
    return index, log_ratio[()]
