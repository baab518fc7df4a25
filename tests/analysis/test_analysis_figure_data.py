"""The numbers that come off a figure are those that went into it."""

from __future__ import annotations

import csv
import io

import numpy as np
import pytest
from matplotlib.figure import Figure

from openmm_bg.analysis.figure_data import figure_csv, table_csv


def columns(text: str) -> dict[str, list[str]]:
    header, *rows = csv.reader(io.StringIO(text))
    assert len(set(header)) == len(header) and all(len(row) == len(header) for row in rows)
    return {name: [row[k] for row in rows] for k, name in enumerate(header)}


def test_curves_over_the_same_points_stand_side_by_side_and_others_below():
    axes = Figure().subplots()
    axes.plot([1, 2, 3], [0.5, np.nan, 1 / 3], label="a")
    axes.plot([1, 2, 3], [4e-9, 123456789, np.nan], label="b")
    axes.plot([2, 2.5], [1, 2], label="c, later")
    axes.plot([], [], label="nothing seen")
    axes.axhline(0)
    axes.axvline(2)
    axes.set(xlabel="t / ps", ylabel="y")
    assert columns(figure_csv(axes.figure)) == {
        "t / ps": ["1", "2", "3", "2", "2.5"],
        "a: y": ["0.5", "", "0.333333", "", ""],
        "b: y": ["4e-09", "123456789", "", "", ""],
        "c, later: y": ["", "", "", "1", "2"],
    }


def test_a_band_belongs_to_its_line_and_has_the_gaps_that_it_shows():
    axes = Figure().subplots()
    x = np.linspace(-1, 1, 7)
    y, error = x**2, np.array([0.1, np.nan, 0.2, 0.3, np.nan, np.nan, 0.4])
    axes.plot(x, y)
    axes.fill_between(x, y - error, y + error)
    found = columns(figure_csv(axes.figure))
    for name, expected in (("y (lower)", y - error), ("y (upper)", y + error)):
        numbers = [float(cell or "nan") for cell in found[name]]
        assert numbers == pytest.approx(expected, abs=1e-6, nan_ok=True)


def test_outlines_and_meshes_give_their_bins():
    figure = Figure()
    left, middle, right = figure.subplots(1, 3)
    left.stairs([1, 2], [0, 1, 3], label="h")
    left.stairs([1, 2], [0, 1, 3], fill=True)  # its tint
    mesh = right.pcolormesh([0, 1, 2], [10, 20, 30], [[1, np.nan], [3, 4]], rasterized=True)
    right.set(title="map", xlabel="p", ylabel="q")
    middle.pcolormesh([0, 1, 2], [10, 20, 30], [[5, 6], [7, np.nan]])
    middle.set(title="other", xlabel="p", ylabel="q")
    figure.colorbar(mesh, ax=[middle, right]).set_label("height")  # of both
    assert columns(figure_csv(figure)) == {
        "x (from)": ["0", "1", "", "", "", ""],
        "x (to)": ["1", "3", "", "", "", ""],
        "h: y": ["1", "2", "", "", "", ""],
        "p": ["", "", "0.5", "1.5", "0.5", "1.5"],
        "q": ["", "", "15", "15", "25", "25"],
        "other: height": ["", "", "5", "6", "7", ""],
        "map: height": ["", "", "1", "", "3", "4"],
    }


def test_panels_that_share_an_axis_share_its_label():
    upper, lower = Figure().subplots(2, 1, sharex=True)
    upper.plot([1, 2], [3, 4])
    lower.plot([1, 2], [5, 6])
    upper.set_ylabel("u")
    lower.set(xlabel="time", ylabel="v")
    assert columns(figure_csv(upper.figure)) == {"time": ["1", "2"], "u": ["3", "4"], "v": ["5", "6"]}


def test_nothing_gives_nothing():
    assert figure_csv(Figure()) == ""


def test_a_table_is_read_by_other_programs():
    assert table_csv(("a", "b"), [("1,000", "−3.1 ± 0.2")]) == 'a,b\n"1,000",-3.1 ± 0.2\n'  # noqa: RUF001 - a minus sign, as tables print it
