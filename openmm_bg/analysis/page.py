"""The HTML of a report: small pieces that escape what they are given, and one style sheet."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape
from urllib.parse import quote

from openmm_bg.analysis.formatting import MINUS
from openmm_bg.analysis.page_style import STYLE
from openmm_bg.version import __version__


def document(title: str, body: str, script: str = "") -> str:
    """The whole page; a script, where there is one, comes last."""
    program = f"<script>\n{script}</script>\n" if script else ""
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n{body}\n"
        f"<footer>Written by openmm_bg {escape(__version__)}.</footer>\n</main>\n{program}</body>\n</html>\n"
    )


def head(title: str, verdict: str, tone: str, word: str, text: str) -> str:
    """Title, verdict and a paragraph of context."""
    lead = f'\n<p class="lead">{escape(text)}</p>' if text else ""
    return (
        f"<header>\n<h1>{escape(title)}</h1>\n"
        f'<div class="verdict {tone}"><strong>{escape(word)}</strong><p>{escape(verdict)}</p></div>'
        f"{lead}\n</header>"
    )


def cards(items: Sequence[tuple[str, str, str]]) -> str:
    """The figures that matter: label, value, note."""
    if not items:
        return ""
    parts = []
    for label, value, note in items:
        extra = f'<dd class="note">{escape(note)}</dd>' if note else ""
        parts.append(f'<div><dt>{escape(label)}</dt><dd class="value">{escape(value)}</dd>{extra}</div>')
    return f'<dl class="cards">{"".join(parts)}</dl>'


def section(name: str, title: str, parts: Sequence[str], *, grid: bool = False) -> str:
    """A headed section; nothing at all where there is nothing to show."""
    if not parts:
        return ""
    inner = "\n".join(parts)
    inner = f'<div class="grid">\n{inner}\n</div>' if grid else inner
    return f'<section aria-labelledby="{name}">\n<h2 id="{name}">{escape(title)}</h2>\n{inner}\n</section>'


def figure(number: int, title: str, svg: str, caption: str, data: str, *, wide: bool) -> str:
    """A card with one drawing, which is not escaped, and its data, if any."""
    # only the view box keeps the shape; the page gives the size
    opening, rest = svg.split(">", 1)
    opening = re.sub(r'\s(width|height)="[^"]*"', "", opening) + f' aria-label="{escape(title)}"'
    kind = "wide" if wide else ""
    return _card(number, kind, title, f'<div class="canvas">{opening}>{rest}</div>', caption, data)


def molecules(number: int, title: str, panels: Sequence[tuple[str, str, str]], caption: str, data: str) -> str:
    """A card with drawings of molecules side by side, which are not escaped, each with its name and a note."""
    parts = [
        f"<div>{svg}<p><strong>{escape(name)}</strong>{f'<br>{escape(note)}' if note else ''}</p></div>"
        for svg, name, note in panels
    ]
    inner = (
        f'<div class="panels" aria-label="{escape(title)}">{"".join(parts)}</div>'
        '<p class="hint" hidden>Drag, or use the arrow keys, to turn; a double click or Home turns back.</p>'
    )
    return _card(number, "wide molecules", title, inner, caption, data)


def _card(number: int, kind: str, title: str, inner: str, caption: str, data: str) -> str:
    below = f"\n<figcaption>{escape(caption)}</figcaption>" if caption else ""
    style = f' class="{kind}"' if kind else ""
    head = _headed(title, data, f"figure-{number}")
    return f'<figure{style} id="figure-{number}">\n{head}\n{inner}{below}\n</figure>'


def _headed(title: str, data: str, name: str) -> str:
    """A heading and a link that saves data: the link holds them itself, so neither network nor script is needed."""
    link = ""
    if data:
        file = "-".join([name, *re.findall(r"[a-z0-9]+", title.lower())])
        link = (
            f'<a class="data" download="{file}.csv" href="data:text/csv;charset=utf-8,{quote(data, safe=",:;()=+")}" '
            f'aria-label="Data of {escape(title)} (CSV)">data (CSV)</a>'
        )
    return f'<div class="headed"><h3>{escape(title)}</h3>{link}</div>'


def table(
    number: int, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], caption: str, data: str
) -> str:
    """A table and its data; columns in which every cell begins like a number are set flush right."""
    numeric = [i > 0 and bool(rows) and all(_is_number(row[i]) for row in rows) for i in range(len(columns))]
    kind = [' class="number"' if right else "" for right in numeric]
    top = "".join(f'<th scope="col"{k}>{escape(c)}</th>' for c, k in zip(columns, kind, strict=True))
    lines = []
    for row in rows:
        cells = "".join(f"<td{k}>{escape(c)}</td>" for c, k in zip(row[1:], kind[1:], strict=True))
        lines.append(f'<tr><th scope="row">{escape(row[0])}</th>{cells}</tr>')
    below = f"\n<p>{escape(caption)}</p>" if caption else ""
    return (
        f'<div class="table">\n{_headed(title, data, f"table-{number}")}\n'
        f'<div class="scroll" tabindex="0"><table>\n<thead><tr>{top}</tr></thead>\n'
        f"<tbody>\n{chr(10).join(lines)}\n</tbody>\n</table></div>{below}\n</div>"
    )


def _is_number(text: str) -> bool:
    return re.match(rf"[{MINUS}+-]?(\d|∞)", text) is not None or text in ("not measured", "")


def notes(paragraphs: Sequence[str]) -> str:
    """What the page does not show."""
    return f'<ul class="notes">{"".join(f"<li>{escape(p)}</li>" for p in paragraphs)}</ul>'


def definitions(facts: Mapping[str, str]) -> str:
    """Names and values in two columns."""
    items = "".join(f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in facts.items())
    return f'<dl class="facts">{items}</dl>'
