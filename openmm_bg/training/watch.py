"""Whether training still stands on its feet, and where to go back to when it does not."""

from __future__ import annotations

from typing import Any

from torch import Tensor

# Steps in a row without a finite gradient, and the share of the best score so far, that count as a divergence.
_STEPS = 20
_SHARE = 0.2
# A score below this says nothing yet.
_LEAST = 0.05
# Share of the best score from which on weights are good. The score is that of the averaged weights, which lag behind
# the flow's own: when it begins to fall those are further gone.
_GOOD = 0.9


class Watch:
    """Keeps the last good weights of a training and notices when it has diverged.

    Diverged means: twenty steps in a row without a finite gradient, or a validation score that has fallen to a fifth of
    the stage's best. Whoever asks then restores ``good``, the last weights with nine tenths of the best score, and goes
    on with ``factor`` times the learning rate.

    Parameters
    ----------
    good : dict of Tensor
        Weights and moments to go back to.
    factor : float
        Halved at every return.
    bad : int
        Steps in a row without a finite gradient.
    best, stage
        The best score, and the stage it belongs to.
    """

    def __init__(
        self, good: dict[str, Tensor], factor: float = 1.0, bad: int = 0, best: float = 0.0, stage: int = 0
    ) -> None:
        self.good, self.factor, self.bad, self.best, self.stage = good, factor, bad, best, stage

    def numbers(self) -> dict[str, Any]:
        """What a checkpoint holds besides ``good``."""
        return {"factor": self.factor, "bad": self.bad, "best": self.best, "stage": self.stage}

    def step(self, usable: bool) -> None:
        self.bad = 0 if usable else self.bad + 1

    def lost(self, stage: int, score: float | None) -> bool:
        """Whether training has diverged; ``score`` is None between validations."""
        if self.bad >= _STEPS:
            return True
        # a new stage learns something else: its first score is where it starts from
        return score is not None and stage == self.stage and self.best > _LEAST and score < _SHARE * self.best

    def keep(self, stage: int, score: float | None, weights: dict[str, Tensor]) -> None:
        """These weights are good if their score is nearly the best: a slow collapse must not lead to its middle."""
        if stage != self.stage:
            self.stage, self.best = stage, 0.0
        if score is not None:
            self.best = max(self.best, score)
        if self.bad == 0 and (score is None or score >= _GOOD * self.best):
            self.good = weights

    def rolled_back(self) -> None:
        self.factor *= 0.5
        self.bad = 0
