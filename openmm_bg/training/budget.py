"""How much a training may cost."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from openmm_bg.errors import InputError

_SECONDS = {"s": 1.0, "min": 60.0, "h": 3600.0}


@dataclass(frozen=True)
class Budget:
    """Time, energy evaluations, or both: training ends where the first is spent, with the best model so far.

    The learning rate falls with the share that is spent. A budget of evaluations reproduces a run exactly, a budget of
    time as exactly as the machine is fast.

    Parameters
    ----------
    seconds : float, optional
    evaluations : int, optional

    Examples
    --------
    >>> Budget.parse("10min")
    Budget(seconds=600.0, evaluations=None)
    >>> Budget.parse("1e7")
    Budget(seconds=None, evaluations=10000000)
    """

    seconds: float | None = None
    evaluations: int | None = None

    def __post_init__(self) -> None:
        if self.seconds is None and self.evaluations is None:
            raise InputError("A budget needs seconds or evaluations.")
        for name in ("seconds", "evaluations"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise InputError(f"A budget of {value} {name} cannot be spent; give a positive number.")

    @classmethod
    def parse(cls, text: str) -> Budget:
        """ "90s", "10min" or "2h" of time, or a number of evaluations such as "1e7".

        Raises
        ------
        InputError
            For anything else.
        """
        match = re.fullmatch(r"\s*([0-9.]+(?:e\+?[0-9]+)?)\s*([a-z]*)\s*", str(text).lower())
        try:
            number, unit = float(match[1]), match[2]
            return cls(evaluations=int(number)) if not unit else cls(seconds=number * _SECONDS[unit])
        except (TypeError, ValueError, KeyError, OverflowError):
            raise InputError(
                f"The budget {text!r} is neither a time (90s, 10min, 2h) nor a number of evaluations (1e7)."
            ) from None

    def spent(self, seconds: float, evaluations: int) -> float:
        """The share that is spent, of what runs out first: 0 at the start, 1 and more where nothing is left.

        Parameters
        ----------
        seconds : float
        evaluations : int
            What has been used so far.
        """
        by_time = 0.0 if self.seconds is None else seconds / self.seconds
        by_evaluations = 0.0 if self.evaluations is None else evaluations / self.evaluations
        return max(by_time, by_evaluations)

    def less(self, seconds: float, evaluations: int) -> Budget:
        """The budget that remains for what comes next, once this much of it is used; a limit that is not set stays so.

        Parameters
        ----------
        seconds : float
            Time used.
        evaluations : int
            Energy evaluations used.

        Raises
        ------
        InputError
            If nothing remains, of time or of evaluations.

        Examples
        --------
        >>> Budget(seconds=600.0, evaluations=10**6).less(150.0, 200_000)
        Budget(seconds=450.0, evaluations=800000)
        """
        if self.spent(seconds, evaluations) >= 1:
            raise InputError(
                f"Nothing is left of the budget after {seconds:g} seconds and {evaluations} evaluations; give more."
            )
        return Budget(
            None if self.seconds is None else self.seconds - seconds,
            None if self.evaluations is None else self.evaluations - evaluations,
        )
