"""The plan of the house, checked: imports run downwards only, and importing the package stays quiet and quick."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def test_imports_run_downwards_only(tmp_path):
    if not (ROOT / "pyproject.toml").exists():
        pytest.skip("the contracts live in the checkout")
    # import-linter reads one tree of files: put the two data folders where setup.py installs them
    shutil.copytree(ROOT / "openmm_bg", tmp_path / "openmm_bg")
    for folder in ("systems", "forcefields"):
        shutil.copytree(ROOT / folder, tmp_path / "openmm_bg" / folder)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    script = Path(sys.executable).with_name("lint-imports")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    result = subprocess.run([script, "--no-cache"], cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "0 broken" in result.stdout


@pytest.mark.parametrize("heavy", ["openmmtools", "deeptime", "matplotlib", "pymbar"])
def test_importing_the_package_leaves_slow_libraries_alone(heavy):
    code = f"import sys, openmm_bg; sys.exit({heavy!r} in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0 and result.stdout == "", result.stdout + result.stderr


def test_public_names():
    import openmm_bg as bg

    for name in bg.__all__:
        assert getattr(bg, name) is not None
    with pytest.raises(AttributeError):
        _ = bg.no_such_name


def test_the_force_field_folder_is_where_openmm_looks():
    from importlib.metadata import entry_points

    (entry,) = [e for e in entry_points(group="openmm.forcefielddir") if e.name == "openmm_bg"]
    assert Path(entry.load()()).is_dir()
