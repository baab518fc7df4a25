"""One call that holds an ensemble against a reference: what differs in words, distances with floors, populations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from openmm_bg.analysis.causes import explain
from openmm_bg.analysis.comparison import Comparison
from openmm_bg.analysis.contrasts import adjusted
from openmm_bg.analysis.distances import Distance, Metric, energy_w2, measure, torus_w2, total_variation
from openmm_bg.analysis.ensemble import Ensemble, ensemble, same_grid
from openmm_bg.analysis.free_energy import free_energy_difference, population
from openmm_bg.analysis.pairs import EffectiveSize, FreeEnergyPair, PopulationPair
from openmm_bg.analysis.probes import POPULATIONS, Contrast, Inside, ask_all
from openmm_bg.analysis.questions import Groups, questions
from openmm_bg.analysis.statistics import block_count, kish_size
from openmm_bg.analysis.structure import Structure
from openmm_bg.analysis.tica import jensen_shannon, planar_w2, tica_is_there, tica_projection
from openmm_bg.analysis.weights import pareto_shape
from openmm_bg.errors import InputError

Track = Callable[[Iterable[Any]], Iterable[Any]]

_MOST_BLOCKS = 10
_MOST_POINTS = 5000
_RARE = 0.01


def compare(
    reference: Any,
    samples: Any,
    *,
    topology: Any,
    reference_energies: ArrayLike | None = None,
    sample_energies: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    reference_weights: ArrayLike | None = None,
    temperature: float | None = None,
    n: int = 1000,
    repeats: int = 5,
    lag: int = 1,
    seed: int = 0,
    progress: Track = iter,
) -> Comparison:
    """Hold samples against a reference trajectory, of any molecule with bonds.

    *What is tested.* Populations of backbone basins and rotamers, cis and trans peptide bonds, stereocentres, clashes;
    the energy, and how widely bonds and angles vary, with the upper tails of both; the distribution of every torsion,
    bond and angle. Means are compared by Hotelling's T^2 on block averages of rank scores, shares by Fisher's exact
    test on effective counts, so that correlation and weights are respected. Holm's procedure, within four families of
    questions that share the error evenly, keeps the chance that anything at all is called different, where nothing is,
    at one percent (:mod:`openmm_bg.analysis.contrasts`). What differs is then sorted into causes and what follows from
    them (:mod:`openmm_bg.analysis.causes`).

    *What is shown beside it.* Wasserstein-2 distances on the torus of phi and psi, of all phi, psi and chi, of energies
    and in the plane of the two slowest directions (TICA; where deeptime is installed), total variation of Ramachandran
    histograms, Jensen-Shannon distance in the TICA plane, and the marginals of bonds, angles and torsions. Every one
    comes with its floor from two blocked halves of the reference at the same number of points.

    Parameters
    ----------
    reference, samples : (frames, atoms, 3) arrays or Quantities
        nm, molecules whole. In the order in which they were made: correlated frames in random order look independent,
        and that makes errors too small. Trajectories may be joined end to end.
    topology : openmm.app.Topology or mdtraj.Topology
    reference_energies, sample_energies : (frames,) arrays, optional
        Reduced energies u = U / kT at one and the same temperature; both or neither.
    weights, reference_weights : (frames,) arrays, optional
        Unnormalised, not logarithms. Frames without weight are left out, whatever they hold.
    temperature : float, optional
        K, of the reference: names the temperature where the samples have another one.
    n : int
        Points per Wasserstein distance in more than one dimension, whose cost grows faster than n^2, and per marginal.
        The other distances use all frames.
    repeats, seed : int
        Random subsamples for mean and spread.
    lag : int
        Of TICA, in reference frames.
    progress : callable
        Wraps what is gone through, such as tqdm.

    Raises
    ------
    InputError
        Where shapes do not fit, the topology has no bonds, or a frame that carries weight is not finite.

    Examples
    --------
    >>> print(compare(md, generated, topology=molecule.topology))    # doctest: +SKIP
    """
    if (reference_energies is None) != (sample_energies is None):
        raise InputError("Energies are needed on both sides; give reference_energies and sample_energies, or neither.")
    if n < 2 or repeats < 2:
        raise InputError(f"n and repeats must be 2 or more, not {n} and {repeats}.")
    structure = Structure.of(topology)
    ref = ensemble("reference", reference, reference_energies, reference_weights, structure)
    new = ensemble("samples", samples, sample_energies, weights, structure)
    if (points := min(n, len(ref.weights) // 2, len(new.weights))) > _MOST_POINTS:
        raise InputError(
            f"A W2 distance of {points} points needs {8 * points**2 / 1e9:.1f} GB and hours; n may be {_MOST_POINTS}."
        )
    notes = same_grid(ref, new)
    sides = (ref.weights, new.weights)
    probes, groups = questions(structure, ref, new)
    contrasts, typical = ask_all(probes, sides, progress)
    levels = adjusted([c.p_value for c in contrasts], [c.family for c in contrasts])
    contrasts = [replace(c, adjusted=float(level)) for c, level in zip(contrasts, levels, strict=True)]
    found = explain(probes, contrasts, sides, typical, temperature)
    distances, marginals, more = _distances(structure, ref, new, n, repeats, lag, seed, progress)
    states = {p.name: (p, c) for p, c in zip(probes, contrasts, strict=True) if isinstance(p, Inside)}
    return Comparison(
        tuple(distances), tuple(_pairs(groups, states, ref, new)), len(ref.weights), len(new.weights),
        None if weights is None else kish_size(new.weights), n, repeats, seed, contrasts=tuple(contrasts),
        causes=found.causes, consequences=found.consequences,
        free_energies=tuple(_free_energies(groups, states, ref, new)), marginals=tuple(marginals),
        reference_size=_size(contrasts, "reference_size"), sample_size=_size(contrasts, "sample_size"),
        pareto=None if weights is None else pareto_shape(np.log(new.weights)), notes=(*notes, *more),
    )  # fmt: skip


def _size(contrasts: Sequence[Contrast], side: str) -> EffectiveSize:
    """What a side is worth in the property that it sampled worst, of those that change on either side.

    States that hold less than a percent on both sides are left to the census.
    """

    def is_rare(c: Contrast) -> bool:
        return max(c.reference, c.samples) < _RARE or min(c.reference, c.samples) > 1 - _RARE

    known = [
        c
        for c in contrasts
        if max(c.reference_size, c.sample_size) > 0 and not (c.family == POPULATIONS and is_rare(c))
    ]
    if not known:
        return EffectiveSize(0.0, "all that was measured")
    slowest = min(known, key=lambda c: getattr(c, side))
    return EffectiveSize(getattr(slowest, side), slowest.name)


def _pairs(
    groups: Groups, states: dict[str, tuple[Inside, Contrast]], ref: Ensemble, new: Ensemble
) -> Iterable[PopulationPair]:
    for group, names in groups:
        for name in names:
            probe, contrast = states[f"{group} {name}"]
            sides = (population(name, probe.reference, ref.weights), population(name, probe.samples, new.weights))
            yield PopulationPair(group, *sides, contrast)


def _free_energies(
    groups: Groups, states: dict[str, tuple[Inside, Contrast]], ref: Ensemble, new: Ensemble
) -> Iterable[FreeEnergyPair]:
    for group, names in groups:
        probes = {name: states[f"{group} {name}"][0] for name in names}
        base = max(names, key=lambda name: states[f"{group} {name}"][1].reference)
        for name, probe in probes.items():
            if name != base:
                yield FreeEnergyPair(
                    f"{group} {name}",
                    *free_energy_difference(probe.reference, probes[base].reference, ref.weights),
                    *free_energy_difference(probe.samples, probes[base].samples, new.weights),
                )


def _distances(
    structure: Structure, ref: Ensemble, new: Ensemble, n: int, repeats: int, lag: int, seed: int, progress: Track
) -> tuple[list[Distance], list[Distance], list[str]]:
    """Distances, marginals, and what could not be measured."""
    angles = ref.torsions[:, structure.free_torsions]
    other = new.torsions[:, structure.free_torsions]
    notes, asked, marginals = [], [], []
    for residue, *ij in structure.backbone:
        plane = (ref.torsions[:, ij], new.torsions[:, ij])
        asked += [
            (f"{residue} φψ W2", torus_w2, *plane, n, "degrees"),
            (f"{residue} φψ histogram TV", total_variation, *plane, None, ""),
        ]
    if angles.shape[1] and not (len(structure.backbone) == 1 and angles.shape[1] == 2):
        asked.append(("all torsions W2", torus_w2, angles, other, n, "degrees"))
    if ref.energies is not None and new.energies is not None:
        asked.append(("energy W2", energy_w2, ref.energies, new.energies, None, "kT"))
    if angles.shape[1] and tica_is_there():
        plane = tica_projection(angles, other, lag=lag)
        asked += [("TICA W2", planar_w2, *plane, n, ""), ("TICA Jensen-Shannon", jensen_shannon, *plane, None, "")]
    elif angles.shape[1]:
        notes.append("TICA was left out: install deeptime to have it.")
    for rows, a, b, unit, scale in (
        (structure.bonds, ref.bonds, new.bonds, "nm", 1.0),
        (structure.angles, ref.angles, new.angles, "degrees", 180 / np.pi),
    ):
        marginals += [(row.name, energy_w2, a[:, k] * scale, b[:, k] * scale, n, unit) for k, row in enumerate(rows)]
    marginals += [
        (f"{row.name} TV", total_variation, ref.torsions[:, k], new.torsions[:, k], None, "")
        for k, row in enumerate(structure.torsions)
    ]
    # halves are made of blocks that outlive the slowest angle, where the reference is long enough for that
    turns = [f(angles[:, k]) for k in range(angles.shape[1]) for f in (np.cos, np.sin)]
    blocks = min(_MOST_BLOCKS, max(4, block_count(*turns) // 2 * 2)) if turns else _MOST_BLOCKS
    streams = iter(np.random.default_rng(seed).spawn(len(asked) + len(marginals)))

    def one(row: tuple[str, Metric, np.ndarray, np.ndarray, int | None, str]) -> Distance:
        name, metric, a, b, points, unit = row
        return measure(
            name, metric, a, b, next(streams), weights=new.given, reference_weights=ref.given, n=points,
            repeats=repeats, blocks=blocks, unit=unit,
        )  # fmt: skip

    return [one(row) for row in progress(asked)], [one(row) for row in marginals], notes
