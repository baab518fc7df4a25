"""Two replicas of alanine dipeptide, at 300 K and at 600 K, and no ladder of temperatures between them.

    python learned_exchange.py --output results/exchange              about an hour on two cores
    python learned_exchange.py --output results/short --short         half a minute, to see that it works

Two generators, one trained at either temperature, make an invertible map between the two ensembles; through it the
replicas exchange configurations that do not resemble each other. The result is exact, whatever the generators learned.
"""

import argparse
from pathlib import Path

import openmm
from openmm import app, unit

import openmm_bg as bg
from openmm_bg.sampling import geometric_temperatures

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--output", type=Path, default=Path("exchange"), help="a folder for what is made")
parser.add_argument("--short", action="store_true", help="a few steps of everything, to see that it works")
options = parser.parse_args()
short, temperatures = options.short, (300, 600)
molecule = bg.systems.load("alanine_dipeptide")

# 1. A generator at each temperature. Their data may come from anywhere; here, from one ladder that is short.

ladder = bg.replica_exchange(
    molecule.system, molecule.positions, temperatures=geometric_temperatures(*temperatures, 3), keep=(0, 2),
    n_iterations=40 if short else 2400, steps_per_iteration=100 if short else 500, seed=1,
)  # fmt: skip
generators = []
for temperature, frames in zip(temperatures, ladder.frames.values(), strict=True):
    data = bg.bursts(molecule.system, frames, temperature=temperature, n_bursts=16, seed=2)
    generators.append(
        bg.BoltzmannGenerator.for_molecule(
            molecule.topology, molecule.system, temperature, positions=molecule.positions, seed=3
        )
    )
    generators[-1].fit(data.positions, likelihood_steps=60 if short else 2500, steps=10 if short else 7000, seed=4)

# 2. The exchange: an ordinary OpenMM Simulation, and OpenMM's reporter for replica exchange.

integrator = openmm.LangevinMiddleIntegrator(300, 1, 0.001)
simulation = app.Simulation(molecule.topology, molecule.system, integrator, openmm.Platform.getPlatform("Reference"))
simulation.context.setPositions(molecule.positions)
states = [{"temperature": temperature * unit.kelvin} for temperature in temperatures]
sampler = bg.LearnedReplicaExchangeSampler(states, simulation, 50 if short else 500, generators, seed=5)
sampler.reporters.append(app.ReplicaExchangeReporter(str(options.output), 1, sampler, trajectoryPerState=True))
sampler.simulate(30 if short else 2000)

statistics = sampler.statistics
print(f"{statistics.accepted[0, 1]} of {statistics.attempts[0, 1]} exchanges were accepted")
print(f"{statistics.round_trips.sum()} round trips between 300 K and 600 K")
