"""Acceptance of a generator's proposals in explicit water (TIP3P, PME), with and without switching.

    python benchmarks/explicit_water.py --generator generator.bg --output water.jsonl --steps 0 1000 10000 --moves 50
    python benchmarks/explicit_water.py --generator generator.bg --output water.jsonl --steps 10000 --to 0.5 0.2
    python benchmarks/explicit_water.py --output water.jsonl --table

One row of alanine dipeptide for each number of switching steps (0 places the proposals directly). Moves are made on
conformations of MD at constant pressure, or volume with --volume. The acceptance is the mean of min(1, alpha), whose
error is smaller than the count's and is taken over moves; a direct move is a series of 100 proposals. An acceptance is
worth as much as it changes: beside it stands the root mean square change of (phi, psi) in accepted moves. Effort is in
force evaluations of the whole box. `--to` ends the decoupling at other couplings of electrostatics and sterics than 0
and 0.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import openmm
from openmm import app, unit

import openmm_bg as bg
from openmm_bg import workflow
from openmm_bg.analysis import backbone_dihedrals
from openmm_bg.sampling.switching import schedule

NEVER = 10**9  # steps between moves of the samplers' own accord
DIRECT = 100  # proposals of a direct move
TOPOLOGY = bg.systems.load("alanine_dipeptide").topology


def main() -> None:
    options = parse()
    if not options.table:
        simulation = water(options)
        generator = bg.BoltzmannGenerator.load(options.generator)
        for steps in options.steps:
            row = acceptance(simulation, generator, steps, options)
            with options.output.open("a") as stream:
                stream.write(json.dumps(row) + "\n")
    print_table([json.loads(line) for line in options.output.read_text().splitlines()])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--generator", type=Path)
    parser.add_argument("--output", type=Path, required=True, help="JSON Lines")
    parser.add_argument("--steps", type=int, nargs="+", default=[0, 1000, 10_000], help="of the decoupling")
    parser.add_argument("--to", type=float, nargs=2, default=[0.0, 0.0], help="couplings at the decoupled end")
    parser.add_argument("--moves", type=int, default=50)
    parser.add_argument(
        "--proposals", type=int, default=10, help="in each move; without switching a hundred times more"
    )
    parser.add_argument("--time-step", type=float, default=0.001, help="ps")
    parser.add_argument("--between", type=int, default=1000, help="time steps of MD between moves")
    parser.add_argument("--equilibration", type=int, default=20_000, help="time steps")
    parser.add_argument("--box", type=float, default=2.4, help="nm, before equilibration")
    parser.add_argument("--volume", action="store_true", help="constant volume")
    parser.add_argument("--platform", help="the fastest by default")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--table", action="store_true", help="print what is there")
    options = parser.parse_args()
    if not options.table and options.generator is None:
        parser.error("give --generator, or --table")
    return options


def water(options: argparse.Namespace) -> app.Simulation:
    """Alanine dipeptide in a box of water, equilibrated."""
    molecule = bg.systems.load("alanine_dipeptide")
    forcefield = app.ForceField("amber99sbildn.xml", "tip3p.xml")
    modeller = app.Modeller(molecule.topology, molecule.positions * unit.nanometer)
    modeller.addSolvent(forcefield, boxSize=openmm.Vec3(1, 1, 1) * options.box * unit.nanometer)
    system = forcefield.createSystem(modeller.topology, nonbondedMethod=app.PME, nonbondedCutoff=0.9 * unit.nanometer)
    if not options.volume:
        barostat = openmm.MonteCarloBarostat(1 * unit.atmosphere, 300 * unit.kelvin)
        barostat.setRandomNumberSeed(options.seed)
        system.addForce(barostat)
    integrator = openmm.LangevinMiddleIntegrator(300, 1.0, options.time_step)
    integrator.setRandomNumberSeed(options.seed)
    platform = () if options.platform is None else (openmm.Platform.getPlatform(options.platform),)
    simulation = app.Simulation(modeller.topology, system, integrator, *platform)
    simulation.context.setPositions(modeller.positions)
    simulation.minimizeEnergy()
    simulation.context.setVelocitiesToTemperature(300, options.seed)
    simulation.step(options.equilibration)
    return simulation


def acceptance(
    simulation: app.Simulation, generator: bg.BoltzmannGenerator, steps: int, options: argparse.Namespace
) -> dict[str, Any]:
    """One row."""
    atoms = range(generator.num_atoms)
    if steps == 0:
        sampler = bg.BoltzmannGeneratorSampler(generator, simulation, NEVER, 1, atoms, options.seed)
        series, effort = DIRECT, 1.0
    else:
        couplings = 1 - (1 - np.array(options.to)) * (1 - schedule(steps))
        sampler = bg.SwitchingSampler(
            generator, simulation, atoms, steps, NEVER, 1, options.proposals, couplings=couplings, seed=options.seed
        )
        series, effort = 1, 2.0 * steps + options.proposals
    simulation.reporters.pop()  # moves are made here
    works, changes, seconds = [], [], 0.0
    for _ in range(options.moves):
        simulation.step(options.between)
        started = time.perf_counter()
        works.append([])
        before = torsions(simulation)
        for _ in range(series):
            (attempt,) = sampler.attemptMoves(1)
            works[-1].append(-attempt.log_acceptance)
            if attempt.accepted:
                after = torsions(simulation)
                changes.append(np.arccos(np.cos(after - before)))
                before = after
        seconds += time.perf_counter() - started
    work = np.array(works)
    probability = np.exp(-np.maximum(work, 0)).mean(1)
    finished = work[np.isfinite(work)]
    return {
        "steps": steps, "to": options.to, "proposals": options.proposals,
        "ensemble": "NVT" if options.volume else "NPT",
        "particles": simulation.system.getNumParticles(), "attempts": work.size, "accepted": sampler.numAccepted,
        "refused": sampler.numRefused, "acceptance": float(probability.mean()),
        "error": float(probability.std(ddof=1) / math.sqrt(len(work))),
        "degrees": float(np.degrees(np.sqrt(np.mean(np.square(changes))))) if changes else None,
        "work": [float(np.quantile(finished, q)) for q in (0, 0.1, 0.5, 0.9)] if len(finished) else None,
        "evaluations_per_attempt": effort, "seconds_per_attempt": seconds / work.size,
        "platform": simulation.context.getPlatform().getName(), "time_step": options.time_step, "seed": options.seed,
        "date": datetime.now(UTC).isoformat(timespec="seconds"), "versions": workflow.versions(),
    }  # fmt: skip


def torsions(simulation: app.Simulation) -> np.ndarray:
    """phi and psi in radians."""
    positions = simulation.context.getState(positions=True).getPositions(asNumpy=True)._value[None, :22]
    angles = backbone_dihedrals(positions, TOPOLOGY)
    return np.array([angles.phi[0, 0], angles.psi[0, 0]])


def print_table(rows: list[dict[str, Any]]) -> None:
    print(
        "| switching steps | to | ensemble | attempts | accepted | acceptance | work, least / 10 % / median (kT) |",
        end="",
    )
    print(" change (degrees) | evaluations per acceptance | s per attempt |")
    print("|---:|---|---|---:|---:|---:|---:|---:|---:|---:|")
    for row in rows:
        work = " / ".join(f"{w:.3g}" for w in row["work"][:3]) if row["work"] else "--"
        cost = f"{row['evaluations_per_attempt'] / row['acceptance']:.2g}" if row["acceptance"] else "--"
        change = "--" if row["degrees"] is None else f"{row['degrees']:.0f}"
        print(
            f"| {row['steps']} | {row['to'][0]:g}, {row['to'][1]:g} | {row['ensemble']} | {row['attempts']} | "
            f"{row['accepted']} | {row['acceptance']:.2g} +- {row['error']:.1g} | {work} | {change} | {cost} | "
            f"{row['seconds_per_attempt']:.2g} |"
        )


if __name__ == "__main__":
    main()
