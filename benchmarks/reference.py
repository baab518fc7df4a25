"""A long replica exchange of alanine dipeptide: the independent reference that generators are compared with.

    python benchmarks/reference.py --minutes 75 --seed 2026 --output ala2_reference.npz

The output is rewritten about every minute and is complete at any time; a checkpoint beside it lets the same
command continue a run that was stopped. It holds the frames of the lowest temperature (`positions`, float32, nm),
the potential energies of all temperatures (kJ/mol), which walker was where, the exchanges, and a JSON string
`provenance`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import openmm

from openmm_bg import __version__, systems
from openmm_bg.sampling.replica_exchange import ReplicaExchange, geometric_temperatures

EQUILIBRATION = 200  # iterations
MINUTES_BETWEEN_WRITES = 1.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, required=True, help="wall time to run")
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--output", type=Path, required=True, help="the .npz file to write")
    parser.add_argument("--workers", type=int, default=1, help="threads")
    parser.add_argument("--iterations", type=int, default=60_000, help="frames after which to stop in any case")
    parser.add_argument("--highest", type=float, default=1000.0, help="highest temperature, K")
    parser.add_argument("--replicas", type=int, default=6)
    parser.add_argument("--steps", type=int, default=500, help="steps of 1 fs per iteration")
    options = parser.parse_args()

    molecule = systems.load("alanine_dipeptide")
    settings = {
        "steps_per_iteration": options.steps,
        "timestep": 0.001,
        "friction": 1.0,
        "seed": options.seed,
    }
    run = ReplicaExchange(
        molecule.system,
        molecule.positions,
        temperatures=geometric_temperatures(molecule.temperature, options.highest, options.replicas),
        workers=options.workers,
        **settings,
    )
    provenance = {
        "openmm_bg": __version__,
        "openmm": openmm.version.version,
        "numpy": np.__version__,
        "platform": "Reference",
        "forcefield": molecule.forcefield,
        "system_sha256": hashlib.sha256(openmm.XmlSerializer.serialize(molecule.system).encode()).hexdigest(),
        "temperatures": run.temperatures.tolist(),
        "equilibration_iterations": EQUILIBRATION,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        **settings,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    checkpoint = options.output.with_suffix(".checkpoint.npz")
    if checkpoint.exists():
        run.restore(checkpoint)
    deadline = time.monotonic() + 60 * options.minutes
    run.run(max(0, EQUILIBRATION - run.attempts), record=False, checkpoint=checkpoint, progress=False)
    finished = False
    while not finished:
        pause = min(deadline, time.monotonic() + 60 * MINUTES_BETWEEN_WRITES)
        while not finished:
            run.run(min(50, options.iterations - len(run)), progress=False)
            finished = time.monotonic() >= deadline or len(run) >= options.iterations
            if time.monotonic() >= pause:
                break
        run.save(checkpoint)
        write(options.output, run, provenance)


def write(path: Path, run: ReplicaExchange, provenance: dict) -> None:
    result = run.result()
    temporary = path.with_suffix(".part.npz")
    np.savez(
        temporary,
        positions=result.frames[0].astype(np.float32),
        potential_energy=result.potential_energy,
        temperatures=result.temperatures,
        walkers=result.walkers.astype(np.int8),
        exchanges_tried=result.exchanges_tried,
        exchanges_accepted=result.exchanges_accepted,
        provenance=json.dumps({**provenance, "force_evaluations": result.force_evaluations}),
    )
    temporary.replace(path)
    print(
        f"{len(run)} frames, {result.force_evaluations:.3g} evaluations, "
        f"acceptance {result.acceptance.round(2)}, round trips {result.round_trips.sum()}",
        flush=True,
    )


if __name__ == "__main__":
    main()
