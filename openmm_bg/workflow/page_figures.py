"""The figures of a run's page."""

from __future__ import annotations

from typing import Any

import numpy as np

from openmm_bg.analysis import (
    Figure,
    MoleculeView,
    acceptance_trace,
    energy_histograms,
    indicator_autocorrelation,
    log_weight_histogram,
    phi_profile,
    ramachandran_maps,
    representatives,
    to_svg,
    training_curves,
)
from openmm_bg.workflow.results import Results

_LOSS = "mean -log q"
_LOWEST, _HIGHEST = -2.0, 12.0  # kT; what lies beyond in a profile is noise of single draws


def figures(results: Results) -> list[Figure | MoleculeView]:
    """In the order of the page."""
    m, ensembles = results.material, results.ensembles
    drawn: list[Figure | MoleculeView] = []
    shown = [name for name in ("MD", "generator", "reweighted", "MD with moves") if results.is_shown(name)]
    profiled = [name for name in ensembles if name != "generator" and results.is_shown(name)]
    whole = results.is_shown("reweighted")
    again = " the same draws with their exact weights;" if whole else ""
    left_out = "" if whole else " Reweighted draws are left out: a handful of them holds all the weight."
    for k, residue in enumerate(results.residues):
        maps = {name: (*ensembles[name].backbone.pair(k).T, ensembles[name].weights) for name in shown}
        drawn.append(Figure(
            "Where the molecule is" if len(results.residues) == 1 else f"Where {residue} is",
            to_svg(ramachandran_maps(maps), f"rama{k}"),
            f"Free energy over the backbone torsions φ and ψ. Plain MD; the generator's own draws;{again} MD with "
            f"generator moves.{left_out}", wide=True,
        ))  # fmt: skip
    drawn.append(_molecules(results))
    for k, residue in enumerate(results.residues):
        profile = phi_profile({
            name: (ensembles[name].backbone.phi[:, k], ensembles[name].weights)
            for name in profiled
        })  # fmt: skip
        axes = profile.axes[0]
        low, high = axes.get_ylim()
        axes.set_ylim(max(low, _LOWEST), min(high, _HIGHEST))
        drawn.append(Figure(
            "Free energy along φ" if len(results.residues) == 1 else f"Free energy along φ of {residue}",
            to_svg(profile, f"phi{k}"),
            "With one-sigma bands from block bootstrap. A simulation cannot tell the depth of φ > 0 until it has "
            "crossed the barrier many times.",
        ))  # fmt: skip
    energies = {name: (ensembles[name].energy, ensembles[name].weights) for name in shown}
    drawn += [
        Figure(
            "Potential energy", to_svg(energy_histograms(energies), "energy"),
            "In kT. The generator's draws" + (" before and after reweighting" if whole else "")
            + ", beside both simulations.",
        ),
        Figure(
            "Weights", to_svg(log_weight_histogram(m.log_weights, m.held_out_log_weights), "weights"),
            "log p/q on the generator's draws, and on frames of the target that training never saw. The right end of "
            "the second is what an independence chain can get stuck in.",
        ),
        Figure(
            "Acceptance and effective samples", to_svg(acceptance_trace(m.accepted, results.chains), "acceptance"),
            f"Running acceptance of the moves, and effective samples of {results.observable} as force evaluations are "
            "spent.",
        ),
    ]  # fmt: skip
    if any(np.ptp(np.asarray(chain.series)) > 0 for chain in results.chains.values()):
        drawn.append(Figure(
            f"Memory of {results.observable}",
            to_svg(indicator_autocorrelation(results.chains, label=results.observable), "acf"),
            f"Autocorrelation of {results.observable} against force evaluations, proposals included.",
        ))  # fmt: skip
    training = _training_figure(m.training)
    return drawn if training is None else [*drawn, training]


def _molecules(results: Results) -> MoleculeView:
    """What the basins look like, in the simulation that went everywhere."""
    m = results.material
    shown = representatives(m.chain, m.topology)
    rest = 1 - sum(conformation.share for conformation in shown)
    return MoleculeView(
        "What it looks like" if len(shown) == 1 else "What the basins look like", m.topology, shown,
        "From MD with moves, the frame nearest to the middle of each basin, with the basin's population and its "
        "standard error. Carbon is grey, hydrogen light, nitrogen blue, oxygen red; what is far fades."
        + (f" Rarer basins hold another {100 * rest:.2g} %." if rest > 5e-4 else ""),
    )  # fmt: skip


def _training_figure(records: list[dict[str, Any]]) -> Figure | None:
    """The losses of each stage by name: likelihood means another thing in the second stage than in the first."""
    curves = []
    for record in records:
        curve: dict[str, Any] = {key: record[key] for key in ("seconds", "ess") if key in record}
        if record["stage"] == "likelihood":
            curve[_LOSS] = record["nll"]
        elif "log_variance" in record:
            curve["var log w"] = record["log_variance"]
        curves.append(curve)
    losses = [name for name in (_LOSS, "var log w") if any(name in curve for curve in curves)]
    if not losses:
        return None
    curves_of = training_curves(curves, losses=losses, ess="ess" if any("ess" in curve for curve in curves) else None)
    for axes in curves_of.axes:
        for line in axes.lines:
            if len(line.get_xdata()) < 10:
                line.set_marker("o")
    return Figure(
        "Training", to_svg(curves_of, "training"),
        "The mean of -log q over the data while it learns from them; the variance of log w about its middle while it "
        "learns from the energy; the effective sample size on draws for validation alone.",
    )  # fmt: skip
