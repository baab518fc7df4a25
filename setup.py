"""Metadata lives in pyproject.toml; this file places the two data folders inside the package."""

import re
from pathlib import Path

from setuptools import find_packages, setup

init = Path(__file__).with_name("openmm_bg") / "version.py"
version = re.search(r'^__version__ = "([^"]+)"', init.read_text(), re.M).group(1)

setup(
    version=version,
    packages=[*find_packages(include=["openmm_bg", "openmm_bg.*"]), "openmm_bg.forcefields", "openmm_bg.systems"],
    package_dir={
        "openmm_bg": "openmm_bg",
        "openmm_bg.forcefields": "forcefields",
        "openmm_bg.systems": "systems",
    },
    package_data={
        "openmm_bg": ["py.typed", "prelude.h"],
        "openmm_bg.analysis": ["*.js"],
        "openmm_bg.forcefields": ["*.xml"],
        "openmm_bg.systems": ["*.pdb"],
    },
)
