"""The figures of a run: how moves are accepted, what a sample costs, how training went."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from openmm_bg.analysis.formatting import format_value
from openmm_bg.analysis.statistics import autocorrelation, effective_sample_size, statistical_inefficiency
from openmm_bg.analysis.style import (
    INK,
    LINE_STYLES,
    colors_of,
    legend_above,
    new_figure,
    require_some,
    styled,
)
from openmm_bg.errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


class Chain(NamedTuple):
    """A time series and what one frame of it costs.

    Attributes
    ----------
    series : (frames,) or (chains, frames) array
        For instance the indicator phi > 0.
    evaluations_per_frame : float
        Force evaluations from one frame to the next, proposals included.
    """

    series: ArrayLike
    evaluations_per_frame: float


def _power(exponent: int) -> str:
    return "10" + str(exponent).translate(_SUPERSCRIPTS)


def _logarithmic(ax: Axes) -> None:
    """A logarithmic x axis whose labels are plain text: mathematical text would be placed glyph by glyph."""

    def text(value: float, _: float) -> str:
        exponent = round(np.log10(value)) if value > 0 else 0
        return _power(exponent) if value > 0 and np.isclose(value, 10.0**exponent) else ""

    ax.set_xscale("log")
    ax.xaxis.set_major_formatter(text)
    ax.xaxis.set_minor_formatter(lambda value, position: "")


@styled
def acceptance_trace(accepted: ArrayLike, chains: Mapping[str, Chain], *, points: int = 40) -> Figure:
    """Running acceptance of the proposals, and how the effective sample size grows with force evaluations.

    Parameters
    ----------
    accepted : (proposals,) array of bool
    chains : mapping of name to Chain
        Usually the indicator phi > 0 of MD and of MD with moves.
    points : int
        Along each growing curve.
    """
    require_some(chains)
    a = np.asarray(accepted, dtype=np.float64)
    if a.ndim != 1 or not len(a) or not np.isin(a, (0.0, 1.0)).all():
        raise InputError("accepted must hold one True or False for each proposal.")
    figure = new_figure(5.3, 4.8)
    top, bottom = figure.subplots(2, 1)
    count = np.arange(1, len(a) + 1)
    mean = np.cumsum(a) / count
    # a band of one binomial error; proposals of an independence chain are nearly independent trials
    error = np.sqrt(mean * (1 - mean) / count)
    shown = np.unique(np.geomspace(1, len(a), 400).astype(int)) - 1
    color = colors_of(["MD with moves"])["MD with moves"]
    top.plot(count[shown], 100 * mean[shown], color=color)
    low, high = 100 * (mean - error)[shown], 100 * (mean + error)[shown]
    top.fill_between(count[shown], low, high, color=color, alpha=0.2, linewidth=0)
    settled = count[shown] >= min(30, len(a))
    _logarithmic(top)
    top.set(xlabel="proposals", ylabel="accepted so far / %", xlim=(min(10, len(a)), max(len(a), 11)))
    top.set_ylim(0, min(100.0, 1.4 * float(high[settled].max()) + 1e-3))
    top.grid(axis="y")
    colors = colors_of(chains)
    longest = max(np.asarray(series).size * cost for series, cost in chains.values())
    exponent = int(np.log10(max(longest, 1.0))) // 3 * 3
    for k, (name, (series, cost)) in enumerate(chains.items()):
        x = np.atleast_2d(np.asarray(series, dtype=np.float64))
        ends = np.unique(np.linspace(0, x.shape[1], points + 1).astype(int))[1:]
        ends = ends[ends >= 2]
        size = [effective_sample_size(x[:, :end]) for end in ends]
        style = LINE_STYLES[k % len(LINE_STYLES)]
        bottom.plot(ends * len(x) * cost / 10.0**exponent, size, color=colors[name], linestyle=style, label=name)
    unit = f" / {_power(exponent)}" if exponent else ""
    bottom.set(xlabel="force evaluations" + unit, ylabel="effective samples", xlim=(0, None))
    bottom.set_ylim(bottom=0)
    bottom.grid(axis="y")
    bottom.legend(loc="upper left")
    return figure


@styled
def training_curves(
    records: Sequence[Mapping[str, float]],
    *,
    losses: Sequence[str],
    ess: str | None = "ess",
    time: str = "seconds",
) -> Figure:
    """Objectives and effective sample size against the wall clock.

    Parameters
    ----------
    records : sequence of mappings
        As a trainer logs them; a record may lack a quantity that was not evaluated then.
    losses : sequence of str
        Keys of the objectives. Each gets an axis of its own, for their units differ.
    ess : str or None
        Key of the effective sample size as a fraction of one; None draws none.
    time : str
        Key of the seconds since training began.
    """
    if not losses:
        raise InputError("Name at least one objective to draw in losses.")
    keys = [*losses, *([ess] if ess is not None else [])]
    figure = new_figure(5.3, 0.9 + 1.5 * len(keys))
    axes = figure.subplots(len(keys), 1, sharex=True, squeeze=False)[:, 0]
    palette = colors_of([f"curve {k}" for k in range(6)])
    for k, (ax, key) in enumerate(zip(axes, keys, strict=True)):
        points = np.array([(r[time], r[key]) for r in records if key in r and time in r], dtype=np.float64)
        if not len(points):
            raise InputError(f"No record holds both {time!r} and {key!r}; name quantities that were logged.")
        color = "#0072b2" if key == ess else palette[f"curve {k % 6}"] if k else "#d55e00"
        values = 100 * points[:, 1] if key == ess else points[:, 1]
        shown = np.isfinite(values)
        ax.plot(points[shown, 0], values[shown], color=color, linewidth=1.8)
        missing = int((~shown).sum())
        ax.set_ylabel("ESS / %" if key == ess else key)
        if missing:
            ax.set_title(f"{missing} values not finite", loc="right", fontsize=10, fontweight="normal", color="#b42318")
        if key == ess:
            ax.set_ylim(bottom=0)
        elif shown.sum() > 20:  # the first plunge would flatten all that follows
            low, high = np.quantile(values[shown], [0.0, 0.97])
            ax.set_ylim(low - 0.08 * (high - low) - 1e-9, high + 0.08 * (high - low) + 1e-9)
        ax.grid(axis="y")
    axes[-1].set_xlabel("wall time / s")
    figure.align_ylabels(list(axes))
    return figure


@styled
def indicator_autocorrelation(chains: Mapping[str, Chain], *, label: str = "φ > 0") -> Figure:
    """Autocorrelation of an indicator against force evaluations: the price of one independent sample.

    Parameters
    ----------
    chains : mapping of name to Chain
        An indicator that never changes has no autocorrelation; the legend says so.
    label : str
        What the indicator asks.
    """
    require_some(chains)
    figure = new_figure(5.3, 3.5)
    ax = figure.subplots()
    colors = colors_of(chains)
    first, last = np.inf, 0.0
    for k, (name, (series, cost)) in enumerate(chains.items()):
        rho, g = autocorrelation(series), statistical_inefficiency(series)
        style = LINE_STYLES[k % len(LINE_STYLES)]
        if np.isinf(g):
            ax.plot([], [], color=colors[name], linestyle=style, label=f"{name}: no transition seen")
            continue
        end = int(min(len(rho), max(10.0, 5 * g)))
        lags = np.unique(np.geomspace(1, end - 1, 200).astype(int)) if end > 2 else np.array([1])
        price = format_value(g * cost, 0.05 * g * cost, show_error=False)
        ax.plot(
            lags * cost,
            rho[lags],
            color=colors[name],
            linestyle=style,
            label=f"{name}: one sample per {price}",
        )
        first, last = min(first, cost), max(last, float(lags[-1] * cost))
    ax.axhline(0, color=INK, linewidth=0.8)
    if last > 0:  # a logarithmic axis cannot be empty
        _logarithmic(ax)
    ax.set(ylim=(-0.15, 1.02), xlabel="force evaluations", ylabel=f"autocorrelation of {label}")
    if last > first:
        ax.set_xlim(first, last)
    ax.grid(axis="y")
    legend_above(figure, ax.get_legend_handles_labels()[1])
    return figure
