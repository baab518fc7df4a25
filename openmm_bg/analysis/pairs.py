"""The same thing in a reference and in samples."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from openmm_bg.analysis.free_energy import Population
from openmm_bg.analysis.probes import Contrast


@dataclass(frozen=True)
class PopulationPair:
    """The same basin in the reference and in the samples."""

    residue: str
    reference: Population
    samples: Population
    contrast: Contrast

    @property
    def name(self) -> str:
        return f"{self.residue} {self.reference.name}"

    @property
    def difference(self) -> float:
        return self.samples.value - self.reference.value

    @property
    def error(self) -> float:
        """Of the difference. A side that never moved adds nothing that could be known; NaN where neither did."""
        known = [e for e in (self.samples.error, self.reference.error) if not math.isnan(e)]
        return math.hypot(*known) if known else math.nan

    @property
    def agrees(self) -> bool | None:
        """False where the two differ at the family-wise error of the comparison.

        None where a side holds too few independent samples to say, or never entered or never left the basin and the
        other does not contradict it. A basin that one side visits often and the other never is a difference, not a gap.
        """
        if self.contrast.differs:
            return False
        return True if self.contrast.is_measured else None


class FreeEnergyPair(NamedTuple):
    """Free energy of a basin above the fullest of its residue in the reference, kT, with block errors."""

    name: str
    reference: float
    reference_error: float
    samples: float
    sample_error: float


class EffectiveSize(NamedTuple):
    """Of how many independent frames an ensemble is worth in what moves most slowly, and what that is."""

    size: float
    slowest: str
