"""``openmm-bg doctor``: does this installation work, in plain words."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

_TOLERANCE = 0.05  # kJ/mol, between single and double precision on a small molecule
_OPTIONAL = {
    "deeptime": "TICA distances of `compare`",
    "distributed": "walkers on a Dask cluster (--scheduler)",
    "pymbar": "several states of a reference (--reference-states)",
}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: whether it works (None: it is not needed), and a sentence."""

    topic: str
    works: bool | None
    text: str


def diagnose_installation() -> Iterator[Finding]:
    """Look at everything, one after another."""
    for topic, look in (
        ("versions", _versions), ("OpenMM platforms", _platforms), ("energies in torch", _energies), ("GPU", _gpu),
        ("compiler", _compiler), ("force fields", _force_fields), ("optional packages", _optional),
    ):  # fmt: skip
        try:
            yield from (Finding(topic, works, text) for works, text in look())
        except Exception as error:  # whatever is broken here is what the reader wants to know
            yield Finding(topic, False, f"failed with {type(error).__name__}: {' '.join(str(error).split())[:300]}")


Looked = Iterator[tuple[bool | None, str]]


def _versions() -> Looked:
    from packaging.requirements import Requirement

    from openmm_bg.version import __version__

    machine = f"Python {platform.python_version()} on {platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    yield True, f"openmm_bg {__version__}, {machine}."
    for line in importlib.metadata.requires("openmm_bg") or ():
        wanted = Requirement(line)
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        try:
            there = importlib.metadata.version(wanted.name)
        except importlib.metadata.PackageNotFoundError:
            yield False, f"{wanted.name} is missing; pip install '{wanted}'."
            continue
        fits = wanted.specifier.contains(there, prereleases=True)
        yield fits, f"{wanted.name} {there}" + ("." if fits else f" is not the {wanted.specifier} that is needed.")


def _platforms() -> Looked:
    import openmm
    from openmm import unit

    from openmm_bg import systems

    molecule = systems.load("alanine_dipeptide")
    energies: dict[str, float] = {}
    names = [openmm.Platform.getPlatform(k).getName() for k in range(openmm.Platform.getNumPlatforms())]
    for name in sorted(names, key=lambda name: name != "Reference"):
        try:
            context = openmm.Context(
                molecule.system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName(name)
            )
            context.setPositions(molecule.positions)
            state = context.getState(getEnergy=True)
            energies[name] = state.getPotentialEnergy().value_in_unit(unit.kilojoules_per_mole)
        except openmm.OpenMMException as error:
            reason = " ".join(str(error).split()).rstrip(".")
            # a graphics platform without its device is no fault
            yield (None if name not in ("Reference", "CPU") else False), f"{name} cannot be used here: {reason}."
            continue
        gap = abs(energies[name] - energies["Reference"])
        yield (
            gap < _TOLERANCE,
            (
                f"{name} works."
                if name == "Reference"
                else f"{name} works; its energy is {gap:.1g} kJ/mol from Reference's."
            ),
        )
    # one library that is missing keeps several plugins out
    reasons = {" ".join(str(f).partition(": ")[2].split()) for f in openmm.Platform.getPluginLoadFailures()}
    for reason in sorted(reasons):
        yield None, f"A plugin for another platform was not loaded: {reason}."


def _energies() -> Looked:
    import torch

    from openmm_bg import systems
    from openmm_bg.energies import ContextEnergy, ForceFieldEnergy

    molecule = systems.load("alanine_dipeptide")
    x = torch.as_tensor(molecule.positions)[None]
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")  # recorded, and told below: a filter of the user's must not hide what is wrong
        there = ForceFieldEnergy(molecule.system, 300).potential(x)
    gap = float((there - ContextEnergy(molecule.system, 300, platform="Reference").potential(x)).abs().max())
    yield gap < _TOLERANCE, f"torch {torch.__version__}; energies are {gap:.1g} kJ/mol from OpenMM's."
    for warning in heard:
        yield None, " ".join(str(warning.message).split())


def _gpu() -> Looked:
    import torch

    if not torch.cuda.is_available():
        yield None, "torch finds no GPU, so everything is computed on processor cores; small molecules need no more."
        return
    for k in range(torch.cuda.device_count()):
        total = torch.cuda.get_device_properties(k).total_memory / 2**30
        gap = float((torch.ones(8, device=f"cuda:{k}").sum() - 8).abs())
        yield gap == 0, f"cuda:{k} is a {torch.cuda.get_device_name(k)} with {total:.0f} GiB."


def _compiler() -> Looked:
    from openmm_bg.compilation import NoCompiler, cache_directory, library

    try:
        library('extern "C" int openmm_bg_doctor() { return 1; }', "double")
    except NoCompiler as error:
        yield None, f"Energies are not compiled and ten times slower, since {error}; install g++."
        return
    yield True, f"A C++ compiler works; compiled energies are kept in {cache_directory()}."


def _force_fields() -> Looked:
    from openmm import app

    for name in ("amber99sbildn.xml", "amber99_obc.xml", "softcore.xml"):
        app.ForceField(name)
    yield True, "OpenMM finds its own force fields and softcore.xml of openmm_bg."


def _optional() -> Looked:
    for name, purpose in _OPTIONAL.items():
        try:
            yield True, f"{name} {importlib.metadata.version(name)}."
        except importlib.metadata.PackageNotFoundError:
            yield None, f"{name} is not installed, so there are no {purpose}; pip install {name}."


def run(json_wanted: bool, say: Callable[[str], None]) -> int:
    """Print what was found; 0 where all that is needed works, else 1."""
    import json

    marks, findings, topic = {True: "  ok    ", None: "  note  ", False: "  FAULT "}, [], ""
    for finding in diagnose_installation():
        findings.append(finding)
        if json_wanted:
            continue
        if finding.topic != topic:
            topic = finding.topic
            say(topic)
        say(marks[finding.works] + finding.text)
    faults = sum(f.works is False for f in findings)
    if json_wanted:
        say(json.dumps({"works": not faults, "findings": [asdict(f) for f in findings]}, indent=2))
    elif faults:
        say(f"\n{faults} fault{'s' if faults > 1 else ''}: what is marked above has to be mended first.")
    else:
        say("\nThis installation works.")
    return 1 if faults else 0
