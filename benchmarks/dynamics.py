"""Steps per second and core: batched Langevin dynamics beside a loop over an OpenMM Context, in turn.

taskset -c 0 python benchmarks/dynamics.py --repeats 5
python benchmarks/dynamics.py --device cuda --walkers 1024 16384
"""

from __future__ import annotations

import argparse
import copy
import time

import numpy as np
import openmm
import torch

import openmm_bg as bg
from openmm_bg.sampling import BatchedLangevin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--molecule", default="alanine_dipeptide", help="a name, or a sequence")
    parser.add_argument("--walkers", type=int, nargs="+", default=[64, 512])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="about how long one measurement takes")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(1)
    known = options.molecule in bg.systems.names()
    molecule = bg.systems.load(options.molecule) if known else bg.systems.peptide(options.molecule)
    loop = openmm.LangevinMiddleIntegrator(300, 1, 0.001)
    loop.setRandomNumberSeed(1)
    context = openmm.Context(molecule.system, loop, openmm.Platform.getPlatform("Reference"))
    context.setPositions(molecule.positions)
    openmm.LocalEnergyMinimizer.minimize(context)
    loop.step(200)
    energy = copy.deepcopy(bg.ForceFieldEnergy(molecule.system, 300)).to(options.device)
    batches = []
    for n in options.walkers:
        walkers = BatchedLangevin(
            energy, np.repeat(molecule.positions[None], n, 0), temperature=300, timestep=0.001, friction=1.0,
            generator=torch.Generator(options.device).manual_seed(1),
        )  # fmt: skip
        walkers.draw_velocities()
        walkers.advance(20)
        batches.append(walkers)

    def timed(step: object, size: int) -> float:
        """Microseconds per step and walker."""
        begun, steps = time.perf_counter(), 0
        while time.perf_counter() - begun < options.seconds:
            step(25)
            steps += 25
        if options.device != "cpu":
            torch.cuda.synchronize()
        return 1e6 * (time.perf_counter() - begun) / (steps * size)

    rows = [[timed(loop.step, 1), *(timed(b.advance, len(b)) for b in batches)] for _ in range(options.repeats)]
    table = np.array(rows)
    print(
        f"{molecule.name}, {molecule.num_atoms} atoms, one thread, {options.device}; microseconds per walker and step"
    )
    names = ["OpenMM Reference loop", *(f"{n} walkers" for n in options.walkers)]
    for name, column, ratio in zip(names, table.T, (table[:, :1] / table).T, strict=True):
        spread = f"{ratio.mean():.1f} ± {ratio.std(ddof=1):.1f}" if len(ratio) > 1 else f"{ratio.mean():.1f}"
        print(f"{name:24} {column.mean():8.2f}   ratio in the same round {spread}")


if __name__ == "__main__":
    main()
