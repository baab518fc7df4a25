"""One call that holds an ensemble against a reference: distances with floors, populations with errors."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from openmm_bg.analysis.dihedrals import backbone_dihedrals
from openmm_bg.analysis.distances import Distance, energy_w2, measure, torus_w2, total_variation
from openmm_bg.analysis.formatting import format_value
from openmm_bg.analysis.free_energy import Population, populations
from openmm_bg.analysis.statistics import kish_size
from openmm_bg.errors import InputError

_SIGMA = 3.0  # several populations are looked at, so the bar for one of them is higher than for one distance


@dataclass(frozen=True)
class PopulationPair:
    """The same basin in the reference and in the samples."""

    residue: str
    reference: Population
    samples: Population

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
        """Whether the two differ by at most three errors.

        None where a side never entered or never left the basin and the other does not contradict it: nothing was shown.
        A basin that one side visits often and the other never is a difference, not a gap.
        """
        if abs(self.difference) > _SIGMA * self.error:
            return False
        return None if math.isnan(self.samples.error + self.reference.error) else True


@dataclass(frozen=True)
class Comparison:
    """What :func:`compare` found. ``str()`` is a table; :meth:`to_dict` is ready for JSON.

    Attributes
    ----------
    distances : tuple of Distance
    populations : tuple of PopulationPair
    reference_frames, sample_frames : int
    sample_kish : float or None
        Kish's effective size of the weights; None without weights.
    n, repeats, seed : int
        As asked for.
    """

    distances: tuple[Distance, ...]
    populations: tuple[PopulationPair, ...]
    reference_frames: int
    sample_frames: int
    sample_kish: float | None
    n: int
    repeats: int
    seed: int

    @property
    def agrees(self) -> bool:
        """Whether every distance lies within its floor and every population that was measured agrees."""
        return all(d.within_floor for d in self.distances) and all(p.agrees is not False for p in self.populations)

    @property
    def verdict(self) -> str:
        """One sentence."""
        far = [d.name for d in self.distances if not d.within_floor]
        far += [p.name for p in self.populations if p.agrees is False]
        unknown = [p.name for p in self.populations if p.agrees is None]
        text = (
            f"The samples differ from the reference in {', '.join(far)}."
            if far
            else "The samples agree with the reference within its own uncertainty."
        )
        if unknown:
            text += f" Not measured, for want of transitions: {', '.join(unknown)}."
        return text

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, numbers and strings; what was not measured is None."""
        pairs = []
        for p in self.populations:
            sides = {"reference": asdict(p.reference), "samples": asdict(p.samples)}
            pairs.append(
                {
                    "residue": p.residue,
                    **sides,
                    "difference": p.difference,
                    "error": p.error,
                    "agrees": p.agrees,
                }
            )
        record = {
            "distances": [d.to_dict() for d in self.distances],
            "populations": pairs,
            "agrees": self.agrees,
            "reference_frames": self.reference_frames,
            "sample_frames": self.sample_frames,
            "sample_kish": self.sample_kish,
            "n": self.n,
            "repeats": self.repeats,
            "seed": self.seed,
        }
        return _jsonable(record)

    def distance_rows(self) -> list[tuple[str, ...]]:
        """Name, value, floor, debiased, n and verdict of each distance, as text."""
        return [
            (
                f"{d.name} ({d.unit})" if d.unit else d.name,
                format_value(d.value, d.error),
                format_value(d.floor, d.floor_error),
                format_value(d.debiased, d.error, show_error=False),
                str(d.n),
                "within floor" if d.within_floor else "above floor",
            )
            for d in self.distances
        ]

    def population_rows(self) -> list[tuple[str, ...]]:
        """Name, both populations and their difference in per cent, and verdict, as text."""
        words = {True: "agrees", False: "differs", None: "not measured"}
        return [
            (
                p.name,
                format_value(100 * p.reference.value, 100 * p.reference.error),
                format_value(100 * p.samples.value, 100 * p.samples.error),
                format_value(100 * p.difference, 100 * p.error),
                words[p.agrees],
            )
            for p in self.populations
        ]

    def __str__(self) -> str:
        weights = "" if self.sample_kish is None else f", weighted (Kish size {self.sample_kish:.0f})"
        head = f"{self.sample_frames} samples{weights} against {self.reference_frames} reference frames"
        distances = _table(("distance", "value", "floor", "debiased", "n", ""), self.distance_rows())
        basins = _table(("population, %", "reference", "samples", "difference", ""), self.population_rows())
        return "\n".join([head, "", *distances, "", *basins, "", self.verdict])


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in [header, *rows]]
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]


def _jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _jsonable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_jsonable(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def compare(
    reference: Any,
    samples: Any,
    *,
    topology: Any,
    reference_energies: ArrayLike | None = None,
    sample_energies: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    n: int = 2000,
    repeats: int = 5,
    seed: int = 0,
) -> Comparison:
    """Hold samples against a reference trajectory.

    For every residue with phi and psi: the Wasserstein distance on the torus (degrees), the total variation
    of the Ramachandran histograms (15 degree bins) and the populations of its basins; with energies, their
    Wasserstein distance (kT). Every distance comes with its floor from two blocked halves of the reference at
    the same number of points.

    Parameters
    ----------
    reference, samples : (frames, atoms, 3) arrays or Quantities
        nm. The reference in the order it was made; trajectories may be joined end to end.
    topology : openmm.app.Topology or mdtraj.Topology
    reference_energies, sample_energies : (frames,) arrays, optional
        Reduced energies u = U / kT; both or neither.
    weights : (frames,) array, optional
        Of the samples; unnormalised, not logarithms.
    n : int
        Points per Wasserstein distance on the torus, whose cost grows faster than n^2. The other distances
        use all frames.
    repeats, seed : int
        Random subsamples for mean and spread.

    Raises
    ------
    InputError
        Where shapes do not fit, or a position or an energy that carries weight is not finite.

    Examples
    --------
    >>> print(compare(md, generated, topology=molecule.topology))    # doctest: +SKIP
    """
    ref, new = backbone_dihedrals(reference, topology), backbone_dihedrals(samples, topology)
    streams = iter(np.random.default_rng(seed).spawn(2 * len(ref.residues) + 1))
    distances: list[Distance] = []
    pairs: list[PopulationPair] = []
    for i, residue in enumerate(ref.residues):
        a, b = ref.pair(i), new.pair(i)
        plane, histogram = f"{residue} φψ W2", f"{residue} φψ histogram TV"
        distances += [
            measure(plane, torus_w2, a, b, next(streams), weights=weights, n=n, repeats=repeats, unit="degrees"),
            measure(histogram, total_variation, a, b, next(streams), weights=weights, repeats=repeats),
        ]
        sides = zip(populations(a[:, 0], a[:, 1]), populations(b[:, 0], b[:, 1], weights), strict=True)
        pairs += [PopulationPair(residue, p, q) for p, q in sides]
    if (reference_energies is None) != (sample_energies is None):
        raise InputError("Energies are needed on both sides; give reference_energies and sample_energies, or neither.")
    if reference_energies is not None and sample_energies is not None:
        distances.append(
            _energy_distance(reference_energies, sample_energies, ref.phi, new.phi, weights, repeats, next(streams))
        )
    kish = None if weights is None else kish_size(weights)
    return Comparison(tuple(distances), tuple(pairs), len(ref.phi), len(new.phi), kish, n, repeats, seed)


def _energy_distance(
    reference: ArrayLike,
    samples: ArrayLike,
    reference_phi: np.ndarray,
    sample_phi: np.ndarray,
    weights: ArrayLike | None,
    repeats: int,
    rng: np.random.Generator,
) -> Distance:
    a, b = np.asarray(reference, dtype=np.float64), np.asarray(samples, dtype=np.float64)
    if a.shape != (len(reference_phi),) or b.shape != (len(sample_phi),):
        raise InputError(
            f"The energies have the shapes {a.shape} and {b.shape}; give one for each of the "
            f"{len(reference_phi)} reference frames and {len(sample_phi)} samples."
        )
    return measure("energy W2", energy_w2, a, b, rng, weights=weights, repeats=repeats, unit="kT")
