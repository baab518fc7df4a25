"""What is asked of two ensembles of a molecule."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from openmm_bg.analysis.causes import ENERGY_NAME, STRAIN_NAME
from openmm_bg.analysis.ensemble import Ensemble
from openmm_bg.analysis.free_energy import BASINS, ROTAMERS, rotamer
from openmm_bg.analysis.probes import (
    ENERGY,
    GEOMETRY,
    POPULATIONS,
    TORSIONS,
    Circular,
    Coupling,
    Inside,
    Linear,
    Probe,
    tail,
)
from openmm_bg.analysis.statistics import Array
from openmm_bg.analysis.structure import Structure

_CONSTRAINED = {"nm": 2e-5, "degrees": 2e-4}  # spreads in nm and radians below which a coordinate counts as constant

Groups = list[tuple[str, tuple[str, ...]]]


def questions(structure: Structure, ref: Ensemble, new: Ensemble) -> tuple[list[Probe], Groups]:
    """Every question; and which states belong together, by residue or torsion."""
    probes: list[Probe] = []
    groups: Groups = []

    def states(group: str, names: Sequence[str], inside: Callable[[Ensemble, int], NDArray[np.bool_]]) -> None:
        groups.append((group, tuple(names)))
        for k, name in enumerate(names):
            probes.append(Inside(POPULATIONS, f"{group} {name}", inside(ref, k), inside(new, k)))

    for residue, phi, psi in structure.backbone:
        states(
            residue, [b.name for b in BASINS],
            lambda side, k, i=phi, j=psi: BASINS[k].contains(side.torsions[:, i], side.torsions[:, j]),
        )  # fmt: skip
    for number in structure.rotamers:
        states(
            structure.torsions[number].name, ROTAMERS,
            lambda side, k, i=number: rotamer(side.torsions[:, i]) == k,
        )  # fmt: skip
    peptide = [structure.values(side.positions, structure.peptide_bonds) for side in (ref, new)]
    for k, bond in enumerate(structure.peptide_bonds):
        probes.append(Inside(POPULATIONS, f"{bond.name} cis", *(np.abs(x[:, k]) < np.pi / 2 for x in peptide)))
    hands = [structure.handedness(side.positions) for side in (ref, new)]
    for k, centre in enumerate(structure.centres):
        usual = centre.is_alpha or ref.weights @ hands[0][:, k] > 0.5
        name = f"D-{centre.name.split()[0]}" if centre.is_alpha else f"{centre.name} mirrored"
        probes.append(Inside(POPULATIONS, name, *(x[:, k] != usual for x in hands), fixed=True))
    probes.append(Inside(POPULATIONS, "clashes", structure.clashes(ref.positions), structure.clashes(new.positions)))
    if ref.energies is not None and new.energies is not None:
        probes.append(Linear(ENERGY, ENERGY_NAME, ref.energies, new.energies, "kT"))
        probes.append(tail("highest energies", ref.energies, new.energies, (ref.weights, new.weights)))
    geometry, strain = _geometry(structure, ref, new)
    if geometry:
        probes.append(Linear(ENERGY, STRAIN_NAME, *strain, "of the mean square"))
        probes.append(tail("most strained bonds and angles", *strain, (ref.weights, new.weights)))
    for k, torsion in enumerate(structure.torsions):
        probes.append(Circular(TORSIONS, torsion.name, ref.torsions[:, k], new.torsions[:, k], torsion.fold))
    for residue, *ij in structure.backbone:
        a, b = ((side.torsions[:, ij[0]], side.torsions[:, ij[1]]) for side in (ref, new))
        probes.append(Coupling(TORSIONS, f"{residue} φ with ψ", a, b))
    return probes + geometry, groups


def _geometry(structure: Structure, ref: Ensemble, new: Ensemble) -> tuple[list[Probe], tuple[Array, Array]]:
    """Bonds and angles that are free to move, and the mean square of their deviations in each frame.

    Deviations are from the means of either side, in units of the spread of both: a bond that is longer is no strain,
    harmonic bonds and angles of another temperature are, in proportion to it.
    """
    probes: list[Probe] = []
    strain = np.zeros(len(ref.weights)), np.zeros(len(new.weights))
    for rows, columns, unit, scale in (
        (structure.bonds, (ref.bonds, new.bonds), "nm", 1.0),
        (structure.angles, (ref.angles, new.angles), "degrees", 180 / np.pi),
    ):
        for k, row in enumerate(rows):
            values = [x[:, k] for x in columns]
            deviations = [x - w @ x.astype(np.float64) for x, w in zip(values, (ref.weights, new.weights), strict=True)]
            squares = [float(w @ d**2) for d, w in zip(deviations, (ref.weights, new.weights), strict=True)]
            if max(squares) < _CONSTRAINED[unit] ** 2:
                continue
            probes.append(Linear(GEOMETRY, row.name, values[0], values[1], unit, scale))
            for total, d in zip(strain, deviations, strict=True):
                total += d**2 / (sum(squares) / 2)
    for total in strain:
        total /= max(len(probes), 1)
    return probes, strain
