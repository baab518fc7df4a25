"""Molecular energies without singularities: every pair continued by a parabola inside its own radius."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import openmm

from openmm_bg import units
from openmm_bg.energies.readers import born
from openmm_bg.energies.readers.nonbonded import COULOMB
from openmm_bg.energies.readers.registry import plain
from openmm_bg.errors import InputError

DEFAULT_THRESHOLD = 100.0
"""In kT: what `softcore.xml` takes when createSystem is not told otherwise."""

GUARD = 0.02
"""nm; below, implicit solvents see (r^2 + GUARD^2) / (2 GUARD) for r, as OpenMM's formula is 0/0 at r = 0."""

PAIR_ENERGY = "select(step(r-rc), qq/r+4*epsilon*(s6*s6-s6), uc+slope*(r^2-rc^2)); s6=(sigma/r)^6"


@dataclass
class Softened:
    """A System whose pairs are finite everywhere.

    Attributes
    ----------
    system : openmm.System
    threshold : float
        kJ/mol: below it the energy is that of the original System, away from exempt pairs.
    depth : float
        kJ/mol: how far all other terms together can pull the energy down, at most.
    pairs : ndarray
        ``(pairs, 2)``: the interacting pairs.
    radii : ndarray
        ``(pairs,)`` nm: inside, a pair is continued.
    exempt_pairs : list of tuple
        Pairs of opposite charges without Lennard-Jones repulsion. Their true energy has no lower bound; they are
        capped at `exempt_radius`, where the original energy is changed however low it is.
    """

    system: openmm.System
    threshold: float
    depth: float
    pairs: np.ndarray
    radii: np.ndarray
    exempt_pairs: list[tuple[int, int]]


def soften(
    system: openmm.System,
    temperature: Any,
    threshold: float,
    *,
    offset: float = 0.0,
    other_depth: float | None = None,
    exempt_radius: float = 0.05,
) -> Softened:
    """The regularised energy of Theorem 1 (Rehman & Friesecke), pair by pair, as an OpenMM System.

    Inside the radius r_c where a pair alone costs more than the threshold and the depth of everything else together,
    its energy u is continued by u(r_c) + u'(r_c) (r^2 - r_c^2) / (2 r_c): continuously differentiable, finite at
    r = 0. Wherever the total energy is below the threshold no pair is that close, and nothing has changed.

    The NonbondedForce becomes a CustomBondForce over the same pairs and exceptions, and an implicit solvent a
    CustomGBForce that is finite at r = 0. Collinear dihedrals keep what they have. In OpenMM itself the forces (not the
    energy) of two atoms at exactly the same place are NaN: start dynamics from anything but that.

    Parameters
    ----------
    system
        Not changed. Its NonbondedForce must be without cutoff.
    temperature
        Quantity, or a number in K.
    threshold
        1/eps in kT, counted from `offset`; infinity continues nothing and gives the same System uncapped.
    offset
        Reduced energy from which the threshold counts, such as that of a minimised conformation.
    other_depth
        kJ/mol: a bound on how far forces may go below zero that are not known here (custom forces, and implicit
        solvents other than GBSAOBCForce).
    exempt_radius
        nm; see `Softened.exempt_pairs`.

    Raises
    ------
    InputError
        If the System has a cutoff, no or several NonbondedForces, or forces of unknown depth.

    Examples
    --------
    >>> import openmm_bg as bg
    >>> molecule = bg.systems.load("alanine_dipeptide")
    >>> soft = soften(molecule.system, 300, threshold=100)
    >>> float(soft.radii.max()) < 0.2
    True
    """
    if not threshold > 0:
        raise InputError(f"threshold must be a positive number of kT, not {threshold!r}.")
    if not (math.isfinite(exempt_radius) and exempt_radius > 0):
        raise InputError(f"exempt_radius must be a positive length in nm, not {exempt_radius!r}.")
    kT = units.thermal_energy(units.kelvin(temperature))
    new = copy.deepcopy(system)
    forces = [force for force in new.getForces() if isinstance(force, openmm.NonbondedForce)]
    if len(forces) != 1:
        raise InputError(f"A System with one NonbondedForce is needed; this one has {len(forces)}.")
    (force,) = forces
    if force.getNonbondedMethod() != openmm.NonbondedForce.NoCutoff:
        raise InputError(
            "The per-pair regularisation needs a NonbondedForce without cutoff (nonbondedMethod=NoCutoff)."
        )
    if force.getNumParticleParameterOffsets() or force.getNumExceptionParameterOffsets():
        raise InputError("The per-pair regularisation does not cover parameter offsets of a NonbondedForce.")

    pairs, qq, sigma, epsilon = _interactions(force)
    bare = epsilon == 0
    exempt = bare & (qq < 0)
    lowest, place = _minima(qq, sigma, epsilon)
    lowest[exempt] = qq[exempt] / exempt_radius
    depth = float(-lowest.sum()) + _depth_of_others(new, other_depth)
    limit = (offset + threshold) * kT
    target = limit + depth
    radius = np.zeros(len(pairs))
    if math.isfinite(threshold):
        radius[~exempt] = _radii(qq[~exempt], sigma[~exempt], epsilon[~exempt], place[~exempt], target)
        radius[exempt] = exempt_radius
    _replace(new, force, pairs, qq, sigma, epsilon, radius)
    _guard_solvent(new)
    listed = [(int(i), int(j)) for i, j in pairs[exempt]]
    return Softened(new, limit, depth, pairs, radius, listed)


def soften_created(system: openmm.System, arguments: Any) -> None:
    """What the Script of `softcore.xml` calls: the same, in place, on a System that ForceField has just made.

    `createSystem` takes ``softcoreThreshold`` (kT, 100 by default), ``softcoreTemperature`` (300 K) and
    ``softcoreOtherDepth`` (kJ/mol).
    """

    def given(name: str, default: Any) -> Any:
        return arguments[name] if name in arguments else default

    threshold = float(given("softcoreThreshold", DEFAULT_THRESHOLD))
    temperature, other = given("softcoreTemperature", 300.0), given("softcoreOtherDepth", None)
    soft = soften(system, temperature, threshold, other_depth=other)
    for index in reversed(range(system.getNumForces())):
        system.removeForce(index)
    for force in soft.system.getForces():
        system.addForce(copy.deepcopy(force))


def pair_energy(r: np.ndarray, qq: np.ndarray, sigma: np.ndarray, epsilon: np.ndarray) -> np.ndarray:
    """Coulomb and Lennard-Jones in kJ/mol; qq includes Coulomb's constant."""
    s6 = (sigma / r) ** 6
    return qq / r + 4 * epsilon * (s6 * s6 - s6)


def _slope(r: np.ndarray, qq: np.ndarray, sigma: np.ndarray, epsilon: np.ndarray) -> np.ndarray:
    s6 = (sigma / r) ** 6
    return -qq / r**2 - 24 * epsilon * (2 * s6 * s6 - s6) / r


def _interactions(force: openmm.NonbondedForce) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Pairs that interact, with charge product, sigma and epsilon."""
    count = force.getNumParticles()
    q, s, e = np.array([plain(force.getParticleParameters(i)) for i in range(count)]).reshape(-1, 3).T
    i, j = np.triu_indices(count, 1)
    table = {
        (a, b): row
        for a, b, *row in zip(
            i.tolist(), j.tolist(), COULOMB * q[i] * q[j], (s[i] + s[j]) / 2, np.sqrt(e[i] * e[j]), strict=True
        )
    }
    for n in range(force.getNumExceptions()):
        a, b, charge, width, well = plain(force.getExceptionParameters(n))
        table[min(a, b), max(a, b)] = [COULOMB * charge, width, well]
    kept = {pair: row for pair, row in table.items() if row[0] != 0 or row[2] != 0}
    qq, sigma, epsilon = np.array(list(kept.values()), dtype=np.float64).reshape(-1, 3).T
    pairs = np.array(list(kept), dtype=np.int64).reshape(-1, 2)
    return pairs, qq, np.where(epsilon != 0, sigma, 0.0), epsilon


def _minima(qq: np.ndarray, sigma: np.ndarray, epsilon: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The lowest energy of each pair, at most 0, and the end of its repulsive branch.

    That is where the slope first vanishes: u' r^13 is a quadratic in r^6 and qq r^11, increasing through its root.
    """
    lowest, place = np.zeros(len(qq)), np.full(len(qq), np.inf)
    for n in np.flatnonzero(epsilon):
        low, high = 1e-3 * sigma[n], 10 * sigma[n]
        pair = (qq[n], sigma[n], epsilon[n])
        if qq[n] > 0:  # charge may turn the well into a shoulder: the branch ends where the slope does, or never
            grid = np.geomspace(0.5 * sigma[n], 10 * sigma[n], 400)
            rising = np.flatnonzero(_slope(grid, *pair) > 0)
            if not len(rising):
                continue
            low, high = grid[max(rising[0] - 1, 0)], grid[rising[0]]
        else:
            while _slope(high, *pair) <= 0:
                high *= 2
        for _ in range(200):
            middle = math.sqrt(low * high)
            low, high = (middle, high) if _slope(middle, *pair) < 0 else (low, middle)
        place[n] = low
        lowest[n] = min(0.0, float(pair_energy(low, *pair)))
    return lowest, place


def _radii(qq: np.ndarray, sigma: np.ndarray, epsilon: np.ndarray, place: np.ndarray, target: float) -> np.ndarray:
    """Where each pair alone reaches the target on its repulsive branch."""
    if target <= 0:
        raise InputError("The threshold lies below every energy; raise threshold or offset.")
    high = np.where(np.isfinite(place), place, np.maximum(10 * sigma, 2 * np.abs(qq) / target) + 1e-3)
    low = high.copy()
    for _ in range(200):
        with np.errstate(over="ignore"):
            short = pair_energy(low, qq, sigma, epsilon) < target
        if not short.any():
            break
        low = np.where(short, low / 1.5, low)
    for _ in range(200):
        middle = np.sqrt(low * high)
        above = pair_energy(middle, qq, sigma, epsilon) >= target
        low, high = np.where(above, middle, low), np.where(above, high, middle)
    return low


def _depth_of_others(system: openmm.System, other_depth: float | None) -> float:
    """How far below zero everything but the pairs can go, in kJ/mol."""
    depth = 0.0
    unknown = []
    for force in system.getForces():
        match force:
            case openmm.NonbondedForce() | openmm.HarmonicBondForce() | openmm.HarmonicAngleForce():
                pass
            case openmm.CMMotionRemover() | openmm.AndersenThermostat():
                pass
            case openmm.PeriodicTorsionForce():
                stiffness = [plain(force.getTorsionParameters(n))[6] for n in range(force.getNumTorsions())]
                depth += sum(max(0.0, -2 * k) for k in stiffness)
            case openmm.RBTorsionForce():
                rows = [plain(force.getTorsionParameters(n))[4:] for n in range(force.getNumTorsions())]
                depth += sum(sum(map(abs, row[1:])) - row[0] for row in rows)
            case openmm.GBSAOBCForce():
                depth += _born_depth(force)
            case _:
                unknown.append(type(force).__name__)
    if unknown and other_depth is None:
        raise InputError(
            f"How far {', '.join(unknown)} can lower the energy is not known; give a bound as other_depth, in kJ/mol."
        )
    return depth + (other_depth or 0.0)


def _born_depth(force: openmm.GBSAOBCForce) -> float:
    """Born radii are never below the offset radii, and 1/f_GB never above 1/sqrt(B_i B_j)."""
    table = np.array([plain(force.getParticleParameters(i)) for i in range(force.getNumParticles())]).reshape(-1, 3)
    charge, offset = table[:, 0], table[:, 1] - born.DIELECTRIC_OFFSET
    screening = COULOMB * (1 / force.getSoluteDielectric() - 1 / force.getSolventDielectric())
    scaled = np.sqrt(np.abs(screening)) * charge / np.sqrt(offset)
    products = np.outer(scaled, scaled)
    return float(0.5 * np.trace(products) + np.triu(np.maximum(products, 0), 1).sum())


def _replace(
    system: openmm.System,
    force: openmm.NonbondedForce,
    pairs: np.ndarray,
    qq: np.ndarray,
    sigma: np.ndarray,
    epsilon: np.ndarray,
    radius: np.ndarray,
) -> None:
    """The CustomBondForce in place of the NonbondedForce."""
    bonds = openmm.CustomBondForce(PAIR_ENERGY)
    bonds.setName("SoftcoreNonbondedForce")
    bonds.setForceGroup(force.getForceGroup())
    for name in ("rc", "qq", "epsilon", "uc", "slope", "sigma"):
        bonds.addPerBondParameter(name)
    capped = radius > 0
    safe = np.where(capped, radius, 1.0)
    at_radius = np.where(capped, pair_energy(safe, qq, sigma, epsilon), 0.0)
    slope = np.where(capped, _slope(safe, qq, sigma, epsilon) / (2 * safe), 0.0)
    for (i, j), *row in zip(pairs.tolist(), radius, qq, epsilon, at_radius, slope, sigma, strict=True):
        bonds.addBond(i, j, [float(value) for value in row])
    (index,) = [n for n, f in enumerate(system.getForces()) if isinstance(f, openmm.NonbondedForce)]
    system.removeForce(index)
    system.addForce(bonds)


_GUARDED = f"; r=select(step(r-{GUARD!r}), r, (r*r+{GUARD * GUARD!r})/{2 * GUARD!r})"


def _guard_solvent(system: openmm.System) -> None:
    """Implicit solvents with a distance that never vanishes."""
    for index in reversed(range(system.getNumForces())):
        force = system.getForce(index)
        if isinstance(force, openmm.CustomGBForce):
            for n in range(force.getNumComputedValues()):
                name, text, kind = force.getComputedValueParameters(n)
                if kind != force.SingleParticle:
                    force.setComputedValueParameters(n, name, text + _GUARDED, kind)
            for n in range(force.getNumEnergyTerms()):
                text, kind = force.getEnergyTermParameters(n)
                if kind != force.SingleParticle:
                    force.setEnergyTermParameters(n, text + _GUARDED, kind)
        elif isinstance(force, openmm.GBSAOBCForce):
            if force.getNonbondedMethod() != openmm.GBSAOBCForce.NoCutoff:
                raise InputError("The per-pair regularisation needs a GBSAOBCForce without cutoff.")
            system.addForce(_as_custom(force))
            system.removeForce(index)


def _as_custom(force: openmm.GBSAOBCForce) -> openmm.CustomGBForce:
    """The same model as a CustomGBForce, with the guarded distance."""
    custom = openmm.CustomGBForce()
    custom.setName("SoftcoreGBSAOBCForce")
    custom.setForceGroup(force.getForceGroup())
    for name in ("charge", "radius", "offset", "scaled"):
        custom.addPerParticleParameter(name)
    single, paired = born.energy_texts(force)
    custom.addComputedValue("I", born.INTEGRAL + _GUARDED, custom.ParticlePairNoExclusions)
    custom.addComputedValue("B", born.BORN_RADIUS, custom.SingleParticle)
    for text in single:
        custom.addEnergyTerm(text, custom.SingleParticle)
    custom.addEnergyTerm(paired + _GUARDED, custom.ParticlePairNoExclusions)
    for i in range(force.getNumParticles()):
        charge, radius, scale = plain(force.getParticleParameters(i))
        offset = radius - born.DIELECTRIC_OFFSET
        custom.addParticle([charge, radius, offset, offset * scale])
    return custom
