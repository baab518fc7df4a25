"""``openmm-bg compare``: two trajectories of one molecule, from files to a verdict."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from openmm_bg.errors import InputError

_DESCRIPTION = """\
Hold samples against a reference: what differs, in words, at a family-wise error of one percent; and distances, each
with the floor that two halves of the reference show at the same number of points.

  openmm-bg compare md.dcd samples.xtc --top molecule.pdb
  openmm-bg compare md.dcd samples.npz --top molecule.pdb --log-weights samples.npz
  openmm-bg compare md.dcd hot.dcd --top molecule.pdb --forcefield amber99sbildn.xml amber99_obc.xml --temperature 300
"""
_EPILOG = """\
Frames must be in the order in which they were made: errors come from how long a series remembers. Water is left out.
"""
_FRAMES_AT_ONCE = 5000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of the command, with its texts."""
    parser.description, parser.epilog = _DESCRIPTION, _EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    kinds = "any trajectory that mdtraj reads (dcd, xtc, trr, nc, h5, pdb ...), or positions in nm as npy or npz"
    parser.add_argument("reference", metavar="REFERENCE", help=kinds)
    parser.add_argument("samples", metavar="SAMPLES", help="the same")
    parser.add_argument("--top", required=True, metavar="TOP", help="the molecule: PDB, mmCIF, prmtop, psf, gro, mol2")
    for side, prefix in (("samples", ""), ("reference", "reference-")):
        given = parser.add_argument_group(f"weights of the {side}").add_mutually_exclusive_group()
        given.add_argument(f"--{prefix}weights", metavar="FILE", help="one for each frame, as npy, npz or text")
        given.add_argument(
            f"--{prefix}log-weights", metavar="FILE", help="their logarithms, or the samples.npz of a run"
        )
        if side == "reference":
            given.add_argument(
                "--reference-states", metavar="FILE",
                help="npz with reduced_energies (states, frames) and counts (states): frames of several states, "
                "weighted for the first one by MBAR",
            )  # fmt: skip
    parser.add_argument("--smooth", action="store_true", help="Pareto-smooth the weights of the samples")
    energy = parser.add_argument_group("energies, on both sides")
    source = energy.add_mutually_exclusive_group()
    source.add_argument("--forcefield", nargs="+", metavar="XML", help="OpenMM force field files; TOP is a PDB file")
    source.add_argument("--system", metavar="XML", help="a serialised OpenMM System")
    energy.add_argument("--temperature", type=float, metavar="K", help="of the reference (default for energies: 300)")
    where = energy.add_mutually_exclusive_group()
    where.add_argument("--device", default="cpu", metavar="NAME", help="where torch computes them: cpu or cuda")
    where.add_argument("--platform", metavar="NAME", help="an OpenMM platform that computes them instead")
    how = parser.add_argument_group("how")
    how.add_argument("--n", type=int, default=1000, metavar="N", help="points per W2 distance (default 1000)")
    how.add_argument("--repeats", type=int, default=5, metavar="N", help="random subsamples per distance (default 5)")
    how.add_argument("--lag", type=int, default=1, metavar="N", help="frames, of TICA (default 1)")
    how.add_argument("--seed", type=int, default=0, metavar="N", help="of the subsamples (default 0)")
    cost = parser.add_argument_group("what the two cost, for effective samples per cost")
    for name, what in (("force-evaluations", "force evaluations"), ("seconds", "seconds")):
        cost.add_argument(f"--{name}", nargs=2, type=float, metavar=("REF", "SAMPLES"), help=f"{what} of either side")
    parser.add_argument("--json", action="store_true", help="everything as JSON, and nothing else")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    parser.set_defaults(do=run)


def run(options: argparse.Namespace, command: str) -> None:
    """Read, compare, print."""
    from openmm_bg.analysis import compare, multistate, pareto_smooth, sampling_rate
    from openmm_bg.analysis.trajectories import read_arrays, read_topology, read_trajectory, read_weights

    if options.seed < 0:
        raise InputError(f"seed must be 0 or more, not {options.seed}.")
    evaluations, seconds = options.force_evaluations or (None, None), options.seconds or (None, None)
    for cost in zip(evaluations, seconds, strict=True):
        sampling_rate(1.0, evaluations=cost[0], seconds=cost[1])  # refused now rather than after everything else
    topology = read_topology(options.top)
    atoms = None
    with_energies = options.forcefield is not None or options.system is not None
    if not with_energies:
        # without energies nobody asks for the water
        atoms = np.array([atom.index for atom in topology.atoms if not atom.residue.is_water], dtype=np.intp)
    sides = {name: read_trajectory(getattr(options, name), topology, atoms=atoms) for name in ("reference", "samples")}
    weights: dict[str, Any] = {}
    for side, prefix in (("samples", ""), ("reference", "reference_")):
        for kind in ("weights", "log_weights"):
            path = getattr(options, prefix + kind)
            if path is not None:
                weights[side] = read_weights(path, len(sides[side]), logarithms=kind == "log_weights")
    if options.reference_states is not None:
        log_w = multistate(*read_arrays(options.reference_states, ("reduced_energies", "counts"))).log_weights
        if len(log_w) != len(sides["reference"]):
            raise InputError(
                f"{options.reference_states} has {len(log_w)} frames and {options.reference} "
                f"{len(sides['reference'])}; they must be the same ones."
            )
        weights["reference"] = np.exp(log_w - log_w.max())
    if options.smooth:
        if "samples" not in weights:
            raise InputError("--smooth needs the weights of the samples; give --weights or --log-weights.")
        with np.errstate(divide="ignore"):
            log_w = pareto_smooth(np.log(weights["samples"])).log_weights
        weights["samples"] = np.exp(log_w - log_w.max())
    track = _quiet if options.quiet else _tracked
    energies = {name: None for name in sides}
    if with_energies:
        energies = _energies(options, sides, weights, track)
    if atoms is not None:
        topology = topology.subset(atoms)
    found = compare(
        sides["reference"], sides["samples"], topology=topology, weights=weights.get("samples"),
        reference_weights=weights.get("reference"), reference_energies=energies["reference"],
        sample_energies=energies["samples"], temperature=options.temperature, n=options.n, repeats=options.repeats,
        lag=options.lag, seed=options.seed, progress=track,
    )  # fmt: skip
    rates = {}
    if options.force_evaluations is not None or options.seconds is not None:
        for k, (name, size) in enumerate((("reference", found.reference_size), ("samples", found.sample_size))):
            rates[name] = sampling_rate(size.size, evaluations=evaluations[k], seconds=seconds[k])
    if options.json:
        record = found.to_dict() | {"command": command}
        if rates:
            record["rates"] = {
                name: {key: value for key, value in vars(rate).items() if value == value}
                for name, rate in rates.items()
            }
        print(json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False))
        return
    print(found)
    for name, rate in rates.items():
        print(f"{name}: {rate}")


def _energies(
    options: argparse.Namespace, sides: dict[str, Any], weights: dict[str, Any], track: Any
) -> dict[str, Any]:
    """Reduced energies of the frames that carry weight; infinite for the others."""
    import torch

    from openmm_bg.device import find_device
    from openmm_bg.energies import ContextEnergy, ForceFieldEnergy

    system = _system(options)
    temperature = 300.0 if options.temperature is None else options.temperature
    atoms = sides["reference"].shape[1]
    if system.getNumParticles() != atoms:
        raise InputError(f"The System has {system.getNumParticles()} particles and {options.top} {atoms} atoms.")
    if options.platform is not None:
        energy: Any = ContextEnergy(system, temperature, platform=options.platform)
    else:
        energy = ForceFieldEnergy(system, temperature).to(find_device(options.device))
    device = "cpu" if options.platform is not None else options.device
    found = {}
    for name, x in sides.items():
        used = np.flatnonzero(weights.get(name, np.ones(len(x))) > 0)
        reduced = np.full(len(x), np.inf)
        for start in track(range(0, len(used), _FRAMES_AT_ONCE)):
            rows = used[start : start + _FRAMES_AT_ONCE]
            with torch.no_grad():
                part = torch.as_tensor(x[rows], dtype=torch.float64, device=device)
                reduced[rows] = energy(part).cpu().numpy()
        found[name] = reduced
    return found


def _system(options: argparse.Namespace) -> Any:
    import openmm

    from openmm_bg import systems
    from openmm_bg.generator_file import refuse_code

    if options.forcefield is not None:
        if not options.top.lower().endswith(".pdb"):
            raise InputError("--forcefield needs --top to be a PDB file; give the System itself with --system.")
        return systems.from_pdb(options.top, forcefield=tuple(options.forcefield)).system
    try:
        with open(options.system) as file:
            xml = file.read()
    except (FileNotFoundError, IsADirectoryError, UnicodeDecodeError):
        raise InputError(f"There is no System in XML in {options.system}.") from None
    refuse_code(xml, options.system)
    try:
        system = openmm.XmlSerializer.deserialize(xml)
    except (openmm.OpenMMException, ValueError):
        system = None
    if not isinstance(system, openmm.System):
        raise InputError(f"{options.system} is not a serialised OpenMM System; write one with XmlSerializer.serialize.")
    return system


def _quiet(items: Iterable[Any]) -> Iterator[Any]:
    return iter(items)


def _tracked(items: Iterable[Any]) -> Iterator[Any]:
    from tqdm import tqdm

    return iter(tqdm(items, file=sys.stderr, disable=None, delay=2, dynamic_ncols=True, leave=False))
