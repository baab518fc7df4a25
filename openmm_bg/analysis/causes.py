"""Which differences are causes, and which follow from them.

A basin that is five points too full drags torsions, energies and distances along. So the samples are reweighted until
the states that differ are as full as in the reference, and what else had come out different is asked again: what is
then the same followed from the states. The same is done with a temperature.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq

from openmm_bg.analysis.formatting import format_value
from openmm_bg.analysis.probes import ALPHA, POPULATIONS, Contrast, Inside, Linear, Probe, Sides, Sizes

ENERGY_NAME, STRAIN_NAME = "energy", "spread of bonds and angles"
_MOST_STATES = 12
_LEAST_KEPT = 0.1
_LARGEST_TILT = 3.0  # standard deviations


@dataclass(frozen=True)
class Explanation:
    """What differs by itself, in words, the most certain first; and the names of what goes with it."""

    causes: tuple[str, ...] = ()
    consequences: tuple[str, ...] = ()


def explain(
    probes: Sequence[Probe], contrasts: Sequence[Contrast], weights: Sides, typical: Sizes, temperature: float | None
) -> Explanation:
    """Sort what differs into causes and consequences.

    Parameters
    ----------
    probes, contrasts
        One answer for each question.
    weights, typical
        Under which they were asked.
    temperature : float, optional
        K, of the reference, to name another one.
    """
    left = sorted((k for k, c in enumerate(contrasts) if c.differs), key=lambda k: contrasts[k].adjusted)
    causes: list[str] = []
    gone: list[int] = []

    def factor(c: Contrast) -> float:
        return c.adjusted / c.p_value if c.p_value > 0 else len(contrasts)

    def settle(found: Sequence[int], corrected: Sides | None) -> None:
        """Take causes out, and with them all that is the same once they are corrected for."""
        nonlocal left, weights
        left = [k for k in left if k not in found]
        if corrected is None or not left:
            return
        weights = corrected
        # at the level of before: what is asked again was chosen for being extreme
        still = [k for k in left if probes[k].ask(weights, typical).p_value * factor(contrasts[k]) <= ALPHA]
        gone.extend(k for k in left if k not in still)
        left = still

    for fixed in (True, False):
        states = [k for k in left if _is_state(probes[k], fixed)]
        if states:
            causes.append(", ".join(str(contrasts[k]) for k in _gains_first(states, contrasts)))
            settle(states, _stratified([probes[k] for k in states[:_MOST_STATES]], weights))
    heat = _temperature(probes, contrasts, left, weights, typical, temperature)
    if heat is not None:
        text, members, corrected = heat
        causes.append(text)
        settle(members, corrected)
    causes += [str(contrasts[k]) for k in left]
    return Explanation(tuple(causes), tuple(contrasts[k].name for k in gone))


def _is_state(probe: Probe, fixed: bool) -> bool:
    return isinstance(probe, Inside) and probe.family == POPULATIONS and probe.fixed == fixed


def _gains_first(states: Sequence[int], contrasts: Sequence[Contrast]) -> list[int]:
    return sorted(states, key=lambda k: -contrasts[k].difference)


def _stratified(states: Sequence[Probe], weights: Sides) -> Sides | None:
    """Weights under which the samples hold every combination of states as often as the reference.

    Frames of a combination that one side lacks are left out. None where hardly anything remains.
    """
    labels: list[NDArray[np.intp]] = [np.zeros(len(w), dtype=np.intp) for w in weights]
    for bit, state in enumerate(states):
        for label, inside in zip(labels, (state.reference, state.samples), strict=True):
            label += inside.astype(np.intp) << bit
    shares = [np.bincount(label, w, 1 << len(states)) for label, w in zip(labels, weights, strict=True)]
    both = (shares[0] > 0) & (shares[1] > 0)
    if min(share[both].sum() for share in shares) < _LEAST_KEPT:
        return None
    factor = np.divide(shares[0], shares[1], out=np.zeros_like(shares[0]), where=both)
    reference, samples = weights[0] * both[labels[0]], weights[1] * factor[labels[1]]
    return reference / reference.sum(), samples / samples.sum()


def _temperature(
    probes: Sequence[Probe],
    contrasts: Sequence[Contrast],
    left: Sequence[int],
    weights: Sides,
    typical: Sizes,
    temperature: float | None,
) -> tuple[str, list[int], Sides] | None:
    """Whether one temperature explains energy and strain together; words, members and the weights that undo it."""
    numbers = {p.name: k for k, p in enumerate(probes) if p.name in (ENERGY_NAME, STRAIN_NAME)}
    strain = numbers.get(STRAIN_NAME)
    leader = numbers.get(ENERGY_NAME, strain)
    if strain is None or leader not in left:
        return None
    probe, now = probes[leader], {k: probes[k].ask(weights, typical) for k in numbers.values()}
    assert isinstance(probe, Linear)
    same_way = len({math.copysign(1, c.difference) for c in now.values()}) == 1
    if not same_way or any(not c.p_value <= ALPHA for c in now.values()):
        return None
    tilt = _tilt(probe.samples, weights[1], now[leader].reference)
    if tilt is None:
        return None
    undone = weights[0], tilt[1]
    if any(probes[k].ask(undone, typical).p_value <= ALPHA / len(numbers) for k in numbers.values()):
        return None
    # strain is proportional to temperature; energies say how far they had to be tilted
    c = now[leader]
    if leader == strain:
        ratio, error = c.samples / c.reference, c.error / c.reference
    else:
        ratio = 1 / (1 - tilt[0])
        error = ratio**2 * abs(tilt[0]) * c.error / abs(c.difference)
    wider = now[strain]
    words = [f"energy {_signed(c.difference, c.error)} kT"] if leader != strain else []
    square = _signed(100 * (wider.samples / wider.reference - 1), 100 * wider.error)
    words.append(f"bonds and angles vary by {square} % in square")
    how = f"{_signed(100 * (ratio - 1), 100 * error)} % in temperature"
    if temperature is not None:
        how = f"{format_value(temperature * ratio, temperature * error)} K instead of {temperature:g} K"
    return f"temperature (as at {how}: {', '.join(words)})", list(numbers.values()), undone


def _tilt(values: NDArray[np.floating], weights: NDArray[np.float64], mean: float) -> tuple[float, NDArray] | None:
    """The factor t for which exp(t values) brings the weighted mean of values to another one, and those weights."""
    used = weights > 0
    x = np.where(used, values, mean).astype(np.float64) - mean
    most = _LARGEST_TILT / math.sqrt(weights @ x**2)

    def tilted(t: float) -> NDArray[np.float64]:
        exponent = t * x
        w = weights * np.exp(exponent - exponent[used].max())
        return w / w.sum()

    def gap(t: float) -> float:
        return float(tilted(t) @ x)

    if gap(-most) * gap(most) > 0:
        return None
    t = float(brentq(gap, -most, most))
    return -t, tilted(t)


def _signed(value: float, error: float) -> str:
    return f"{'+' if value > 0 else ''}{format_value(value, error)}"
