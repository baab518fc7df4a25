"""One figure of the three parts."""

from pathlib import Path

import numpy as np

import openmm_bg as bg
from _rehman_friesecke.tables import Row
from openmm_bg.analysis.distances import torus_histogram
from openmm_bg.analysis.style import FAINT, LINE_STYLES, colors_of, new_figure, styled


@styled
def draw(
    path: Path,
    *,
    rows: list[Row],
    wells: dict[float, np.ndarray],
    angles: dict[str, np.ndarray],
    curves: dict[str, np.ndarray],
) -> None:
    """Write ``path.svg`` and ``path.png``.

    Parameters
    ----------
    rows : list of dict
        Of all parts.
    wells : dict
        Samples of the masked RealNVP, by inverse temperature.
    angles : dict
        phi and psi, (frames, 2) in radians, by the name of their panel.
    curves : dict
        See ``regularised.pair_rows``.
    """
    figure = new_figure(12.6, 11.2)
    axes = figure.subplots(3, 3)
    for ax, (beta, samples) in zip(axes[0], wells.items(), strict=False):
        _well(ax, beta, samples)
    _floors(axes[0, 2], [row for row in rows if row.get("distance") == "plane"])
    for ax, (name, pair) in zip(axes[1], angles.items(), strict=True):
        _ramachandran(ax, name, pair)
    _potential(axes[2, 0], curves)
    _errors(axes[2, 1], [row for row in rows if row["table"] == "ion pair"], "ion pair: error")
    _errors(
        axes[2, 2],
        [row for row in rows if row["table"] == "alanine dipeptide"],
        "alanine dipeptide: error",
    )
    figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
    figure.savefig(path.with_suffix(".png"), dpi=110)


def _well(ax, beta: float, samples: np.ndarray) -> None:
    """Free energy of the flow's samples in colour, the exact one as lines."""
    well = bg.systems.load("double_well", beta=beta)
    x, y = np.linspace(-2.4, 2.4, 97), np.linspace(-2.4, 2.4, 97)
    counts, _, _ = np.histogram2d(samples[:, 0], samples[:, 1], bins=(x, y))
    density = counts / len(samples) / (x[1] - x[0]) / (y[1] - y[0])
    energy = np.full_like(density, np.nan)
    np.log(density, out=energy, where=density > 0)
    ax.pcolormesh(x, y, (-energy - well.log_z).T, cmap="viridis", vmin=0, vmax=6, rasterized=True)
    a, b = np.meshgrid(x, y, indexing="ij")
    exact = beta * ((a * a - 1) ** 2 / 4 + b * b / 2)
    lines = ax.contour(a, b, exact, levels=[0.2, 1, 2, 4, 6], colors="white", linewidths=0.9)
    ax.clabel(lines, fontsize=8)
    ax.set(title=f"double well, β = {beta:g}", xlabel="x₁", ylabel="x₂", aspect="equal")


def _floors(ax, rows: list[Row]) -> None:
    """W2 in the plane against its floor: on the diagonal nothing can be told from sampling noise."""
    forms = list(dict.fromkeys(row["form"] for row in rows))
    colors = colors_of(forms)
    for form in forms:
        mine = [row for row in rows if row["form"] == form]
        ax.errorbar(
            [row["floor"] for row in mine],
            [row["value"] for row in mine],
            xerr=[row["floor_error"] for row in mine],
            yerr=[row["value_error"] for row in mine],
            fmt="o",
            ms=4,
            lw=1,
            color=colors[form],
            label=f"{form}, {mine[0]['parameters']} parameters",
        )
    largest = 1.08 * max(max(row["floor"], row["value"]) for row in rows)
    ax.plot([0, largest], [0, largest], color=FAINT, lw=1, zorder=0)
    ax.set(title="W₂ to exact samples", xlabel="floor: exact to exact", ylabel="flow to exact")
    ax.set(xlim=(0, largest), ylim=(0, largest), aspect="equal")
    ax.locator_params(nbins=5)
    ax.legend(loc="lower right", fontsize=9)


def _ramachandran(ax, name: str, pair: np.ndarray) -> None:
    wrapped = (pair + np.pi) % (2 * np.pi) - np.pi
    probability = torus_histogram(wrapped, 60)
    energy = np.full_like(probability, np.nan)
    np.log(probability, out=energy, where=probability > 0)
    edges = np.linspace(-180, 180, 61)
    ax.pcolormesh(edges, edges, (np.nanmax(energy) - energy).T, cmap="viridis", vmin=0, vmax=8, rasterized=True)
    ax.set(title=name, xlabel="φ / degrees", ylabel="ψ / degrees", aspect="equal")
    ax.set(xticks=(-120, 0, 120), yticks=(-120, 0, 120))


def _potential(ax, curves: dict[str, np.ndarray]) -> None:
    colors = colors_of(curves)
    for style, (name, u) in zip(LINE_STYLES, ((k, v) for k, v in curves.items() if k != "r"), strict=True):
        ax.plot(curves["r"], u, label=name, color=colors[name], ls=style)
    ax.set(xlim=(0, 0.6), ylim=(-0.5, 14), xlabel="distance / nm", ylabel="u above its minimum / kT")
    ax.set_title("ion pair, threshold 4 kT")
    ax.legend(fontsize=9)


def _errors(ax, rows: list[Row], title: str) -> None:
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    colors = colors_of(kinds)
    for kind in kinds:
        mine = [row for row in rows if row["kind"] == kind]
        x = [row["threshold"] for row in mine]
        ax.plot(x, [row["l1"] for row in mine], "o-", ms=4, lw=1.5, color=colors[kind], label=kind)
        ax.plot(x, [row["l1_bound"] for row in mine], "--", lw=1, color=colors[kind])
    # errors of exactly zero have no place on a logarithmic axis; those of 1e-13 are rounding
    ax.set_yscale("log", nonpositive="mask")
    ax.set(ylim=(1e-15, 10), xlabel="threshold 1/ε / kT", ylabel="L¹ error (dashed: bound)", title=title)
    ax.legend(fontsize=9)
