"""The tutorial notebook: a page of the documentation, and a script that runs it without Jupyter.

    python docs/_ext/notebook.py docs/tutorial.ipynb        runs every cell in turn and stores what it shows

A cell shows what it prints and the figures of matplotlib's pyplot that it opens.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any

from docutils import nodes

IMAGE = "image/svg+xml"


def code_cells(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def text_of(part: str | list[str]) -> str:
    """Notebooks keep text as one string or as its lines."""
    return part if isinstance(part, str) else "".join(part)


def run(notebook: dict[str, Any], **replaced: Any) -> dict[str, Any]:
    """Run the code cells in one namespace and put their output into the notebook; the namespace is returned.

    Parameters
    ----------
    notebook : dict
        As JSON gives it.
    **replaced
        Values for names that a cell assigns at its top level, in place of its own: a test makes everything smaller.

    Raises
    ------
    ValueError
        If no cell assigns one of those names.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    namespace: dict[str, Any] = {"__name__": "__notebook__"}
    left = set(replaced)
    for number, cell in enumerate(code_cells(notebook), 1):
        source = text_of(cell["source"])
        tree = ast.parse(source)
        for statement in tree.body:
            if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
                name = statement.targets[0].id
                if name in replaced:
                    statement.value = ast.copy_location(ast.Constant(replaced[name]), statement.value)
                    left.discard(name)
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(tree, f"cell {number}", "exec"), namespace)
        outputs = []
        if printed.getvalue():
            outputs.append({"output_type": "stream", "name": "stdout", "text": printed.getvalue().splitlines(True)})
        for figure in map(plt.figure, plt.get_fignums()):
            drawn = io.StringIO()
            with matplotlib.rc_context({"svg.hashsalt": "tutorial"}):
                figure.savefig(drawn, format="svg", bbox_inches="tight", metadata={"Date": None})
            data = {IMAGE: drawn.getvalue().splitlines(True)}
            outputs.append({"output_type": "display_data", "data": data, "metadata": {}})
        plt.close("all")
        cell["outputs"], cell["execution_count"] = outputs, number
    if left:
        raise ValueError(f"No cell assigns {', '.join(sorted(left))}.")
    return namespace


def to_markdown(notebook: dict[str, Any]) -> str:
    """The notebook as a page: text as it is, code in fences, output below in plain fences and pictures."""
    parts = []
    for cell in notebook["cells"]:
        source = text_of(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            if output["output_type"] == "stream":
                parts.append(f"```text\n{text_of(output['text']).rstrip()}\n```")
            elif IMAGE in output["data"]:
                svg = text_of(output["data"][IMAGE])
                picture = svg[svg.index("<svg") :].replace("\n\n", "\n")
                parts.append(f'<div class="cell-output">\n{picture.rstrip()}\n</div>')
    return "\n\n".join(parts) + "\n"


def setup(app: Any) -> dict[str, Any]:
    """Make .ipynb files pages."""
    from myst_parser.parsers.sphinx_ import MystParser

    class NotebookParser(MystParser):
        supported = ("notebook",)

        def parse(self, inputstring: str, document: nodes.document) -> None:
            super().parse(to_markdown(json.loads(inputstring)), document)

    app.add_source_suffix(".ipynb", "notebook")
    app.add_source_parser(NotebookParser)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}


if __name__ == "__main__":
    path = Path(sys.argv[1])
    made = json.loads(path.read_text())
    run(made)
    path.write_text(json.dumps(made, indent=1, ensure_ascii=False) + "\n")
