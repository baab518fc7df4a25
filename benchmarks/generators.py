"""How good a generator becomes, and at what cost: one row per molecule, seed and choice.

    python benchmarks/generators.py alanine_dipeptide --reference aldp.npz --output rows.jsonl --seed 1
    python benchmarks/generators.py "ACE PHE NME" --output rows.jsonl --seed 1
    python benchmarks/generators.py alanine_tetrapeptide --output rows.jsonl --device cuda --batch-size 4096 \\
        --learning-rate 1e-2 --budget 8min --constraints HBonds
    python benchmarks/generators.py alanine_dipeptide --output rows.jsonl --no-data --budget 50min
    python benchmarks/generators.py alanine_dipeptide --output rows.jsonl --without memory --set training_steps=3000
    python benchmarks/generators.py --output rows.jsonl --table

A reference (`benchmarks/reference.py`) is never used for training; without one a row is measured on the ladders of its
own exchange that training did not see. What is finished is kept in the folder: a killed run goes on where it was, and a
row that is in the output already is not run again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import time
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from evaluation import evaluate
from openmm import app

import openmm_bg as bg
from openmm_bg.files import write_atomically
from openmm_bg.sampling import Trajectory, bursts
from openmm_bg.training import ReversePath, Settings
from openmm_bg.workflow import RunSettings
from openmm_bg.workflow.data import TIMESTEP, exchange, settle

CHOICES = (
    "flow", "device", "budget", "constraints", "batch_size", "learning_rate", "hidden", "layers", "no_data", "without",
)  # fmt: skip
# an ingredient of the recipe: what of the flow, of the objective or of the settings leaves it out
INGREDIENTS: dict[str, tuple[dict, dict, dict]] = {
    "mixing": ({"mixing": False}, {}, {}),
    "bonded-masks": ({"neighbours": None}, {}, {}),
    "memory": ({}, {"memory": 0}, {}),
    "log-variance": ({}, {"variance": 0.0}, {}),
    "tempering": ({}, {"temper": 0.0}, {}),
    "exploration": ({}, {"explore": 0.0}, {}),
    "weights": ({}, {"power": 0.0}, {}),
    "torsion-rate": ({}, {}, {"torsion_rate": 1.0}),
    "average": ({}, {}, {"average": 0.0}),
}


def main() -> None:
    options = parse()
    rows = [json.loads(line) for line in options.output.read_text().splitlines()] if options.output.exists() else []
    if options.table:
        print_table(rows)
        return
    torch.set_num_threads(options.threads)
    key = {"molecule": options.molecule, "seed": options.seed} | options.set
    key |= {name: getattr(options, name) for name in CHOICES if getattr(options, name) is not None}
    if any(row["key"] == key for row in rows):
        print("this row is there already:", key)
        return
    row = measure(options, key)
    with options.output.open("a") as stream:
        stream.write(json.dumps(row) + "\n")
    print_table([row])


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("molecule", nargs="?", help="a name of bg.systems, or a sequence such as 'ACE PHE NME'")
    parser.add_argument("--output", type=Path, required=True, help="JSON Lines")
    parser.add_argument("--reference", type=Path, help="frames of benchmarks/reference.py")
    parser.add_argument("--folder", type=Path, default=Path("results/benchmarks"), help="where runs are kept")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--samples", type=int, default=100_000)
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=NUMBER", help="settings of a run")
    parser.add_argument("--flow", choices=("realnvp",))
    parser.add_argument("--device", choices=("cuda",))
    parser.add_argument("--budget", help="of training: 10min or 1e7")
    parser.add_argument("--constraints", choices=("HBonds",))
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--hidden", type=int, help="units of the couplings' networks")
    parser.add_argument("--layers", type=int, help="couplings")
    parser.add_argument("--no-data", action="store_true", default=None, help="from the energy alone")
    parser.add_argument("--without", choices=tuple(INGREDIENTS), help="an ingredient of the recipe")
    parser.add_argument("--table", action="store_true", help="print the rows instead")
    options = parser.parse_args(arguments)
    if not options.table and not options.molecule:
        parser.error("name a molecule, or ask for the --table")
    known = {field.name for field in dataclasses.fields(RunSettings)}
    pairs = [item.partition("=") for item in options.set]
    wrong = [name for name, _, value in pairs if name not in known or not value]
    if wrong:
        parser.error(f"--set takes NAME=NUMBER with a name of RunSettings; check {', '.join(wrong)}")
    options.set = {name: json.loads(value) for name, _, value in pairs}
    return options


def load(options: argparse.Namespace) -> tuple[Any, Any]:
    """The molecule without constraints, whose ladders run in a batch, and as it is asked for."""
    make = bg.systems.peptide if " " in options.molecule else bg.systems.load
    free = make(options.molecule)
    if options.constraints is None:
        return free, free
    return free, make(options.molecule, constraints=getattr(app, options.constraints))


def measure(options: argparse.Namespace, key: dict) -> dict:
    """Data, training and evaluation; each is kept when it is done."""
    name = "_".join(str(value) for value in key.values()).replace(" ", "-").replace("/", "-")
    folder = options.folder / name
    folder.mkdir(parents=True, exist_ok=True)
    free, molecule = load(options)
    settings = RunSettings(seed=options.seed, data="exchange", **{"flow": options.flow or "spline"}, **options.set)
    generator = untrained(molecule, options)
    settings = settle(settings, free, generator)
    held, ladder, data, cost = None, None, None, {}
    if not options.no_data:
        held, ladder, data, cost = gather(free, molecule, settings, folder, options.device or "cpu")
    cost |= train(generator, data, settings, options, folder)
    if options.reference is not None:
        with np.load(options.reference, allow_pickle=False) as file:
            held, ladder = file["positions"].astype(np.float64), file["ladder"]
    if held is None:
        raise SystemExit("Without data a row needs a --reference to be measured on.")
    row = {"key": key, "date": datetime.now(UTC).isoformat(timespec="seconds")}
    row |= {"atoms": molecule.num_atoms, "dimension": generator.flow.dimension, "defensive": generator.defensive}
    row |= {
        "reference": None if options.reference is None else options.reference.stem,
        "settings": dataclasses.asdict(settings),
    }
    return row | {"cost": cost} | evaluate(generator, held, ladder, options.samples, seed=options.seed + 1000)


def untrained(molecule: Any, options: argparse.Namespace) -> bg.BoltzmannGenerator:
    """The usual generator, or one whose flow is wider or deeper."""
    make = partial(
        bg.BoltzmannGenerator.for_molecule, molecule.topology, molecule.system, molecule.temperature,
        positions=molecule.positions, seed=options.seed,
    )  # fmt: skip
    generator = make(flow=options.flow or "spline")
    changes = {k: getattr(options, k) for k in ("hidden", "layers") if getattr(options, k) is not None}
    changes |= left_out(options)[0]
    if not changes:
        return generator
    return make(flow=bg.flows.MolecularFlow.from_config(generator.flow.config() | changes))


def left_out(options: argparse.Namespace) -> tuple[dict, dict, dict]:
    """Changes of the flow, the objective and the settings."""
    return ({}, {}, {}) if options.without is None else INGREDIENTS[options.without]


def gather(
    free: Any, molecule: Any, settings: RunSettings, folder: Path, device: str
) -> tuple[np.ndarray, np.ndarray, Any, dict]:
    """Held-out frames with their ladders, training conformations, and what they cost."""
    if not (folder / "data.json").exists():
        started = time.perf_counter()
        exchanged = exchange(free, settings, folder / "exchange.npz", device=device)
        frames = exchanged.trajectory(0)
        training, held = settings.split(frames.positions)
        burst = bursts(
            molecule.system, training, temperature=molecule.temperature, n_bursts=settings.bursts,
            seed=settings.seed + 1, timestep=TIMESTEP,
            device=device if molecule is free else "cpu",
        )  # fmt: skip
        burst.save(folder / "training.npz")
        np.savez(folder / "held.npz", positions=held.astype(np.float32))
        cost = {
            "data_seconds": round(time.perf_counter() - started, 1),
            "data_evaluations": exchanged.force_evaluations + burst.force_evaluations,
        }
        write_atomically(folder / "data.json", json.dumps(cost).encode())
    with np.load(folder / "held.npz", allow_pickle=False) as file:
        held = file["positions"].astype(np.float64)
    ladder = np.repeat(np.arange(settings.ladders), len(held) // settings.ladders)
    data = Trajectory.load(folder / "training.npz").positions
    return held, ladder, data, json.loads((folder / "data.json").read_text())


def train(
    generator: bg.BoltzmannGenerator, data: Any, settings: RunSettings, options: argparse.Namespace, folder: Path
) -> dict:
    """Train, or load what was trained; what it cost."""
    if not (folder / "training.json").exists():
        usual = Settings()
        training = dataclasses.replace(
            usual, device=options.device or usual.device, batch_size=options.batch_size or usual.batch_size,
            learning_rate=options.learning_rate or usual.learning_rate, **left_out(options)[2],
        )  # fmt: skip
        result = generator.fit(
            data, steps=settings.training_steps, likelihood_steps=None if data is None else settings.likelihood_steps,
            budget=options.budget, settings=training,
            objective=None if data is None else ReversePath(**left_out(options)[1]),
            seed=settings.seed, log=folder / "training.jsonl", checkpoint=folder / "training.checkpoint", resume=True,
        )  # fmt: skip
        generator.save(folder / "generator.bg")
        cost = {
            "training_seconds": round(result.seconds, 1),
            "training_evaluations": result.evaluations,
            "steps": result.steps,
            "rollbacks": result.rollbacks,
            "where": torch.cuda.get_device_name() if options.device else f"cpu, {options.threads} threads",
            "torch": torch.__version__,
        }
        write_atomically(folder / "training.json", json.dumps(cost).encode())
    trained = bg.BoltzmannGenerator.load(folder / "generator.bg")
    generator.flow, generator.defensive = trained.flow, trained.defensive
    return json.loads((folder / "training.json").read_text())


def print_table(rows: list[dict]) -> None:
    """The rows, and mean and spread over seeds."""
    columns = ("ess", "ess_clipped", "acceptance", "forward", "largest_log_ratio")
    print(f"{'':60}" + "".join(f"{c:>18}" for c in columns) + f"{'evaluations':>14}{'minutes':>9}{'basins apart':>14}")
    groups: dict[str, list[list[float]]] = {}
    for row in rows:
        key, cost = dict(row["key"]), row["cost"]
        seed = key.pop("seed")
        name = " ".join(str(v) if k == "molecule" else f"{k}={v}" for k, v in key.items())
        values = [row[c] for c in columns]
        groups.setdefault(name, []).append(values)
        spent, seconds = (
            sum(value for k, value in cost.items() if k.endswith(ending)) for ending in ("evaluations", "seconds")
        )
        apart = max((abs(b["apart"]) for b in row["basins"].values()), default=math.nan)
        print(
            f"{f'{name}, seed {seed}':60}" + "".join(f"{v:18.4f}" for v in values)
            + f"{spent:14.3g}{seconds / 60:9.1f}{apart:14.1f}"
        )  # fmt: skip
    for name, values in groups.items():
        if len(values) > 1:
            mean, spread = np.mean(values, 0), np.std(values, 0, ddof=1)
            text = "".join(f"{m:10.4f} ± {s:.4f}" for m, s in zip(mean, spread, strict=True))
            print(f"{f'{name}, mean and spread':60}" + text)


if __name__ == "__main__":
    main()
