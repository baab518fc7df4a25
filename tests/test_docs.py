"""The documentation: every code block is run, every command is understood, every public name has a page.

docs/README.md describes the comments in the pages that make a block small enough for a test, or prepare what it needs.
"""

from __future__ import annotations

import ast
import contextlib
import doctest
import importlib
import importlib.util
import io
import json
import os
import pkgutil
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).resolve().parents[1] / "docs"
ROOMS = (
    "analysis", "app", "coordinates", "energies", "flows", "sampling", "systems", "training", "workflow"
)  # fmt: skip

# the wheel is tested outside the checkout, where there are no pages
if not DOCS.is_dir():
    pytest.skip("the docs folder is not beside the tests", allow_module_level=True)

PAGES = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md") if "_build" not in path.parts)
_PARTS = re.compile(
    r"^<!-- (?P<kind>setup|rehearsal)\n(?P<comment>.*?)^-->$|^```(?P<language>\w+)\n(?P<block>.*?)^```$", re.M | re.S
)


def blocks_of(page: str) -> list[tuple[int, str]]:
    """What of a page is run, in order: line number and code, hidden setup included, made small."""
    text = (DOCS / page).read_text()
    found: list[tuple[int, str]] = []
    smaller: list[str] = []
    for part in _PARTS.finditer(text):
        line = text[: part.start()].count("\n") + 2
        if part["kind"] == "setup":
            found.append((line, part["comment"]))
        elif part["kind"] == "rehearsal":
            smaller = part["comment"].splitlines()
        elif part["language"] == "python":
            code = part["block"]
            for rule in smaller:
                long, _, short = rule.partition(" => ")
                assert code.count(long) == 1, (
                    f"{page}:{line}: the rehearsal of {long!r} finds it {code.count(long)} times"
                )
                code = code.replace(long, short)
            found.append((line, code))
            smaller = []
    assert not smaller, f"{page}: a rehearsal without a block of Python after it"
    return found


@dataclass
class Tiny:
    """Small things for the pages' hidden setup: made once, or anew where they are changed."""

    folder: Path

    @cached_property
    def molecule(self) -> Any:
        import openmm_bg as bg

        return bg.systems.load("alanine_dipeptide")

    def generator(self, temperature: float = 300.0, system: Any = None) -> Any:
        """Informed by a structure, not trained."""
        import openmm_bg as bg

        molecule = self.molecule
        return bg.BoltzmannGenerator.for_molecule(
            molecule.topology, molecule.system if system is None else system, temperature, positions=molecule.positions
        )

    @cached_property
    def frames(self) -> Any:
        """Frames of a short run, (40, 22, 3) in nm."""
        import openmm_bg as bg

        return bg.simulate(
            self.molecule.system, self.molecule.positions, temperature=300, n_frames=40, steps_per_frame=10, seed=1,
            progress=False,
        ).positions  # fmt: skip

    @cached_property
    def settings(self) -> Any:
        """Of a training that learns nothing."""
        from openmm_bg.training import Settings

        return Settings(batch_size=64, validation_size=64)

    @cached_property
    def adaptive(self) -> Any:
        """The same for an adaptive one."""
        from openmm_bg.training import AdaptiveSettings

        return AdaptiveSettings(
            walkers=4, heating_steps=20, settling_steps=20, steps=100, interval=5, rounds=1, likelihood_steps=1,
            training_steps=1, closing_steps=1, draws=200,
        )  # fmt: skip

    def simulation(self) -> Any:
        """Of alanine dipeptide, ready to go."""
        import openmm
        from openmm import app

        reference = openmm.Platform.getPlatform("Reference")
        integrator = openmm.LangevinMiddleIntegrator(300, 1, 0.001)
        simulation = app.Simulation(self.molecule.topology, self.molecule.system, integrator, reference)
        simulation.context.setPositions(self.molecule.positions)
        return simulation


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Tiny:
    """A folder as a reader would have it: a PDB file, and the results of a run."""
    from importlib.resources import files

    folder = tmp_path_factory.mktemp("docs")
    (folder / "my.pdb").write_text((files("openmm_bg.systems") / "alanine_dipeptide.pdb").read_text())
    tiny = Tiny(folder)
    (folder / "results" / "alanine_dipeptide").mkdir(parents=True)
    tiny.generator().save(folder / "results" / "alanine_dipeptide" / "generator.bg")
    return tiny


@pytest.mark.parametrize("page", [page for page in PAGES if "```python" in (DOCS / page).read_text()])
def test_the_code_of_a_page_runs(page, tiny, monkeypatch):
    monkeypatch.chdir(tiny.folder)
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    namespace: dict[str, Any] = {"__name__": "__page__", "tiny": tiny}
    for line, code in blocks_of(page):
        # a traceback shows the lines of the page
        exec(compile("\n" * (line - 1) + code, str(DOCS / page), "exec"), namespace)


def test_every_command_is_understood():
    """Of the blocks that show a terminal, only what is typed is looked at; nothing is run."""
    from openmm_bg.cli import _parser

    typed = [
        (page, command)
        for page in PAGES
        for block in re.findall(r"^```console\n(.*?)^```$", (DOCS / page).read_text(), re.M | re.S)
        for command in re.findall(r"^\$ openmm-bg (.*)$", block, re.M)
    ]
    assert len(typed) > 8
    for page, command in typed:
        said = io.StringIO()
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            try:
                _parser().parse_args(shlex.split(command, comments=True))
            except SystemExit as end:
                assert end.code == 0, f"{page}: openmm-bg {command}: {said.getvalue()}"


def test_messages_that_are_explained_exist():
    """Quoted with … where a message goes on with a name or a number."""
    import openmm_bg

    written = {
        node.value
        for path in Path(openmm_bg.__file__).parent.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    quoted = re.findall(r"^> (.*)$", (DOCS / "guide" / "troubleshooting.md").read_text(), re.M)
    assert len(quoted) > 15
    for message in quoted:
        for part in message.split("…"):
            assert any(part.strip() in text for text in written), message


def test_the_examples_of_docstrings_run(tmp_path, monkeypatch):
    import openmm_bg

    monkeypatch.chdir(tmp_path)
    names = [module.name for module in pkgutil.walk_packages(openmm_bg.__path__, "openmm_bg.")]
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    said = io.StringIO()
    for module in map(importlib.import_module, ["openmm_bg", *names]):
        for examples in doctest.DocTestFinder().find(module):
            runner.run(examples, out=said.write)
    assert runner.tries > 200
    assert runner.failures == 0, said.getvalue()


def test_every_public_name_has_a_page():
    import openmm_bg as bg

    rooms = {room: importlib.import_module(f"openmm_bg.{room}".rstrip(".")) for room in ("", *ROOMS)}
    listed = set()
    for page in (DOCS / "api").glob("*.md"):
        for table in re.findall(r"\.\. autosummary::\n(.*?)```", page.read_text(), re.S):
            listed |= {line.strip() for line in table.splitlines() if line.strip() and line.strip()[0] != ":"}
    documented = {id(_at(bg, path)) for path in listed}
    for room, module in rooms.items():
        for name in module.__all__:
            if name != "__version__" and not (room == "" and name in ROOMS):
                path = f"openmm_bg.{room}.{name}" if room else f"openmm_bg.{name}"
                assert id(getattr(module, name)) in documented, f"{path} is on no page of docs/api"


def _at(thing: Any, path: str) -> Any:
    for name in path.split("."):
        thing = getattr(thing, name)
    return thing


@pytest.fixture(scope="module")
def notebook():
    spec = importlib.util.spec_from_file_location("docs_notebook", DOCS / "_ext" / "notebook.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_tutorial_runs(notebook, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tutorial = json.loads((DOCS / "tutorial.ipynb").read_text())
    stored = [[output["output_type"] for output in cell["outputs"]] for cell in notebook.code_cells(tutorial)]
    namespace = notebook.run(tutorial, rehearsal=True)
    assert namespace["sampler"].numProposed > 0
    # what the page shows was made by these very cells
    assert [[output["output_type"] for output in cell["outputs"]] for cell in notebook.code_cells(tutorial)] == stored


@pytest.mark.slow
def test_the_documentation_builds_without_a_warning(tmp_path):
    missing = [name for name in ("sphinx", "furo", "myst_parser", "numpydoc") if not importlib.util.find_spec(name)]
    if missing:  # `make test` installs them; who has only the extra `test` can run all else
        pytest.skip(f"{', '.join(missing)} is not installed: pip install openmm_bg[docs]")
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "-q",
        "-W",
        "--keep-going",
        "-b",
        "html",
        str(DOCS),
        str(tmp_path / "html"),
    ]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr
    page = (tmp_path / "html" / "theory" / "move.html").read_text()
    assert "<math" in page and "http" not in "".join(re.findall(r'<(?:script|link)[^>]*(?:src|href)="([^"]*)"', page))
