"""What a reference says: backbone torsions, basins, and populations with errors from independent ladders."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from openmm import app

from openmm_bg.analysis import BASINS, left_handed, statistical_inefficiency

LETTERS = "abl"  # of BASINS: helix, sheet, left
LEAST_POPULATION = 0.005
WIDEST = 4.0  # standard errors between halves


@dataclass(frozen=True)
class Backbone:
    """The backbone torsions of a peptide, by the names of its atoms.

    Attributes
    ----------
    names : tuple of str
        Such as "phi ALA2"; "omega ALA2" is the bond between residues 2 and 3.
    atoms : ndarray (torsions, 4)
    """

    names: tuple[str, ...]
    atoms: np.ndarray

    @classmethod
    def of(cls, topology: app.Topology) -> Backbone:
        residues = [{atom.name: atom.index for atom in residue.atoms()} for residue in topology.residues()]
        labels = [f"{residue.name}{residue.index + 1}" for residue in topology.residues()]
        bonds = {frozenset((a.index, b.index)) for a, b in topology.bonds()}
        found = []
        for i, here in enumerate(residues):
            before = residues[i - 1] if i else {}
            after = residues[i + 1] if i + 1 < len(residues) else {}
            joined = "C" in before and frozenset((before["C"], here.get("N"))) in bonds
            goes_on = "N" in after and frozenset((here.get("C"), after["N"])) in bonds
            if joined and "CA" in here:
                found.append(("phi", labels[i], (before["C"], here["N"], here["CA"], here["C"])))
            if goes_on and "CA" in here:
                found.append(("psi", labels[i], (here["N"], here["CA"], here["C"], after["N"])))
            if goes_on:
                found.append(("omega", labels[i], (_alpha(here), here["C"], after["N"], _alpha(after))))
        return cls(tuple(f"{kind} {label}" for kind, label, _ in found), np.array([atoms for *_, atoms in found]))

    def columns(self, kind: str) -> dict[str, int]:
        """Residue to column of one kind of torsion."""
        return {name.split()[1]: k for k, name in enumerate(self.names) if name.startswith(kind)}


def _alpha(residue: dict[str, int]) -> int:
    """The alpha carbon, or the methyl carbon of a cap (in NME it is called C or CH3)."""
    return next(residue[name] for name in ("CA", "CH3", "C") if name in residue)


def indicators(torsions: np.ndarray, backbone: Backbone, least: float = LEAST_POPULATION) -> dict[str, np.ndarray]:
    """Which frames are where, (ladders, iterations) bool: basins of every residue, of all together, cis bonds.

    Basins of all residues together are named where they hold more than the share ``least`` of the frames.
    """
    phi, psi, omega = (backbone.columns(kind) for kind in ("phi", "psi", "omega"))
    found = {f"{residue} l": left_handed(torsions[..., k]) for residue, k in phi.items() if residue not in psi}
    joint = np.zeros(torsions.shape[:2], dtype=np.int64)
    both = [residue for residue in phi if residue in psi]
    for residue in both:
        inside = [basin.contains(torsions[..., phi[residue]], torsions[..., psi[residue]]) for basin in BASINS]
        found |= {f"{residue} {letter}": x for letter, x in zip(LETTERS, inside, strict=True)}
        joint = joint * len(BASINS) + np.argmax(inside, axis=0)
    if len(both) > 1:
        for code, count in zip(*np.unique(joint, return_counts=True), strict=True):
            if count > least * joint.size:
                digits = (code // len(BASINS) ** k % len(BASINS) for k in reversed(range(len(both))))
                found["joint " + "".join(LETTERS[digit] for digit in digits)] = joint == code
    return found | {f"{residue} cis": np.abs(torsions[..., k]) < np.pi / 2 for residue, k in omega.items()}


def measure(series: np.ndarray) -> dict[str, float]:
    """Mean of a (ladders, iterations) series, its error from the spread of the ladders, and how they agree.

    ``effective_samples`` is the lesser of two estimates: frames over the statistical inefficiency, and the variance of
    a frame over the squared error. ``halves`` is the second half's mean less the first's, in standard errors.
    """
    x = np.asarray(series, dtype=np.float64)
    n = x.shape[1] // 2

    def error(means: np.ndarray) -> float:
        return float(means.std(ddof=1) / np.sqrt(len(means)))

    value, spread = float(x.mean()), error(x.mean(1))
    drift = x[:, -n:].mean(1) - x[:, :n].mean(1)
    sizes = (x.size / statistical_inefficiency(x), x.var() / spread**2) if spread > 0 else (0.0, 0.0)
    return {
        "value": value,
        "error": spread,
        "effective_samples": float(min(sizes)),
        "halves": float(drift.mean() / error(drift)) if error(drift) > 0 else 0.0,
    }


def describe(energy: np.ndarray, torsions: np.ndarray, backbone: Backbone) -> dict:
    """Populations, mean energy and the comparison of halves, of (ladders, iterations) series."""
    populations = {name: measure(x) for name, x in indicators(torsions, backbone).items()}
    mean = measure(energy)
    halves = max(abs(m["halves"]) for m in (mean, *populations.values()))
    return {
        "populations": populations,
        "mean_energy": mean,
        "recorded": int(energy.size),
        "largest_difference_of_halves": halves,
        "halves_agree": halves < WIDEST,
    }


def effective_samples(found: dict) -> float:
    """Of the slowest basin; cis bonds, which may be too rare to be seen at all, are left out."""
    populations = found.get("populations", {}).items()
    return min((m["effective_samples"] for name, m in populations if not name.endswith("cis")), default=0.0)


def slowest(found: dict) -> str:
    """A line of progress: the two basins and the cis bond with the fewest effective samples."""
    ranked = sorted(found["populations"].items(), key=lambda item: item[1]["effective_samples"])
    cis = [item for item in ranked if item[0].endswith("cis")]
    basins = [item for item in ranked if item not in cis]
    said = ", ".join(
        f"{name} {100 * m['value']:.3f} ± {100 * m['error']:.3f} % ({m['effective_samples']:.3g} effective)"
        for name, m in basins[:2] + cis[:1]
    )
    return f"{said}; halves within {found['largest_difference_of_halves']:.1f} sigma"
