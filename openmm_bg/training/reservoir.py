"""A bounded memory of frames: a uniform random sample of all that were ever put in."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


class Reservoir:
    """Keeps at most ``capacity`` frames; each that was ever added is in it with the same probability.

    Every frame draws a priority when it comes, and those with the highest stay (a reservoir sample without replacement:
    Vitter, ACM Trans. Math. Softw. 11, 37 (1985)).

    Parameters
    ----------
    capacity : int

    Attributes
    ----------
    frames : ndarray (n, ...)
    priorities : ndarray (n,)

    Examples
    --------
    >>> reservoir = Reservoir(3)
    >>> reservoir.add(np.zeros((5, 2)), np.random.default_rng(0))
    >>> len(reservoir)
    3
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.frames: NDArray[Any] = np.empty(0)
        self.priorities = np.empty(0)

    def __len__(self) -> int:
        return len(self.priorities)

    def add(self, frames: NDArray[Any], rng: np.random.Generator) -> None:
        """Put frames in, ``(n, ...)``."""
        priorities = np.concatenate([self.priorities, rng.random(len(frames))])
        frames = np.concatenate([self.frames, frames]) if len(self) else np.array(frames)
        kept = slice(None)
        if len(priorities) > self.capacity:
            # in the order they came, so that what is kept does not depend on how they were sorted
            kept = np.sort(np.argpartition(-priorities, self.capacity)[: self.capacity])
        self.frames, self.priorities = frames[kept], priorities[kept]
