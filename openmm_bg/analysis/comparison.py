"""What a comparison found: its verdict in words, its tables, and the record for JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from openmm_bg.analysis.diagnosis import jsonable
from openmm_bg.analysis.distances import Distance
from openmm_bg.analysis.formatting import format_value
from openmm_bg.analysis.pairs import EffectiveSize, FreeEnergyPair, PopulationPair
from openmm_bg.analysis.probes import ALPHA, GEOMETRY, POPULATIONS, Contrast
from openmm_bg.analysis.weights import ParetoShape

_ENOUGH = 1000
"""Effective samples from which equality may be claimed: a half-full basin is then known to 2.2 points."""
_LISTED = 4


UNKNOWN = EffectiveSize(math.nan, "")


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
    contrasts : tuple of Contrast
        Everything that was tested, with p-values adjusted for how much that is.
    causes : tuple of str
        What differs by itself, in words.
    consequences : tuple of str
        What differs too, and no longer does once the causes are corrected for.
    free_energies : tuple of FreeEnergyPair
    marginals : tuple of Distance
        Of every bond, angle and torsion.
    reference_size, sample_size : EffectiveSize
    pareto : ParetoShape or None
        Of the weights.
    notes : tuple of str
        What could not be looked at, and why.
    """

    distances: tuple[Distance, ...]
    populations: tuple[PopulationPair, ...]
    reference_frames: int
    sample_frames: int
    sample_kish: float | None
    n: int
    repeats: int
    seed: int
    contrasts: tuple[Contrast, ...] = ()
    causes: tuple[str, ...] = ()
    consequences: tuple[str, ...] = ()
    free_energies: tuple[FreeEnergyPair, ...] = ()
    marginals: tuple[Distance, ...] = ()
    reference_size: EffectiveSize = UNKNOWN
    sample_size: EffectiveSize = UNKNOWN
    pareto: ParetoShape | None = None
    notes: tuple[str, ...] = ()

    @property
    def agrees(self) -> bool:
        """Whether nothing that was tested differs, at a family-wise error of one percent."""
        if not self.contrasts:  # a distance by itself
            return all(d.within_floor for d in self.distances)
        return not any(c.differs for c in self.contrasts)

    @property
    def is_conclusive(self) -> bool:
        """Whether the verdict stands: a difference, or equality with enough samples on both sides."""
        return not self.agrees or not self._short()

    @property
    def verdict(self) -> str:
        """One sentence, or two."""
        unknown = [p.name for p in self.populations if p.agrees is None]
        if not self.agrees:
            causes = self.causes or tuple(d.name for d in self.distances if not d.within_floor)
            text = f"The samples differ from the reference in {_listed(causes, '; ')}."
            if self.consequences:
                text += f" What differs with it and follows from it: {_listed(self.consequences, ', ')}."
        elif short := self._short():
            text = f"Too little to tell: {' and '.join(short)}; {self._nothing()}"
        else:
            text = f"The samples agree with the reference within error: {self._nothing()}"
        if unknown:
            text += f" Not measured, for want of transitions: {', '.join(unknown)}."
        return text

    def _short(self) -> list[str]:
        sides = (("the reference", self.reference_size), ("the samples", self.sample_size))
        return [
            f"{who} {'are' if who.endswith('s') else 'is'} worth {side.size:.0f} independent frames in {side.slowest}"
            for who, side in sides
            if side.size < _ENOUGH
        ]

    def _nothing(self) -> str:
        asked = sum(not math.isnan(c.p_value) for c in self.contrasts)
        text = f"of {asked} properties none differs, at a family-wise error of {100 * ALPHA:.0f} %."
        seen = self.resolution
        if seen is not None and math.isfinite(seen[1]):
            text += f" {seen[0]} would have had to be off by {100 * seen[1]:.1f} points to be noticed."
        return text

    @property
    def resolution(self) -> tuple[str, float] | None:
        """The basin that is known least, and by how much it would have had to differ to be called different."""
        from scipy.stats import norm

        shares = [p for p in self.populations if p.agrees is not None]
        families = {c.family for c in self.contrasts if not math.isnan(c.p_value)}
        asked = sum(c.family == POPULATIONS and not math.isnan(c.p_value) for c in self.contrasts)
        if not shares or not asked:
            return None
        worst = max(shares, key=lambda p: p.error)
        return worst.name, float(norm.isf(ALPHA / (2 * len(families) * asked)) * worst.error)

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, numbers and strings; what was not measured is None."""
        pairs = [
            {
                "residue": p.residue,
                "reference": asdict(p.reference),
                "samples": asdict(p.samples),
                "difference": p.difference,
                "error": p.error,
                "agrees": p.agrees,
            }
            for p in self.populations
        ]
        record = {
            "verdict": self.verdict,
            "agrees": self.agrees,
            "conclusive": self.is_conclusive,
            "causes": list(self.causes),
            "consequences": list(self.consequences),
            "distances": [d.to_dict() for d in self.distances],
            "populations": pairs,
            "free_energies_kT": [pair._asdict() for pair in self.free_energies],
            "tests": [asdict(c) | {"difference": c.difference, "differs": c.differs} for c in self.contrasts],
            "marginals": [d.to_dict() for d in self.marginals],
            "family_wise_error": ALPHA,
            "reference_frames": self.reference_frames,
            "sample_frames": self.sample_frames,
            "reference_effective": self.reference_size._asdict(),
            "sample_effective": self.sample_size._asdict(),
            "sample_kish": self.sample_kish,
            "pareto_k": None if self.pareto is None else self.pareto._asdict(),
            "notes": list(self.notes),
            "n": self.n,
            "repeats": self.repeats,
            "seed": self.seed,
        }
        return jsonable(record)

    def distance_rows(self) -> list[tuple[str, ...]]:
        """Name, value, floor, debiased, n and verdict of each distance, as text."""
        return [_distance_row(d) for d in self.distances]

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

    def free_energy_rows(self) -> list[tuple[str, ...]]:
        """Name and free energies of both sides in kT, as text."""
        return [
            (f.name, format_value(f.reference, f.reference_error), format_value(f.samples, f.sample_error))
            for f in self.free_energies
        ]

    def census_rows(self) -> list[tuple[str, ...]]:
        """Peptide bonds, stereocentres and clashes: name, both shares in per cent, and verdict, as text."""
        named = {p.name for p in self.populations}
        return [
            (c.name, f"{100 * c.reference:.3f}", f"{100 * c.samples:.3f}", _word(c))
            for c in self.contrasts
            if c.family == POPULATIONS and c.name not in named
        ]

    def geometry_rows(self, most: int = 5) -> list[tuple[str, ...]]:
        """The bonds and angles that differ most: name, both means, difference, distance with floor, verdict."""
        distances = {d.name: d for d in self.marginals}
        rows = sorted(
            (c for c in self.contrasts if c.family == GEOMETRY and not math.isnan(c.p_value)), key=lambda c: c.p_value
        )
        return [
            (
                f"{c.name} ({c.unit})",
                format_value(c.reference, c.error, show_error=False),
                format_value(c.difference, c.error),
                *_distance_row(distances[c.name])[1:4],
                _word(c),
            )
            for c in rows[:most]
        ]

    def __str__(self) -> str:
        weights = "" if self.sample_kish is None else f", weighted (Kish size {self.sample_kish:.0f})"
        if self.pareto is not None:
            weights += f", Pareto k {format_value(self.pareto.value, self.pareto.error)}"
        head = f"{self.sample_frames} samples{weights} against {self.reference_frames} reference frames"
        lines = [head]
        for who, side in (("reference", self.reference_size), ("samples", self.sample_size)):
            if not math.isnan(side.size):
                lines.append(f"{who}: worth {side.size:.0f} independent frames in {side.slowest}, which is the slowest")
        for title, header, rows in (
            ("", ("distance", "value", "floor", "debiased", "n", ""), self.distance_rows()),
            ("", ("population, %", "reference", "samples", "difference", ""), self.population_rows()),
            ("", ("free energy, kT", "reference", "samples"), self.free_energy_rows()),
            ("", ("census, % of frames", "reference", "samples", ""), self.census_rows()),
            (
                "the bonds and angles that differ most:",
                ("marginal", "reference", "difference", "W2", "floor", "debiased", ""),
                self.geometry_rows(),
            ),
        ):
            if rows:
                lines += ["", *([title] if title else []), *_table(header, rows)]
        return "\n".join([*lines, "", *self.notes, *([""] if self.notes else []), self.verdict])


def _word(c: Contrast) -> str:
    if c.reference == c.samples == 0:
        return "none"
    return "differs" if c.differs else "agrees" if c.is_measured else "not measured"


def _distance_row(d: Distance) -> tuple[str, ...]:
    return (
        f"{d.name} ({d.unit})" if d.unit else d.name,
        format_value(d.value, d.error),
        format_value(d.floor, d.floor_error),
        format_value(d.debiased, d.error, show_error=False),
        str(d.n),
        "within floor" if d.within_floor else "above floor",
    )


def _listed(names: Sequence[str], between: str) -> str:
    more = len(names) - _LISTED
    return between.join(names[:_LISTED]) + (f"{between}and {more} more" if more > 0 else "")


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in [header, *rows]]
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]
