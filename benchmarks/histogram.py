"""How long until the (phi, psi) histogram of alanine dipeptide is right, everything included from the PDB on.

    python benchmarks/histogram.py truth --generator other.bg --seed 77 --truth truth.npz
    python benchmarks/histogram.py generator --folder results/benchmarks/alanine_dipeptide_1 --truth truth.npz \
        --output rows.jsonl
    python benchmarks/histogram.py exchange --checkpoint aldp.checkpoint.npz --truth truth.npz --output rows.jsonl
    python benchmarks/histogram.py openmmtools --minutes 20 --seed 1 --truth truth.npz --output rows.jsonl
    python benchmarks/histogram.py plain --minutes 20 --seed 1 --truth truth.npz --output rows.jsonl
    python benchmarks/histogram.py table --output rows.jsonl

Right is a total variation of 0.03 in 30 x 30 bins from a million reweighted draws of a generator with a seed of its own
(`truth`), which prints its basins to be held against those of `reference.py`. `generator` takes a folder of
`generators.py`: its data and training count, and 400,000 draws beside them up to the one that makes the histogram
right. `exchange` takes the
checkpoint of `reference.py`, the project's own replica exchange in one batch. `plain` runs many walkers of MD in one
batch: a third of them start with phi > 0, and how fast they leave says how seldom one enters. What has not come that
far when its minutes are over is extrapolated by the square root of time, and is marked so.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import openmm
import torch
from openmm import unit
from reference import save
from reference_ladders import FRICTION, TIMESTEP, with_heavy_hydrogens
from reference_statistics import Backbone

import openmm_bg as bg
from openmm_bg import workflow
from openmm_bg.analysis import left_handed, populations
from openmm_bg.analysis.distances import torus_histogram
from openmm_bg.coordinates import dihedral
from openmm_bg.sampling import effective_sample_size, geometric_temperatures

BINS, RIGHT, CHUNK = 30, 0.03, 2000
COLUMNS = slice(1, 3)  # phi and psi in the torsions of a Backbone, which begin with omega of the cap
MOLECULE = bg.systems.load("alanine_dipeptide")
ATOMS = torch.as_tensor(Backbone.of(MOLECULE.topology).atoms)[COLUMNS]

Part = tuple[np.ndarray, np.ndarray | None, float, float]
"""Torsions (n, 2), their weights, and seconds and evaluations spent until they were there."""


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    if options.kind == "table":
        print_table([json.loads(line) for line in options.output.read_text().splitlines()])
    elif options.kind == "truth":
        truth(options)
    else:
        with np.load(options.truth, allow_pickle=False) as file:
            right = file["histogram"]
        sources: dict[str, Callable[..., Iterator[Part]]] = {
            "generator": generator, "exchange": exchange, "openmmtools": openmmtools, "plain": plain,
        }  # fmt: skip
        facts: dict[str, Any] = {"kind": options.kind, "seed": options.seed, "versions": workflow.versions()}
        row = approach(sources[options.kind](options, facts), right)
        row = {"date": datetime.now(UTC).isoformat(timespec="seconds")} | facts | row
        with options.output.open("a") as stream:
            stream.write(json.dumps(row) + "\n")
        print_table([row])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=("truth", "generator", "exchange", "openmmtools", "plain", "table"))
    parser.add_argument("--truth", type=Path, help="the histogram that is right (.npz)")
    parser.add_argument("--output", type=Path, help="JSON Lines")
    parser.add_argument("--generator", type=Path, help="whose draws are the truth")
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, help="of a row of generators.py")
    parser.add_argument("--checkpoint", type=Path, help="of reference.py")
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--temperatures", type=int, default=6, help="of openmmtools' ladder, 300 to 1300 K")
    parser.add_argument("--steps", type=int, default=100, help="of 2 fs between exchanges (openmmtools)")
    parser.add_argument("--walkers", type=int, default=300, help="of plain MD")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    needed = {"truth": ("generator", "truth"), "generator": ("folder", "truth", "output"), "table": ("output",)}
    needed |= {"exchange": ("checkpoint", "truth", "output")}
    for name in needed.get(options.kind, ("truth", "output")):
        if getattr(options, name) is None:
            parser.error(f"{options.kind} needs --{name}")
    return options


def torsions(x: Any) -> np.ndarray:
    return dihedral(torch.as_tensor(np.asarray(x, dtype=np.float64)), ATOMS).numpy()


def weighted(draws: bg.Samples) -> tuple[np.ndarray, np.ndarray]:
    """Torsions and log-weights of the draws that have any weight."""
    log_w = draws.log_weights.numpy()
    kept = np.isfinite(log_w)
    return torsions(draws.positions[torch.as_tensor(kept)]), log_w[kept]


def truth(options: argparse.Namespace) -> None:
    """A weighted histogram, its own noise, and its basins."""
    source = bg.BoltzmannGenerator.load(options.generator)
    random, angles, log_w = torch.Generator().manual_seed(options.seed), [], []
    for start in range(0, options.samples, 100_000):
        draws = source.sample(min(100_000, options.samples - start), generator=random)
        x, log_weights = weighted(draws)
        angles.append(x)
        log_w.append(log_weights)
        print(f"{min(start + 100_000, options.samples)} of {options.samples} draws", flush=True)
    x, log_weights = np.concatenate(angles), np.concatenate(log_w)
    weights = np.exp(log_weights - log_weights.max())
    found = populations(x[:, 0], x[:, 1], weights)
    p = torus_histogram(x, BINS, weights)
    effective = len(x) * effective_sample_size(log_weights).fraction
    # mean absolute errors of the bins, were they normal
    noise = 0.5 * math.sqrt(2 / math.pi) * np.sqrt(p * (1 - p) / effective).sum()
    provenance = {
        "generator": source.fingerprint, "samples": options.samples, "seed": options.seed,
        "effective": effective, "noise": float(noise),
        "populations": {one.name: [one.value, one.error] for one in found},
    }  # fmt: skip
    save(options.truth, histogram=p, provenance=json.dumps(provenance))
    print(json.dumps(provenance, indent=1))


def approach(parts: Iterator[Part], right: np.ndarray) -> dict[str, Any]:
    """Add parts until the histogram is right; the way there."""
    total, mass, n, curve, reached = np.zeros_like(right), 0.0, 0, [], None
    for x, weights, seconds, evaluations in parts:
        w = np.ones(len(x)) if weights is None else weights
        total += torus_histogram(x, BINS, w) * w.sum()
        mass, n = mass + w.sum(), n + len(x)
        value = 0.5 * float(np.abs(total / mass - right).sum())
        curve.append([round(seconds, 2), evaluations, value])
        if reached is None and value <= RIGHT:
            reached = [round(seconds, 2), evaluations]
    if not curve:
        raise SystemExit("Nothing came in this time but equilibration; give more --minutes.")
    seconds, evaluations, value = curve[-1]
    extrapolated = reached is None
    if reached is None:
        # the square of an error of independent samples falls as their number grows
        reached = [seconds * (value / RIGHT) ** 2, evaluations * (value / RIGHT) ** 2]
    keep = sorted({round(k) for k in np.geomspace(1, len(curve), 40)})
    return {"samples": n, "reached": reached, "extrapolated": extrapolated, "curve": [curve[k - 1] for k in keep]}


def generator(options: argparse.Namespace, facts: dict[str, Any]) -> Iterator[Part]:
    """Reweighted draws of a generator, after what its data and training cost."""
    cost = {}
    for name in ("data.json", "training.json"):
        cost |= json.loads((options.folder / name).read_text())
    source = bg.BoltzmannGenerator.load(options.folder / "generator.bg")
    facts |= {"generator": source.fingerprint, "cost": cost}
    seconds, spent = (sum(v for k, v in cost.items() if k.endswith(end)) for end in ("_seconds", "_evaluations"))
    random = torch.Generator().manual_seed(options.seed + 5000)
    started, shift = time.perf_counter(), None
    for _ in range(200):
        draws = source.sample(CHUNK, generator=random)
        x, log_w = weighted(draws)
        shift, spent = log_w.max() if shift is None else shift, spent + CHUNK
        yield x, np.exp(log_w - shift), seconds + time.perf_counter() - started, spent


def exchange(options: argparse.Namespace, facts: dict[str, Any]) -> Iterator[Part]:
    """The series of a reference; time and evaluations go with the iterations, those of its start included."""
    with np.load(options.checkpoint, allow_pickle=False) as file:
        header, series = json.loads(file["header"].item()), file["series"]
    facts |= {"settings": header["settings"], "seed": header["settings"]["seed"]}
    every = header["settings"]["exchanges_between_frames"]
    first = header["iteration"] - every * len(series)
    for k in range(0, len(series), 25):
        part = series[k : k + 25, :, 1:][..., COLUMNS].astype(np.float64)
        done = (first + every * (k + len(part))) / header["iteration"]
        yield part.reshape(-1, 2), None, done * header["seconds"], done * header["evaluations"]


def openmmtools(options: argparse.Namespace, facts: dict[str, Any]) -> Iterator[Part]:
    """Parallel tempering of openmmtools, with the ladder, the masses and the time step of `reference.py`."""
    logging.getLogger("openmmtools").setLevel(logging.ERROR)
    from openmmtools import cache, mcmc, multistate, states

    temperatures = geometric_temperatures(300.0, 1300.0, options.temperatures)
    facts |= {"temperatures": temperatures.tolist(), "steps": options.steps}
    system = with_heavy_hydrogens(MOLECULE.system)
    np.random.seed(options.seed)  # noqa: NPY002 - openmmtools draws its exchanges from this global stream alone
    move = mcmc.LangevinDynamicsMove(
        TIMESTEP * unit.picoseconds, FRICTION / unit.picoseconds, options.steps, reassign_velocities=False
    )
    sampler = multistate.ReplicaExchangeSampler(mcmc_moves=move, number_of_iterations=10**9)
    platform = openmm.Platform.getPlatform("Reference")
    cache.global_context_cache.platform = platform
    started, past = time.perf_counter(), round(60.0 / (TIMESTEP * options.steps))
    with tempfile.TemporaryDirectory() as folder:
        sampler.create(
            [states.ThermodynamicState(system, t * unit.kelvin) for t in temperatures],
            [states.SamplerState(MOLECULE.positions * unit.nanometers)],
            multistate.MultiStateReporter(str(Path(folder) / "exchange.nc"), checkpoint_interval=10**9),
        )
        sampler.minimize()
        kept: list[np.ndarray] = []
        for iteration in range(10**9):
            sampler.run(n_iterations=1)
            replica = int(np.argmin(sampler._replica_thermodynamic_states))
            if iteration >= past:  # as long an equilibration as that of `reference.py`
                kept.append(sampler.sampler_states[replica].positions.value_in_unit(unit.nanometer))
            seconds = time.perf_counter() - started
            spent = (iteration + 1) * options.steps * options.temperatures
            if len(kept) == 50 or (kept and seconds > 60 * options.minutes):
                yield torsions(np.array(kept)), None, seconds, spent
                kept = []
            if seconds > 60 * options.minutes:
                return


def plain(options: argparse.Namespace, facts: dict[str, Any]) -> Iterator[Part]:
    """Walkers of MD. The histogram is of those that began as the PDB; the others say how long phi > 0 lasts."""
    system = with_heavy_hydrogens(MOLECULE.system)
    third, begun = options.walkers // 3, time.perf_counter()
    start = np.repeat(MOLECULE.positions[None], options.walkers, 0)
    start[:third] = turned()
    walkers = bg.sampling.BatchedLangevin(
        bg.ForceFieldEnergy(system, 300), start, temperature=300.0, timestep=TIMESTEP, friction=FRICTION,
        generator=torch.Generator().manual_seed(options.seed),
    )  # fmt: skip
    walkers.draw_velocities()
    inside, time_inside, left_at = np.ones(third, bool), 0.0, 0
    steps, share = 50, 1 - third / options.walkers
    while (seconds := time.perf_counter() - begun) < 60 * options.minutes:
        walkers.advance(steps)
        x = torsions(walkers.positions.double().numpy())
        # left for good is the bottom of another basin, not the top of the barrier
        gone = inside & (np.abs(x[:third, 0] + np.pi / 2) < np.pi / 6)
        time_inside += inside.sum() * steps * TIMESTEP
        left_at, inside = left_at + int(gone.sum()), inside & ~gone
        # work goes with the walkers, so that of these is a share of all
        yield x[third:], None, share * seconds, share * walkers.force_evaluations
    rest = x[third:, 0]
    facts |= {
        "walkers": options.walkers, "nanoseconds": walkers.force_evaluations * TIMESTEP * 1e-3,
        "picoseconds_in_left": time_inside, "escapes_from_left": left_at,
        "entered_left": int(left_handed(rest).sum()),
    }  # fmt: skip


def turned() -> np.ndarray:
    """The PDB's conformation, drawn to phi = 60 degrees and relaxed there."""
    system = copy.deepcopy(MOLECULE.system)
    force = openmm.CustomTorsionForce("1000 * pull * (1 - cos(theta - pi / 3)); pi = 3.141592653589793")
    force.addGlobalParameter("pull", 1.0)
    force.addTorsion(*ATOMS[0].tolist())
    system.addForce(force)
    context = openmm.Context(system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatform("Reference"))
    context.setPositions(MOLECULE.positions)
    for pull in (1.0, 0.0):
        context.setParameter("pull", pull)
        openmm.LocalEnergyMinimizer.minimize(context)
    x = context.getState(positions=True).getPositions(asNumpy=True)._value
    if not left_handed(torsions(x[None])[:, 0]).all():
        raise RuntimeError("The conformation went back to phi < 0 as it relaxed; no escape can be seen from there.")
    return x


def print_table(rows: list[dict]) -> None:
    """When each came to be right, and how much sooner the generator was."""
    for row in rows:
        seconds, evaluations = row["reached"]
        print(
            f"{row['kind']:12} seed {row['seed']:<5} TV {row['curve'][-1][2]:.4f} after "
            f"{row['curve'][-1][0] / 60:7.1f} min; "
            f"{RIGHT} {'extrapolated to' if row['extrapolated'] else 'reached after'} {seconds / 60:8.1f} min, "
            f"{evaluations:.3g} evaluations"
        )
        if row.get("escapes_from_left"):
            lasts = row["picoseconds_in_left"] / row["escapes_from_left"]
            print(f"{'':12} phi > 0 lasts {lasts:.0f} ps on average ({row['escapes_from_left']} escapes seen)")


if __name__ == "__main__":
    main()
