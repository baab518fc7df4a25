r"""Two-stage acceptance: many steps on a cheap energy V, one decision by the energy U that is sampled.

A series of Metropolis-Hastings steps on V, all of one kind, is a kernel P^n that is reversible with respect to
exp(-beta V), so that P^n(x, x') / P^n(x', x) = exp(-beta (V(x') - V(x))). Taken as one proposal, it is accepted with
probability min(1, alpha),

.. math::

    \log\alpha = -\beta [(U - V)(x') - (U - V)(x)],

and leaves exp(-beta U) invariant whatever V is. The density of the generator has done its part in the series; to use it
(or all of U) a second time would sample something else.

References
----------
Christen and Fox, J. Comput. Graph. Stat. 14, 795 (2005); Gelb, J. Chem. Phys. 118, 7747 (2003).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from openmm_bg.errors import InputError
from openmm_bg.sampling.metropolis import independence_chain
from openmm_bg.sampling.proposals import Proposals

Potential = Callable[[NDArray[np.float64]], NDArray[np.float64]]
"""Positions (n, atoms, 3) in nm to energies (n,) in kJ/mol; what is not finite is never accepted."""


class Scan(NamedTuple):
    """Where a series on the cheap energy ended.

    Attributes
    ----------
    positions : ndarray, shape (atoms, 3)
        nm.
    log_prob, log_prob_start : float
        Log densities at the end and at the beginning, as the moves propose.
    potential, potential_start : float
        The cheap energy of both, kJ/mol.
    tried, moved : int
        Proposals, and those accepted.
    """

    positions: NDArray[np.float64]
    log_prob: float
    log_prob_start: float
    potential: float
    potential_start: float
    tried: int
    moved: int

    @property
    def refused(self) -> bool:
        """Whether the series could not begin: no density under the generator, or no finite cheap energy."""
        return self.tried == 0


def scan(
    proposals: Proposals,
    potential: Potential,
    thermal_energy: float,
    n: int,
    at: NDArray[np.float64],
    rng: np.random.Generator,
) -> Scan:
    """Metropolis-Hastings steps on a cheap energy, evaluated for a whole batch of proposals at a time.

    Independent proposals are one batch. Of those that depend on the current conformation the rejections up to the first
    acceptance are kept; what follows it is drawn anew.

    Parameters
    ----------
    proposals : Proposals
        Of one kind: a mixture in a fixed order would not be reversible.
    potential : callable
        See :data:`Potential`.
    thermal_energy : float
        kT in kJ/mol.
    n : int
        Number of steps.
    at : ndarray, shape (atoms, 3)
        Positions to begin with, nm.
    rng : numpy.random.Generator

    Raises
    ------
    ValueError
        If the density of the current conformation is NaN or +inf.
    """
    log_q = start = proposals.log_prob(at)
    if math.isnan(start) or start == math.inf:
        raise ValueError("The generator's log density of the current state is NaN or +inf; the generator is faulty.")
    v = v_start = float(potential(at[None])[0])
    if not (math.isfinite(start) and math.isfinite(v_start)):
        return Scan(at, start, start, v_start, v_start, 0, 0)
    tried = moved = 0
    while tried < n:
        placed, log_probs = proposals.take(n - tried, at)
        energies = potential(placed)
        usable = np.isfinite(energies) & np.isfinite(log_probs)
        log_weights = np.full(len(placed), -np.inf)
        log_weights[usable] = -energies[usable] / thermal_energy - log_probs[usable]
        chain = independence_chain([-v / thermal_energy - log_q, *log_weights], rng).indices[1:]
        if proposals.state_dependent and chain.any():
            # what was drawn from a conformation that has been left is worth nothing
            chain = chain[: np.flatnonzero(chain)[0] + 1]
        tried += len(chain)
        moved += int(np.count_nonzero(np.diff(chain, prepend=0)))
        if chain[-1]:
            last = chain[-1] - 1
            at, log_q, v = placed[last], float(log_probs[last]), float(energies[last])
    return Scan(at, log_q, start, v, v_start, tried, moved)


def potential_of(energy: Any, generator: Any) -> Potential:
    """The cheap energy of a generator's molecule, evaluated in float64.

    Parameters
    ----------
    energy : Energy
        Of the molecule alone; with a method ``potential`` in kJ/mol.
    generator : BoltzmannGenerator

    Raises
    ------
    InputError
        If it is an energy of something else.
    """
    if not callable(getattr(energy, "potential", None)):
        raise InputError(
            f"The cheap energy must have a method potential(x) in kJ/mol, as ForceFieldEnergy has; a "
            f"{type(energy).__name__} has none."
        )
    shape = tuple(energy.event_shape)
    coordinates = generator.coordinates
    expected = (generator.flow.dimension,) if coordinates is None else (coordinates.num_atoms, 3)
    if math.prod(shape) != math.prod(expected):
        raise InputError(
            f"The cheap energy takes points of shape {shape}, but the generator makes {expected}; it must be an energy "
            "of the generator's molecule alone."
        )

    @torch.no_grad()
    def potential(positions: NDArray[np.float64]) -> NDArray[np.float64]:
        x = torch.from_numpy(np.ascontiguousarray(positions)).reshape(-1, *shape)
        return energy.potential(x).numpy(force=True).astype(np.float64)

    return potential
