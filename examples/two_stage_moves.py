"""Hundreds of proposals for one energy evaluation: moves decided in two stages.

    python two_stage_moves.py --generator results/ala2/generator.bg --steps 20000

The System has a bias that the generator has never seen. All proposals of an iteration are tried on the generator's own
energy in one batch; the simulation's energy, bias included, is evaluated once, and decides whether to go there.
"""

import argparse
import sys

from openmm import CustomTorsionForce, LangevinMiddleIntegrator
from openmm.app import Simulation

import openmm_bg as bg

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--generator", required=True, help="a trained generator of alanine dipeptide")
parser.add_argument("--steps", type=int, default=20_000)
options = parser.parse_args()

molecule = bg.systems.load("alanine_dipeptide")
bias = CustomTorsionForce("5*(1+cos(theta-1))")
bias.addTorsion(4, 6, 8, 14)  # phi
molecule.system.addForce(bias)
simulation = Simulation(molecule.topology, molecule.system, LangevinMiddleIntegrator(300, 1, 0.001))
simulation.context.setPositions(molecule.positions)

generator = bg.BoltzmannGenerator.load(options.generator)
sampler = bg.BoltzmannGeneratorSampler(
    generator, simulation, stepsPerIteration=100, proposalsPerIteration=200, energy=generator.energy
)
columns = {"step": True, "speed": True, "remainingTime": True, "totalSteps": options.steps}
simulation.reporters.append(bg.BoltzmannGeneratorReporter(sys.stdout, options.steps // 10, sampler, **columns))
simulation.step(options.steps)

moves = sampler.statistics["independent"]
print(f"{moves.tried} proposals, {moves.moved} moves of the scans, {moves.accepted} of {moves.evaluated} ends accepted")
