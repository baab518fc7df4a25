"""Formulas as MathML, which browsers draw themselves: nothing is loaded from a network and no script runs.

docutils brings the translation from LaTeX; this hands it the formulas of Sphinx, with their numbers.
"""

from __future__ import annotations

import re
from typing import Any

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError

_APPLIED = re.compile(r"(<mo>&ApplyFunction;</mo>)(?!\s*<mo[^>]*>[(\[])")


def translated(node: nodes.Element, block: bool) -> str:
    """The MathML of a formula; one that cannot be translated stops the build."""
    try:
        formula = tex2mathml(node.astext(), as_block=block)
    except MathError as error:
        raise ExtensionError(f"{node.source}:{node.line}: the formula {node.astext()!r} is no LaTeX: {error}") from None
    # what TeX does by itself: a thin space between a function's name and a letter, and primes that lean
    formula = re.sub(
        r"(<mo>&ApplyFunction;</mo>)(?!\s*<mo[^>]*>[(\[])", r'\1<mspace width="0.1667em"></mspace>', formula
    )
    return formula.replace("<mo>'</mo>", '<mo lspace="0" rspace="0">\u2032</mo>')


def inline(self: Any, node: nodes.math) -> None:
    self.body.append(translated(node, block=False))
    raise nodes.SkipNode


def display(self: Any, node: nodes.math_block) -> None:
    self.body.append(self.starttag(node, "div", CLASS="math"))
    self.body.append(translated(node, block=True))
    if node.get("number"):
        number = str(node["number"])
        self.body.append(f'<span class="eqno">({number})')
        self.add_permalink_ref(node, "Link to this equation")
        self.body.append("</span>")
    self.body.append("</div>\n")
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_html_math_renderer("mathml", (inline, None), (display, None))
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
