"""The named targets, and `load`."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from openmm_bg.systems.clusters import DoubleWellCluster, LennardJonesCluster
from openmm_bg.systems.densities import DoubleWell, GaussianMixture, gmm2_unequal, gmm4, gmm9, gmm40, gmm_pair
from openmm_bg.systems.lattice import LatticeDoubleWell
from openmm_bg.systems.many_well import ManyWell, ManyWellDelta
from openmm_bg.systems.molecules import Molecule, from_pdb
from openmm_bg.systems.peptides import alanine_dipeptide_ff96, peptide

from openmm_bg.energies import Energy
from openmm_bg.errors import InputError

__all__ = ["describe", "load", "names"]


def _alanine_dipeptide(*, temperature: Any = 300.0, constraints: Any = None, hydrogen_mass: Any = None) -> Molecule:
    """ACE-ALA-NME (22 atoms) with amber99sbildn and amber99_obc implicit solvent."""
    return from_pdb(
        Path(__file__).with_name("alanine_dipeptide.pdb"),
        temperature=temperature,
        constraints=constraints,
        hydrogen_mass=hydrogen_mass,
        description=describe("alanine_dipeptide"),
    )


def _alanine_dipeptide_ff96(
    *, temperature: Any = 300.0, constraints: Any = None, hydrogen_mass: Any = None
) -> Molecule:
    """ACE-ALA-NME (22 atoms) with amber96 and OBC1 implicit solvent, openmmtools' AlanineDipeptideImplicit."""
    return alanine_dipeptide_ff96(
        temperature=temperature,
        constraints=constraints,
        hydrogen_mass=hydrogen_mass,
        description=describe("alanine_dipeptide_ff96"),
    )


def _alanine_tetrapeptide(*, temperature: Any = 300.0, constraints: Any = None, hydrogen_mass: Any = None) -> Molecule:
    """ACE-ALA-ALA-ALA-NME (42 atoms) with amber99sbildn and amber99_obc implicit solvent."""
    return peptide(
        "ACE ALA ALA ALA NME",
        temperature=temperature,
        constraints=constraints,
        hydrogen_mass=hydrogen_mass,
        name="alanine_tetrapeptide",
        description=describe("alanine_tetrapeptide"),
    )


def _alanine_hexapeptide(*, temperature: Any = 300.0, constraints: Any = None, hydrogen_mass: Any = None) -> Molecule:
    """ACE-ALA-ALA-ALA-ALA-ALA-NME (62 atoms) with amber99sbildn and amber99_obc implicit solvent."""
    return peptide(
        "ACE ALA ALA ALA ALA ALA NME",
        temperature=temperature,
        constraints=constraints,
        hydrogen_mass=hydrogen_mass,
        name="alanine_hexapeptide",
        description=describe("alanine_hexapeptide"),
    )


def _elil(*, temperature: Any = 300.0, constraints: Any = None, hydrogen_mass: Any = None) -> Molecule:
    """GLU-LEU-ILE-LEU with charged ends (75 atoms), amber99sbildn and amber99_obc implicit solvent."""
    return peptide(
        "GLU LEU ILE LEU",
        temperature=temperature,
        constraints=constraints,
        hydrogen_mass=hydrogen_mass,
        name="elil",
        description=describe("elil"),
    )


def _chignolin(*, temperature: Any = 310.0, constraints: Any = None, hydrogen_mass: Any = None) -> Molecule:
    """GLY-TYR-ASP-PRO-GLU-THR-GLY-THR-TRP-GLY with charged ends (138 atoms), amber14 and OBC1 implicit solvent."""
    return peptide(
        "GLY TYR ASP PRO GLU THR GLY THR TRP GLY",
        forcefield=("amber14-all.xml", "implicit/obc1.xml"),
        temperature=temperature,
        constraints=constraints,
        hydrogen_mass=hydrogen_mass,
        name="chignolin",
        description=describe("chignolin"),
    )


def _double_well(*, beta: float = 1.0) -> DoubleWell:
    """Two wells in the plane, u = beta [(x1^2 - 1)^2 / 4 + x2^2 / 2]."""
    return DoubleWell(beta)


def _gmm40() -> GaussianMixture:
    """Forty Gaussians of equal weight in [-40, 40]^2."""
    return gmm40()


def _gmm4() -> GaussianMixture:
    """Four Gaussians of equal weight at (+-8, +-8)."""
    return gmm4()


def _gmm2_unequal() -> GaussianMixture:
    """Two Gaussians, (4, 4) with weight 1/3 and (-8, -8) with weight 2/3."""
    return gmm2_unequal()


def _gmm9() -> GaussianMixture:
    """Nine narrow Gaussians of equal weight on the grid {-1, 0, 1}^2."""
    return gmm9()


def _gmm_pair(*, separation: float = 4.0, weight: float = 0.7) -> GaussianMixture:
    """Two Gaussians on the line, w N(m, 1) + (1 - w) N(-m, 1)."""
    return gmm_pair(separation, weight)


def _many_well_8() -> ManyWell:
    """Four lopsided double wells and four Gaussians in 8 dimensions."""
    return ManyWell(8)


def _many_well_8_delta2() -> ManyWellDelta:
    """Eight symmetric double wells (x_i^2 - 2)^2 in 8 dimensions."""
    return ManyWellDelta(8, wells=8, delta=2.0)


def _many_well_32() -> ManyWell:
    """Sixteen lopsided double wells and sixteen Gaussians in 32 dimensions."""
    return ManyWell(32)


def _lattice_double_well(*, sites: int = 16, m: float = 6.0) -> LatticeDoubleWell:
    """A quantum particle in a double well, as a periodic path in imaginary time."""
    return LatticeDoubleWell(sites, m)


def _dw4() -> DoubleWellCluster:
    """Four particles in the plane, each pair in a double well of their distance."""
    return DoubleWellCluster()


def _lj13(*, well_depth: float = 1.0) -> LennardJonesCluster:
    """Thirteen Lennard-Jones particles in space, held together by a spring."""
    return LennardJonesCluster(13, well_depth)


_TARGETS: dict[str, Callable[..., Molecule | Energy]] = {
    "alanine_dipeptide": _alanine_dipeptide,
    "alanine_dipeptide_ff96": _alanine_dipeptide_ff96,
    "alanine_tetrapeptide": _alanine_tetrapeptide,
    "alanine_hexapeptide": _alanine_hexapeptide,
    "elil": _elil,
    "chignolin": _chignolin,
    "double_well": _double_well,
    "gmm40": _gmm40,
    "gmm4": _gmm4,
    "gmm2_unequal": _gmm2_unequal,
    "gmm9": _gmm9,
    "gmm_pair": _gmm_pair,
    "many_well_8": _many_well_8,
    "many_well_8_delta2": _many_well_8_delta2,
    "many_well_32": _many_well_32,
    "lattice_double_well": _lattice_double_well,
    "dw4": _dw4,
    "lj13": _lj13,
}


def names() -> tuple[str, ...]:
    """The names `load` knows, molecules first."""
    return tuple(_TARGETS)


def describe(name: str) -> str:
    """One sentence about a named target.

    Parameters
    ----------
    name : str
        One of `names()`.

    Raises
    ------
    InputError
        For an unknown name.

    Examples
    --------
    >>> describe("alanine_dipeptide")
    'ACE-ALA-NME (22 atoms) with amber99sbildn and amber99_obc implicit solvent.'
    """
    return (_target(name).__doc__ or "").splitlines()[0]


def load(name: str, **parameters: Any) -> Any:
    """A named target.

    Parameters
    ----------
    name : str
        One of `names()`.
    **parameters
        What the target takes, by keyword; anything else is refused. Molecules take `temperature`,
        `constraints` and `hydrogen_mass`, as `from_pdb` does; `double_well` takes `beta`, `gmm_pair` takes
        `separation` and `weight`, `lattice_double_well` takes `sites` and `m`, `lj13` takes `well_depth`.

    Returns
    -------
    Molecule or Energy

    Raises
    ------
    InputError
        For an unknown name or parameter, or a value the target cannot take.

    Examples
    --------
    >>> load("alanine_dipeptide").num_atoms
    22
    """
    target = _target(name)
    accepted = list(inspect.signature(target).parameters)
    unknown = [parameter for parameter in parameters if parameter not in accepted]
    if unknown:
        raise InputError(f"{name} has no parameter {unknown[0]!r}; it takes {', '.join(accepted) or 'none'}.")
    return target(**parameters)


def _target(name: str) -> Callable[..., Any]:
    if name in _TARGETS:
        return _TARGETS[name]
    close = difflib.get_close_matches(str(name), _TARGETS, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise InputError(f"There is no target named {name!r}; there are {', '.join(_TARGETS)}.{hint}")
