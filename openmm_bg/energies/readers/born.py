"""Implicit solvent: GBSAOBCForce and the general CustomGBForce."""

from __future__ import annotations

import math

import numpy as np
import openmm
from openmm import unit

from openmm_bg.energies import expression
from openmm_bg.energies.expression import Node, number
from openmm_bg.energies.lepton import parse
from openmm_bg.energies.model import NotNative, PairwiseSums
from openmm_bg.energies.readers.nonbonded import COULOMB
from openmm_bg.energies.readers.registry import Contribution, global_parameters, plain, reader
from openmm_bg.energies.tabulated import read_functions

PROBE_RADIUS = 0.14
"""Of the surface-area term of GBSAOBCForce, nm."""

DIELECTRIC_OFFSET = 0.009
"""What GBSAOBCForce takes off every radius, nm."""

# What neighbour 2, a sphere of radius s, takes from the surroundings of atom 1, of radius o. Where the spheres
# do not reach each other it is nothing, and the logarithm may have no value.
INTEGRAL = (
    "select(step(r+s-o), 0.5*(L-U+0.25*(r-s*s/r)*(U*U-L*L)+0.5*log(U/L)/r+select(step(s-r-o), 2*(1/o-L), 0)), 0);"
    "U=1/(r+s); L=1/max(o,abs(r-s)); s=scaled2; o=offset1"
)

BORN_RADIUS = "1/(1/offset-tanh(psi*(1+psi*(4.85*psi-0.8)))/radius); psi=I*offset"


def energy_texts(force: openmm.GBSAOBCForce) -> tuple[list[str], str]:
    """The energies of single particles, and of pairs, of GBSAOBCForce."""
    screening = COULOMB * (1 / force.getSoluteDielectric() - 1 / force.getSolventDielectric())
    surface = force.getSurfaceAreaEnergy().value_in_unit(unit.kilojoule_per_mole / unit.nanometer**2)
    single = [
        f"{-0.5 * screening!r}*charge^2/B",
        f"{4 * math.pi * surface!r}*(radius+{PROBE_RADIUS})^2*(radius/B)^6",
    ]
    return single, f"{-screening!r}*charge1*charge2/sqrt(r2+BB*exp(-0.25*r2/BB)); r2=r*r; BB=B1*B2"


@reader(openmm.GBSAOBCForce)
def obc(force: openmm.GBSAOBCForce, system: openmm.System) -> Contribution:
    """Generalised Born, model II of Onufriev, Bashford and Case (Proteins 55, 383, 2004), with a surface term."""
    if force.getNonbondedMethod() != openmm.GBSAOBCForce.NoCutoff:
        raise NotNative("a cutoff")
    count = force.getNumParticles()
    if count == 0:
        return Contribution()
    table = np.array([plain(force.getParticleParameters(i)) for i in range(count)], dtype=np.float64)
    charge, radius, scale = table.T
    offset = radius - DIELECTRIC_OFFSET
    pairs = all_pairs(count)
    single, paired = energy_texts(force)
    sums = PairwiseSums(
        "GBSAOBCForce",
        {"charge": charge, "radius": radius, "offset": offset, "scaled": offset * scale},
        pairs,
        ("I", parse(INTEGRAL)),
        [("B", parse(BORN_RADIUS))],
        [parse(text) for text in single],
        [(parse(paired), pairs)],
    )
    return Contribution(sums=[sums])


def all_pairs(count: int) -> np.ndarray:
    """Every unordered pair of particles, ``(pairs, 2)``."""
    return np.stack(np.triu_indices(count, 1), 1).astype(np.int64)


@reader(openmm.CustomGBForce)
def custom_born(force: openmm.CustomGBForce, system: openmm.System) -> Contribution:
    """Any CustomGBForce whose first computed value is a sum over pairs and whose others are not."""
    count = force.getNumParticles()
    kinds = [force.getComputedValueParameters(n)[2] for n in range(force.getNumComputedValues())]
    if not kinds or kinds[0] == force.SingleParticle or any(kind != force.SingleParticle for kind in kinds[1:]):
        raise NotNative("computed values in an unusual order")
    if force.getNonbondedMethod() not in (force.NoCutoff, force.CutoffNonPeriodic):
        raise NotNative("periodic")
    if count == 0:
        return Contribution()
    names = [force.getPerParticleParameterName(k) for k in range(force.getNumPerParticleParameters())]
    table = np.array([force.getParticleParameters(i) for i in range(count)], dtype=np.float64).reshape(count, -1)
    parameters = dict(zip(names, table.T, strict=True)) or {"": np.zeros(count)}
    functions = read_functions(force)
    excluded = {tuple(sorted(force.getExclusionParticles(n))) for n in range(force.getNumExclusions())}
    everything = all_pairs(count)
    allowed = everything[[pair not in excluded for pair in map(tuple, everything.tolist())]]

    cutoff = None
    if force.getNonbondedMethod() == force.CutoffNonPeriodic:
        cutoff = force.getCutoffDistance().value_in_unit(unit.nanometer)

    def cut(node: Node) -> Node:
        return node if cutoff is None else within(node, cutoff)

    def pairs_of(kind: int) -> np.ndarray:
        return everything if kind == force.ParticlePairNoExclusions else allowed

    values = [force.getComputedValueParameters(n) for n in range(force.getNumComputedValues())]
    (first_name, first_text, first_kind), *others = values
    single: list[Node] = []
    paired: list[tuple[Node, np.ndarray]] = []
    for n in range(force.getNumEnergyTerms()):
        text, kind = force.getEnergyTermParameters(n)
        node = parse(text, functions)
        if kind == force.SingleParticle:
            single.append(node)
        else:
            paired.append((cut(node), pairs_of(kind)))
    sums = PairwiseSums(
        "CustomGBForce",
        parameters,
        pairs_of(first_kind),
        (first_name, cut(parse(first_text, functions))),
        [(name, parse(text, functions)) for name, text, _ in others],
        single,
        paired,
    )
    return Contribution(sums=[sums], global_parameters=global_parameters(force))


def within(node: Node, cutoff: float) -> Node:
    """The expression up to the cutoff, zero beyond."""
    inside = expression.apply("step", number(cutoff) - expression.variable("r"))
    return expression.apply("select", inside, node, number(0.0))
