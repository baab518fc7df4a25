"""Build the wheel, install it in an environment of its own, and run the tests outside the checkout.

    python tests/wheel.py [--all]

Dependencies are borrowed from the environment that runs this (a .pth file), the package itself is the wheel's. Without
``--all`` only some quick tests run: enough to prove that nothing is missing from the wheel.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
QUICK = ["test_import_rules.py", "systems", "test_generator.py", "app", "test_cli.py", "test_examples.py"]


def main(everything: bool) -> int:
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        source = place / "source"
        # a clean copy: a build folder of the checkout must not reach the wheel
        ignore = shutil.ignore_patterns(".venv", ".git", "build", "results", "*.egg-info", "__pycache__")
        shutil.copytree(ROOT, source, ignore=ignore)
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
        subprocess.run([*pip, "wheel", "--quiet", "--no-deps", "-w", str(place), str(source)], check=True)
        (wheel,) = place.glob("openmm_bg-*.whl")
        venv.create(place / "env", with_pip=True)
        python = place / "env" / "bin" / "python"
        subprocess.run(
            [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", wheel], check=True
        )
        # a plain path line: packages are found, the checkout's editable hook is not run
        (site_packages(python) / "borrowed.pth").write_text(f"{site_packages(sys.executable)}\n")
        tests = place / "tests"
        shutil.copytree(ROOT / "tests", tests, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copytree(ROOT / "examples", place / "examples", ignore=shutil.ignore_patterns("__pycache__"))
        where = subprocess.run(
            [python, "-c", "import openmm_bg, openmm_bg.systems as s; print(openmm_bg.__file__, s.__file__)"],
            cwd=place, capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
        if str(ROOT) in where:
            print(f"the checkout was imported instead of the wheel: {where}")
            return 1
        chosen = [str(tests)] if everything else [str(tests / name) for name in QUICK]
        command = [python, "-m", "pytest", "-q", "-n", "2", "-p", "no:cacheprovider", "-m", "not slow"]
        command += ["--rootdir", str(place)]
        return subprocess.run([*command, *chosen], cwd=place).returncode


def site_packages(python: str | Path) -> Path:
    """Where an interpreter keeps its packages."""
    code = "import site; print(site.getsitepackages()[0])"
    return Path(subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip())


if __name__ == "__main__":
    sys.exit(main("--all" in sys.argv[1:]))
