"""What docstrings need to become pages: references by any path, lines and bars as they are, no fields without words.

A name of this package may be written by any path that leads to it from where it is written: what it means is found by
importing it. `openmm_bg.training.fit`, `openmm_bg.fit` and `fit` in a docstring beside it are one function with one
page. What exists and has no page stays plain; what does not exist is a warning.
"""

from __future__ import annotations

import ast
import functools
import itertools
import re
import textwrap
from collections.abc import Iterable
from typing import Any

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

_LITERAL = re.compile(r"(``.*?``)")


@functools.cache
def found(path: str) -> Any:
    """What a dotted path leads to; None where it leads nowhere."""
    import openmm_bg

    head, *rest = path.split(".")
    thing: Any = openmm_bg if head == "openmm_bg" else None
    for name in rest:
        thing = getattr(thing, name, None)
    return thing


def candidates(target: str, written_in: str) -> list[str]:
    """The paths that a name may stand for, the nearest first."""
    parts = written_in.split(".") if written_in else ["openmm_bg"]
    return [".".join([*parts[:n], target]) for n in range(len(parts), 0, -1)] + [target]


def resolve(app: Sphinx, env: BuildEnvironment, node: pending_xref, text: nodes.TextElement) -> nodes.Element | None:
    """The page of the object that a reference means, under whatever name that page has."""
    if node.get("refdomain") != "py":
        return None
    written_in = re.search(r"docstring of ([\w.]+)", str(node.source or ""))
    things = [found(path) for path in candidates(node["reftarget"], written_in[1] if written_in else "")]
    objects = {name: entry for name, entry in env.domains.python_domain.objects.items() if not entry.aliased}
    # the table of a room shows first sentences of docstrings without saying where they are from
    things += [found(name) for name in objects if name.endswith(f".{node['reftarget']}")]
    thing = next((thing for thing in things if thing is not None), None)
    if thing is None:
        return None
    pages = {id(found(name)): (name, entry) for name, entry in objects.items()}
    if id(thing) not in pages:
        return text
    name, entry = pages[id(thing)]
    where = app.builder.get_relative_uri(node["refdoc"], entry.docname)
    return nodes.reference("", "", text, internal=True, refuri=f"{where}#{entry.node_id}", reftitle=name)


def keep_bars(app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """In text |x| is an absolute value and no substitution of reStructuredText."""
    formula = False
    for i, line in enumerate(lines):
        if line.strip().startswith((".. math::", "::")):
            formula = True
        elif line and not line[0].isspace():
            formula = line.startswith((">>>", "..."))
        if not formula and "|" in line and ":math:" not in line:
            parts = _LITERAL.split(line)
            lines[i] = "".join(part if k % 2 else re.sub(r"(?<!\\)\|", r"\\|", part) for k, part in enumerate(parts))


def language(block: Iterable[str]) -> str:
    """Of a few lines: Python, or a formula."""
    try:
        ast.parse(textwrap.dedent("\n".join(block)))
    except SyntaxError:
        return "text"
    return "python"


def keep_lines(app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Before the first section, an indented paragraph is a formula or a few lines of code, not a quotation."""
    before = ""
    for i, line in enumerate(list(lines)):
        if set(line) == {"-"}:
            break
        indented = line.startswith("    ")
        if indented and not lines[i - 1] and not before.startswith((" ", ".. ", "- ")) and not before.endswith("::"):
            block = itertools.takewhile(lambda line: line.startswith("    ") or not line, lines[i:])
            lines[i] = f".. code-block:: {language(block)}\n\n{line}"
        before = line or before
    lines[:] = "\n".join(lines).split("\n")


def skip_fields(app: Sphinx, what: str, name: str, thing: Any, skip: bool, options: Any) -> bool | None:
    """Fields of named tuples are told in the docstring of the class."""
    return True if str(getattr(thing, "__doc__", "")).startswith("Alias for field number") else None


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("missing-reference", resolve)
    app.connect("autodoc-process-docstring", keep_lines, priority=100)
    app.connect("autodoc-process-docstring", keep_bars, priority=900)
    app.connect("autodoc-skip-member", skip_fields)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
