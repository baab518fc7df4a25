"""Which OpenMM forces can be read, and what reading one gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import openmm
from openmm import unit

from openmm_bg.energies.model import PairwiseSums, Terms


@dataclass
class Contribution:
    """What one force adds to a `Model`.

    Attributes
    ----------
    terms, sums : list
    global_parameters : dict
        Names and default values.
    """

    terms: list[Terms] = field(default_factory=list)
    sums: list[PairwiseSums] = field(default_factory=list)
    global_parameters: dict[str, float] = field(default_factory=dict)


Reader: TypeAlias = Callable[[Any, openmm.System], Contribution]

REGISTRY: dict[type[openmm.Force], Reader] = {}


def reader(force_class: type[openmm.Force]) -> Callable[[Reader], Reader]:
    """Register a function as the reader of a force class."""

    def register(function: Reader) -> Reader:
        REGISTRY[force_class] = function
        return function

    return register


def plain(parameters: Sequence[Any]) -> list[Any]:
    """Quantities as numbers in OpenMM's own units."""
    return [p.value_in_unit_system(unit.md_unit_system) if unit.is_quantity(p) else p for p in parameters]


def global_parameters(force: Any) -> dict[str, float]:
    """Names and default values of a force's global parameters."""
    count = force.getNumGlobalParameters()
    return {force.getGlobalParameterName(k): force.getGlobalParameterDefaultValue(k) for k in range(count)}
