"""How good a generator becomes, and at what cost: one row per seed, measured on an independent reference.

    python benchmarks/generators.py --reference ala2_reference.npz --output rows.jsonl --flow spline --seed 1
    python benchmarks/generators.py --reference ala2_reference.npz --output rows.jsonl --table

The reference (`benchmarks/reference.py`) is never used for training. A row that is in the output already is
not run again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch

import openmm_bg as bg
from openmm_bg import workflow
from openmm_bg.analysis import backbone_dihedrals, populations
from openmm_bg.sampling import (
    effective_sample_size,
    forward_effective_sample_size,
    independence_acceptance,
    largest_log_ratio,
    log_normalizer,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reference", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True, help="JSON Lines")
    parser.add_argument("--folder", type=Path, default=Path("results/benchmarks"), help="where runs are kept")
    parser.add_argument("--flow", choices=("spline", "realnvp"), default="spline")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--training-steps", type=int)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--samples", type=int, default=100_000)
    parser.add_argument("--table", action="store_true", help="print the rows instead")
    options = parser.parse_args()
    rows = [json.loads(line) for line in options.output.read_text().splitlines()] if options.output.exists() else []
    if options.table:
        print_table(rows)
        return
    torch.set_num_threads(options.threads)
    settings = workflow.RunSettings(flow=options.flow, seed=options.seed)
    if options.training_steps:
        settings = dataclasses.replace(settings, training_steps=options.training_steps)
    key = {"flow": options.flow, "seed": options.seed, "training_steps": settings.training_steps}
    if any(row["key"] == key for row in rows):
        print("this row is there already:", key)
        return
    folder = options.folder / f"{options.flow}_{options.seed}_{settings.training_steps}"
    with workflow.Run.start("alanine_dipeptide", folder, settings, resume=True) as run:
        run.run("train")
        record = run.record
    row = {"key": key, "date": datetime.now(UTC).isoformat(timespec="seconds"), "threads": options.threads}
    row |= {"cost": {name: record["steps"][name] for name in ("simulate", "train")}, "versions": record["versions"]}
    row |= evaluate(folder / "generator.bg", options.reference, options.samples, seed=options.seed + 1000)
    with options.output.open("a") as stream:
        stream.write(json.dumps(row) + "\n")
    print_table([row])


def evaluate(path: Path, reference: Path, samples: int, seed: int) -> dict:
    """Figures of a saved generator, with and without its defensive part."""
    generator = bg.BoltzmannGenerator.load(path)
    with np.load(reference, allow_pickle=False) as file:
        frames = file["positions"].astype(np.float64)
    angles = backbone_dihedrals(frames, generator.topology)
    result: dict = {"reference_frames": len(frames)}
    expected = populations(angles.phi[:, 0], angles.psi[:, 0])
    for defensive in (generator.defensive, 0.0):
        generator.defensive = defensive
        started = time.perf_counter()
        draws = generator.sample(samples, seed=seed)
        seconds = time.perf_counter() - started
        log_z = log_normalizer(draws.log_weights)
        ess = effective_sample_size(draws.log_weights)
        held = generator.log_weights(frames).numpy()
        worst = np.sort(held - log_z.value)[-5:]
        inside = torch.isfinite(draws.log_weights).numpy()
        weights = np.exp(draws.log_weights.numpy()[inside] - draws.log_weights.max().item())
        drawn = backbone_dihedrals(draws.positions.numpy()[inside], generator.topology)
        reweighted = populations(drawn.phi[:, 0], drawn.psi[:, 0], weights)
        plain = populations(drawn.phi[:, 0], drawn.psi[:, 0])
        result["defensive" if defensive else "plain"] = {
            "share": defensive,
            "n": samples,
            "ess": ess.fraction,
            "ess_clipped": ess.clipped,
            "acceptance": independence_acceptance(draws.log_weights),
            "forward": forward_effective_sample_size(held, log_z.value),
            "largest_log_ratio": largest_log_ratio(held, log_z.value),
            "worst_log_ratios": [round(float(w), 2) for w in worst],
            "largest_log_ratio_of_draws": float(draws.log_weights.max()) - log_z.value,
            "outside_support": float(1 - inside.mean()),
            "log_z": [log_z.value, log_z.error],
            "populations": {
                e.name: {
                    "reference": [e.value, e.error],
                    "reweighted": [r.value, r.error],
                    "generator": [p.value, p.error],
                }
                for e, r, p in zip(expected, reweighted, plain, strict=True)
            },
            "sampling_seconds": round(seconds, 1),
        }
    return result


def print_table(rows: list[dict]) -> None:
    """The rows, and mean and spread over seeds."""
    columns = ("ess", "ess_clipped", "acceptance", "forward", "largest_log_ratio")
    print(f"{'':34}" + "".join(f"{c:>18}" for c in columns) + f"{'phi>0 reweighted':>20}{'reference':>18}")
    groups: dict[tuple, list[list[float]]] = {}
    for row in rows:
        for part in ("defensive", "plain"):
            figures = row[part]
            left = list(figures["populations"].values())[-1]
            name = f"{row['key']['flow']} seed {row['key']['seed']} {part}"
            values = [figures[c] for c in columns]
            groups.setdefault((row["key"]["flow"], part), []).append(values)
            print(
                f"{name:34}" + "".join(f"{v:18.4f}" for v in values)
                + "".join(f"{left[side][0]:12.4f}±{left[side][1]:.4f}" for side in ("reweighted", "reference"))
            )  # fmt: skip
    for (flow, part), values in groups.items():
        if len(values) > 1:
            mean, spread = np.mean(values, 0), np.std(values, 0, ddof=1)
            text = "".join(
                f"{m:10.4f}±{s:.4f}" if math.isfinite(m) else f"{m:>18}" for m, s in zip(mean, spread, strict=True)
            )
            print(f"{f'{flow} {part}, mean and spread':34}" + text)


if __name__ == "__main__":
    main()
