"""One page that says what came out: a single HTML file that needs no network and no neighbours."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from openmm_bg.analysis import page
from openmm_bg.analysis.figure_data import table_csv
from openmm_bg.analysis.molecule_view import MoleculeView, script
from openmm_bg.analysis.style import prefix_ids, split_data
from openmm_bg.errors import InputError
from openmm_bg.files import write_atomically


class Status(Enum):
    """How a verdict is meant, told by colour and by word."""

    GOOD = "Passed"
    CAUTION = "With care"
    BAD = "Failed"
    NEUTRAL = "Result"


@dataclass(frozen=True)
class Card:
    """One figure that matters, such as ``Card("Acceptance", "36 %", "of 8000 proposals")``."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Summary:
    """The head of a report.

    Attributes
    ----------
    verdict : str
        One sentence.
    status : Status
    text : str
        A paragraph of context; may be empty.
    cards : sequence of Card
        Four or so.
    """

    verdict: str
    status: Status = Status.NEUTRAL
    text: str = ""
    cards: Sequence[Card] = ()


@dataclass(frozen=True)
class Figure:
    """A figure with its caption.

    Attributes
    ----------
    title, caption : str
    svg : str
        One inline ``<svg>`` element: :func:`openmm_bg.analysis.to_svg`. It is not escaped; draw it yourself. The
        numbers that it carries become a download.
    wide : bool
        Takes the full width of the page.
    """

    title: str
    svg: str
    caption: str = ""
    wide: bool = False


@dataclass(frozen=True)
class Table:
    """A table of text; numbers come through :func:`openmm_bg.analysis.format_value`.

    Attributes
    ----------
    title, caption : str
    columns : sequence of str
    rows : sequence of sequences of str
        As long as columns. The first cell heads its row.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""


def report(
    path: str | os.PathLike[str],
    *,
    title: str,
    summary: Summary,
    figures: Sequence[Figure | MoleculeView] = (),
    tables: Sequence[Table] = (),
    notes: Sequence[str] = (),
    provenance: Mapping[str, str] | None = None,
) -> Path:
    """Write a report: verdict, key figures, figures, tables, limits, provenance.

    Every figure and table has a link that saves its numbers as CSV; the link holds them, so it works offline. Only a
    :class:`~openmm_bg.analysis.MoleculeView` needs a script to turn, and without one it is still drawn.

    The file appears whole or not at all: it is written beside its place and then moved there.

    Parameters
    ----------
    path : path
        Of the HTML file, in a folder that exists.
    title : str
    summary : Summary
    figures : sequence of Figure or MoleculeView
    tables : sequence of Table
    notes : sequence of str
        What a reader must know to not believe too much; a paragraph each.
    provenance : mapping of str to str, optional
        Versions, seeds, command, hash of the System.

    Returns
    -------
    Path
        Where it lies.

    Examples
    --------
    >>> report("report.html", title="Alanine dipeptide", summary=Summary("It works."))    # doctest: +SKIP
    """
    target = Path(path)
    if not target.parent.is_dir():
        raise InputError(f"The folder {target.parent} does not exist; make it before writing the report.")
    for table in tables:
        if any(len(row) != len(table.columns) for row in table.rows):
            raise InputError(f"A row of the table {table.title!r} does not have its {len(table.columns)} cells.")
    for figure in figures:
        if isinstance(figure, Figure) and not (figure.svg.startswith("<svg") and figure.svg.endswith("</svg>")):
            raise InputError(f"The figure {figure.title!r} is not one <svg> element; make it with to_svg.")
    body = [page.head(title, summary.verdict, summary.status.name.lower(), summary.status.value, summary.text)]
    body.append(page.cards([(card.label, card.value, card.note) for card in summary.cards]))
    drawn = [_figure(number, figure) for number, figure in enumerate(figures, 1)]
    body.append(page.section("figures", "Figures", drawn, grid=True))
    written = [
        page.table(number, t.title, t.columns, t.rows, t.caption, table_csv(t.columns, t.rows))
        for number, t in enumerate(tables, 1)
    ]
    body.append(page.section("numbers", "Numbers", written))
    body.append(page.section("limits", "Limits", [page.notes(notes)] if notes else []))
    body.append(page.section("provenance", "Provenance", [page.definitions(provenance)] if provenance else []))
    program = script() if any(isinstance(figure, MoleculeView) for figure in figures) else ""
    document = page.document(title, "\n".join(part for part in body if part), program)
    write_atomically(target, document.encode())
    return target


def _figure(number: int, figure: Figure | MoleculeView) -> str:
    """Numbered anew, so that even one figure shown twice has two sets of ids."""
    prefix = f"f{number}"
    if isinstance(figure, Figure):
        svg, data = split_data(figure.svg)
        return page.figure(number, figure.title, prefix_ids(svg, prefix), figure.caption, data, wide=figure.wide)
    panels = [
        (prefix_ids(svg, prefix), conformation.name, conformation.note)
        for svg, conformation in zip(figure.drawings(), figure.conformations, strict=True)
    ]
    return page.molecules(number, figure.title, panels, figure.caption, figure.csv())
