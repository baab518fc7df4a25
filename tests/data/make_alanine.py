"""Makes the files of this folder; run from the checkout when the format of generators changes.

    python tests/data/make_alanine.py generator            alanine_small.bg, a small generator, about three minutes
    python tests/data/make_alanine.py reference FILE.npz   alanine_reference.json, from benchmarks/reference.py

The reference is never used for training.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch

import openmm_bg as bg
from openmm_bg.analysis import backbone_dihedrals, populations, standard_error
from openmm_bg.flows import MolecularFlow
from openmm_bg.sampling import geometric_temperatures

FOLDER = Path(__file__).parent


def generator() -> None:
    """A generator small enough for a repository and good enough for tests."""
    torch.set_num_threads(1)
    molecule = bg.systems.load("alanine_dipeptide")
    default = bg.BoltzmannGenerator.for_molecule(molecule.topology, molecule.system, 300, positions=molecule.positions)
    config = default.flow.config() | {"layers": 6, "hidden": 40, "torsion_hidden": 24}
    small = bg.BoltzmannGenerator.for_molecule(
        molecule.topology, molecule.system, 300, positions=molecule.positions, flow=MolecularFlow.from_config(config),
    )  # fmt: skip
    exchange = bg.replica_exchange(
        molecule.system, molecule.positions, temperatures=geometric_temperatures(300, 1000, 6), n_iterations=500,
        equilibration_iterations=20, seed=71,
    )  # fmt: skip
    data = bg.bursts(molecule.system, exchange.frames[0], temperature=300, seed=72)
    small.fit(data.positions, steps=2000, likelihood_steps=300, seed=73)
    small.save(FOLDER / "alanine_small.bg")


def reference(path: str) -> None:
    """Populations and mean energy of the long replica exchange, with errors."""
    with np.load(path, allow_pickle=False) as file:
        frames, energy = file["positions"].astype(np.float64), file["potential_energy"][:, 0]
        provenance = json.loads(str(file["provenance"]))
    angles = backbone_dihedrals(frames, bg.systems.load("alanine_dipeptide").topology)
    record = {
        "populations": {p.name: [p.value, p.error] for p in populations(angles.phi[:, 0], angles.psi[:, 0])},
        "mean_energy": [float(energy.mean()), standard_error(energy)],
        "frames": len(frames),
        "provenance": provenance,
    }
    (FOLDER / "alanine_reference.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    {"generator": generator, "reference": reference}[sys.argv[1]](*sys.argv[2:])
