"""The figures of a report. Each returns a matplotlib Figure; angles come in radians, energies in kT.

Names such as "MD" and "reweighted" keep their colour from figure to figure
(:data:`openmm_bg.analysis.style.ROLE_COLORS`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from openmm_bg.analysis.distances import torus_histogram
from openmm_bg.analysis.free_energy import free_energy_profile
from openmm_bg.analysis.statistics import (
    Array,
    kish_size,
    normalized_weights,
)
from openmm_bg.analysis.style import (
    FAINT,
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

_DEGREES = (-120, 0, 120)
_LOWEST_LOG_RATIO = 30.0  # overlapping atoms have log p/q of -1e6, and would leave one bar for all the others


def _degrees(axis_of: Axes, x: str, y: str | None = None) -> None:
    axis_of.set(xlim=(-180, 180), xticks=_DEGREES, xlabel=x)
    if y is not None:
        axis_of.set(ylim=(-180, 180), yticks=_DEGREES, ylabel=y)


@styled
def ramachandran_maps(
    ensembles: Mapping[str, tuple[ArrayLike, ArrayLike, ArrayLike | None]],
    *,
    bins: int = 60,
    highest: float = 8.0,
) -> Figure:
    """Free energy over phi and psi, one map for each ensemble, on one scale.

    Parameters
    ----------
    ensembles : mapping of name to (phi, psi, weights or None)
        Radians.
    bins : int
        Per angle.
    highest : float
        kT at the bright end of the scale; what is higher gets that colour, what was never visited stays
        white.
    """
    require_some(ensembles)
    figure = new_figure(2.75 * len(ensembles) + 1.2, 3.35)
    axes = figure.subplots(1, len(ensembles), sharey=True, squeeze=False)[0]
    edges = np.linspace(-180, 180, bins + 1)
    for ax, (name, (phi, psi, weights)) in zip(axes, ensembles.items(), strict=True):
        probability = torus_histogram(np.stack([np.asarray(phi), np.asarray(psi)], axis=1), bins, weights)
        energy = np.full_like(probability, np.nan)
        np.log(probability, out=energy, where=probability > 0)
        energy = np.nanmax(energy) - energy
        mesh = ax.pcolormesh(edges, edges, energy.T, cmap="viridis", vmin=0, vmax=highest, rasterized=True)
        ax.set_aspect("equal")
        ax.set_title(name)
        for spine in ax.spines.values():
            spine.set_visible(True)
        _degrees(ax, "φ / degrees", "ψ / degrees" if ax is axes[0] else None)
        ax.axvline(0, color=FAINT, linewidth=0.6, linestyle=":")
    bar = figure.colorbar(mesh, ax=list(axes), extend="max", aspect=18, pad=0.02, shrink=0.82)
    bar.set_label("free energy / kT")
    bar.outline.set_visible(False)
    figure.set_dpi(200)  # of the rasterised maps
    return figure


@styled
def phi_profile(
    ensembles: Mapping[str, tuple[ArrayLike, ArrayLike | None]],
    *,
    bins: int = 48,
    label: str = "φ",
    seed: int = 0,
) -> Figure:
    """Free energy along an angle, with bands of one standard error from a block bootstrap.

    Profiles are aligned where they are all known best: by their average over the bins, weighted with the
    first ensemble's population. Aligned by the minimum, the noise of one bin would shift a whole curve.

    Parameters
    ----------
    ensembles : mapping of name to (angles, weights or None)
        Radians, in the order they were made.
    bins : int
    label : str
        Of the angle.
    seed : int
        Of the bootstrap.
    """
    require_some(ensembles)
    figure = new_figure(5.3, 3.5)
    ax = figure.subplots()
    colors, anchor = colors_of(ensembles), None
    for k, (name, (angles, weights)) in enumerate(ensembles.items()):
        profile = free_energy_profile(angles, weights, bins=bins, seed=seed)
        x, f = (
            np.degrees(profile.centres),
            np.where(np.isfinite(profile.free_energy), profile.free_energy, np.nan),
        )
        population = np.exp(-profile.free_energy)
        if anchor is None:
            anchor = (population, f)
        shared = np.isfinite(f) & np.isfinite(anchor[1])
        if shared.any():
            f = f + np.average((anchor[1] - f)[shared], weights=anchor[0][shared])
        style = LINE_STYLES[k % len(LINE_STYLES)]
        ax.plot(x, f, color=colors[name], linestyle=style, label=name, marker=".", markersize=4)
        ax.fill_between(x, f - profile.error, f + profile.error, color=colors[name], alpha=0.2, linewidth=0)
    _degrees(ax, f"{label} / degrees")
    ax.set_ylabel("free energy / kT")
    ax.set_ylim(bottom=min(-0.3, ax.get_ylim()[0]))
    ax.grid(axis="y")
    legend_above(figure, ax.get_legend_handles_labels()[1])
    return figure


@styled
def energy_histograms(ensembles: Mapping[str, tuple[ArrayLike, ArrayLike | None]], *, bins: int = 60) -> Figure:
    """Densities of the reduced energy, over the range of the first ensemble and its surroundings.

    Parameters
    ----------
    ensembles : mapping of name to (energies, weights or None)
        kT. The share that lies beyond the drawn range, infinite energies included, is written into the
        legend.
    """
    require_some(ensembles)
    first = np.asarray(next(iter(ensembles.values()))[0], dtype=np.float64)
    first = first[np.isfinite(first)]
    if not len(first):
        raise InputError("The first ensemble has no finite energy, so there is no range to draw; check its energies.")
    low, high = np.quantile(first, [0.001, 0.999])
    margin = 0.5 * (high - low) or 1.0
    edges = np.linspace(low - margin / 2, high + margin, bins + 1)
    figure = new_figure(5.3, 3.4)
    ax = figure.subplots()
    colors = colors_of(ensembles)
    for k, (name, (energies, weights)) in enumerate(ensembles.items()):
        u = np.asarray(energies, dtype=np.float64)
        w = normalized_weights(weights, len(u))
        if np.isnan(u[w > 0]).any():
            raise InputError(f"{name} holds energies that are not a number; leave those frames out and say how many.")
        inside = (u >= edges[0]) & (u <= edges[-1])
        share, _ = np.histogram(u[inside], edges, weights=w[inside])
        beyond = w[~inside & (w > 0)].sum()
        text = name if beyond < 5e-4 else f"{name} ({100 * beyond:.2g} % beyond)"
        style = LINE_STYLES[k % len(LINE_STYLES)]
        density = share / np.diff(edges)
        ax.stairs(density, edges, color=colors[name], linestyle=style, linewidth=2, label=text)
        ax.stairs(density, edges, color=colors[name], alpha=0.12, fill=True)
    ax.set(xlabel="reduced energy u / kT", ylabel="density / (1/kT)", xlim=(edges[0], edges[-1]))
    ax.set_ylim(bottom=0)
    legend_above(figure, ax.get_legend_handles_labels()[1])
    return figure


@styled
def log_weight_histogram(reverse: ArrayLike, forward: ArrayLike | None = None, *, bins: int = 60) -> Figure:
    """log p/q on the generator's own samples and on held-out frames of the reference.

    Both are shifted by the estimate of log Z from the samples, so that a perfect generator has all of them at
    zero. What lies far to the right on held-out frames is what an independence chain gets stuck in. The share of
    samples too far to the left to be drawn is written into the legend.

    Parameters
    ----------
    reverse : (n,) array
        -u - log q of samples; -inf for invalid ones, which are counted in the legend.
    forward : (m,) array, optional
        -u - log q of held-out frames; +inf where the generator cannot reach, counted in the legend.
    """
    r = np.asarray(reverse, dtype=np.float64)
    f = np.empty(0) if forward is None else np.asarray(forward, dtype=np.float64)
    if np.isnan(r).any() or np.isnan(f).any() or (r == np.inf).any() or (f == -np.inf).any():
        raise InputError("log weights must be finite, or -inf on samples and +inf on held-out frames.")
    valid = r[np.isfinite(r)]
    if not len(valid):
        raise InputError("No sample has a finite log weight, so there is nothing to draw.")
    top = valid.max()
    shift = top + np.log(np.exp(valid - top).sum() / len(r))
    valid, held = valid - shift, f[np.isfinite(f)] - shift
    everything = np.concatenate([valid, held])
    high = everything.max()
    # a broadened share of a few percent lies far to the left and would squeeze the rest into one bar
    low = max(np.quantile(everything, 0.03) - 0.5, min(high, 0.0) - _LOWEST_LOG_RATIO)
    edges = np.linspace(low, high + 0.03 * (high - low) + 1e-6, bins + 1)
    figure = new_figure(5.3, 3.5)
    ax = figure.subplots()
    size = kish_size(np.exp(valid - valid.max()))
    label = f"samples: ESS {100 * size / len(r):.3g} % of {len(r)}"
    below = (valid < low).sum() / len(r)
    label += "" if below < 5e-4 else f", {100 * below:.2g} % below"
    invalid = len(r) - len(valid)
    _log_weight_stairs(ax, valid, edges, "#d55e00", label + (f", {invalid} invalid" if invalid else ""))
    if forward is not None:
        unreachable = len(f) - len(held)
        largest = f"largest {held.max():.3g}" if len(held) else "none reached"
        label = f"held-out frames: {largest}" + (f", {unreachable} unreachable" if unreachable else "")
        _log_weight_stairs(ax, held, edges, "#4a5560", label)
        if len(held):
            ax.axvline(held.max(), color="#4a5560", linewidth=1.2, linestyle=(0, (4, 2)))
    ax.axvline(0, color=FAINT, linewidth=1, linestyle=":")
    ax.set(xlabel="log p/q (0 is perfect)", ylabel="density", xlim=(edges[0], edges[-1]))
    ax.set_ylim(bottom=0)
    legend_above(figure, ax.get_legend_handles_labels()[1])
    return figure


def _log_weight_stairs(ax: Axes, values: Array, edges: Array, color: str, label: str) -> None:
    density = np.histogram(values, edges)[0] / max(len(values), 1) / np.diff(edges)
    ax.stairs(density, edges, color=color, linewidth=2, label=label)
    ax.stairs(density, edges, color=color, alpha=0.15, fill=True)
