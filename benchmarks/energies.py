"""Cost and error of energies: ours beside loops over OpenMM Contexts, in one run.

    python benchmarks/energies.py --output energies.jsonl                     all sections, about ten minutes
    python benchmarks/energies.py --output energies.jsonl --only speed
    python benchmarks/energies.py --output energies.jsonl --plot energies.svg
    python benchmarks/energies.py --output energies.jsonl --table

Sections: speed (microseconds per conformation, batch 1024, one thread, against the fastest loop), size (22 to 500
atoms), batch (1 to 1e6, with peak memory), compile (cold and warm, each in a fresh process), accuracy. One JSON line
per row; rows that are in the file already are not measured again.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openmm
import torch
from openmm import app, unit
from tqdm import tqdm

import openmm_bg as bg

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "energies"))
import force_fields

BATCH = 1024
REPEATS = 3
SECTIONS = ("speed", "size", "batch", "compile", "accuracy")
ROW = dict[str, Any]


def polyalanine(residues: int, *field: str) -> tuple[openmm.System, np.ndarray]:
    """ACE-(ALA)n-NME, stretched out, hydrogens and all."""
    from pdbfixer import PDBFixer

    sequence = ["ACE", *["ALA"] * residues, "NME"]
    fixer = PDBFixer(pdbfile=(Path(bg.systems.__file__).parent / "alanine_dipeptide.pdb").open())
    template = {}
    for atom, position in zip(fixer.topology.atoms(), fixer.positions.value_in_unit(unit.nanometer), strict=True):
        template.setdefault(atom.residue.name, []).append((atom, np.array(position)))
    # each alanine is the one before moved by the vector from the nitrogen of ALA to that of NME, turned half around
    named = {(a.residue.name, a.name): p for members in template.values() for a, p in members}
    step = named["NME", "N"] - named["ALA", "N"]
    axis = step / np.linalg.norm(step)
    topology, positions, previous = app.Topology(), [], None
    chain = topology.addChain()
    for number, name in enumerate(sequence):
        residue = topology.addResidue(name, chain)
        turns = 0 if number == 0 else number - 1 if name == "ALA" else residues - 1
        atoms = {}
        for atom, place in template[name]:
            shifted = place - named["ALA", "N"]
            if turns % 2:
                shifted = 2 * axis * (axis @ shifted) - shifted
            atoms[atom.name] = topology.addAtom(atom.name, atom.element, residue)
            positions.append(shifted + turns * step)
        for bond in fixer.topology.bonds():
            if bond[0].residue.name == bond[1].residue.name == name:
                topology.addBond(atoms[bond[0].name], atoms[bond[1].name])
        if previous is not None:
            topology.addBond(previous, atoms["N"])
        previous = atoms.get("C")
    system = app.ForceField(*field).createSystem(topology)
    context = openmm.Context(system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatform("CPU"))
    context.setPositions(np.array(positions))
    openmm.LocalEnergyMinimizer.minimize(context, 100, 500)
    return system, context.getState(positions=True).getPositions(asNumpy=True).value_in_unit(unit.nanometer)


def molecules() -> dict[str, tuple[openmm.System, np.ndarray]]:
    return {
        "alanine dipeptide, amber99sbildn+amber99_obc": force_fields.make("amber99sbildn+amber99_obc"),
        "ACE-(ALA)5-NME, amber99sbildn+amber99_obc": polyalanine(5, "amber99sbildn.xml", "amber99_obc.xml"),
        "alanine dipeptide, amber14+obc2 (CustomGBForce)": force_fields.make("amber14+obc2"),
    }


def conformations(positions: np.ndarray, rows: int, seed: int = 0) -> np.ndarray:
    return positions + 0.003 * np.random.default_rng(seed).standard_normal((rows, *positions.shape))


def timed(action: Callable[[], object], rows: int, rounds: int = 5) -> float:
    """Median microseconds per conformation."""
    action()
    taken = []
    for _ in range(rounds):
        start = time.perf_counter()
        action()
        taken.append((time.perf_counter() - start) / rows * 1e6)
    return statistics.median(taken)


def loop(system: openmm.System, x: np.ndarray, platform: str, forces: bool) -> Callable[[], None]:
    """What a user writes: one conformation after another through one Context."""
    properties = {"Threads": "1"} if platform == "CPU" else {}
    integrator = openmm.VerletIntegrator(0.001)
    context = openmm.Context(system, integrator, openmm.Platform.getPlatform(platform), properties)

    def run() -> None:
        for row in x:
            context.setPositions(row)
            state = context.getState(energy=True, forces=forces)
            state.getPotentialEnergy()
            if forces:
                state.getForces(asNumpy=True)

    run.context = (context, integrator)  # type: ignore[attr-defined]
    return run


def _serve(xml: str, platform: str, tasks: Any, results: Any) -> None:
    system = openmm.XmlSerializer.deserialize(xml)
    properties = {"Threads": "1"} if platform == "CPU" else {}
    context = openmm.Context(system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatform(platform), properties)
    while (task := tasks.get()) is not None:
        number, row = task
        context.setPositions(row)
        state = context.getState(energy=True, forces=True)
        results.put((number, state.getPotentialEnergy()._value, state.getForces(asNumpy=True)._value))


def queue(system: openmm.System, x: np.ndarray, platform: str) -> float:
    """A worker process that is sent one conformation per message."""
    spawn = multiprocessing.get_context("spawn")
    tasks, results = spawn.Queue(), spawn.Queue()
    worker = spawn.Process(target=_serve, args=(openmm.XmlSerializer.serialize(system), platform, tasks, results))
    worker.start()

    def run() -> None:
        for number, row in enumerate(x):
            tasks.put((number, row))
        for _ in x:
            results.get()

    try:
        return timed(run, len(x), 3)
    finally:
        tasks.put(None)
        worker.join()


def ours(system: openmm.System, x: np.ndarray, dtype: torch.dtype, forces: bool, compile: bool, device: str) -> float:
    energy = bg.ForceFieldEnergy(system, 300, compile=compile).to(device)
    batch = torch.as_tensor(x).to(device, dtype)

    def run() -> None:
        energy.value_and_gradient(batch) if forces else energy(batch)
        if device == "cuda":
            torch.cuda.synchronize()

    return timed(run, len(x))


def speed() -> Iterator[tuple[str, Callable[[], ROW]]]:
    for repeat in range(REPEATS):
        for name, (system, positions) in molecules().items():
            x = conformations(positions, BATCH, repeat)

            def measure(system: openmm.System = system, x: np.ndarray = x) -> ROW:
                row: ROW = {}
                for forces, what in ((True, "energy+forces"), (False, "energy")):
                    for platform in ("Reference", "CPU"):
                        row[f"{platform} loop, {what}"] = timed(loop(system, x, platform, forces), BATCH, 3)
                    for dtype in (torch.float32, torch.float64):
                        label = str(dtype).removeprefix("torch.")
                        row[f"ours {label}, {what}"] = ours(system, x, dtype, forces, True, "cpu")
                        row[f"ours {label} plain torch, {what}"] = ours(system, x, dtype, forces, False, "cpu")
                        if torch.cuda.is_available():
                            many = np.tile(x, (256, 1, 1))
                            row[f"ours {label} CUDA, {what}"] = ours(system, many, dtype, forces, True, "cuda")
                    fastest = min(row[f"{platform} loop, {what}"] for platform in ("Reference", "CPU"))
                    for label in ("float32", "float64"):
                        row[f"ratio {label}, {what}"] = fastest / row[f"ours {label}, {what}"]
                platform = min(("Reference", "CPU"), key=lambda p: row[f"{p} loop, energy+forces"])
                row["queue of the faster platform, energy+forces"] = queue(system, x, platform)
                row["batch 1, ms"] = ours(system, x[:1], torch.float64, True, True, "cpu") / 1000
                return row

            yield f"{name}, seed {repeat}", measure


def size() -> Iterator[tuple[str, Callable[[], ROW]]]:
    for residues in (1, 5, 10, 20, 35, 49):

        def measure(residues: int = residues) -> ROW:
            system, positions = polyalanine(residues, "amber99sbildn.xml", "amber99_obc.xml")
            x = conformations(positions, 64)
            row: ROW = {"atoms": len(positions)}
            for dtype in (torch.float32, torch.float64):
                row[f"ours {str(dtype)[6:]}"] = ours(system, x, dtype, True, True, "cpu")
            row["Reference loop"] = timed(loop(system, x, "Reference", True), len(x), 1)
            row["CPU loop"] = timed(loop(system, x, "CPU", True), len(x), 1)
            return row

        yield f"{residues} residues", measure


_MEMORY = """
import resource, sys, time, torch
sys.path.insert(0, {folder!r})
import force_fields, openmm_bg as bg
torch.set_num_threads(1)
system, positions = force_fields.make("amber99sbildn+amber99_obc")
energy = bg.ForceFieldEnergy(system, 300)
energy.value_and_gradient(torch.as_tensor(positions[None]).float())
noise = torch.randn({rows}, 22, 3, generator=torch.Generator().manual_seed(0))
x = noise.mul_(0.003).add_(torch.as_tensor(positions).float())
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
start = time.perf_counter()
u, g = energy.value_and_gradient(x)
taken = time.perf_counter() - start
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(taken / {rows} * 1e6, after - before, {rows} * 67 * 4 / 2**20)
"""


def batch() -> Iterator[tuple[str, Callable[[], ROW]]]:
    for exponent in range(7):

        def measure(rows: int = 10**exponent) -> ROW:
            code = _MEMORY.format(folder=str(Path(force_fields.__file__).parent), rows=rows)
            done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
            cost, added, results = map(float, done.stdout.split())
            return {"rows": rows, "microseconds": cost, "MiB beyond the input": added, "MiB of results": results}

        yield f"1e{exponent}", measure


_COMPILE = """
import sys, time, torch
sys.path.insert(0, {folder!r})
import force_fields, openmm_bg as bg
system, positions = force_fields.make({name!r})
x = torch.as_tensor(positions[None]).to(torch.{dtype})
start = time.perf_counter()
energy = bg.ForceFieldEnergy(system, 300)
energy.value_and_gradient(x)
print(time.perf_counter() - start)
"""


def compilation() -> Iterator[tuple[str, Callable[[], ROW]]]:
    for name in ("amber99sbildn+amber99_obc", "charmm36_2024", "alchemical"):
        for dtype in ("float32", "float64"):

            def measure(name: str = name, dtype: str = dtype) -> ROW:
                code = _COMPILE.format(folder=str(Path(force_fields.__file__).parent), name=name, dtype=dtype)
                with tempfile.TemporaryDirectory() as cache:
                    environment = os.environ | {"OPENMM_BG_CACHE": cache}
                    taken = [
                        float(
                            subprocess.run(
                                [sys.executable, "-c", code],
                                capture_output=True,
                                text=True,
                                check=True,
                                env=environment,
                            ).stdout.split()[-1]
                        )
                        for _ in range(2)
                    ]
                return {"cold, s": taken[0], "warm, s": taken[1]}

            yield f"{name}, {dtype}", measure


def accuracy() -> Iterator[tuple[str, Callable[[], ROW]]]:
    for name in (*force_fields.BUILDERS, *force_fields.AMINO_ACIDS):

        def measure(name: str = name) -> ROW:
            system, _ = force_fields.make(name)
            x = torch.as_tensor(force_fields.thermal(name, 20))
            reference = bg.ContextEnergy(system, 300, platform="Reference").value_and_gradient(x)
            row: ROW = {}
            for compile in (True, False):
                u, g = bg.ForceFieldEnergy(system, 300, compile=compile).value_and_gradient(x)
                what = "compiled" if compile else "plain torch"
                row[f"energy, {what}"] = float(((u - reference[0]) / reference[0].abs().clamp(min=1)).abs().max())
                row[f"forces, {what}"] = float((g - reference[1]).abs().max() / reference[1].abs().max())
            return row

        yield name, measure


def table(rows: list[ROW]) -> None:
    """Markdown, mean and spread over seeds."""
    for section in SECTIONS:
        found = [row for row in rows if row["section"] == section]
        groups: dict[str, list[ROW]] = {}
        for row in found:
            groups.setdefault(row["name"].split(", seed")[0], []).append(row)
        for name, members in groups.items():
            print(f"\n{section}: {name}\n")
            for key in [k for k in members[0] if k not in ("section", "name")]:
                values = [member[key] for member in members]
                spread = f" ± {statistics.stdev(values):.3g}" if len(values) > 1 else ""
                print(f"| {key} | {statistics.mean(values):.4g}{spread} |")


def plot(rows: list[ROW], path: str) -> None:
    """Cost against atoms and against batch."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    sizes = sorted((row for row in rows if row["section"] == "size"), key=lambda row: row["atoms"])
    for key in ("ours float32", "ours float64", "Reference loop", "CPU loop"):
        left.loglog([row["atoms"] for row in sizes], [row[key] for row in sizes], "o-", label=key, markersize=3)
    left.set(xlabel="atoms", ylabel="µs per conformation, energy and forces")
    left.legend(frameon=False)
    batches = [row for row in rows if row["section"] == "batch"]
    right.loglog([row["rows"] for row in batches], [row["microseconds"] for row in batches], "o-", markersize=3)
    right.set(xlabel="batch", ylabel="µs per conformation, 22 atoms, float32")
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON lines, one per row")
    parser.add_argument("--only", choices=SECTIONS, help="one section")
    parser.add_argument("--table", action="store_true", help="print what the file holds and stop")
    parser.add_argument("--plot", help="draw what the file holds and stop")
    arguments = parser.parse_args()
    rows = [json.loads(line) for line in arguments.output.read_text().splitlines()] if arguments.output.exists() else []
    if arguments.table or arguments.plot:
        table(rows) if arguments.table else plot(rows, arguments.plot)
        return
    torch.set_num_threads(1)
    known = {(row["section"], row["name"]) for row in rows}
    makers = {"speed": speed, "size": size, "batch": batch, "compile": compilation, "accuracy": accuracy}
    for section in [arguments.only] if arguments.only else SECTIONS:
        for name, measure in tqdm(makers[section](), desc=section):
            if (section, name) in known:
                continue
            row = {"section": section, "name": name, **measure()}
            with arguments.output.open("a") as stream:
                stream.write(json.dumps(row) + "\n")
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")


if __name__ == "__main__":
    main()
