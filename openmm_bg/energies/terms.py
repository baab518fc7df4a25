"""The force classes that torch evaluates itself: for each, a reader of the OpenMM force and the formula.

A reader turns one force into tables (or says why it cannot); the formula turns a `Geometry` and those tables
into energies, ``(batch,)`` in kJ/mol. Tables hold one row per term, so they broadcast against (rows, batch);
integer tables are rows of the geometry. `native_term` looks a force up; whatever is not here is evaluated by
OpenMM itself.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import openmm
import torch
from openmm import unit
from torch import Tensor

from openmm_bg.energies.geometry import Catalogue, Geometry, take

COULOMB = 138.93545764438198
"""Coulomb's constant, kJ nm / (mol e^2)."""

PROBE_RADIUS = 0.14
"""Of the surface-area term of GBSAOBCForce, nm."""

DIELECTRIC_OFFSET = 0.009
"""What GBSAOBCForce takes off every radius, nm."""

Tables: TypeAlias = dict[str, np.ndarray]
Reader: TypeAlias = Callable[[openmm.Force, Catalogue], Tables]
Formula: TypeAlias = Callable[..., Tensor]


class NotNative(Exception):
    """This force has a feature that the formula does not cover; the message names it."""


_REGISTRY: dict[type[openmm.Force], tuple[Reader, Formula]] = {}


def native(force_class: type[openmm.Force], reader: Reader) -> Callable[[Formula], Formula]:
    """Register a formula and its reader for a force class."""

    def register(formula: Formula) -> Formula:
        _REGISTRY[force_class] = (reader, formula)
        return formula

    return register


def native_term(force: openmm.Force, catalogue: Catalogue) -> tuple[Formula, Tables]:
    """The formula and tables of a force.

    Raises
    ------
    NotNative
        If there is no formula for this force.
    """
    if type(force) not in _REGISTRY:
        raise NotNative("no torch formula")
    if force.usesPeriodicBoundaryConditions():
        raise NotNative("periodic")
    reader, formula = _REGISTRY[type(force)]
    return formula, reader(force, catalogue)


def contributes_nothing(force: openmm.Force) -> bool:
    """Whether a force only changes the dynamics: thermostats, barostats, removal of the overall motion."""
    dynamics_only = ("CMMotionRemover", "AndersenThermostat")
    name = type(force).__name__
    return name in dynamics_only or name.endswith("Barostat")


def _column(values: list[float] | np.ndarray) -> np.ndarray:
    return np.array(values, dtype=np.float64).reshape(-1, 1)


def _read_bonds(force: openmm.HarmonicBondForce, catalogue: Catalogue) -> Tables:
    bonds = [_plain(force.getBondParameters(n)) for n in range(force.getNumBonds())]
    return {
        "bond": catalogue.pairs([(i, j) for i, j, _, _ in bonds]),
        "length": _column([length for *_, length, _ in bonds]),
        "stiffness": _column([k for *_, k in bonds]),
    }


@native(openmm.HarmonicBondForce, _read_bonds)
def harmonic_bond(g: Geometry, bond: Tensor, length: Tensor, stiffness: Tensor) -> Tensor:
    """1/2 k (r - r0)^2; `length` nm and `stiffness` kJ/mol/nm^2, both ``(bonds, 1)``."""
    return (0.5 * stiffness * (take(g.distance, bond) - length) ** 2).sum(0)


def _read_angles(force: openmm.HarmonicAngleForce, catalogue: Catalogue) -> Tables:
    angles = [_plain(force.getAngleParameters(n)) for n in range(force.getNumAngles())]
    return {
        "angle": catalogue.angles([(i, j, k) for i, j, k, _, _ in angles]),
        "equilibrium": _column([theta for *_, theta, _ in angles]),
        "stiffness": _column([k for *_, k in angles]),
    }


@native(openmm.HarmonicAngleForce, _read_angles)
def harmonic_angle(g: Geometry, angle: Tensor, equilibrium: Tensor, stiffness: Tensor) -> Tensor:
    """1/2 k (theta - theta0)^2; `equilibrium` rad and `stiffness` kJ/mol/rad^2, both ``(angles, 1)``."""
    return (0.5 * stiffness * (take(g.angle, angle) - equilibrium) ** 2).sum(0)


def _read_torsions(force: openmm.PeriodicTorsionForce, catalogue: Catalogue) -> Tables:
    torsions = [_plain(force.getTorsionParameters(n)) for n in range(force.getNumTorsions())]
    rows = catalogue.torsions([(i, j, k, m) for i, j, k, m, *_ in torsions])
    torsion, inverse = np.unique(rows, return_inverse=True)
    harmonics = max((n for *_, n, _, _ in torsions), default=0)
    if any(n < 1 for *_, n, _, _ in torsions):
        raise NotNative("a periodicity below 1")
    cosine, sine = np.zeros((2, harmonics + 1, len(torsion), 1))
    for row, (*_, n, phase, k) in zip(inverse, torsions, strict=True):
        # k (1 + cos(n phi - phase)), the cosine expanded
        cosine[0, row] += k
        cosine[n, row] += k * math.cos(phase)
        sine[n, row] += k * math.sin(phase)
    return {"torsion": torsion, "cosine": cosine, "sine": sine}


@native(openmm.PeriodicTorsionForce, _read_torsions)
def periodic_torsion(g: Geometry, torsion: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """sum_n [a_n cos(n phi) + b_n sin(n phi)]: the periodic terms of a dihedral as one Fourier series.

    `cosine` and `sine` in kJ/mol, ``(harmonics + 1, torsions, 1)``.
    """
    c, s = take(g.cos_torsion, torsion), take(g.sin_torsion, torsion)
    cos_n, sin_n = torch.ones_like(c), torch.zeros_like(s)
    energy = cosine[0] * cos_n
    for a, b in zip(cosine[1:], sine[1:], strict=True):
        cos_n, sin_n = cos_n * c - sin_n * s, sin_n * c + cos_n * s
        energy = energy + a * cos_n + b * sin_n
    return energy.sum(0)


def _read_nonbonded(force: openmm.NonbondedForce, catalogue: Catalogue) -> Tables:
    if force.getNonbondedMethod() != openmm.NonbondedForce.NoCutoff:
        raise NotNative("a cutoff or Ewald summation")
    if force.getNumParticleParameterOffsets() or force.getNumExceptionParameterOffsets():
        raise NotNative("parameter offsets")
    particles = [_plain(force.getParticleParameters(i)) for i in range(force.getNumParticles())]
    interactions = {}
    for (i, (qi, si, ei)), (j, (qj, sj, ej)) in itertools.combinations(enumerate(particles), 2):
        interactions[i, j] = (qi * qj, (si + sj) / 2, math.sqrt(ei * ej))
    for n in range(force.getNumExceptions()):
        i, j, charge_product, sigma, epsilon = _plain(force.getExceptionParameters(n))
        interactions[min(i, j), max(i, j)] = (charge_product, sigma, epsilon)
    interactions = {pair: p for pair, p in interactions.items() if p[0] != 0 or p[2] != 0}
    return {
        "pair": catalogue.pairs(list(interactions)),
        "charge_product": _column([COULOMB * qq for qq, _, _ in interactions.values()]),
        # without a well sigma does nothing, and sigma = 0 keeps 0 * inf out of close contacts
        "sigma": _column([sigma if epsilon else 0.0 for _, sigma, epsilon in interactions.values()]),
        "epsilon": _column([epsilon for *_, epsilon in interactions.values()]),
    }


@native(openmm.NonbondedForce, _read_nonbonded)
def nonbonded(g: Geometry, pair: Tensor, charge_product: Tensor, sigma: Tensor, epsilon: Tensor) -> Tensor:
    """K q_i q_j / r + 4 epsilon [(sigma/r)^12 - (sigma/r)^6], exceptions in place of their pairs, no cutoff.

    `charge_product` kJ nm/mol (Coulomb's constant included), `sigma` nm, `epsilon` kJ/mol: ``(pairs, 1)``.
    """
    inverse = take(g.inverse_distance, pair)
    sixth = (sigma * inverse) ** 2
    sixth = sixth * sixth * sixth
    return (charge_product * inverse + 4 * epsilon * sixth * (sixth - 1)).sum(0)


def _read_born(force: openmm.GBSAOBCForce, catalogue: Catalogue) -> Tables:
    if force.getNonbondedMethod() != openmm.GBSAOBCForce.NoCutoff:
        raise NotNative("a cutoff")
    particles = [_plain(force.getParticleParameters(i)) for i in range(force.getNumParticles())]
    charge, radius, scale = np.array(particles, dtype=np.float64).reshape(-1, 3).T
    atoms = range(len(particles))
    pair = catalogue.pairs(list(itertools.combinations(atoms, 2)))
    # row i of `ordered`: the distances from atom i to every other atom
    others = np.array([[j for j in atoms if j != i] for i in atoms], dtype=np.int64).reshape(len(atoms), -1)
    first, second = np.triu_indices(len(atoms), 1)
    of_pair = np.zeros((len(atoms), len(atoms)), dtype=np.int64)
    of_pair[first, second] = of_pair[second, first] = pair
    offset_radius = radius - DIELECTRIC_OFFSET
    screening = COULOMB * (1 / force.getSoluteDielectric() - 1 / force.getSolventDielectric())
    surface = force.getSurfaceAreaEnergy().value_in_unit(unit.kilojoule_per_mole / unit.nanometer**2)
    return {
        "pair": pair,
        "first": first,
        "second": second,
        "ordered": np.take_along_axis(of_pair, others, 1),
        "radius": _column(radius),
        "neighbor_radius": (offset_radius * scale)[others][:, :, None],
        "charge_product": _column(-screening * charge[first] * charge[second]),
        "self_energy": _column(-0.5 * screening * charge**2),
        "surface_energy": _column(4 * math.pi * surface * (radius + PROBE_RADIUS) ** 2),
    }


@native(openmm.GBSAOBCForce, _read_born)
def born_obc(
    g: Geometry,
    pair: Tensor,
    first: Tensor,
    second: Tensor,
    ordered: Tensor,
    radius: Tensor,
    neighbor_radius: Tensor,
    charge_product: Tensor,
    self_energy: Tensor,
    surface_energy: Tensor,
) -> Tensor:
    """Generalised Born energy, OBC2 (Onufriev, Bashford and Case, Proteins 55, 383 (2004)), and surface term.

    ``(pairs, 1)``: `charge_product` kJ nm/mol. ``(atoms, 1)``: `radius` nm, `self_energy` kJ nm/mol,
    `surface_energy` kJ/mol. `neighbor_radius` ``(atoms, atoms - 1, 1)`` nm: the scaled offset radii of the
    neighbours in `ordered`.
    """
    inverse_born = _inverse_born_radii(g, ordered, radius, neighbor_radius)
    born = 1 / inverse_born
    product = take(born, first) * take(born, second)
    square = take(g.distance, pair) ** 2
    polar = charge_product * torch.rsqrt(square + product * torch.exp(-0.25 * square / product))
    surface = surface_energy * (radius * inverse_born) ** 6
    return polar.sum(0) + (self_energy * inverse_born + surface).sum(0)


def _inverse_born_radii(g: Geometry, ordered: Tensor, radius: Tensor, neighbor_radius: Tensor) -> Tensor:
    """1/B in 1/nm, ``(atoms, batch)``: every neighbour within reach takes its share off 1/radius."""
    shape = (*ordered.shape, -1)
    r = take(g.distance, ordered.flatten()).view(shape)
    inverse_r = take(g.inverse_distance, ordered.flatten()).view(shape)
    own, s = (radius - DIELECTRIC_OFFSET)[:, :, None], neighbor_radius

    lower = 1 / torch.maximum(own, (r - s).abs())
    upper = 1 / (r + s)
    integral = lower - upper + 0.25 * (r - s * s * inverse_r) * (upper**2 - lower**2)
    integral = integral + 0.5 * torch.log(upper / lower) * inverse_r
    engulfed = s - r > own
    integral = integral + torch.where(engulfed, 2 * (1 / own - lower), 0.0)
    integral = 0.5 * torch.where(r + s > own, integral, 0.0).sum(1)

    own = own[:, :, 0]
    psi = integral * own
    return 1 / own - torch.tanh(psi * (1 + psi * (-0.8 + 4.85 * psi))) / radius


def _plain(parameters: list) -> list:
    """Quantities as numbers in OpenMM's own units."""
    return [p.value_in_unit_system(unit.md_unit_system) if unit.is_quantity(p) else p for p in parameters]
