"""Coulomb and Lennard-Jones: NonbondedForce without periodicity."""

from __future__ import annotations

import itertools

import numpy as np
import openmm
from openmm import unit

from openmm_bg.energies.lepton import parse
from openmm_bg.energies.model import Coordinate, NotNative, Terms
from openmm_bg.energies.readers.registry import Contribution, global_parameters, plain, reader

COULOMB = 138.93545764438198
"""Coulomb's constant, kJ nm / (mol e^2)."""

_DISTANCE = {"r": Coordinate("distance", (0, 1))}
_LENNARD_JONES = "4*epsilon*(s6*s6-s6); s6=(sigma/r)^6"


@reader(openmm.NonbondedForce)
def nonbonded(force: openmm.NonbondedForce, system: openmm.System) -> Contribution:
    """qq/r + 4 epsilon [(sigma/r)^12 - (sigma/r)^6]; exceptions in place of their pairs.

    With a cutoff, pairs beyond it do not interact, Coulomb becomes the reaction field
    qq (1/r + k r^2 - c), and a switching function may take Lennard-Jones to zero; exceptions know of none of this.
    """
    method = force.getNonbondedMethod()
    if method not in (openmm.NonbondedForce.NoCutoff, openmm.NonbondedForce.CutoffNonPeriodic):
        raise NotNative("periodic or Ewald summation")
    atoms = np.arange(force.getNumParticles())
    exceptions = [plain(force.getExceptionParameters(n)) for n in range(force.getNumExceptions())]
    pairs = np.array(list(itertools.combinations(atoms, 2)), dtype=np.int64).reshape(-1, 2)
    excepted = {(min(i, j), max(i, j)) for i, j, *_ in exceptions}
    pairs = pairs[[pair not in excepted for pair in map(tuple, pairs.tolist())]]
    coulomb, sterics = _texts(force)
    if force.getNumParticleParameterOffsets() or force.getNumExceptionParameterOffsets():
        return _with_offsets(force, pairs, exceptions, coulomb, sterics)

    particles = np.array([plain(force.getParticleParameters(int(i))) for i in atoms], dtype=np.float64).reshape(-1, 3)
    (q1, s1, e1), (q2, s2, e2) = particles[pairs[:, 0]].T, particles[pairs[:, 1]].T
    terms = _split("pairs", pairs, COULOMB * q1 * q2, (s1 + s2) / 2, np.sqrt(e1 * e2), coulomb, sterics)
    known = np.array([row[2:] for row in exceptions], dtype=np.float64).reshape(-1, 3)
    apart = np.array([row[:2] for row in exceptions], dtype=np.int64).reshape(-1, 2)
    terms += _split("exceptions", apart, COULOMB * known[:, 0], known[:, 1], known[:, 2], "qq/r", _LENNARD_JONES)
    return Contribution(terms)


def _split(
    what: str, pairs: np.ndarray, qq: np.ndarray, sigma: np.ndarray, epsilon: np.ndarray, coulomb: str, sterics: str
) -> list[Terms]:
    """Pairs with Lennard-Jones apart from those that only have charges; pairs with neither are left out."""
    well = epsilon != 0
    charged = ~well & (qq != 0)
    terms = []
    if well.any():
        main, *definitions = sterics.split(";")
        text = ";".join((f"{main}+coulomb", f"coulomb={coulomb}", *definitions))
        columns = {"qq": qq[well], "sigma": sigma[well], "epsilon": epsilon[well]}
        terms.append(Terms(f"NonbondedForce {what}", pairs[well], _DISTANCE, columns, parse(text)))
    if charged.any():
        columns = {"qq": qq[charged]}
        terms.append(Terms(f"NonbondedForce {what} charges", pairs[charged], _DISTANCE, columns, parse(coulomb)))
    return terms


def _texts(force: openmm.NonbondedForce) -> tuple[str, str]:
    """Coulomb and Lennard-Jones of ordinary pairs, cut and switched where the force says so."""
    if force.getNonbondedMethod() == openmm.NonbondedForce.NoCutoff:
        return "qq/r", _LENNARD_JONES
    cutoff = force.getCutoffDistance().value_in_unit(unit.nanometer)
    dielectric = force.getReactionFieldDielectric()
    k = (dielectric - 1) / (2 * dielectric + 1) / cutoff**3
    c = 3 * dielectric / (2 * dielectric + 1) / cutoff
    inside = f"step({cutoff!r}-r)"
    coulomb = f"select({inside}, qq*(1/r+{k!r}*r^2-{c!r}), 0)"
    return coulomb, switched(_LENNARD_JONES, cutoff, switching_distance(force))


def switching_distance(force: openmm.NonbondedForce | openmm.CustomNonbondedForce) -> float | None:
    """In nm, where the switching function begins; None without one."""
    return force.getSwitchingDistance().value_in_unit(unit.nanometer) if force.getUseSwitchingFunction() else None


def switched(text: str, cutoff: float, start: float | None) -> str:
    """An expression that ends at the cutoff, through 1 - 6 t^5 + 15 t^4 - 10 t^3 from `start` on."""
    main, *definitions = text.split(";")
    if start is not None and start < cutoff:
        fade = f"1-t^3*(10-t*(15-6*t)); t=max(0,(r-{start!r})/{cutoff - start!r})"
        ended, *more = (f"({main})*fade", f"fade={fade.split(';')[0]}", fade.split(";")[1])
        main, definitions = ended, [*more, *definitions]
    return ";".join((f"select(step({cutoff!r}-r), {main}, 0)", *definitions))


def _with_offsets(
    force: openmm.NonbondedForce, pairs: np.ndarray, exceptions: list[list], coulomb: str, sterics: str
) -> Contribution:
    """Charges, radii and wells that depend linearly on global parameters."""
    values = global_parameters(force)
    base = np.array([plain(force.getParticleParameters(i)) for i in range(force.getNumParticles())]).reshape(-1, 3)
    of_particles = [force.getParticleParameterOffset(n) for n in range(force.getNumParticleParameterOffsets())]
    of_exceptions = [force.getExceptionParameterOffset(n) for n in range(force.getNumExceptionParameterOffsets())]

    columns = {}
    for side in (1, 2):
        for k, name in enumerate("qse"):
            columns[f"{name}{side}"] = base[pairs[:, side - 1], k]
    definitions = {}
    for name, (parameter, scales) in _by_parameter(of_particles, len(base)).items():
        for side in (1, 2):
            for k, kind in enumerate("qse"):
                columns[f"{name}_{kind}{side}"] = scales[pairs[:, side - 1], k]
        definitions[name] = parameter
    total = {
        f"{kind}{side}": "+".join((f"{kind}{side}", *(f"{p}*{name}_{kind}{side}" for name, p in definitions.items())))
        for kind in "qse"
        for side in (1, 2)
    }
    mixed = (
        f"qq={COULOMB!r}*({total['q1']})*({total['q2']}); sigma=0.5*({total['s1']}+{total['s2']}); "
        f"epsilon=sqrt(({total['e1']})*({total['e2']}))"
    )
    terms = [Terms("NonbondedForce pairs", pairs, _DISTANCE, columns, parse(_joined(coulomb, sterics, mixed)))]

    known = np.array([row[2:] for row in exceptions], dtype=np.float64).reshape(-1, 3)
    apart = np.array([row[:2] for row in exceptions], dtype=np.int64).reshape(-1, 2)
    columns = {kind: known[:, k] for k, kind in enumerate("qse")}
    sums = {kind: kind for kind in "qse"}
    active = (known[:, 0] != 0) | (known[:, 2] != 0)
    for name, (parameter, scales) in _by_parameter(of_exceptions, len(known)).items():
        for k, kind in enumerate("qse"):
            columns[f"{name}_{kind}"] = scales[:, k]
            sums[kind] += f"+{parameter}*{name}_{kind}"
        active |= (scales != 0).any(1)
    mixed = f"qq={COULOMB!r}*({sums['q']}); sigma={sums['s']}; epsilon={sums['e']}"
    columns = {name: column[active] for name, column in columns.items()}
    energy = parse(_joined("qq/r", _LENNARD_JONES, mixed))
    terms.append(Terms("NonbondedForce exceptions", apart[active], _DISTANCE, columns, energy))
    return Contribution([t for t in terms if len(t.particles)], global_parameters=values)


def _joined(coulomb: str, sterics: str, mixed: str) -> str:
    main, *definitions = sterics.split(";")
    return ";".join((f"{main}+coulomb", f"coulomb={coulomb}", *definitions, mixed))


def _by_parameter(offsets: list[list], rows: int) -> dict[str, tuple[str, np.ndarray]]:
    """For each global parameter a name for columns, and its scales of charge, sigma and epsilon by row."""
    if len({(parameter, row) for parameter, row, *_ in offsets}) < len(offsets):
        # the platforms of OpenMM do not agree on what this means
        raise NotNative("two offsets of one thing by one parameter")
    scales: dict[str, np.ndarray] = {}
    for parameter, row, *scale in offsets:
        scales.setdefault(parameter, np.zeros((rows, 3)))[row] += np.array(plain(scale), dtype=np.float64)
    return {f"offset{k}": (parameter, table) for k, (parameter, table) in enumerate(scales.items())}
