"""Small steps in the latent space of a generator, beside whole conformations and dynamics.

    python latent_moves.py --generator results/ala2/generator.bg --steps 20000

For a molecule, or a generator, of which few whole conformations are accepted. The first fifth of the run learns the
length of the steps and how many proposals to make; what it samples is set aside.
"""

import argparse

from openmm import LangevinMiddleIntegrator
from openmm.app import Simulation

import openmm_bg as bg

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--generator", required=True, help="a trained generator of alanine dipeptide")
parser.add_argument("--steps", type=int, default=20_000)
options = parser.parse_args()

molecule = bg.systems.load("alanine_dipeptide")
simulation = Simulation(molecule.topology, molecule.system, LangevinMiddleIntegrator(300, 1, 0.001))
simulation.context.setPositions(molecule.positions)

generator = bg.BoltzmannGenerator.load(options.generator)
sampler = bg.BoltzmannGeneratorSampler(
    generator, simulation, stepsPerIteration=100, latentShare=0.5, adaptationIterations=options.steps // 500
)
simulation.step(options.steps)

print(f"steps of length {sampler.latentStep:.2f}, {sampler.proposalsPerIteration} proposals an iteration")
for kind, moves in sampler.statistics.items():
    print(f"{kind}: {moves.accepted} of {moves.attempts} accepted ({100 * moves.acceptance:.1f} %)")
