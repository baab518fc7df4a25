"""Effective samples of the indicator phi > 0 per force evaluation: MD with moves against plain MD.

    python benchmarks/production.py --generator generator.bg --output production.jsonl --seed 1
    python benchmarks/production.py --output production.jsonl --plain --steps 10000000 --seed 1
    python benchmarks/production.py --output production.jsonl --reference aldp.npz --table

Each call adds one chain. Training and its data are not in these figures; the report of a run states them with and
without.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import mdtraj
import numpy as np
import openmm
from openmm import app

import openmm_bg as bg
from openmm_bg import workflow
from openmm_bg.analysis import backbone_dihedrals, effective_sample_size, left_handed, populations

STEPS_PER_ITERATION = 500


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--generator", type=Path)
    parser.add_argument("--output", type=Path, required=True, help="JSON Lines")
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--proposals", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--plain", action="store_true", help="no moves")
    parser.add_argument("--reference", type=Path)
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    if options.table:
        print_table(options.output, options.reference)
        return
    molecule = bg.systems.load("alanine_dipeptide")
    started = time.perf_counter()
    if options.plain:
        trajectory = bg.simulate(
            molecule.system, molecule.positions, temperature=300, n_frames=options.steps // STEPS_PER_ITERATION,
            steps_per_frame=STEPS_PER_ITERATION, equilibration_steps=20_000, seed=options.seed,
        )  # fmt: skip
        frames, row = trajectory.positions, {"kind": "plain MD", "per_iteration": STEPS_PER_ITERATION}
    else:
        frames, row = with_moves(molecule, options)
    row |= {"seed": options.seed, "steps": options.steps, "seconds": round(time.perf_counter() - started, 1)}
    angles = backbone_dihedrals(frames, molecule.topology)
    indicator = left_handed(angles.phi[:, 0]).astype(float)
    size = effective_sample_size(indicator)
    row |= {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": workflow.versions(),
        "transitions": int(np.abs(np.diff(indicator)).sum()),
        "effective_samples": size,
        "per_million": 1e6 * size / (len(indicator) * row["per_iteration"]),
        "populations": {p.name: [p.value, p.error] for p in populations(angles.phi[:, 0], angles.psi[:, 0])},
    }
    with options.output.open("a") as stream:
        stream.write(json.dumps(row) + "\n")
    print(row)


def with_moves(molecule: bg.systems.Molecule, options: argparse.Namespace) -> tuple[np.ndarray, dict]:
    """One chain of MD with moves."""
    generator = bg.BoltzmannGenerator.load(options.generator)
    integrator = openmm.LangevinMiddleIntegrator(300, 1.0, 0.001)
    integrator.setRandomNumberSeed(options.seed)
    simulation = app.Simulation(
        molecule.topology, molecule.system, integrator, openmm.Platform.getPlatform("Reference")
    )
    simulation.context.setPositions(molecule.positions)
    simulation.context.setVelocitiesToTemperature(300, options.seed)
    with tempfile.TemporaryDirectory() as folder:
        trajectory = Path(folder) / "chain.dcd"
        sampler = bg.BoltzmannGeneratorSampler(
            generator, simulation, stepsPerIteration=STEPS_PER_ITERATION, proposalsPerIteration=options.proposals,
            seed=options.seed, trajectoryFile=trajectory,
        )  # fmt: skip
        simulation.step(options.steps)
        frames = mdtraj.load(str(trajectory), top=mdtraj.Topology.from_openmm(molecule.topology)).xyz
    row = {
        "kind": "MD with moves",
        "generator": generator.fingerprint,
        "per_iteration": STEPS_PER_ITERATION + options.proposals,
        "acceptance": sampler.acceptanceRate,
        "refused": sampler.numRefused,
    }
    return frames.astype(np.float64), row


def print_table(path: Path, reference: Path | None) -> None:
    """Chains, their means, and the reference's populations."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        left = list(row["populations"].values())[-1]
        print(
            f"{row['kind']:14} seed {row['seed']}  {row['steps']:>10} steps  {row['transitions']:>6} transitions  "
            f"{row['per_million']:10.3f} effective per million  phi>0 {left[0]:.4f} ± {left[1]:.4f}"
            + (f"  acceptance {row['acceptance']:.4f}" if "acceptance" in row else "")
        )
    means = {}
    for kind in sorted({row["kind"] for row in rows}):
        values = [row["per_million"] for row in rows if row["kind"] == kind]
        means[kind] = np.mean(values)
        print(f"{kind:14} mean {np.mean(values):.3f} ± {np.std(values, ddof=1) if len(values) > 1 else np.nan:.3f}")
    if len(means) == 2:
        print(f"ratio {means['MD with moves'] / means['plain MD']:.3g}")
    if reference is not None:
        with np.load(reference, allow_pickle=False) as file:
            frames = file["positions"].astype(np.float64)
        angles = backbone_dihedrals(frames, bg.systems.load("alanine_dipeptide").topology)
        for p in populations(angles.phi[:, 0], angles.psi[:, 0]):
            print(f"reference {p}")


if __name__ == "__main__":
    main()
