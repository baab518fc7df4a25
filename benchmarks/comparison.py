"""Does `bg.compare` find what differs, name it, and keep quiet where nothing does?

    python benchmarks/comparison.py --reference aldp.npz --output comparison.jsonl
    python benchmarks/comparison.py --output comparison.jsonl --table

The reference is the long replica exchange of alanine dipeptide that `benchmarks/reference.py` makes. Each row cuts it
into forty contiguous blocks and holds a random half of them against the rest: as it is (`same`), and with one change
made to the second half:

- `basin`: frames outside the helix are left out at random until it holds five points more;
- `mirror`: one percent of the frames are replaced by their mirror images, which hold D-alanine;
- `bond`: CB and what hangs on it are moved 0.002 nm away from CA;
- `hot`: frames are kept with a probability in proportion to exp(-(beta' - beta) U), which leaves those of 310 K.

Each change is made without and with energies known (not so `bond`, whose energies would have to be computed anew, and
`mirror`, which changes none). A row is appended when it is done, and the same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

import openmm_bg as bg
from openmm_bg.analysis import backbone_dihedrals
from openmm_bg.analysis.free_energy import BASINS
from openmm_bg.units import thermal_energy

BLOCKS = 40
ALPHA_CARBON, SIDE_CHAIN = 8, [10, 11, 12, 13]
Frames = tuple[np.ndarray, np.ndarray]
"""Positions in nm, and energies in kJ/mol."""


def same(x: np.ndarray, energy: np.ndarray, rng: np.random.Generator) -> Frames:
    return x, energy


def basin(x: np.ndarray, energy: np.ndarray, rng: np.random.Generator) -> Frames:
    angles = backbone_dihedrals(x, TOPOLOGY)
    helix = BASINS[0].contains(angles.phi[:, 0], angles.psi[:, 0])
    share = helix.mean()
    odds = (share / (1 - share)) / ((share + 0.05) / (0.95 - share))
    kept = helix | (rng.random(len(x)) < odds)
    return x[kept], energy[kept]


def mirror(x: np.ndarray, energy: np.ndarray, rng: np.random.Generator) -> Frames:
    changed = x.copy()
    changed[rng.random(len(x)) < 0.01] *= -1
    return changed, energy


def bond(x: np.ndarray, energy: np.ndarray, rng: np.random.Generator) -> Frames:
    direction = x[:, SIDE_CHAIN[0]] - x[:, ALPHA_CARBON]
    changed = x.copy()
    changed[:, SIDE_CHAIN] += 0.002 * (direction / np.linalg.norm(direction, axis=1, keepdims=True))[:, None]
    return changed, energy


def hot(x: np.ndarray, energy: np.ndarray, rng: np.random.Generator) -> Frames:
    log_w = (1 / thermal_energy(300) - 1 / thermal_energy(310)) * energy
    kept = rng.random(len(x)) < np.exp(log_w - log_w.max())
    return x[kept], energy[kept]


TOPOLOGY = bg.systems.load("alanine_dipeptide").topology
CASES: dict[str, tuple[Callable[..., Frames], bool, str]] = {
    # what is done, whether energies are given, and what a verdict must name first
    "same": (same, False, ""),
    "same, energies": (same, True, ""),
    "basin": (basin, False, "ALA2 helix"),
    "basin, energies": (basin, True, "ALA2 helix"),
    "mirror": (mirror, False, "D-ALA2"),
    "mirror, energies": (mirror, True, "D-ALA2"),
    "bond": (bond, False, "ALA2 CA-CB"),
    "hot": (hot, False, "temperature"),
    "hot, energies": (hot, True, "temperature"),
}


def row(reference: Frames, case: str, seed: int) -> dict:
    """One split, one change, one verdict."""
    x, energy = reference
    change, with_energies, cause = CASES[case]
    rng = np.random.default_rng([seed, 7])
    edges = np.linspace(0, len(x), BLOCKS + 1).astype(int)
    order = rng.permutation(BLOCKS)
    one, other = (
        np.concatenate([np.arange(edges[b], edges[b + 1]) for b in blocks])
        for blocks in (order[: BLOCKS // 2], order[BLOCKS // 2 :])
    )
    changed, changed_energy = change(x[other], energy[other], rng)
    kT = thermal_energy(300)
    started = time.perf_counter()
    found = bg.compare(
        x[one], changed, topology=TOPOLOGY, temperature=300, seed=seed, n=500, repeats=2,
        reference_energies=energy[one] / kT if with_energies else None,
        sample_energies=changed_energy / kT if with_energies else None,
    )  # fmt: skip
    silent = found.agrees and found.is_conclusive
    right = bool(found.causes and cause in found.causes[0]) if cause else silent
    return {
        "case": case,
        "seed": seed,
        "right": right,
        "causes": list(found.causes),
        "consequences": list(found.consequences),
        "effective": [round(found.reference_size.size), round(found.sample_size.size)],
        "frames": [found.reference_frames, found.sample_frames],
        "least_adjusted_p": float(np.nanmin([c.adjusted for c in found.contrasts])),
        "seconds": round(time.perf_counter() - started, 1),
    }


def table(rows: list[dict]) -> str:
    lines = [
        "| change | rows | right verdict, cause named first | other causes named | effective samples |",
        "|---|---|---|---|---|",
    ]
    for case in CASES:
        mine = [r for r in rows if r["case"] == case]
        if mine:
            right = sum(r["right"] for r in mine)
            more = sum(max(0, len(r["causes"]) - 1) for r in mine)
            least = min(min(r["effective"]) for r in mine)
            lines.append(f"| {case} | {len(mine)} | {right} | {more} | at least {least} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reference", type=Path, help="of benchmarks/reference.py")
    parser.add_argument("--output", type=Path, required=True, help="JSON Lines")
    parser.add_argument("--splits", type=int, default=20)
    parser.add_argument("--frames", type=int, help="of the reference, evenly thinned (default all)")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--table", action="store_true", help="print what is there and stop")
    options = parser.parse_args()
    rows = [json.loads(line) for line in options.output.read_text().splitlines()] if options.output.exists() else []
    if options.table:
        print(table(rows))
        return
    if options.reference is None:
        parser.error("give --reference, or --table")
    with np.load(options.reference, allow_pickle=False) as file:
        kept = np.linspace(0, len(file["positions"]) - 1, options.frames or len(file["positions"])).astype(int)
        reference = file["positions"][kept], file["potential_energy"][kept, 0].astype(np.float64)
    done = {(r["case"], r["seed"]) for r in rows}
    for seed in range(options.splits):
        for case in options.cases:
            if (case, seed) not in done:
                new = row(reference, case, seed)
                print(json.dumps(new, ensure_ascii=False), flush=True)
                with options.output.open("a") as out:
                    out.write(json.dumps(new, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
