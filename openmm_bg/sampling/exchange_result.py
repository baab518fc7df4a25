"""What a replica exchange has produced, and how well its walkers travelled."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from openmm_bg.errors import InputError
from openmm_bg.sampling.dynamics import Trajectory

__all__ = ["ReplicaExchangeResult"]


@dataclass(frozen=True)
class ReplicaExchangeResult:
    """What a replica exchange has produced.

    Attributes
    ----------
    temperatures : ndarray (replicas,)
        In K, rising.
    potential_energy : ndarray (iterations, replicas)
        kJ/mol of the frame that each temperature generated, before the exchange that followed. The iterations of all
        ladders stand one ladder after the other, here and below.
    walkers : ndarray (iterations, replicas)
        Which walker of the ladder was at each temperature when the frame was generated.
    exchanges_tried, exchanges_accepted : ndarray (replicas - 1,)
        Per pair of neighbours.
    frames : dict of int to ndarray (iterations, atoms, 3)
        Positions in nm, for the temperatures that were kept, by their index.
    force_evaluations : int
        By all replicas, energies and discarded iterations included.
    seed : int
    ladders : int
        Independent exchanges that ran side by side.
    """

    temperatures: np.ndarray
    potential_energy: np.ndarray
    walkers: np.ndarray
    exchanges_tried: np.ndarray
    exchanges_accepted: np.ndarray
    frames: dict[int, np.ndarray]
    force_evaluations: int
    seed: int
    ladders: int = 1

    @property
    def acceptance(self) -> np.ndarray:
        """Accepted share of the exchanges of each neighbour pair, (replicas - 1,); NaN where none was tried."""
        tried = np.where(self.exchanges_tried > 0, self.exchanges_tried, np.nan)
        return self.exchanges_accepted / tried

    @property
    def round_trips(self) -> np.ndarray:
        """How often each walker went from the lowest temperature to the highest and back, (ladders * replicas,)."""
        trips = []
        for ladder in self.walkers.reshape(self.ladders, -1, len(self.temperatures)):
            for walker in range(len(self.temperatures)):
                ends = np.where(ladder[:, 0] == walker, -1, 0) + np.where(ladder[:, -1] == walker, 1, 0)
                ends = ends[ends != 0]
                arrivals = np.count_nonzero((ends[:-1] == 1) & (ends[1:] == -1))
                started_high = len(ends) > 0 and ends[0] == 1
                trips.append(max(0, arrivals - started_high))
        return np.array(trips, dtype=np.int64)

    def trajectory(self, index: int = 0) -> Trajectory:
        """The frames of one kept temperature, by default the lowest, at the cost of the whole run."""
        if index not in self.frames:
            raise InputError(f"Frames of temperature {index} were not kept; kept are {sorted(self.frames)}.")
        return Trajectory(
            self.frames[index],
            self.potential_energy[:, index],
            float(self.temperatures[index]),
            self.force_evaluations,
            self.seed,
        )
