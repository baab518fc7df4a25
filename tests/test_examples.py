"""Every example, run as a user runs it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import mdtraj
import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"

if not EXAMPLES.is_dir():
    pytest.skip("the examples folder is not beside the tests", allow_module_level=True)


def run(folder: Path, name: str, *arguments: str) -> str:
    """Standard output of an example that must succeed."""
    result = subprocess.run(
        [sys.executable, EXAMPLES / name, *arguments], cwd=folder, capture_output=True, text=True, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, str]:
    """The short form of alanine_dipeptide.py: its folder and what it printed."""
    folder = tmp_path_factory.mktemp("examples")
    return folder, run(folder, "alanine_dipeptide.py", "--short", "--output", "made")


def test_alanine_dipeptide(made):
    folder, printed = made
    assert re.search(r"effective sample size is \d+\.\d+ % of 2000 draws", printed)
    assert re.search(r"moves: \d+ of 400 accepted", printed)
    assert "left (φ>0):" in printed and "ALA2 φψ W2 (degrees)" in printed
    trajectory = mdtraj.load(str(folder / "made" / "trajectory.dcd"), top=str(folder / "made" / "molecule.pdb"))
    assert trajectory.xyz.shape == (40, 22, 3)


def test_add_bg_move(made):
    folder, _ = made
    printed = run(folder, "add_bg_move.py", "--generator", "made/generator.bg", "--steps", "1000", "--output", "moves")
    assert re.search(r"\d+ of 20 moves were accepted", printed)
    assert len((folder / "moves" / "moves.csv").read_text().splitlines()) == 21
    assert len(mdtraj.load(str(folder / "moves" / "trajectory.dcd"), top=str(folder / "made" / "molecule.pdb"))) == 2


def test_what_add_bg_move_adds_to_an_ordinary_script_is_two_statements():
    text = (EXAMPLES / "add_bg_move.py").read_text()
    core = text.split("# -----")[1]
    code = [line for line in core.splitlines()[1:] if line and not line.startswith("#")]
    assert len([line for line in code if not line.startswith((" ", ")"))]) <= 12
    assert sum("bg." in line for line in code if not line.startswith(" ")) == 2


def test_compare_with_md_makes_its_own_data(tmp_path):
    printed = run(tmp_path, "compare_with_md.py", "--short", "--output", "page")
    assert "200 samples against 200 reference frames" in printed
    assert (tmp_path / "page" / "report.html").read_text().startswith("<!DOCTYPE html>")


def test_compare_with_md_reads_files(made, tmp_path):
    folder, _ = made
    printed = run(
        folder, "compare_with_md.py", "--topology", "made/molecule.pdb", "--reference", "made/trajectory.dcd",
        "--samples", "made/samples.npz", "--output", str(tmp_path),
    )  # fmt: skip
    assert re.search(r"samples, weighted \(Kish size \d+\) against 40 reference frames", printed)
    assert (tmp_path / "report.html").exists()
