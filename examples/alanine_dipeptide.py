"""Alanine dipeptide from a structure to an exact ensemble, with the Python interface.

    python alanine_dipeptide.py --output results/script              about half an hour on two cores
    python alanine_dipeptide.py --output results/short --short       half a minute, to see that it works

At 300 K the backbone torsion phi of alanine dipeptide turns from negative to positive values once in many nanoseconds.
This script samples it by molecular dynamics with Boltzmann generator moves, which cross at once. The command
`openmm-bg run alanine_dipeptide` does the same and writes a report about it.
"""

import argparse
from pathlib import Path

import mdtraj
import numpy as np
import openmm
from openmm import app, unit

import openmm_bg as bg
from openmm_bg.analysis import backbone_dihedrals, populations
from openmm_bg.sampling import effective_sample_size, geometric_temperatures

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--output", type=Path, default=Path("alanine_dipeptide"), help="a folder for what is made")
parser.add_argument("--seed", type=int, default=1)
parser.add_argument("--short", action="store_true", help="a few steps of everything, to see that it works")
options = parser.parse_args()
output, seed, short = options.output, options.seed, options.short
output.mkdir(parents=True, exist_ok=True)

# 1. The molecule. A Molecule is no more than an OpenMM Topology, a System and positions (nm) under one name. For your
#    own, write bg.systems.from_pdb("my.pdb", forcefield=(...)).

molecule = bg.systems.load("alanine_dipeptide", temperature=300)

# 2. Data for training. Replica exchange finds the conformations: the hot replicas cross barriers, the coldest collects
#    frames at 300 K. Short bursts of dynamics from every frame then supply many independent bond lengths and angles,
#    which forget themselves within femtoseconds.

exchange = bg.replica_exchange(
    molecule.system,
    molecule.positions,
    temperatures=geometric_temperatures(300, 1000, 4 if short else 6),
    n_iterations=40 if short else 2400,
    equilibration_iterations=4 if short else 50,
    steps_per_iteration=100 if short else 500,
    seed=seed,
)
print(f"replica exchange: {exchange.round_trips.sum()} round trips between the lowest and the highest temperature")
data = bg.bursts(molecule.system, exchange.frames[0], temperature=300, n_bursts=16, seed=seed + 1)

# 3. The generator: a normalizing flow on bond lengths, angles and torsions. It learns from the data by maximum
#    likelihood, then from the energies of its own samples. The file it is saved to rebuilds it without the data.

generator = bg.BoltzmannGenerator.for_molecule(
    molecule.topology, molecule.system, molecule.temperature, positions=molecule.positions, flow="spline", seed=seed
)
generator.fit(
    data.positions,
    likelihood_steps=60 if short else 2500,
    steps=20 if short else 7000,
    seed=seed,
    log=output / "training.jsonl",
)
generator.save(output / "generator.bg")

# 4. Independent samples with exact weights. The effective sample size says how many of the draws the weights leave. It
#    cannot see conformations that the generator never makes, so it is no proof that nothing is missing.

samples = generator.sample(2_000 if short else 100_000, seed=seed)
ess = effective_sample_size(samples.log_weights)
np.savez(
    output / "samples.npz",
    positions=samples.positions,
    reduced_energy=samples.reduced_energy,
    log_prob=samples.log_prob,
)
print(f"generator: the effective sample size is {100 * ess.fraction:.2f} % of {ess.n} draws")

# 5. Molecular dynamics with moves, which needs no weights: every frame is a fair sample. Energies and temperature are
#    those of the simulation, so the result does not depend on how well the generator was trained.

integrator = openmm.LangevinMiddleIntegrator(300, 1, 0.001)
integrator.setRandomNumberSeed(seed)
simulation = app.Simulation(molecule.topology, molecule.system, integrator, openmm.Platform.getPlatform("Reference"))
simulation.context.setPositions(exchange.frames[0][-1])
simulation.context.setVelocitiesToTemperature(300, seed)
sampler = bg.BoltzmannGeneratorSampler(
    generator,
    simulation,
    stepsPerIteration=50 if short else 500,
    proposalsPerIteration=10,
    seed=seed,
    logFile=output / "moves.csv",
    trajectoryFile=output / "trajectory.dcd",
)
simulation.step(2_000 if short else 1_000_000)
print(f"moves: {sampler.numAccepted} of {sampler.numProposed} accepted")

# 6. What came out. The trajectory holds the conformation after the moves of every iteration. Errors know of the
#    correlation between frames; a question mark stands where a basin was never entered or never left, and so nothing
#    was measured.

with open(output / "molecule.pdb", "w") as file:
    app.PDBFile.writeFile(molecule.topology, molecule.positions * unit.nanometer, file)
frames = mdtraj.load(str(output / "trajectory.dcd"), top=str(output / "molecule.pdb")).xyz
angles = backbone_dihedrals(frames, molecule.topology)
for population in populations(angles.phi[:, 0], angles.psi[:, 0]):
    print(f"  {population}")
print(bg.compare(exchange.frames[0], frames, topology=molecule.topology))
