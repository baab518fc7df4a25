"""Conformations as balls and sticks: a drawing that stands still on paper and turns by hand on a screen.

The drawing is plain SVG. Where scripts run, ``molecule_view.js`` takes the same elements over: every ball carries its
position, every half stick the balls it joins, and the numbers of the projection stand on the ``<svg>`` element.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape
from importlib import resources
from typing import Any

import numpy as np
from numpy.typing import NDArray

from openmm_bg.analysis.figure_data import rows_csv
from openmm_bg.analysis.representatives import Conformation
from openmm_bg.analysis.structure import Structure
from openmm_bg.errors import InputError

# picometres; distances of the eye in units of the molecule's radius
_STICK = 17.0
_EYE = 3.6
_BALL, _HYDROGEN = 0.22, 0.2  # of the van der Waals radius
_TUCKED = 0.85  # sticks begin inside their balls
_KNOWN = ("C", "H", "N", "O", "P", "S")


@dataclass(frozen=True, eq=False)
class MoleculeView:
    """Conformations of one molecule side by side in a report, superposed, to be turned together by hand.

    Parameters
    ----------
    title : str
    topology : openmm.app.Topology or mdtraj.Topology
        With bonds. Water is left out.
    conformations : sequence of Conformation
        As :func:`~openmm_bg.analysis.representatives` finds them.
    caption : str

    Raises
    ------
    InputError
        Where there is no conformation, one does not fit the topology or is not finite, or the topology has no bonds.

    Examples
    --------
    >>> from openmm_bg import systems
    >>> molecule = systems.load("alanine_dipeptide")
    >>> view = MoleculeView("It", molecule.topology, [Conformation("as in its file", molecule.positions)])
    >>> len(view.drawings())
    1
    """

    title: str
    topology: Any
    conformations: Sequence[Conformation]
    caption: str = ""

    def __post_init__(self) -> None:
        if not self.conformations:
            raise InputError(f"The view {self.title!r} has no conformation to show.")
        atoms = self._structure.topology.n_atoms
        for conformation in self.conformations:
            x = np.asarray(conformation.positions)
            if x.shape != (atoms, 3) or not np.isfinite(x).all():
                raise InputError(f"{conformation.name} must hold finite positions (nm) of {atoms} atoms.")

    @cached_property
    def _structure(self) -> Structure:
        return Structure.of(self.topology)

    @cached_property
    def _atoms(self) -> list[Any]:
        return [atom for atom in self._structure.topology.atoms if not atom.residue.is_water]

    @cached_property
    def positions(self) -> NDArray[np.int64]:
        """(conformations, atoms, 3) in whole picometres: superposed on the first, centred, flattest towards the eye."""
        import mdtraj

        kept = [atom.index for atom in self._atoms]
        x = np.stack([np.asarray(c.positions, dtype=np.float64)[kept] for c in self.conformations])
        heavy = [i for i, atom in enumerate(self._atoms) if _symbol(atom) != "H"] or None
        if heavy is not None and len(heavy) > 2:
            trajectory = mdtraj.Trajectory(x, self._structure.topology.subset(kept))
            x = trajectory.superpose(trajectory[0], atom_indices=heavy).xyz.astype(np.float64)
        x -= x.mean(axis=(0, 1))
        axes = np.linalg.svd(x.reshape(-1, 3), full_matrices=False)[2]
        axes *= np.sign(axes[np.arange(3), np.abs(axes).argmax(axis=1)])[:, None]  # of either sense, always the same
        axes[2] *= np.linalg.det(axes)  # a rotation: handedness is not up to us
        return np.rint(1000 * x @ axes.T).astype(np.int64)

    def drawings(self) -> list[str]:
        """An ``<svg>`` element for every conformation, all on one scale."""
        reach = float(np.linalg.norm(self.positions, axis=2).max()) + 1.0
        return [self._draw(number, x, reach) for number, x in enumerate(self.positions)]

    def csv(self) -> str:
        """Atoms of every conformation, as they are drawn."""
        header = ["conformation", "residue", "atom", *(f"{axis} / nm" for axis in "xyz")]
        return rows_csv([
            header,
            *(
                [conformation.name, str(atom.residue), atom.name, *(f"{value / 1000:.3f}" for value in position)]
                for conformation, x in zip(self.conformations, self.positions, strict=True)
                for atom, position in zip(self._atoms, x, strict=True)
            ),
        ])  # fmt: skip

    def _draw(self, number: int, x: NDArray[np.int64], reach: float) -> str:
        eye = _EYE * reach
        scale = eye / (eye - x[:, 2])
        radii = [_radius(atom) for atom in self._atoms]

        def project(point: NDArray[np.float64]) -> NDArray[np.float64]:
            return point[:2] * (1, -1) * eye / (eye - point[2])

        parts: list[tuple[float, str]] = []
        for k, (atom, p, s, r) in enumerate(zip(self._atoms, x, scale, radii, strict=True)):
            left, top = project(p.astype(np.float64))
            parts.append((
                float(p[2]),
                f'<g class="ball {_kind(atom)}" data-atom="{k}" data-at="{p[0]} {p[1]} {p[2]}" '
                f'transform="translate({left:.1f} {top:.1f}) scale({s:.3f})" style="--depth:{_depth(p[2], reach)}">'
                f'<title>{escape(f"{atom.residue} {atom.name}")}</title><circle r="{r}"/>'
                f'<circle r="{r}" fill="url(#shine{number})"/></g>',
            ))  # fmt: skip
        index = {atom.index: k for k, atom in enumerate(self._atoms)}
        for bond in self._structure.bonds:
            ends = [index[atom] for atom in bond.atoms]
            for i, j in (ends, ends[::-1]):
                along = (x[j] - x[i]).astype(np.float64)
                start = x[i] + along * min(0.5, _TUCKED * radii[i] / np.linalg.norm(along))
                (x1, y1), (x2, y2) = project(start), project(x[i] + along / 2)
                z = float(x[i, 2] + along[2] / 4)
                parts.append((
                    z,
                    f'<line class="stick {_kind(self._atoms[i])}" data-ends="{i} {j}" x1="{x1:.1f}" y1="{y1:.1f}" '
                    f'x2="{x2:.1f}" y2="{y2:.1f}" stroke-width="{_STICK * eye / (eye - z):.1f}" '
                    f'style="--depth:{_depth(z, reach)}"/>',
                ))  # fmt: skip
        parts.sort(key=lambda part: part[0])  # what is far is drawn first
        conformation = self.conformations[number]
        # turned about either axis it stays inside: seen from the eye, a sphere is a little larger than its radius
        rise = float(np.linalg.norm(self.positions[..., 1:], axis=2).max()) + 1.0
        across, down = (
            round(eye * radius / (eye**2 - radius**2) ** 0.5 + max(radii) * eye / (eye - reach))
            for radius in (reach, rise)
        )
        label = ", ".join(text for text in (conformation.name, conformation.note) if text)
        return (
            f'<svg role="img" aria-label="{escape(label)}: balls and sticks" '
            f'viewBox="{-across} {-down} {2 * across} {2 * down}" '
            f'data-eye="{eye:.1f}" data-reach="{reach:.1f}" data-stick="{_STICK}" data-tucked="{_TUCKED}">'
            f'<defs><radialGradient id="shine{number}" cx="0.36" cy="0.32" r="0.72">'
            '<stop offset="0" stop-color="#fff" stop-opacity="0.7"/><stop offset="0.5" stop-color="#fff" '
            'stop-opacity="0"/><stop offset="1" stop-color="#000" stop-opacity="0.35"/></radialGradient></defs>'
            f"{''.join(part for _, part in parts)}</svg>"
        )


def script() -> str:
    """The program that turns the drawings of a page."""
    return resources.files("openmm_bg.analysis").joinpath("molecule_view.js").read_text(encoding="utf-8")


def _depth(z: float, reach: float) -> str:
    """0 at the front, 1 at the back."""
    return f"{(reach - z) / (2 * reach):.2f}"


def _symbol(atom: Any) -> str:
    return getattr(atom.element, "symbol", "")


def _kind(atom: Any) -> str:
    return _symbol(atom) if _symbol(atom) in _KNOWN else "other"


def _radius(atom: Any) -> int:
    share = _HYDROGEN if _symbol(atom) == "H" else _BALL
    return round(1000 * share * (getattr(atom.element, "radius", None) or 0.15))
