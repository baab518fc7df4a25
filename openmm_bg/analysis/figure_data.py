"""The numbers of a figure, read off what is drawn, and those of a table, as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from openmm_bg.analysis.formatting import MINUS
from openmm_bg.analysis.statistics import Array

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Columns = list[tuple[str, Array]]


@dataclass
class _Block:
    """Columns over the same points."""

    points: Columns
    values: Columns = field(default_factory=list)

    def shares(self, points: Columns) -> bool:
        return [name for name, _ in self.points] == [name for name, _ in points] and all(
            np.array_equal(mine, other) for (_, mine), (_, other) in zip(self.points, points, strict=True)
        )


def figure_csv(figure: Figure) -> str:
    """What a figure shows, as comma-separated values, without a second computation that could differ from it.

    Lines with the bands around them, outlines of histograms and coloured meshes are read; their columns are named by
    legend and axis labels, in the units of the axes. Curves over the same points stand side by side, others below each
    other, with empty cells where a column does not apply. Lines across the whole axes and filled shapes are decoration.

    Parameters
    ----------
    figure : matplotlib.figure.Figure

    Returns
    -------
    str
        A header and a row for every point, six significant digits; empty where nothing is drawn that could be read.

    Examples
    --------
    >>> from matplotlib.figure import Figure
    >>> figure = Figure()
    >>> axes = figure.subplots()
    >>> _ = axes.plot([0, 1], [0.5, 0.25], label="MD")
    >>> _ = axes.set(xlabel="time / ps", ylabel="share")
    >>> print(figure_csv(figure))
    time / ps,MD: share
    0,0.5
    1,0.25
    <BLANKLINE>
    """
    blocks: list[_Block] = []
    for points, values in _drawn(figure):
        block = next((b for b in blocks if b.shares(points)), None)
        if block is None:
            blocks.append(block := _Block(points))
        block.values += values
    names = list(dict.fromkeys(name for b in blocks for name, _ in [*b.points, *b.values]))
    rows = []
    for block in blocks:
        filled = ~np.isnan([values for _, values in block.values]).all(axis=0)
        cells = {name: column[filled] for name, column in [*block.points, *block.values]}
        empty = np.full(int(filled.sum()), np.nan)
        rows += [[_number(x) for x in row] for row in zip(*(cells.get(name, empty) for name in names), strict=True)]
    return rows_csv([names, *rows]) if rows else ""


def table_csv(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table as it stands on the page, with a hyphen for a minus sign: that is what other programs read."""
    return rows_csv([columns, *rows]).replace(MINUS, "-")


def rows_csv(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text as CSV, the header being the first."""
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerows(rows)
    return stream.getvalue()


def _drawn(figure: Figure) -> Iterator[tuple[Columns, Columns]]:
    """Points and values of everything that shows numbers."""
    from matplotlib.collections import PolyCollection, QuadMesh
    from matplotlib.lines import Line2D
    from matplotlib.patches import StepPatch

    bars = [mesh.colorbar.ax for ax in figure.axes for mesh in ax.findobj(QuadMesh) if mesh.colorbar is not None]
    height = next((bar.get_ylabel() for bar in bars), "") or "value"  # one bar serves every map of a figure
    for ax in figure.axes:
        if ax in bars:
            continue
        x, y = (_axis_label(ax, axis) for axis in "xy")
        line = None  # that a band belongs to: the one drawn before it
        for artist in ax.get_children():
            if isinstance(artist, Line2D) and artist.get_transform() is ax.transData and len(artist.get_xdata()):
                line = artist.get_xydata().T
                name = _column(ax, artist, y)
                yield [(x, line[0])], [(name, line[1])]
            elif isinstance(artist, PolyCollection) and line is not None:
                lower, upper = _band(artist, line[0])
                yield [(x, line[0])], [(f"{name} (lower)", lower), (f"{name} (upper)", upper)]
            elif isinstance(artist, StepPatch) and not artist.get_fill():
                heights, edges, _ = artist.get_data()
                points = [(f"{x} (from)", edges[:-1]), (f"{x} (to)", edges[1:])]
                yield points, [(_column(ax, artist, y), heights)]
            elif isinstance(artist, QuadMesh):
                corners = artist.get_coordinates()
                centres = (corners[:-1, :-1] + corners[1:, 1:]) / 2
                values = np.ma.filled(artist.get_array().astype(np.float64), np.nan).ravel()
                points = [(x, centres[..., 0].ravel()), (y, centres[..., 1].ravel())]
                yield points, [(_column(ax, artist, height), values)]


def _band(artist: Any, x: Array) -> tuple[Array, Array]:
    """Lowest and highest corner of a filled band at each point of its line; NaN where it has none."""
    corners = np.concatenate([path.vertices for path in artist.get_paths()] or [np.empty((0, 2))])
    lower, upper = np.full((2, len(x)), np.nan)
    for k, position in enumerate(x):
        heights = corners[corners[:, 0] == position, 1]
        if len(heights):
            lower[k], upper[k] = heights.min(), heights.max()
    return lower, upper


def _column(ax: Axes, artist: Any, quantity: str) -> str:
    label = str(artist.get_label())
    name = ax.get_title() if label.startswith("_") else label
    return f"{name}: {quantity}" if name else quantity


def _axis_label(ax: Axes, axis: str) -> str:
    """Of the axes themselves, or of those that share their axis with them."""
    shared = getattr(ax, f"get_shared_{axis}_axes")().get_siblings(ax)
    labels = [getattr(a, f"get_{axis}label")() for a in [ax, *shared]]
    return next((label for label in labels if label), axis)


def _number(value: float) -> str:
    if np.isnan(value):
        return ""
    return f"{value:.0f}" if value == np.round(value) and abs(value) < 1e15 else f"{value:.6g}"
