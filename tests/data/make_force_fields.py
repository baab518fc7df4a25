"""Makes the molecules and Systems of this folder that take too long to make in a test.

    python tests/data/make_force_fields.py amino_acids     amino_acids.npz, ACE-X-NME for the twenty amino acids
    python tests/data/make_force_fields.py charmm          charmm36_2024.xml.gz, alanine dipeptide, about a minute

amino_acids.npz holds for every residue X the arrays X_atoms (lines "residue name element"), X_bonds (pairs of atoms)
and X_positions (nm, float32, relaxed with amber14). The files n_methylacetamide.{top,gro,psf,prm} are written by hand.
"""

from __future__ import annotations

import gzip
import sys
from importlib.resources import files
from pathlib import Path

import numpy as np
import openmm
from openmm import app, unit

FOLDER = Path(__file__).parent
ALANINE = files("openmm_bg.systems").joinpath("alanine_dipeptide.pdb")
RESIDUES = "ALA ARG ASN ASP CYS GLN GLU GLY HIS ILE LEU LYS MET PHE PRO SER THR TRP TYR VAL".split()


def amino_acids() -> None:
    """Mutate the alanine of alanine dipeptide, add what is missing, relax."""
    from pdbfixer import PDBFixer

    field = app.ForceField("amber14-all.xml")
    arrays: dict[str, np.ndarray] = {}
    for residue in RESIDUES:
        with ALANINE.open() as stream:
            fixer = PDBFixer(pdbfile=stream)
        if residue != "ALA":
            (chain,) = fixer.topology.chains()
            fixer.applyMutations([f"ALA-2-{residue}"], chain.id)
        fixer.findMissingResidues()
        fixer.findMissingAtoms()
        fixer.addMissingAtoms(seed=1)
        fixer.addMissingHydrogens(7.0, forcefield=field)
        arrays[f"{residue}_atoms"] = np.array(
            [f"{a.residue.name} {a.name} {a.element.symbol}" for a in fixer.topology.atoms()]
        )
        arrays[f"{residue}_bonds"] = np.array([(b[0].index, b[1].index) for b in fixer.topology.bonds()], np.int16)
        system = field.createSystem(fixer.topology, nonbondedMethod=app.NoCutoff)
        platform = openmm.Platform.getPlatform("Reference")
        context = openmm.Context(system, openmm.VerletIntegrator(0.001), platform)
        context.setPositions(fixer.positions)
        openmm.LocalEnergyMinimizer.minimize(context, 1.0)
        state = context.getState(positions=True, energy=True)
        positions = state.getPositions(asNumpy=True).value_in_unit(unit.nanometer)
        arrays[f"{residue}_positions"] = (positions - positions.mean(0)).astype(np.float32)
        print(residue, len(positions), state.getPotentialEnergy())
    np.savez_compressed(FOLDER / "amino_acids.npz", **arrays)


def charmm() -> None:
    """The System that charmm36_2024.xml makes of alanine dipeptide."""
    with ALANINE.open() as stream:
        pdb = app.PDBFile(stream)
    system = app.ForceField("charmm36_2024.xml").createSystem(pdb.topology, nonbondedMethod=app.NoCutoff)
    text = openmm.XmlSerializer.serialize(system)
    with gzip.GzipFile(FOLDER / "charmm36_2024.xml.gz", "wb", mtime=0) as stream:  # no date: the same file every time
        stream.write(text.encode())


if __name__ == "__main__":
    {"amino_acids": amino_acids, "charmm": charmm}[sys.argv[1]]()
