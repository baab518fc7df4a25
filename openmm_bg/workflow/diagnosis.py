"""What the diagnosis of a generator needs of its molecule: basins and coordinates, by names a chemist knows."""

from __future__ import annotations

import numpy as np
import torch
from openmm import app
from torch import Tensor

from openmm_bg.analysis import BASINS, Diagnosis, diagnose
from openmm_bg.coordinates import dihedral
from openmm_bg.generator import BoltzmannGenerator

_CHUNK = 16384
# How far a side chain reaches, by the letter after the element: CB, CG, CD, CE, CZ.
_GREEK = {"A": 0, "B": 1, "G": 2, "D": 3, "E": 4, "Z": 5}
_BASIN = {"helix": "helix of {}", "sheet": "sheet of {}", "left": "φ > 0 of {}"}


def diagnose_generator(
    generator: BoltzmannGenerator,
    draws: Tensor | np.ndarray,
    log_weights: np.ndarray,
    held_out: np.ndarray,
    held_out_log_weights: np.ndarray,
    ladders: int = 1,
) -> Diagnosis:
    """Where a molecule's generator loses its effective samples.

    Parameters
    ----------
    generator : BoltzmannGenerator
        As :meth:`~openmm_bg.BoltzmannGenerator.for_molecule` makes it.
    draws, held_out : (n, atoms, 3) and (m, atoms, 3)
        nm; draws outside the support are rows of NaN.
    log_weights, held_out_log_weights : (n,) and (m,)
    ladders : int
        Independent chains of equal length that the held-out frames consist of.
    """
    x, frames = (torch.as_tensor(positions, dtype=torch.float64) for positions in (draws, held_out))
    chart, coordinates = generator.flow.chart, generator.coordinates
    q = torch.cat([coordinates(part)[0] for part in x.split(_CHUNK)])
    # a rotor's hydrogens are alike: their mean turns with it, whatever their labels
    q[:, chart.free] = torch.cat([chart.split(part)[0] for part in q.split(_CHUNK)])
    of_draws, of_frames = backbone_regions(x, generator.topology), backbone_regions(frames, generator.topology)
    return diagnose(
        log_weights, held_out_log_weights, chains=ladders,
        regions={name: (of_draws[name], of_frames[name]) for name in of_draws},
        coordinates=q.numpy(), names=coordinate_names(generator),
        angular=[kind != "bond" for kind in coordinates.kinds],
    )  # fmt: skip


def backbone_regions(positions: Tensor, topology: app.Topology) -> dict[str, np.ndarray]:
    """Which conformations lie in each basin of each residue's φ and ψ, and which have a cis peptide bond.

    Parameters
    ----------
    positions : Tensor, (n, atoms, 3)
        nm; rows of NaN lie nowhere.
    topology : openmm.app.Topology

    Returns
    -------
    dict of str to (n,) bool
        For instance "φ > 0 of ALA 2" and "cis peptide bond before NME 3".
    """
    regions: dict[str, np.ndarray] = {}
    links = _peptide_bonds(topology)
    before, after = {n.residue.index: c for c, n in links}, {c.residue.index: n for c, n in links}
    for residue in topology.residues():
        named = {atom.name: atom for atom in residue.atoms()}
        if residue.index in before and residue.index in after and {"N", "CA", "C"} <= named.keys():
            n, ca, c = (named[name] for name in ("N", "CA", "C"))
            phi = _torsion(positions, before[residue.index], n, ca, c)
            psi = _torsion(positions, n, ca, c, after[residue.index])
            for basin in BASINS:
                name = _BASIN[basin.name.split()[0]].format(_label(residue))
                regions[name] = basin.contains(phi, psi) & np.isfinite(phi)
    neighbours = _neighbours(topology)
    for c, n in links:
        # the α carbon, or the methyl group of a cap; beside nitrogen, proline has CD as well
        ends = [
            min((a for a in neighbours[here] if a.element is app.element.carbon and a != there), key=_rank)
            for here, there in ((c, n), (n, c))
        ]
        omega = _torsion(positions, ends[0], c, n, ends[1])
        regions[f"cis peptide bond before {_label(n.residue)}"] = np.abs(omega) < np.pi / 2
    return regions


def coordinate_names(generator: BoltzmannGenerator) -> list[str]:
    """Names of the coordinates of a molecule's flow: "ψ of ALA 2", "CA-C-N angle of ALA 2/NME 3"."""
    atoms = list(generator.topology.atoms())
    coordinates, zmatrix = generator.coordinates, generator.coordinates.zmatrix
    rows = [*zmatrix.bonds.tolist(), *zmatrix.angles.tolist(), *zmatrix.torsions.tolist()]
    free = set(generator.flow.chart.free.tolist())
    rotors = {int(zmatrix.torsions[first][0]) for first, *_ in zmatrix.rotors}
    names = []
    for column, (row, kind) in enumerate(zip(coordinates.free.tolist(), coordinates.kinds, strict=True)):
        members = [atoms[i] for i in rows[row]]
        of = "/".join(dict.fromkeys(_label(a.residue) for a in sorted(members, key=lambda a: a.index)))
        joined = "-".join(a.name for a in members)
        if kind != "torsion":
            names.append(f"{joined} {kind} of {of}")
        elif column not in free:
            names.append(f"{joined} stiff torsion of {of}")
        elif members[0].index in rotors:
            names.append(f"turn of the hydrogens of {members[1].name} of {_label(members[1].residue)}")
        else:
            names.append(_known_torsion(members) or f"{joined} torsion of {of}")
    return names


def _known_torsion(members: list[app.topology.Atom]) -> str | None:
    """φ, ψ, ω or χ, where the four atoms are those that define it."""
    for a, b, c, d in (members, members[::-1]):
        names = (a.name, b.name, c.name, d.name)
        if names == ("C", "N", "CA", "C"):
            return f"φ of {_label(b.residue)}"
        if names == ("N", "CA", "C", "N"):
            return f"ψ of {_label(b.residue)}"
        if names[1:3] == ("C", "N") and a.element is d.element is app.element.carbon:
            return f"ω before {_label(c.residue)}"
        reach = [_GREEK.get(name[1:2], 9) for name in names]
        from_nitrogen = a.name == "N" and reach[1:] == [0, 1, 2]
        if from_nitrogen or reach in ([0, 1, 2, 3], [1, 2, 3, 4], [2, 3, 4, 5]):
            return f"χ{reach[2]} of {_label(b.residue)}"
    return None


def _peptide_bonds(topology: app.Topology) -> list[tuple[app.topology.Atom, app.topology.Atom]]:
    """C and N of every bond between residues."""
    pairs = [pair for bond in topology.bonds() for pair in ((bond[0], bond[1]), (bond[1], bond[0]))]
    return [(c, n) for c, n in pairs if c.name == "C" and n.name == "N" and c.residue != n.residue]


def _neighbours(topology: app.Topology) -> dict[app.topology.Atom, list[app.topology.Atom]]:
    around: dict[app.topology.Atom, list[app.topology.Atom]] = {atom: [] for atom in topology.atoms()}
    for bond in topology.bonds():
        around[bond[0]].append(bond[1])
        around[bond[1]].append(bond[0])
    return around


def _rank(atom: app.topology.Atom) -> tuple[bool, int]:
    return atom.name != "CA", atom.index


def _label(residue: app.topology.Residue) -> str:
    return f"{residue.name} {residue.id}"


def _torsion(positions: Tensor, *members: app.topology.Atom) -> np.ndarray:
    """(n,) in radians; NaN where the positions are."""
    index = torch.tensor([[atom.index for atom in members]])
    return torch.cat([dihedral(part, index)[:, 0] for part in positions.split(_CHUNK)]).numpy()
