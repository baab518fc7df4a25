"""Numbers for people: no more digits than the error warrants."""

from __future__ import annotations

import math

MINUS = "\N{MINUS SIGN}"

# The spread of equal numbers is not always zero in floating point.
_ROUNDING = 1e-12


def format_value(value: float, error: float | None = None, *, show_error: bool = True) -> str:
    """A value with its error, rounded where the error is uncertain itself.

    The error keeps one significant digit, or two where the first is 1 or 2; the value ends at the same place.
    A NaN error means "not measured" and is shown as a question mark; without an error the value keeps three
    significant digits.

    Parameters
    ----------
    value : float
    error : float, optional
        One standard error, in the value's unit.
    show_error : bool
        False rounds by the error without printing it.

    Examples
    --------
    >>> format_value(0.42137, 0.0131)
    '0.421 ± 0.013'
    >>> format_value(12345.6, 387.0)
    '12300 ± 400'
    >>> format_value(0.42137)
    '0.421'
    >>> format_value(0.42137, float("nan"))
    '0.4 ± ?'
    >>> format_value(100.0, 1.9e-14)
    '100'
    """
    if math.isnan(value):
        return "not measured"
    if math.isinf(value):
        return "∞" if value > 0 else MINUS + "∞"
    if error is None or 0 <= error <= _ROUNDING * abs(value):
        return _plain(value, _decimals(abs(value), 3))
    if not math.isfinite(error):
        return _plain(value, _decimals(abs(value), 1)) + (" ± ?" if show_error else "")
    if error < 0:
        raise ValueError(f"An error cannot be negative: {error}")
    decimals = _error_decimals(error)
    text = _plain(value, decimals)
    return f"{text} ± {_plain(error, decimals)}" if show_error else text


def _error_decimals(error: float) -> int:
    leading = f"{error:.0e}"  # after rounding: 0.0296 is 0.03, one digit
    return _decimals(error, 2 if f"{error:.1e}"[0] in "12" and leading[0] in "12" else 1)


def _decimals(magnitude: float, digits: int) -> int:
    """Decimal places that keep so many significant digits; negative left of the point."""
    if magnitude == 0:
        return 0
    exponent = int(f"{magnitude:.{digits - 1}e}".split("e")[1])
    return digits - 1 - exponent


def _plain(value: float, decimals: int) -> str:
    if abs(value) >= 1e7 or (decimals > 7 and value != 0):
        return f"{value:.2e}".replace("-", MINUS)
    rounded = round(value, decimals)
    if rounded == 0:
        rounded = 0.0  # no minus sign in front of nothing
    return f"{rounded:.{max(decimals, 0)}f}".replace("-", MINUS)
