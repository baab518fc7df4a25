"""Bonds, angles, torsions and torsion maps."""

from __future__ import annotations

import numpy as np
import openmm

from openmm_bg.energies import expression
from openmm_bg.energies.lepton import parse
from openmm_bg.energies.model import Coordinate, Terms
from openmm_bg.energies.readers.registry import Contribution, plain, reader
from openmm_bg.energies.tabulated import Maps

DISTANCE = {"r": Coordinate("distance", (0, 1))}
ANGLE = {"theta": Coordinate("angle", (0, 1, 2))}
DIHEDRAL = {"theta": Coordinate("dihedral", (0, 1, 2, 3))}


def rows_to_terms(
    label: str, rows: list[list], coordinates: dict[str, Coordinate], names: tuple[str, ...], text: str
) -> Contribution:
    """One `Terms` from rows of particles and parameters, none from no rows."""
    if not rows:
        return Contribution()
    width = max(place for c in coordinates.values() for place in c.particles) + 1
    particles = np.array([row[:width] for row in rows], dtype=np.int64)
    columns = np.array([row[width:] for row in rows], dtype=np.float64).T
    return Contribution([Terms(label, particles, coordinates, dict(zip(names, columns, strict=True)), parse(text))])


@reader(openmm.HarmonicBondForce)
def harmonic_bonds(force: openmm.HarmonicBondForce, system: openmm.System) -> Contribution:
    """1/2 k (r - r0)^2."""
    rows = [plain(force.getBondParameters(n)) for n in range(force.getNumBonds())]
    return rows_to_terms("HarmonicBondForce", rows, DISTANCE, ("r0", "k"), "0.5*k*(r-r0)^2")


@reader(openmm.HarmonicAngleForce)
def harmonic_angles(force: openmm.HarmonicAngleForce, system: openmm.System) -> Contribution:
    """1/2 k (theta - theta0)^2."""
    rows = [plain(force.getAngleParameters(n)) for n in range(force.getNumAngles())]
    return rows_to_terms("HarmonicAngleForce", rows, ANGLE, ("theta0", "k"), "0.5*k*(theta-theta0)^2")


@reader(openmm.PeriodicTorsionForce)
def periodic_torsions(force: openmm.PeriodicTorsionForce, system: openmm.System) -> Contribution:
    """k (1 + cos(n theta - theta0))."""
    rows = [plain(force.getTorsionParameters(n)) for n in range(force.getNumTorsions())]
    names = ("n", "theta0", "k")
    return rows_to_terms("PeriodicTorsionForce", rows, DIHEDRAL, names, "k*(1+cos(n*theta-theta0))")


@reader(openmm.RBTorsionForce)
def ryckaert_bellemans(force: openmm.RBTorsionForce, system: openmm.System) -> Contribution:
    """sum_n c_n cos(theta - pi)^n, by Horner's rule; cos(theta - pi) = -cos(theta)."""
    rows = [plain(force.getTorsionParameters(n)) for n in range(force.getNumTorsions())]
    text = "c0+p*(c1+p*(c2+p*(c3+p*(c4+p*c5)))); p=-cos(theta)"
    return rows_to_terms("RBTorsionForce", rows, DIHEDRAL, tuple(f"c{n}" for n in range(6)), text)


@reader(openmm.CMAPTorsionForce)
def torsion_maps(force: openmm.CMAPTorsionForce, system: openmm.System) -> Contribution:
    """A bicubic function of two dihedrals, from a table per map."""
    maps = [force.getMapParameters(n) for n in range(force.getNumMaps())]
    rows = [force.getTorsionParameters(n) for n in range(force.getNumTorsions())]
    a, b = expression.variable("a"), expression.variable("b")
    coordinates = {"a": Coordinate("dihedral", (0, 1, 2, 3)), "b": Coordinate("dihedral", (4, 5, 6, 7))}
    terms = []
    for size in sorted({maps[row[0]][0] for row in rows}):
        same = [row for row in rows if maps[row[0]][0] == size]
        used = sorted({row[0] for row in same})
        table = Maps(np.array([plain([maps[number][1]])[0] for number in used]), size)
        energy = expression.table(table, expression.variable("map"), a, b)
        particles = np.array([row[1:] for row in same], dtype=np.int64)
        parameters = {"map": np.array([float(used.index(row[0])) for row in same])}
        terms.append(Terms("CMAPTorsionForce", particles, coordinates, parameters, energy))
    return Contribution(terms)
