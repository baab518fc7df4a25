"""What an OpenMM System says about energies, as formulas and tables: the form that every evaluator starts from.

`readers` make these from OpenMM forces; `eager` evaluates them in torch, `kernel_source` writes them as C++.
Units are OpenMM's (nm, kJ/mol, radians, elementary charges).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import numpy as np

from openmm_bg.energies.expression import Node

Kind: TypeAlias = Literal["x", "y", "z", "distance", "angle", "dihedral"]


class NotNative(Exception):
    """This force has a feature outside the formulas; the message names it."""


@dataclass(frozen=True)
class Coordinate:
    """A geometric variable of a term.

    Attributes
    ----------
    kind
        A Cartesian coordinate of one particle, a distance of two, an angle of three (at the middle one, in
        [0, pi]), or a dihedral of four (in (-pi, pi], IUPAC sign).
    particles
        Places in the row of particles of the term.
    """

    kind: Kind
    particles: tuple[int, ...]


@dataclass
class Terms:
    """A sum over rows of one expression.

    Attributes
    ----------
    label : str
        Where it comes from, for messages.
    particles : ndarray of int64
        ``(rows, particles per row)``.
    coordinates : dict
        The geometric variables of the expression, by name.
    parameters : dict
        The per-row parameters of the expression, by name: ``(rows,)`` each.
    energy : Node
        In kJ/mol. Its other variables are global parameters.
    """

    label: str
    particles: np.ndarray
    coordinates: dict[str, Coordinate]
    parameters: dict[str, np.ndarray]
    energy: Node


@dataclass
class PairwiseSums:
    """Energies of values that each particle collects from all others: generalised Born models.

    The first value of particle i is the sum, over every j paired with it, of an expression in their distance
    ``r`` and in parameters with suffix 1 for particle i and 2 for particle j; it need not be symmetric. Further
    values follow from it particle by particle, and energies from all of them.

    Attributes
    ----------
    label : str
    parameters : dict
        Per-particle parameters, ``(atoms,)`` each.
    pairs : ndarray of int64
        ``(pairs, 2)``: each unordered pair that takes part in the first value, once.
    first : tuple
        Name and expression of the first value; variables ``r``, ``name1`` and ``name2``, and global parameters.
    further : list of tuple
        Names and expressions of the other values, in order: functions of the particle's parameters, earlier
        values, its position ``x``, ``y``, ``z``, and global parameters.
    single : list of Node
        Energies summed over particles: functions of the same.
    paired : list of tuple
        Energies summed over pairs, each with its own ``(pairs, 2)``: functions of ``r`` and of parameters and
        values with suffixes 1 and 2. They are symmetric in 1 and 2.
    """

    label: str
    parameters: dict[str, np.ndarray]
    pairs: np.ndarray
    first: tuple[str, Node]
    further: list[tuple[str, Node]] = field(default_factory=list)
    single: list[Node] = field(default_factory=list)
    paired: list[tuple[Node, np.ndarray]] = field(default_factory=list)


@dataclass
class Model:
    """Everything native in a System.

    Attributes
    ----------
    num_atoms : int
    terms, sums : list
    global_parameters : dict
        Names and default values.
    """

    num_atoms: int
    terms: list[Terms] = field(default_factory=list)
    sums: list[PairwiseSums] = field(default_factory=list)
    global_parameters: dict[str, float] = field(default_factory=dict)
