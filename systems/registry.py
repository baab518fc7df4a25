"""The named targets, and `load`."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from openmm_bg.systems.densities import DoubleWell, GaussianMixture, gmm40
from openmm_bg.systems.molecules import Molecule, from_pdb

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


def _double_well(*, beta: float = 1.0) -> DoubleWell:
    """Two wells in the plane, u = beta [(x1^2 - 1)^2 / 4 + x2^2 / 2]."""
    return DoubleWell(beta)


def _gmm40() -> GaussianMixture:
    """Forty Gaussians of equal weight in [-40, 40]^2."""
    return gmm40()


_TARGETS: dict[str, Callable[..., Molecule | Energy]] = {
    "alanine_dipeptide": _alanine_dipeptide,
    "double_well": _double_well,
    "gmm40": _gmm40,
}


def names() -> tuple[str, ...]:
    """The names `load` knows, molecules first."""
    return tuple(_TARGETS)


def describe(name: str) -> str:
    """One sentence about a named target.

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
        `constraints` and `hydrogen_mass`, as `from_pdb` does; `double_well` takes `beta`.

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
