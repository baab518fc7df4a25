"""Boltzmann generator moves of alanine dipeptide in explicit water, at constant pressure.

    python explicit_water.py --generator results/ala2/generator.bg --output results/water
    python explicit_water.py --generator results/ala2/generator.bg --output results/water --short

Every move decouples the molecule from the water, lets the generator propose a conformation there, and couples it again
while the water makes room. What is sampled is the Boltzmann distribution of molecule and water. `openmm-bg run
alanine_dipeptide --output results/ala2` trains the generator.
"""

import argparse
from pathlib import Path

import openmm
from openmm import app
from openmm.unit import atmosphere, kelvin, nanometer, picosecond, picoseconds

import openmm_bg as bg

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--generator", required=True, help="a trained generator of alanine dipeptide")
parser.add_argument("--output", type=Path, default=Path("water"), help="a folder for what the simulation writes")
parser.add_argument("--short", action="store_true", help="a few steps of everything, to see that it works")
options = parser.parse_args()
short = options.short
options.output.mkdir(parents=True, exist_ok=True)

molecule = bg.systems.load("alanine_dipeptide")
forcefield = app.ForceField("amber99sbildn.xml", "tip3p.xml")
modeller = app.Modeller(molecule.topology, molecule.positions * nanometer)
modeller.addSolvent(forcefield, boxSize=openmm.Vec3(1, 1, 1) * (2.0 if short else 2.8) * nanometer)
system = forcefield.createSystem(modeller.topology, nonbondedMethod=app.PME, nonbondedCutoff=0.8 * nanometer)
system.addForce(openmm.MonteCarloBarostat(1 * atmosphere, 300 * kelvin))
integrator = openmm.LangevinMiddleIntegrator(300 * kelvin, 1 / picosecond, 0.001 * picoseconds)
simulation = app.Simulation(modeller.topology, system, integrator)
simulation.context.setPositions(modeller.positions)
simulation.minimizeEnergy(maxIterations=20 if short else 0)
simulation.context.setVelocitiesToTemperature(300 * kelvin)

# The first 22 particles are the generator's molecule. One move costs 2 * switchingSteps steps; the slower it is, the
# less work is lost and the more moves are accepted.

sampler = bg.SwitchingSampler(
    bg.BoltzmannGenerator.load(options.generator), simulation, atoms=range(22), switchingSteps=5 if short else 20_000,
    stepsPerIteration=10 if short else 20_000, seed=1, logFile=options.output / "moves.csv",
)  # fmt: skip
simulation.reporters.append(app.DCDReporter(str(options.output / "trajectory.dcd"), 10 if short else 1000))
simulation.step(20 if short else 2_000_000)

print(f"{sampler.numAccepted} of {sampler.numProposed} moves were accepted")
print(f"total work: {sampler.workMean:.1f} kT on average, with a standard deviation of {sampler.workStd:.1f} kT")
