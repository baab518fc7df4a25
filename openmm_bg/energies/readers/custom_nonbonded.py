"""CustomNonbondedForce: any expression over pairs."""

from __future__ import annotations

import numpy as np
import openmm
from openmm import unit

from openmm_bg.energies import expression
from openmm_bg.energies.expression import Node, number, variable
from openmm_bg.energies.lepton import parse
from openmm_bg.energies.model import Coordinate, NotNative, Terms
from openmm_bg.energies.readers.born import all_pairs, within
from openmm_bg.energies.readers.nonbonded import switching_distance
from openmm_bg.energies.readers.registry import Contribution, global_parameters, reader
from openmm_bg.energies.tabulated import read_functions


@reader(openmm.CustomNonbondedForce)
def custom_nonbonded(force: openmm.CustomNonbondedForce, system: openmm.System) -> Contribution:
    """An expression in r and in parameters and computed values of the two particles."""
    if force.getNonbondedMethod() not in (force.NoCutoff, force.CutoffNonPeriodic):
        raise NotNative("periodic")
    count = force.getNumParticles()
    values = global_parameters(force)
    names = [force.getPerParticleParameterName(k) for k in range(force.getNumPerParticleParameters())]
    table = np.array([force.getParticleParameters(i) for i in range(count)], dtype=np.float64).reshape(count, -1)
    functions = read_functions(force)
    energy = _with_computed_values(parse(force.getEnergyFunction(), functions), force, functions)
    if force.getNonbondedMethod() == force.CutoffNonPeriodic:
        energy = _cut(energy, force)

    pairs = _pairs(force)
    if not len(pairs):
        return Contribution(global_parameters=values)
    parameters = {
        f"{name}{side}": column[pairs[:, side - 1]]
        for name, column in zip(names, table.T, strict=True)
        for side in (1, 2)
    }
    coordinates = {"r": Coordinate("distance", (0, 1))}
    return Contribution(
        [Terms("CustomNonbondedForce", pairs, coordinates, parameters, energy)], global_parameters=values
    )


def _with_computed_values(energy: Node, force: openmm.CustomNonbondedForce, functions: dict) -> Node:
    """The energy with each computed value written out for both particles."""
    per_particle = {force.getPerParticleParameterName(k) for k in range(force.getNumPerParticleParameters())}
    replaced = {}
    for n in range(force.getNumComputedValues()):
        name, text = force.getComputedValueParameters(n)
        node = parse(text, functions)
        for side in (1, 2):
            suffixed = {p: variable(f"{p}{side}") for p in per_particle}
            (replaced[f"{name}{side}"],) = expression.substitute([node], suffixed)
    return expression.substitute([energy], replaced)[0]


def _cut(energy: Node, force: openmm.CustomNonbondedForce) -> Node:
    """Zero beyond the cutoff, and faded from the switching distance on."""
    cutoff = force.getCutoffDistance().value_in_unit(unit.nanometer)
    start = switching_distance(force)
    if start is not None and start < cutoff:
        t = expression.apply("max", number(0.0), (variable("r") - start) / (cutoff - start))
        energy = energy * (1 - t**3 * (10 - t * (15 - 6 * t)))
    return within(energy, cutoff)


def _pairs(force: openmm.CustomNonbondedForce) -> np.ndarray:
    """The interacting pairs, in the order in which their parameters are called 1 and 2."""
    excluded = {tuple(sorted(force.getExclusionParticles(n))) for n in range(force.getNumExclusions())}
    if not force.getNumInteractionGroups():
        listed = [tuple(pair) for pair in all_pairs(force.getNumParticles()).tolist()]
    else:
        listed = []
        for n in range(force.getNumInteractionGroups()):
            first, second = map(set, force.getInteractionGroupParameters(n))
            for i in sorted(first):
                for j in sorted(second):
                    # a pair that both sets hold in both orders is one pair
                    if i != j and not (j < i and j in first and i in second):
                        listed.append((i, j))
    kept = [pair for pair in listed if tuple(sorted(pair)) not in excluded]
    return np.array(kept, dtype=np.int64).reshape(-1, 2)
