"""The figure of an example: samples against exact ones, and the figures of merit of every row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np


def draw(panels: list[dict[str, Any]], rows: list[dict[str, Any]], path: Path) -> None:
    """Scatter or histogram panels above, one line per experiment below; written as SVG and PNG.

    Parameters
    ----------
    panels : list of dict
        ``title``, ``exact`` and ``samples`` (n, dimension) arrays.
    rows : list of dict
        With ``target``, ``scheme``, ``ess`` and perhaps ``forward_ess`` and ``annealed_ess``.
    path : Path
        Without suffix.
    """
    columns = max(1, min(4, len(panels)))
    lines = -(-len(panels) // columns)
    # seeds share a line
    names = list(dict.fromkeys(f"{row['target']}, {row['scheme']}" for row in rows))
    below = max(2.0, 0.3 * len(names) + 1.0)
    figure = plt.figure(figsize=(max(7.0, 3.2 * columns), 3.0 * lines + below + 0.4), layout="constrained")
    grid = figure.add_gridspec(lines + 1, columns, height_ratios=[3.0] * lines + [below])
    for number, panel in enumerate(panels):
        axes = figure.add_subplot(grid[number // columns, number % columns])
        exact, samples = panel["exact"], panel["samples"]
        if exact.shape[1] == 2:
            axes.scatter(*exact[:1500].T, s=3, color="#bbbbbb", linewidths=0, label="exact")
            axes.scatter(*samples[:1500].T, s=3, color="#3366aa", linewidths=0, label="flow")
            axes.set_aspect("equal", "datalim")
        else:
            edges = np.linspace(*np.quantile(exact[:, 0], [0.0005, 0.9995]), 60)
            axes.hist(exact[:, 0], edges, density=True, color="#bbbbbb", label="exact")
            axes.hist(samples[:, 0], edges, density=True, histtype="step", color="#3366aa", label="flow")
            axes.set_xlabel("first coordinate")
        axes.set_title(panel["title"], fontsize=9)
        axes.tick_params(labelsize=7)
        if number == 0:
            axes.legend(fontsize=7, markerscale=3, loc="upper left")
    axes = figure.add_subplot(grid[lines, :])
    place = {name: len(names) - 1 - k for k, name in enumerate(names)}
    marks = (
        ("ess", "o", "flow, own draws"),
        ("forward_ess", "x", "flow, exact draws"),
        ("annealed_ess", "^", "annealed"),
    )
    for name, marker, title in marks:
        known = [(row[name], place[f"{row['target']}, {row['scheme']}"]) for row in rows if row.get(name) is not None]
        if known:
            axes.plot(*zip(*known, strict=True), marker, markersize=5, label=title)
    axes.set_yticks(list(place.values()), names, fontsize=7)
    axes.set_xlim(-0.02, 1.03)
    axes.set_ylim(-0.7, len(names) - 0.3)
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    axes.set_xlabel("effective share of samples")
    axes.legend(fontsize=7, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=False)
    for suffix in (".svg", ".png"):
        figure.savefig(path.with_suffix(suffix), dpi=110)
    plt.close(figure)
