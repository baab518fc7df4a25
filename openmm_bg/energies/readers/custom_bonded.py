"""Custom forces on fixed groups of particles: bonds, angles, torsions, external fields, compound bonds."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import openmm

from openmm_bg.energies.expression import Node, apply, variables
from openmm_bg.energies.lepton import parse
from openmm_bg.energies.model import Coordinate, NotNative, Terms
from openmm_bg.energies.readers.bonded import ANGLE, DIHEDRAL, DISTANCE
from openmm_bg.energies.readers.registry import Contribution, global_parameters, plain, reader
from openmm_bg.energies.tabulated import read_functions


def _terms(
    force: Any,
    text: str,
    coordinates: Mapping[str, Coordinate],
    particles: list[Any],
    parameters: list[Any],
    names: list[str],
    functions: Mapping[str, Any] | None = None,
) -> Contribution:
    """The terms of a custom force; coordinates its expression does not use are left out."""
    values = global_parameters(force)
    if not particles:
        return Contribution(global_parameters=values)
    node = parse(text, functions)
    used = {name: c for name, c in coordinates.items() if name in variables(node)}
    if not used:  # a constant still counts once per row
        used = dict(list(coordinates.items())[:1])
    columns = np.array(parameters, dtype=np.float64).reshape(len(particles), -1).T
    terms = Terms(
        type(force).__name__,
        np.array(particles, dtype=np.int64).reshape(len(particles), -1),
        used,
        dict(zip(names, columns, strict=True)),
        node,
    )
    return Contribution([terms], global_parameters=values)


def _simple(force: Any, kind: str, width: int, coordinates: Mapping[str, Coordinate]) -> Contribution:
    """CustomBondForce, CustomAngleForce and CustomTorsionForce, whose methods differ by one word."""
    count = getattr(force, f"getNum{kind}s")()
    rows = [plain(getattr(force, f"get{kind}Parameters")(n)) for n in range(count)]
    named = getattr(force, f"getPer{kind}ParameterName")
    names = [named(k) for k in range(getattr(force, f"getNumPer{kind}Parameters")())]
    particles, parameters = [row[:width] for row in rows], [row[width] for row in rows]
    return _terms(force, force.getEnergyFunction(), coordinates, particles, parameters, names)


@reader(openmm.CustomBondForce)
def custom_bonds(force: openmm.CustomBondForce, system: openmm.System) -> Contribution:
    """An expression in the distance r."""
    return _simple(force, "Bond", 2, DISTANCE)


@reader(openmm.CustomAngleForce)
def custom_angles(force: openmm.CustomAngleForce, system: openmm.System) -> Contribution:
    """An expression in the angle theta."""
    return _simple(force, "Angle", 3, ANGLE)


@reader(openmm.CustomTorsionForce)
def custom_torsions(force: openmm.CustomTorsionForce, system: openmm.System) -> Contribution:
    """An expression in the dihedral theta."""
    return _simple(force, "Torsion", 4, DIHEDRAL)


@reader(openmm.CustomExternalForce)
def external(force: openmm.CustomExternalForce, system: openmm.System) -> Contribution:
    """An expression in the coordinates x, y, z of one particle."""
    text = force.getEnergyFunction()
    if re.search(r"\bperiodicdistance\s*\(", text):
        raise NotNative("periodicdistance")
    rows = [force.getParticleParameters(n) for n in range(force.getNumParticles())]
    names = [force.getPerParticleParameterName(k) for k in range(force.getNumPerParticleParameters())]
    coordinates = {axis: Coordinate(axis, (0,)) for axis in ("x", "y", "z")}
    return _terms(force, text, coordinates, [row[:1] for row in rows], [row[1] for row in rows], names)


# A geometric function of particles becomes a variable, which no name in a user's expression can equal.
_GEOMETRIC = re.compile(r"\b(distance|angle|dihedral)\s*\(([^()]*)\)")


@reader(openmm.CustomCompoundBondForce)
def compound_bonds(force: openmm.CustomCompoundBondForce, system: openmm.System) -> Contribution:
    """An expression in the coordinates, distances, angles and dihedrals of a group of particles."""
    width = force.getNumParticlesPerBond()
    coordinates = {f"{axis}{n + 1}": Coordinate(axis, (n,)) for n in range(width) for axis in ("x", "y", "z")}

    def replace(match: re.Match[str]) -> str:
        kind, particles = match[1], [p.strip() for p in match[2].split(",")]
        places = tuple(int(p[1:]) - 1 for p in particles if re.fullmatch(r"p\d+", p))
        count = {"distance": 2, "angle": 3, "dihedral": 4}[kind]
        if len(places) != len(particles) or len(places) != count or not all(0 <= p < width for p in places):
            raise NotNative(f"{match[0]} is not a {kind} of {count} of its particles")
        if len(set(places)) != count:
            raise NotNative(f"{match[0]} names a particle twice")
        name = "@".join((kind, *map(str, places)))
        coordinates[name] = Coordinate(kind, places)  # type: ignore[arg-type]
        return f" {name} "

    text = _GEOMETRIC.sub(replace, force.getEnergyFunction())
    functions = {**read_functions(force), **_POINT_FUNCTIONS}
    rows = [force.getBondParameters(n) for n in range(force.getNumBonds())]
    names = [force.getPerBondParameterName(k) for k in range(force.getNumPerBondParameters())]
    # coordinates first in the table are only a guess of what a constant depends on
    return _terms(force, text, coordinates, [row[0] for row in rows], [row[1] for row in rows], names, functions)


class _PointFunction:
    """A function of points given by coordinates, written out in arithmetic."""

    def __init__(self, points: int) -> None:
        self.dimensions = 3 * points

    def expand(self, *coordinates: Node) -> Node:
        points = [coordinates[k : k + 3] for k in range(0, len(coordinates), 3)]
        if len(points) == 2:
            return apply("sqrt", _dot(*[_minus(*points)] * 2))
        if len(points) == 3:
            a, b = _minus(points[0], points[1]), _minus(points[2], points[1])
            c = _cross(a, b)
            return apply("atan2", apply("sqrt", _dot(c, c)), _dot(a, b))
        b1, b2, b3 = (_minus(points[k + 1], points[k]) for k in range(3))
        c1, c2 = _cross(b1, b2), _cross(b2, b3)
        return apply("atan2", _dot(b1, c2) * apply("sqrt", _dot(b2, b2)), _dot(c1, c2))


_POINT_FUNCTIONS = {
    name: _PointFunction(points) for name, points in (("pointdistance", 2), ("pointangle", 3), ("pointdihedral", 4))
}


def _minus(a: Any, b: Any) -> list[Node]:
    return [p - q for p, q in zip(a, b, strict=True)]


def _dot(a: Any, b: Any) -> Node:
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def _cross(a: Any, b: Any) -> list[Node]:
    return [a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]]
