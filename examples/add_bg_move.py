"""Boltzmann generator moves in a simulation of your own.

    python add_bg_move.py --generator results/ala2/generator.bg --steps 100000 --output results/moves

Between the two lines of dashes stands an ordinary OpenMM script for alanine dipeptide, and in it the two statements
that add the moves. `openmm-bg run alanine_dipeptide --output results/ala2` trains a generator for it.
"""

import argparse
from importlib.resources import files
from pathlib import Path

from openmm import LangevinMiddleIntegrator
from openmm.app import DCDReporter, ForceField, NoCutoff, PDBFile, Simulation
from openmm.unit import kelvin, picosecond, picoseconds

import openmm_bg as bg

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--generator", required=True, help="a trained generator of alanine dipeptide")
parser.add_argument("--steps", type=int, default=100_000)
parser.add_argument("--output", type=Path, default=Path("moves"), help="a folder for what the simulation writes")
options = parser.parse_args()
options.output.mkdir(parents=True, exist_ok=True)
input_file = str(files("openmm_bg.systems") / "alanine_dipeptide.pdb")

# ----------------------------------------------------------------------------------------------------

pdb = PDBFile(input_file)
forcefield = ForceField("amber99sbildn.xml", "amber99_obc.xml")
system = forcefield.createSystem(pdb.topology, nonbondedMethod=NoCutoff)
integrator = LangevinMiddleIntegrator(300 * kelvin, 1 / picosecond, 0.001 * picoseconds)
simulation = Simulation(pdb.topology, system, integrator)
simulation.context.setPositions(pdb.positions)
simulation.minimizeEnergy()

# After every 500 time steps, ten conformations of the generator are tried, one after the other, in place of the
# current one. What is sampled is the Boltzmann distribution of `system`, whatever the generator has learned.

generator = bg.BoltzmannGenerator.load(options.generator)
sampler = bg.BoltzmannGeneratorSampler(
    generator, simulation, stepsPerIteration=500, proposalsPerIteration=10, logFile=options.output / "moves.csv"
)

simulation.reporters.append(DCDReporter(str(options.output / "trajectory.dcd"), 500))
simulation.step(options.steps)

# ----------------------------------------------------------------------------------------------------

print(f"{sampler.numAccepted} of {sampler.numProposed} moves were accepted ({100 * sampler.acceptanceRate:.1f} %)")
