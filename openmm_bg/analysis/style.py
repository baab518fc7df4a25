"""How every figure looks, and how it becomes SVG that can stand inside a page."""

from __future__ import annotations

import functools
import hashlib
import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape, unescape
from typing import TYPE_CHECKING, Any, ParamSpec

from openmm_bg.analysis.figure_data import figure_csv
from openmm_bg.errors import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

P = ParamSpec("P")

INK = "#1f2933"
FAINT = "#9aa5b1"

ROLE_COLORS: dict[str, str] = {
    "MD": "#4a5560",
    "generator": "#d55e00",
    "reweighted": "#0072b2",
    "MD with moves": "#009e73",
}
"""Names that keep their colour in every figure (after Okabe and Ito, for colour-blind eyes too)."""

_OTHER_COLORS = ("#cc79a7", "#e69f00", "#56b4e9", "#7a5195", "#8c564b", "#117733")
LINE_STYLES = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)))

_SETTINGS: Any = {
    "font.family": ["DejaVu Sans"],
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.labelsize": 11.5,
    "axes.edgecolor": "#52606d",
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.linewidth": 0.9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "grid.color": "#e4e7eb",
    "grid.linewidth": 0.8,
    "xtick.color": "#52606d",
    "ytick.color": "#52606d",
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "text.color": INK,
    "lines.linewidth": 2.0,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "legend.fontsize": 10.5,
    "legend.handlelength": 2.2,
    "figure.facecolor": "white",
    "svg.fonttype": "none",  # text stays text: it can be read aloud, searched and scaled
    "svg.hashsalt": "openmm_bg",
    "savefig.bbox": None,
}


def colors_of(names: Iterable[str]) -> dict[str, str]:
    """A colour for every name: its own for those in ROLE_COLORS, the next free one for others."""
    names = list(names)
    others = [name for name in names if name not in ROLE_COLORS]
    if len(others) > len(_OTHER_COLORS):
        raise InputError(f"{len(others)} ensembles are more than a figure can tell apart; show {len(_OTHER_COLORS)}.")
    free = dict(zip(others, _OTHER_COLORS, strict=False))
    return {name: ROLE_COLORS.get(name) or free[name] for name in names}


def styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Run a figure function under the house settings and leave matplotlib's own settings as they were."""

    @functools.wraps(draw)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> Figure:
        from matplotlib import rc_context

        with rc_context(_SETTINGS):
            return draw(*args, **kwargs)

    return wrapper


def new_figure(width: float, height: float) -> Figure:
    """An empty figure (inches) that needs neither pyplot nor a display."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def require_some(mapping: Mapping[str, object]) -> None:
    if not mapping:
        raise InputError("There is nothing to draw; give at least one named ensemble.")


def legend_above(figure: Figure, labels: Sequence[str]) -> None:
    """Above the axes, in one row where it fits."""
    room, handle = 54, 6  # characters
    in_one_row = sum(len(label) + handle for label in labels) <= room
    columns = len(labels) if in_one_row else max(1, room // (max(map(len, labels)) + handle))
    figure.legend(loc="outside upper left", ncols=columns, columnspacing=1.4)


def to_svg(figure: Figure, prefix: str | None = None) -> str:
    """A figure as one inline ``<svg>`` element that refers to nothing outside itself and carries its numbers.

    The same figure gives the same text: no date, fixed hashes. Every id carries a prefix, so that several
    figures can stand in one page. The numbers stand in ``<metadata>`` as CSV, read off what is drawn
    (:func:`~openmm_bg.analysis.figure_data.figure_csv`); a report turns them into a download.

    Parameters
    ----------
    figure : matplotlib.figure.Figure
    prefix : str, optional
        A letter followed by letters, digits or hyphens; None takes one from the content's hash.

    Examples
    --------
    >>> from matplotlib.figure import Figure
    >>> to_svg(Figure(), "empty").startswith("<svg")
    True
    """
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context(_SETTINGS):
        # the page gives the ground, which may be dark
        none = {"Date": None, "Creator": None, "Format": None, "Type": None}
        figure.savefig(buffer, format="svg", transparent=True, metadata=none)
    text = buffer.getvalue()
    text = text[text.index("<svg") :].strip()
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text, flags=re.DOTALL)
    # a style sheet inside an inline SVG would rule the whole page; the element itself can say the same
    text = re.sub(r"<defs>\s*<style[^>]*>.*?</style>\s*</defs>", "", text, count=1, flags=re.DOTALL)
    text = text.replace("<svg", '<svg role="img" style="stroke-linejoin: round; stroke-linecap: butt"', 1)
    # the reader's own typeface; DejaVu, with which the layout was measured, is wider than most
    text = text.replace("font-family: 'DejaVu Sans'", "font-family: system-ui, 'Segoe UI', 'DejaVu Sans', sans-serif")
    text = re.sub(r"\n\s*", "\n", text)
    text = prefix_ids(text, prefix or "s" + hashlib.sha256(text.encode()).hexdigest()[:10])
    return with_data(text, figure_csv(figure))


def with_data(svg: str, data: str) -> str:
    """An SVG text that carries data, such as CSV, in a ``<metadata>`` element; unchanged where there is none."""
    return svg.replace(">", f">\n<metadata>{escape(data)}</metadata>", 1) if data else svg


def split_data(svg: str) -> tuple[str, str]:
    """An SVG text without the data that it carries, and these; empty where it carries none."""
    found = re.search(r"\n<metadata>(.*?)</metadata>", svg, flags=re.DOTALL)
    return (svg[: found.start()] + svg[found.end() :], unescape(found[1])) if found else (svg, "")


def prefix_ids(svg: str, prefix: str) -> str:
    """Put a prefix before every id of an SVG text and every reference to one."""
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9-]*", prefix):
        raise InputError(f"{prefix!r} cannot begin an id; use a letter, then letters, digits or hyphens.")
    svg = re.sub(r'(?<=\sid=")(?=[^"])', f"{prefix}-", svg)
    svg = re.sub(r'(?<=href="#)', f"{prefix}-", svg)
    return re.sub(r"(?<=url\(#)", f"{prefix}-", svg)
