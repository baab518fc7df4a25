"""Two replicas and the map of two generators between them: acceptance, round trips, free energies of basins.

    python benchmarks/learned_exchange.py alanine_dipeptide --output exchange.jsonl --seed 1 \
        --reference benchmarks/references/alanine_dipeptide.npz
    python benchmarks/learned_exchange.py alanine_tetrapeptide --output exchange.jsonl --seed 1 --reference ala3.npz
    python benchmarks/learned_exchange.py alanine_dipeptide --output exchange.jsonl --seed 1 --plain
    python benchmarks/learned_exchange.py --output exchange.jsonl --table

Each call adds one row. The generators are trained on one short ladder (`--training` iterations of it) and kept in
`--folder`, or given as files with --cold and --hot. `--plain` exchanges the same two replicas without a map. Free
energies are -kT log(p / (1 - p)) of the basin phi > 0 of every residue at the lower temperature. Alanine tetrapeptide
is Ace-(Ala)3-Nme. A reference (`benchmarks/reference.py`) is never used for training.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import openmm
from openmm import app, unit

import openmm_bg as bg
from openmm_bg import workflow
from openmm_bg.analysis import BASINS, Population, backbone_dihedrals, populations
from openmm_bg.sampling import ExchangeStatistics, geometric_temperatures
from openmm_bg.units import thermal_energy

LEFT = len(BASINS) - 1


def main() -> None:
    options = parse()
    if options.table:
        print_table([json.loads(line) for line in options.output.read_text().splitlines()])
        return
    molecule = bg.systems.load(options.molecule)
    generators, training = ([None, None], {}) if options.plain else trained(molecule, options)
    row = {
        "molecule": options.molecule, "scheme": "plain" if options.plain else "learned", "seed": options.seed,
        "temperatures": options.temperatures, "iterations": options.iterations, "steps": options.steps,
        "date": datetime.now(UTC).isoformat(timespec="seconds"), "versions": workflow.versions(), "training": training,
    }  # fmt: skip
    frames, figures = exchanged(molecule, generators, options)
    row |= figures | {"basins": compared(molecule, frames, options)}
    with options.output.open("a") as stream:
        stream.write(json.dumps(row) + "\n")
    print_table([row])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("molecule", nargs="?", help="a name of bg.systems")
    parser.add_argument("--output", type=Path, required=True, help="JSON Lines")
    parser.add_argument("--folder", type=Path, default=Path("results/benchmarks"), help="where generators are kept")
    parser.add_argument("--cold", type=Path, help="a trained generator of the lower temperature")
    parser.add_argument("--hot", type=Path, help="one of the higher")
    parser.add_argument("--temperatures", type=float, nargs=2, default=[300.0, 600.0])
    parser.add_argument("--iterations", type=int, default=10_000)
    parser.add_argument("--equilibration", type=int, default=100, help="iterations that are discarded")
    parser.add_argument("--steps", type=int, default=500, help="time steps of either replica between exchanges")
    parser.add_argument("--training", type=int, default=2400, help="iterations of the ladder that makes the data")
    parser.add_argument("--replicas", type=int, default=3, help="of that ladder")
    parser.add_argument("--likelihood-steps", type=int, default=2500)
    parser.add_argument("--training-steps", type=int, default=7000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--plain", action="store_true", help="no map")
    parser.add_argument("--reference", type=Path)
    parser.add_argument("--table", action="store_true", help="print the rows instead")
    options = parser.parse_args()
    if not options.table and not options.molecule:
        parser.error("name a molecule, or ask for the --table")
    if (options.cold is None) != (options.hot is None):
        parser.error("give both --cold and --hot, or neither")
    return options


def trained(molecule: Any, options: argparse.Namespace) -> tuple[list[bg.BoltzmannGenerator], dict]:
    """The generators of both temperatures, from files or made now, and what they cost."""
    paths = [options.cold, options.hot]
    if options.cold is None:
        folder = options.folder / f"exchange_{options.molecule}_{options.seed}"
        paths = [folder / f"{temperature:g}.bg" for temperature in options.temperatures]
    if not all(path.exists() for path in paths):
        paths[0].parent.mkdir(parents=True, exist_ok=True)
        (folder / "training.json").write_text(json.dumps(train(molecule, paths, options)))
    record = paths[0].parent / "training.json"
    generators = [bg.BoltzmannGenerator.load(path) for path in paths]
    return generators, json.loads(record.read_text()) if record.exists() else {}


def train(molecule: Any, paths: list[Path], options: argparse.Namespace) -> dict:
    """One ladder for the data of both, then bursts, then both fits."""
    started = time.perf_counter()
    ladder = bg.replica_exchange(
        molecule.system, molecule.positions, keep=(0, options.replicas - 1), n_iterations=options.training,
        temperatures=geometric_temperatures(*options.temperatures, options.replicas),
        equilibration_iterations=options.training // 40, seed=options.seed,
    )  # fmt: skip
    evaluations = ladder.force_evaluations
    for path, temperature, frames in zip(paths, options.temperatures, ladder.frames.values(), strict=True):
        data = bg.bursts(molecule.system, frames, temperature=temperature, n_bursts=16, seed=options.seed + 1)
        generator = bg.BoltzmannGenerator.for_molecule(
            molecule.topology, molecule.system, temperature, positions=molecule.positions, seed=options.seed
        )
        result = generator.fit(
            data.positions, likelihood_steps=options.likelihood_steps, steps=options.training_steps, seed=options.seed
        )
        generator.save(path)
        evaluations += data.force_evaluations + result.evaluations
    return {"evaluations": evaluations, "seconds": round(time.perf_counter() - started, 1)}


def exchanged(molecule: Any, generators: list, options: argparse.Namespace) -> tuple[np.ndarray, dict]:
    """Frames of the lower temperature, and how the exchange went."""
    integrator = openmm.LangevinMiddleIntegrator(options.temperatures[0], 1.0, 0.001)
    integrator.setRandomNumberSeed(options.seed)
    simulation = app.Simulation(
        molecule.topology, molecule.system, integrator, openmm.Platform.getPlatform("Reference")
    )
    simulation.context.setPositions(molecule.positions)
    simulation.minimizeEnergy()
    simulation.context.setVelocitiesToTemperature(options.temperatures[0], options.seed)
    states = [{"temperature": temperature * unit.kelvin} for temperature in options.temperatures]
    if options.plain:
        random.seed(options.seed)  # OpenMM's own decisions come from there
        sampler = app.ReplicaExchangeSampler(states, simulation, options.steps)
        # more attempts on unchanged configurations would only undo what they did
        sampler.exchangesPerIteration = 1
    else:
        sampler = bg.LearnedReplicaExchangeSampler(states, simulation, options.steps, generators, seed=options.seed)
    for index in range(2):
        sampler.simulateReplica(index, options.equilibration * options.steps)
    frames, travels = [], ExchangeStatistics(2)

    def keep(sampler: Any) -> None:
        cold = sampler.replicaConformation[sampler.replicaStateIndex.index(0)]
        frames.append(cold.getPositions(asNumpy=True)._value.astype(np.float32))
        travels.visit(sampler.replicaStateIndex)
        places.append(sampler.replicaStateIndex[0])

    places: list[int] = []
    sampler.reporters.append(keep)
    started = time.perf_counter()
    sampler.simulate(options.iterations)
    seconds = time.perf_counter() - started
    places.append(sampler.replicaStateIndex[0])
    refused = 0 if options.plain else int(sampler.statistics.refused[0, 1])
    return np.array(frames, dtype=np.float64), {
        "acceptance": float(np.mean(np.diff(places) != 0)),
        "refused": refused / options.iterations,
        "round_trips": int(travels.round_trips.sum()),
        "seconds": round(seconds, 1),
        "evaluations": 2 * options.iterations * (options.steps + 2),
    }


def compared(molecule: Any, frames: np.ndarray, options: argparse.Namespace) -> dict:
    """Population and free energy of the left-handed basin of every residue, with errors, beside the reference's."""
    known = {}
    if options.reference is not None:
        with np.load(options.reference, allow_pickle=False) as file:
            known = json.loads(str(file["provenance"]))["populations"]
    angles = backbone_dihedrals(frames, molecule.topology)
    kt = thermal_energy(options.temperatures[0])
    basins = {}
    for k, residue in enumerate(angles.residues):
        found = populations(angles.phi[:, k], angles.psi[:, k])[LEFT]
        value, error = free_energy(found.value, found.error, kt)
        basins[residue] = {
            "population": [found.value, found.error], "free_energy": [value, error],
            "effective_samples": found.effective_samples, "transitions": transitions(angles.phi[:, k]),
        }  # fmt: skip
        if f"{residue} l" in known:
            reference = known[f"{residue} l"]
            expected, uncertain = free_energy(reference["value"], reference["error"], kt)
            basins[residue] |= {
                "reference": [expected, uncertain], "apart": (value - expected) / math.hypot(error, uncertain)
            }  # fmt: skip
    return basins


def free_energy(population: float, error: float, kt: float) -> tuple[float, float]:
    """-kT log(p / (1 - p)) and its error, kJ/mol; NaN where the basin is empty or all there is."""
    if not 0 < population < 1:
        return math.nan, math.nan
    return -kt * math.log(population / (1 - population)), kt * error / (population * (1 - population))


def transitions(phi: np.ndarray) -> int:
    """How often a residue crossed between phi > 0 and phi < 0."""
    return int(np.abs(np.diff(BASINS[LEFT].contains(phi, phi).astype(int))).sum())


def print_table(rows: list[dict]) -> None:
    for row in rows:
        cold, hot = row["temperatures"]
        print(
            f"{row['molecule']}, {row['scheme']}, {cold:g} and {hot:g} K, seed {row['seed']}: acceptance "
            f"{100 * row['acceptance']:.2f} %, refused {100 * row['refused']:.2f} %, {row['round_trips']} round trips "
            f"in {row['iterations']} iterations, {row['seconds']:.0f} s"
        )
        for residue, basin in row["basins"].items():
            name, (value, error) = f"{residue} φ>0", basin["population"]
            text = f"  {Population(name, value, error, basin['effective_samples'])}"
            if math.isfinite(basin["free_energy"][1]):
                text += ", {:.2f} ± {:.2f} kJ/mol".format(*basin["free_energy"])
                if "reference" in basin:
                    text += ", reference {:.2f} ± {:.2f}, {:+.1f} errors".format(*basin["reference"], basin["apart"])
            print(f"{text}; {basin['effective_samples']:.0f} effective samples, {basin['transitions']} transitions")


if __name__ == "__main__":
    main()
