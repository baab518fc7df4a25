"""Molecules for the tests of the coordinates, as System with geometry or as bare bond graphs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import openmm
import pytest
import torch
from openmm import app, unit

from openmm_bg.coordinates import InternalCoordinates, ZMatrix


@pytest.fixture(params=[True, False], ids=["compiled", "plain"], scope="module")
def form(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Both ways of placing atoms: what `compile` is where a test does not name it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(InternalCoordinates.__init__.__kwdefaults__, "compile", request.param)
        yield request.param


@dataclass
class Dipeptide:
    """ACE-ALA-NME in vacuum: topology, System, z-matrix, and frames of 300 K dynamics (frames, 22, 3)."""

    topology: app.Topology
    system: openmm.System
    zmatrix: ZMatrix
    frames: torch.Tensor
    masses: list[float]

    def potential(self, x: torch.Tensor) -> np.ndarray:
        """Potential energies in kJ/mol by OpenMM's Reference platform."""
        context = openmm.Context(
            self.system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference")
        )
        energies = []
        for row in x.detach().double().numpy():
            context.setPositions(row)
            energies.append(context.getState(getEnergy=True).getPotentialEnergy()._value)
        return np.array(energies)


@pytest.fixture(scope="session")
def dipeptide() -> Dipeptide:
    from openmmtools.testsystems import AlanineDipeptideVacuum

    reference = AlanineDipeptideVacuum(constraints=None)
    topology = reference.topology
    system = app.ForceField("amber99sbildn.xml").createSystem(topology, constraints=None)
    integrator = openmm.LangevinMiddleIntegrator(300, 10, 0.001)
    integrator.setRandomNumberSeed(5)
    simulation = app.Simulation(topology, system, integrator, openmm.Platform.getPlatformByName("Reference"))
    simulation.context.setPositions(reference.positions)
    simulation.minimizeEnergy(maxIterations=200)
    simulation.context.setVelocitiesToTemperature(300, 6)
    frames = []
    for _ in range(40):
        simulation.step(50)
        state = simulation.context.getState(getPositions=True)
        frames.append(state.getPositions(asNumpy=True).value_in_unit(unit.nanometer))
    masses = [atom.element.mass._value for atom in topology.atoms()]
    return Dipeptide(topology, system, ZMatrix.from_topology(topology), torch.tensor(np.array(frames)), masses)


Graph = tuple[list[str], list[tuple[int, int]]]


def hydrogenated(heavy: str, bonds: list[tuple[int, int]], hydrogens: list[int]) -> Graph:
    """Elements and bonds of heavy atoms with so many hydrogens on each."""
    elements, bonds = list(heavy), list(bonds)
    for atom, count in enumerate(hydrogens):
        for _ in range(count):
            bonds.append((atom, len(elements)))
            elements.append("H")
    return elements, bonds


def ring(size: int) -> list[tuple[int, int]]:
    return [(i, (i + 1) % size) for i in range(size)]


MOLECULES: dict[str, Graph] = {
    "water": hydrogenated("O", [], [2]),
    "ammonia": hydrogenated("N", [], [3]),
    "methane": hydrogenated("C", [], [4]),
    "ethane": hydrogenated("CC", [(0, 1)], [3, 3]),
    "methanol": hydrogenated("CO", [(0, 1)], [3, 1]),
    "butane": hydrogenated("CCCC", [(0, 1), (1, 2), (2, 3)], [3, 2, 2, 3]),
    "neopentane": hydrogenated("CCCCC", [(0, 1), (0, 2), (0, 3), (0, 4)], [0, 3, 3, 3, 3]),
    "cyclopropane": hydrogenated("CCC", ring(3), [2] * 3),
    "cyclohexane": hydrogenated("C" * 6, ring(6), [2] * 6),
    "benzene": hydrogenated("C" * 6, ring(6), [1] * 6),
    "toluene": hydrogenated("C" * 7, [*ring(6), (0, 6)], [0, 1, 1, 1, 1, 1, 3]),
    "biphenyl": hydrogenated(
        "C" * 12, [*ring(6), *[(i + 6, j + 6) for i, j in ring(6)], (0, 6)], [0, *[1] * 5, 0, *[1] * 5]
    ),
    "cubane": hydrogenated("C" * 8, [(i, i ^ bit) for i in range(8) for bit in (1, 2, 4) if i < i ^ bit], [1] * 8),
    "acetonitrile": hydrogenated("CCN", [(0, 1), (1, 2)], [3, 0, 0]),
    "dimethylbutadiyne": hydrogenated("C" * 6, [(i, i + 1) for i in range(5)], [3, 0, 0, 0, 0, 3]),
    "acetylene": hydrogenated("CC", [(0, 1)], [1, 1]),
}


def capped_residues() -> dict[str, tuple[list[str], list[tuple[int, int]], dict[str, int]]]:
    """ACE-X-NME for every amino acid, from the residue templates of amber99sbildn: a graph, and names to indices."""
    templates = app.ForceField("amber99sbildn.xml")._templates
    residues = "ALA ARG ASN ASP CYS GLN GLU GLY HID HIE HIP ILE LEU LYS MET PHE PRO SER THR TRP TYR VAL".split()
    graphs = {}
    for residue in residues:
        elements: list[str] = []
        bonds: list[tuple[int, int]] = []
        index: dict[str, int] = {}
        for name in ("ACE", residue, "NME"):
            template, start = templates[name], len(elements)
            index |= {f"{name}:{atom.name}": start + i for i, atom in enumerate(template.atoms)}
            elements += [atom.element.symbol for atom in template.atoms]
            bonds += [(start + i, start + j) for i, j in template.bonds]
        bonds += [(index["ACE:C"], index[f"{residue}:N"]), (index[f"{residue}:C"], index["NME:N"])]
        graphs[residue] = (elements, bonds, index)
    return graphs


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "molecule" in metafunc.fixturenames:
        graphs = MOLECULES | {name: (elements, bonds) for name, (elements, bonds, _) in capped_residues().items()}
        metafunc.parametrize("molecule", graphs.values(), ids=graphs.keys())
    if "residue" in metafunc.fixturenames:
        residues = capped_residues()
        metafunc.parametrize("residue", residues.items(), ids=residues.keys())
