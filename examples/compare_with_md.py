"""Hold an ensemble against a plain molecular dynamics trajectory, and write a page about it.

    python compare_with_md.py --topology molecule.pdb --reference md.npz --samples trajectory.dcd --output comparison
    python compare_with_md.py --short --output comparison              makes two short trajectories of its own first

Trajectories are DCD files (or anything else that mdtraj reads) or the .npz files of a run: md.npz, exchange_frames.npz,
and samples.npz with its weights.
"""

import argparse
from pathlib import Path

import mdtraj
import numpy as np

import openmm_bg as bg
from openmm_bg.analysis import (
    Figure,
    Status,
    Summary,
    Table,
    backbone_dihedrals,
    phi_profile,
    ramachandran_maps,
    to_svg,
)

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--topology", type=Path, help="a PDB file of the molecule")
parser.add_argument("--reference", type=Path, help="plain MD, in the order in which it was made")
parser.add_argument("--samples", type=Path, help="MD with moves, or the draws of a generator")
parser.add_argument("--output", type=Path, default=Path("compare"))
parser.add_argument("--short", action="store_true", help="make two short trajectories and compare these")
options = parser.parse_args()
output = options.output
output.mkdir(parents=True, exist_ok=True)

# Two runs that differ in nothing but their seed, to have something to compare. They are far too short to say anything.

if options.short:
    molecule = bg.systems.load("alanine_dipeptide")
    for name, seed in (("reference", 1), ("samples", 2)):
        run = bg.simulate(
            molecule.system, molecule.positions, temperature=300, n_frames=200, steps_per_frame=20, seed=seed
        )
        run.save(output / f"{name}.npz")
    options.reference, options.samples = output / "reference.npz", output / "samples.npz"
    topology = mdtraj.Topology.from_openmm(molecule.topology)
elif options.topology and options.reference and options.samples:
    topology = mdtraj.load_topology(str(options.topology))
else:
    parser.error("give --topology, --reference and --samples, or --short")


# Positions are in nm. The draws of a generator carry weights; MD with moves needs none. Draws outside the generator's
# support, rows of NaN, have no weight and are left out.


def load(path):
    if path.suffix != ".npz":
        return mdtraj.load(str(path), top=topology).xyz, None
    with np.load(path, allow_pickle=False) as file:
        positions = file["positions"]
        if "log_prob" not in file:
            return positions, None
        log_weights = -file["reduced_energy"] - file["log_prob"]
    inside = np.isfinite(log_weights)
    return positions[inside], np.exp(log_weights[inside] - log_weights[inside].max())


reference, _ = load(options.reference)
samples, weights = load(options.samples)

# Every distance comes with its floor: the same distance between two halves of the reference. A distance below its floor
# says that this reference cannot tell the two ensembles apart, which is not the same as their being equal.

comparison = bg.compare(reference, samples, topology=topology, weights=weights)
print(comparison)

# The page: two figures for the first residue, and the tables that were just printed.

angles = {"MD": backbone_dihedrals(reference, topology), "samples": backbone_dihedrals(samples, topology)}
weight = {"MD": None, "samples": weights}
maps = ramachandran_maps({name: (a.phi[:, 0], a.psi[:, 0], weight[name]) for name, a in angles.items()})
profile = phi_profile({name: (a.phi[:, 0], weight[name]) for name, a in angles.items()})
page = bg.report(
    output / "report.html",
    title="Comparison with plain MD",
    summary=Summary(
        comparison.verdict,
        Status.GOOD if comparison.agrees else Status.CAUTION,
        f"{comparison.sample_frames} samples against {comparison.reference_frames} frames of plain MD.",
    ),
    figures=[
        Figure("Where the molecule is", to_svg(maps, "rama"), "Free energy over φ and ψ.", wide=True),
        Figure("Free energy along φ", to_svg(profile, "phi"), "With one-sigma bands from a block bootstrap."),
    ],
    tables=[
        Table("Distances", ("distance", "value", "floor", "debiased", "n", "verdict"), comparison.distance_rows()),
        Table(
            "Populations, %", ("basin", "reference", "samples", "difference", "verdict"), comparison.population_rows()
        ),
    ],
    notes=["Plain MD is a reference only as far as it crossed the barriers itself."],
)
print(f"Read {page}")
