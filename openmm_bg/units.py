"""The one place for units: OpenMM's own (nm, ps, K, kJ/mol), as a Quantity or as bare numbers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from openmm import unit

from openmm_bg.errors import InputError

GAS_CONSTANT: float = unit.MOLAR_GAS_CONSTANT_R.value_in_unit(unit.kilojoules_per_mole / unit.kelvin)
"""Boltzmann's constant per mole, kJ/mol/K."""


def _strip(value: Any, target: unit.Unit, name: str) -> Any:
    if unit.is_quantity(value):
        if not value.unit.is_compatible(target):
            raise InputError(f"{name} has the unit {value.unit}; give it in {target} or as a bare number.")
        return value.value_in_unit(target)
    return value


def _positive(value: Any, target: unit.Unit, name: str) -> float:
    value = _strip(value, target, name)
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise InputError(f"{name} must be a number, not {value!r}.") from None
    if not math.isfinite(number) or number <= 0:
        raise InputError(f"{name} must be a positive finite number, not {number}.")
    return number


def kelvin(value: Any, name: str = "temperature") -> float:
    """A temperature in K, refused unless positive and finite."""
    return _positive(value, unit.kelvin, name)


def picoseconds(value: Any, name: str = "time step") -> float:
    """A positive time in ps."""
    return _positive(value, unit.picosecond, name)


def per_picosecond(value: Any, name: str = "friction") -> float:
    """A positive rate in 1/ps."""
    return _positive(value, unit.picosecond**-1, name)


def nanometers(value: Any, name: str = "positions") -> np.ndarray:
    """Lengths in nm as a float64 array of unchanged shape."""
    try:
        return np.asarray(_strip(value, unit.nanometer, name), dtype=np.float64)
    except (TypeError, ValueError):
        raise InputError(f"{name} must be an array of numbers in nm.") from None


def kilojoules_per_mole(value: Any, name: str = "energy") -> np.ndarray:
    """Energies in kJ/mol as a float64 array of unchanged shape."""
    try:
        return np.asarray(_strip(value, unit.kilojoule_per_mole, name), dtype=np.float64)
    except (TypeError, ValueError):
        raise InputError(f"{name} must be numbers in kJ/mol.") from None


def thermal_energy(temperature: Any) -> float:
    """kT in kJ/mol at a temperature in K.

    >>> round(thermal_energy(300), 4)
    2.4943
    """
    return GAS_CONSTANT * kelvin(temperature)
