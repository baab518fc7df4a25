"""Systems of real force fields, by name, with positions in nm; no file is needed that the repository does not hold."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from functools import cache
from importlib.resources import files
from pathlib import Path

import numpy as np
import openmm
from openmm import app, unit

import openmm_bg as bg

DATA = Path(__file__).parents[1] / "data"
AMINO_ACIDS = "ALA ARG ASN ASP CYS GLN GLU GLY HIS ILE LEU LYS MET PHE PRO SER THR TRP TYR VAL".split()
Made = tuple[openmm.System, np.ndarray]


def _alanine(*field: str, **options: object) -> Made:
    molecule = bg.systems.load("alanine_dipeptide")
    return app.ForceField(*field).createSystem(molecule.topology, **options), molecule.positions


def _charmm() -> Made:
    text = gzip.decompress((DATA / "charmm36_2024.xml.gz").read_bytes()).decode()
    return openmm.XmlSerializer.deserialize(text), bg.systems.load("alanine_dipeptide").positions


def _cutoff() -> Made:
    options = {"nonbondedMethod": app.CutoffNonPeriodic, "nonbondedCutoff": 0.5, "switchDistance": 0.4}
    return _alanine("amber14-all.xml", **options)


def _alchemical() -> Made:
    from openmmtools import alchemy, testsystems

    molecule = testsystems.AlanineDipeptideImplicit(constraints=None)
    region = alchemy.AlchemicalRegion(alchemical_atoms=range(8, 14))
    system = alchemy.AbsoluteAlchemicalFactory().create_alchemical_system(molecule.system, region)
    return system, molecule.positions.value_in_unit(unit.nanometer)


def _prmtop() -> Made:
    folder = files("openmmtools").joinpath("data", "alanine-dipeptide-gbsa")
    topology = app.AmberPrmtopFile(str(folder.joinpath("alanine-dipeptide.prmtop")))
    positions = app.AmberInpcrdFile(str(folder.joinpath("alanine-dipeptide.crd"))).positions
    system = topology.createSystem(implicitSolvent=app.OBC2, implicitSolventSaltConc=0.1 * unit.molar)
    return system, np.array(positions.value_in_unit(unit.nanometer))


def _gromacs() -> Made:
    positions = app.GromacsGroFile(str(DATA / "n_methylacetamide.gro")).positions
    return app.GromacsTopFile(str(DATA / "n_methylacetamide.top")).createSystem(), np.array(
        positions.value_in_unit(unit.nanometer)
    )


def _psf() -> Made:
    parameters = app.CharmmParameterSet(str(DATA / "n_methylacetamide.prm"))
    system = app.CharmmPsfFile(str(DATA / "n_methylacetamide.psf")).createSystem(parameters)
    return system, _gromacs()[1]


def _water() -> Made:
    """Four molecules of TIP4P-Ew, each with a virtual site."""
    topology, positions = app.Topology(), []
    chain = topology.addChain()
    for n in range(4):
        residue = topology.addResidue("HOH", chain)
        oxygen = topology.addAtom("O", app.element.oxygen, residue)
        for k in (1, 2):
            topology.addBond(oxygen, topology.addAtom(f"H{k}", app.element.hydrogen, residue))
        shift = np.array([0.3 * (n % 2), 0.3 * (n // 2), 0.05 * n])
        positions += [shift, shift + (0.096, 0, 0), shift + (-0.024, 0.093, 0)]
    field = app.ForceField("tip4pew.xml")
    modeller = app.Modeller(topology, [openmm.Vec3(*p) for p in positions] * unit.nanometer)
    modeller.addExtraParticles(field)
    system = field.createSystem(modeller.topology, rigidWater=False)
    return system, np.array(modeller.positions.value_in_unit(unit.nanometer))


def amino_acid(name: str) -> Made:
    """ACE-X-NME in amber14 with OBC2."""
    stored = np.load(DATA / "amino_acids.npz")
    topology = app.Topology()
    chain, residue, atoms = topology.addChain(), None, []
    for line in stored[f"{name}_atoms"]:
        residue_name, atom, element = str(line).split()
        if residue is None or residue.name != residue_name:
            residue = topology.addResidue(residue_name, chain)
        atoms.append(topology.addAtom(atom, app.Element.getBySymbol(element), residue))
    for i, j in stored[f"{name}_bonds"]:
        topology.addBond(atoms[i], atoms[j])
    field = app.ForceField("amber14-all.xml", "implicit/obc2.xml")
    return field.createSystem(topology), stored[f"{name}_positions"].astype(np.float64)


BUILDERS: dict[str, Callable[[], Made]] = {
    "amber99sbildn+amber99_obc": lambda: _alanine("amber99sbildn.xml", "amber99_obc.xml"),
    "amber96+amber96_obc": lambda: _alanine("amber96.xml", "amber96_obc.xml"),
    **{
        f"amber14+{model}": lambda model=model: _alanine("amber14-all.xml", f"implicit/{model}.xml")
        for model in ("hct", "obc1", "obc2", "gbn", "gbn2")
    },
    "amber19+obc2": lambda: _alanine("amber19-all.xml", "implicit/obc2.xml"),
    "amber14, cutoff": _cutoff,
    "charmm36_2024": _charmm,
    "alchemical": _alchemical,
    "AMBER prmtop": _prmtop,
    "GROMACS top": _gromacs,
    "CHARMM psf": _psf,
    "TIP4P-Ew": _water,
}


@cache
def make(name: str) -> Made:
    """A System and relaxed positions; twenty of the names are amino acids."""
    return amino_acid(name) if name in AMINO_ACIDS else BUILDERS[name]()


def thermal(name: str, frames: int = 6, seed: int = 1) -> np.ndarray:
    """Frames of a short Langevin run at 300 K, ``(frames, atoms, 3)``."""
    system, positions = make(name)
    integrator = openmm.LangevinMiddleIntegrator(300, 10, 0.001)
    integrator.setRandomNumberSeed(seed)
    context = openmm.Context(system, integrator, openmm.Platform.getPlatform("Reference"))
    context.setPositions(positions)
    context.computeVirtualSites()
    openmm.LocalEnergyMinimizer.minimize(context, maxIterations=50)
    context.setVelocitiesToTemperature(300, seed)
    found = []
    for _ in range(frames):
        integrator.step(20)
        found.append(context.getState(positions=True).getPositions(asNumpy=True).value_in_unit(unit.nanometer))
    return np.array(found)
