"""What moves may learn from their acceptance, in a phase that is closed before production."""

from __future__ import annotations

import math

from openmm_bg.errors import InputError

GAIN_EXPONENT = 0.6
"""The k-th observation counts k^-0.6: steps that shrink, and whose sum is infinite (Robbins & Monro)."""


class Adaptation:
    """A running acceptance, learned while the phase is open.

    A chain that adapts to its own past is no Markov chain and samples its target only in the limit. So nothing is
    learned any more once the phase is closed, and what was sampled in it is set aside.

    Attributes
    ----------
    acceptance : float
        Average of what was observed, recent observations counting more; NaN before the first.
    updates : int
    closed : bool

    References
    ----------
    Robbins and Monro, Ann. Math. Stat. 22, 400 (1951); Andrieu and Thoms, Stat. Comput. 18, 343 (2008).

    Examples
    --------
    >>> adaptation = Adaptation()
    >>> adaptation.observe(0.4), adaptation.acceptance
    (1.0, 0.4)
    """

    def __init__(self) -> None:
        self.acceptance = math.nan
        self.updates = 0
        self.closed = False

    def observe(self, acceptance: float) -> float:
        """Take the accepted fraction of some proposals into account; the weight it was given, which decreases.

        Raises
        ------
        InputError
            If the phase is closed.
        """
        if self.closed:
            raise InputError("Adaptation is closed; what production samples with must not change, so start a new run.")
        self.updates += 1
        gain = self.updates**-GAIN_EXPONENT
        self.acceptance = acceptance if self.updates == 1 else self.acceptance + gain * (acceptance - self.acceptance)
        return gain

    def close(self) -> None:
        """End the phase, for good."""
        self.closed = True

    def state_dict(self) -> dict[str, float]:
        """Numbers from which :meth:`load_state_dict` goes on."""
        # NaN is no JSON
        acceptance = -1.0 if self.updates == 0 else self.acceptance
        return {"acceptance": acceptance, "updates": self.updates, "closed": int(self.closed)}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on from what :meth:`state_dict` returned."""
        self.updates, self.closed = int(state["updates"]), bool(state["closed"])
        self.acceptance = float(state["acceptance"]) if self.updates else math.nan


def proposals_needed(acceptance: float, most: int, chance: float = 0.95) -> int:
    """The smallest number of proposals of which at least one is accepted with a probability of `chance`.

    Parameters
    ----------
    acceptance : float
        Of each.
    most : int
        The largest answer.
    chance : float

    Examples
    --------
    >>> proposals_needed(0.25, 100), proposals_needed(0.93, 100), proposals_needed(0.0, 100)
    (11, 2, 100)
    """
    if acceptance >= chance:
        return 1
    if acceptance <= 0:
        return most
    return min(most, math.ceil(math.log1p(-chance) / math.log1p(-acceptance)))
