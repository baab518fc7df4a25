"""A sidebar that opens the room one is in and no other: with all names of the API in it every page would be long."""

from __future__ import annotations

from typing import Any

from sphinx.application import Sphinx


def collapse(app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: Any) -> None:
    """Before furo asks for the whole tree."""
    whole = context.get("toctree")
    if whole is not None:
        context["toctree"] = lambda **options: whole(**{**options, "collapse": True})


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("html-page-context", collapse, priority=100)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
