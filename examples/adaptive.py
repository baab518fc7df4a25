"""A generator from nothing but a structure: walkers of MD teach it, and it carries them between basins.

    python adaptive.py --output results/adaptive

Rounds of dynamics, a look at the generator with frames it has not seen, training and generator moves, until the
convergence test holds. On a Dask cluster, `bg.sampling.dask_executor(address)` takes the place of the pool.
"""

import argparse
from pathlib import Path

import openmm_bg as bg
from openmm_bg.sampling import WorkerPool
from openmm_bg.training import AdaptiveSettings

SHORT = AdaptiveSettings(
    walkers=16, heating_steps=100, settling_steps=100, steps=200, interval=20, rounds=1, likelihood_steps=5,
    training_steps=10, closing_steps=10, draws=500,
)  # fmt: skip

if __name__ == "__main__":  # each worker imports this file
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("adaptive"), help="a folder; a run in it goes on")
    parser.add_argument("--workers", type=int, help="processes for the walkers, by default one for each core")
    parser.add_argument("--short", action="store_true", help="a minute, to see that all works")
    options = parser.parse_args()

    molecule = bg.systems.load("alanine_dipeptide")
    generator = bg.BoltzmannGenerator.for_molecule(
        molecule.topology, molecule.system, molecule.temperature, positions=molecule.positions
    )
    with WorkerPool(options.workers) as pool:
        result = bg.AdaptiveTraining(
            generator, molecule.positions, settings=SHORT if options.short else None, executor=pool, seed=1,
            log=options.output / "adaptive.jsonl", checkpoint=options.output / "adaptive.checkpoint", resume=True,
        ).run()  # fmt: skip
    generator.save(options.output / "generator.bg")
    print(result.verdict)
    print(f"{result.figures}, on {result.figures.held_out} frames that training never saw")
