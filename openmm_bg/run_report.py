"""What a run shows: the numbers of summary.json, and report.html."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from openmm import app

from openmm_bg.analysis import (
    Card,
    Chain,
    Comparison,
    Figure,
    Population,
    Status,
    Summary,
    Table,
    acceptance_trace,
    backbone_dihedrals,
    compare,
    effective_sample_size,
    energy_histograms,
    format_value,
    indicator_autocorrelation,
    log_weight_histogram,
    phi_profile,
    populations,
    ramachandran_maps,
    report,
    to_svg,
    training_curves,
)


@dataclass
class Material:
    """The products of a run's steps; positions in nm, energies in kT.

    Attributes
    ----------
    record : dict
        run.json.
    topology : openmm.app.Topology
    md, exchange, chain : ndarray, (frames, atoms, 3)
        Plain MD, the lowest temperature of the replica exchange, and MD with moves after each iteration.
    samples : ndarray, (n, atoms, 3)
        The generator's draws; rows of NaN where they fell outside the support.
    log_weights, held_out_log_weights : ndarray
        -u - log_prob of the draws, and of frames that training never saw.
    accepted : ndarray of str
        Rows of moves.csv.
    training : list of dict
        Records of training.jsonl.
    quality : dict
        ESS, acceptance, forward figure and so on.
    """

    record: dict[str, Any]
    topology: app.Topology
    md: np.ndarray
    md_energy: np.ndarray
    exchange: np.ndarray
    exchange_energy: np.ndarray
    samples: np.ndarray
    sample_energy: np.ndarray
    log_weights: np.ndarray
    held_out_log_weights: np.ndarray
    chain: np.ndarray
    chain_energy: np.ndarray
    accepted: np.ndarray
    training: list[dict[str, Any]]
    quality: dict[str, Any]


@dataclass
class Results:
    """Everything measured once, for the summary and for the page."""

    material: Material
    comparison: Comparison
    against_exchange: Comparison
    populations: dict[str, tuple[Population, ...]]
    angles: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray | None]]
    chains: dict[str, Chain]
    efficiency: dict[str, dict[str, float]]
    summary: dict[str, Any]


def measure(material: Material) -> Results:
    """Compare MD with moves to plain MD and to replica exchange, and weigh what everything cost."""
    m, topology = material, material.topology
    inside = np.isfinite(m.log_weights)
    weights = np.exp(m.log_weights[inside] - m.log_weights[inside].max())
    angles: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray | None]] = {}
    for name, positions, w in (
        ("MD", m.md, None),
        ("replica exchange", m.exchange, None),
        ("generator", m.samples[inside], None),
        ("reweighted", m.samples[inside], weights),
        ("MD with moves", m.chain, None),
    ):
        backbone = backbone_dihedrals(positions, topology)
        angles[name] = (backbone.phi[:, 0], backbone.psi[:, 0], w)
    shared = {"topology": topology, "n": min(2000, len(m.md) // 2, len(m.chain), len(m.exchange) // 2)}
    comparison = compare(
        m.md, m.chain, reference_energies=m.md_energy, sample_energies=m.chain_energy, **shared
    )  # fmt: skip
    against_exchange = compare(
        m.exchange, m.chain, reference_energies=m.exchange_energy, sample_energies=m.chain_energy, **shared
    )  # fmt: skip
    settings, steps = m.record["settings"], m.record["steps"]
    per_iteration = settings["steps_per_iteration"] + settings["proposals_per_iteration"]
    chains = {
        "MD": Chain((angles["MD"][0] > 0).astype(float), settings["steps_per_iteration"]),
        "MD with moves": Chain((angles["MD with moves"][0] > 0).astype(float), per_iteration),
    }
    preparation = (
        steps["simulate"]["exchange_evaluations"]
        + steps["simulate"]["burst_evaluations"]
        + steps["train"]["evaluations"]
    )
    efficiency = _efficiency(chains, preparation)
    pops = {name: populations(phi, psi, w) for name, (phi, psi, w) in angles.items()}
    proposed, accepted = steps["sample"]["proposed"], steps["sample"]["accepted"]
    summary = {
        "molecule": m.record["name"],
        "temperature_K": m.record["temperature"],
        "generator": {key: _plain(value) for key, value in m.quality.items()},
        "moves": {
            "proposed": proposed,
            "accepted": accepted,
            "acceptance": accepted / proposed,
            "refused": steps["sample"]["refused"],
        },
        "left_handed_share": {name: {"value": p.value, "error": _plain(p.error)} for name, (*_, p) in pops.items()},
        "phi_above_zero": efficiency,
        "against_md": comparison.to_dict(),
        "against_replica_exchange": against_exchange.to_dict(),
        "cost": {
            "force_evaluations": {
                "replica exchange": steps["simulate"]["exchange_evaluations"],
                "bursts": steps["simulate"]["burst_evaluations"],
                "training": steps["train"]["evaluations"],
                "plain MD": steps["simulate"]["md_evaluations"],
                "MD with moves": steps["sample"]["md_steps"] + proposed,
            },
            "seconds": {name: step["seconds"] for name, step in steps.items()},
        },
        "settings": settings,
        "versions": m.record["versions"],
        "system_sha256": m.record["system_sha256"],
        "generator_sha256": steps["train"]["sha256"],
        "command": m.record["command"],
    }
    return Results(m, comparison, against_exchange, pops, angles, chains, efficiency, summary)


def _efficiency(chains: dict[str, Chain], preparation: int) -> dict[str, dict[str, float]]:
    """Effective samples of the indicator phi > 0, per force evaluation."""
    result: dict[str, dict[str, float]] = {}
    for name, chain in chains.items():
        series = np.asarray(chain.series)
        evaluations = series.size * chain.evaluations_per_frame
        size = effective_sample_size(series)
        result[name] = {
            "effective_samples": size,
            "transitions": int(np.count_nonzero(np.diff(series))),
            "force_evaluations": evaluations,
            "per_million_evaluations": 1e6 * size / evaluations,
        }
    moves = result["MD with moves"]
    everything = moves["force_evaluations"] + preparation
    moves["per_million_evaluations_with_training"] = 1e6 * moves["effective_samples"] / everything
    return result


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def headline(results: Results) -> str:
    """A few lines for the terminal."""
    q, moves = results.material.quality, results.summary["moves"]
    return "\n".join(
        [
            "",
            f"{verdict(results)}",
            f"  generator: ESS {100 * q['ess']:.1f} % of {q['n']} draws, forward figure {100 * q['forward']:.1f} % and "
            f"largest log p/q {q['largest_log_ratio']:.1f} on {q['held_out_frames']} held-out frames",
            f"  moves: {moves['accepted']} of {moves['proposed']} accepted ({100 * moves['acceptance']:.1f} %), "
            f"{moves['refused']} refused",
            f"  φ > 0: {_efficiency_text(results)}",
        ]
    )


def verdict(results: Results) -> str:
    """One sentence: whether MD with moves agrees with its references."""
    md, exchange = results.comparison.agrees, results.against_exchange.agrees
    if md and exchange:
        return "MD with moves agrees with plain MD and with replica exchange within their errors."
    if exchange:
        return "MD with moves agrees with replica exchange within its error; " + _lower(results.comparison.verdict)
    return "MD with moves differs from replica exchange: " + _lower(results.against_exchange.verdict)


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]


def _efficiency_text(results: Results) -> str:
    md, moves = results.efficiency["MD"], results.efficiency["MD with moves"]
    text = f"{moves['per_million_evaluations']:.3g} effective samples per million force evaluations with moves"
    if md["transitions"] < 10:
        return f"{text}; plain MD made {md['transitions']} transitions, too few to say"
    return f"{text}, {md['per_million_evaluations']:.3g} without"


def write(path: Path, results: Results) -> None:
    """report.html."""
    m, q, summary = results.material, results.material.quality, results.summary
    agrees = results.comparison.agrees and results.against_exchange.agrees
    md, moves = results.efficiency["MD"], results.efficiency["MD with moves"]
    left = {name: p[-1] for name, p in results.populations.items()}
    cards = [
        Card("Effective sample size", f"{100 * q['ess']:.1f} %", f"of {q['n']:,} independent draws, nothing clipped"),
        Card("Accepted moves", f"{100 * summary['moves']['acceptance']:.1f} %", f"of {summary['moves']['proposed']:,}"),
        Card(
            "Forward figure", f"{100 * q['forward']:.1f} %",
            f"on {q['held_out_frames']:,} held-out frames; largest log p/q {q['largest_log_ratio']:.1f}",
        ),
        Card(
            "Effective samples of φ > 0", f"{moves['per_million_evaluations']:,.0f}",
            f"per million force evaluations; plain MD {md['per_million_evaluations']:.2g} from {md['transitions']} transitions",
        ),
    ]  # fmt: skip
    head = Summary(
        verdict(results),
        Status.GOOD if agrees else Status.CAUTION,
        f"{m.record['description']} at {m.record['temperature']:g} K. Molecular dynamics and Boltzmann generator moves ran "
        f"together: every {summary['settings']['steps_per_iteration']} steps the generator proposed "
        f"{summary['settings']['proposals_per_iteration']} whole conformations, each accepted or rejected exactly.",
        cards,
    )
    report(
        path, title=f"{m.record['name']}: molecular dynamics with generator moves", summary=head,
        figures=_figures(results), tables=_tables(results, left), notes=_notes(results),
        provenance=_provenance(results),
    )  # fmt: skip


def _figures(results: Results) -> list[Figure]:
    m, angles = results.material, results.angles
    maps = {name: angles[name] for name in ("MD", "generator", "reweighted", "MD with moves")}
    profiles = {
        name: (angles[name][0], angles[name][2]) for name in ("MD", "replica exchange", "reweighted", "MD with moves")
    }
    inside = np.isfinite(m.log_weights)
    weights = np.exp(m.log_weights[inside] - m.log_weights[inside].max())
    energies = {
        "MD": (m.md_energy, None),
        "generator": (m.sample_energy[inside], None),
        "reweighted": (m.sample_energy[inside], weights),
        "MD with moves": (m.chain_energy, None),
    }
    # the first column of words in moves.csv says what became of the attempt
    accepted = m.accepted[:, 2].astype(float) > 0
    return [
        Figure(
            "Where the molecule is", to_svg(ramachandran_maps(maps), "rama"),
            "Free energy over the backbone torsions φ and ψ. Plain MD; the generator's own draws; the same draws with their exact "
            "weights; MD with generator moves.", wide=True,
        ),
        Figure(
            "Free energy along φ", to_svg(phi_profile(profiles), "phi"),
            "With one-sigma bands from block bootstrap. Plain MD cannot tell the depth of φ > 0 until it has crossed the barrier "
            "many times.", wide=True,
        ),
        Figure(
            "Potential energy", to_svg(energy_histograms(energies), "energy"),
            "In kT. The generator's draws before and after reweighting, beside both simulations.",
        ),
        Figure(
            "Weights", to_svg(log_weight_histogram(m.log_weights, m.held_out_log_weights), "weights"),
            "log p/q on the generator's draws, and on frames of the target that training never saw. The right end of the second is "
            "what an independence chain can get stuck in.",
        ),
        Figure(
            "Memory of φ > 0", to_svg(indicator_autocorrelation(results.chains), "acf"),
            "Autocorrelation of the indicator φ > 0 against force evaluations, proposals included.",
        ),
        Figure(
            "Acceptance and effective samples", to_svg(acceptance_trace(accepted, results.chains), "acceptance"),
            "Running acceptance of the moves, and effective samples of φ > 0 as force evaluations are spent.",
        ),
        Figure(
            "Training", to_svg(training_curves(m.training, losses=_losses(m.training)), "training"),
            "Losses, and the effective sample size on samples drawn for validation alone.", wide=True,
        ),
    ]  # fmt: skip


def _losses(records: list[dict[str, Any]]) -> list[str]:
    return [name for name in ("nll", "log_variance") if any(name in record for record in records)]


def _tables(results: Results, left: dict[str, Population]) -> list[Table]:
    summary = results.summary
    q = results.material.quality
    cost = summary["cost"]
    rows = []
    for name, pops in results.populations.items():
        rows.append(
            (name, *(format_value(100 * p.value, 100 * p.error) for p in pops), f"{left[name].effective_samples:.0f}")
        )
    names = [p.name for p in next(iter(results.populations.values()))]
    return [
        Table(
            "Populations, %", ("ensemble", *names, "effective samples of φ > 0"), rows,
            "Errors from the statistical inefficiency; '?' where a run never crossed and so measured no error.",
        ),
        Table(
            "MD with moves against plain MD", ("distance", "value", "floor", "debiased", "n", "verdict"),
            results.comparison.distance_rows(),
            "The floor is the same distance between two blocked halves of the reference, at the same number of points: nothing "
            "below it can be told apart.",
        ),
        Table(
            "MD with moves against replica exchange", ("distance", "value", "floor", "debiased", "n", "verdict"),
            results.against_exchange.distance_rows(),
            "The exchange also supplied the training data; MD with moves is exact whatever the training was.",
        ),
        Table(
            "The generator", ("figure", "value"),
            [
                ("effective sample size, unclipped", f"{100 * q['ess']:.2f} % of {q['n']:,}"),
                ("the same with the top 1e-4 clipped", f"{100 * q['ess_clipped']:.2f} %"),
                ("stationary acceptance of an independence chain", f"{100 * q['acceptance']:.2f} %"),
                ("forward figure 1/E_p[p/q]", f"{100 * q['forward']:.2f} % on {q['held_out_frames']:,} held-out frames"),
                ("largest log p/q on held-out frames", f"{q['largest_log_ratio']:.2f}"),
                ("log Z", format_value(q["log_z"], q["log_z_error"])),
            ],
        ),
        Table(
            "What it cost", ("step", "force or energy evaluations", "seconds"),
            [
                ("replica exchange", f"{cost['force_evaluations']['replica exchange']:,}", ""),
                ("bursts", f"{cost['force_evaluations']['bursts']:,}", ""),
                ("plain MD, for comparison", f"{cost['force_evaluations']['plain MD']:,}", ""),
                ("simulate, all three", "", f"{cost['seconds']['simulate']:.0f}"),
                ("train", f"{cost['force_evaluations']['training']:,}", f"{cost['seconds']['train']:.0f}"),
                ("sample: draws, and MD with moves", f"{cost['force_evaluations']['MD with moves']:,}",
                 f"{cost['seconds']['sample']:.0f}"),
            ],
            "Effective samples of φ > 0 per million evaluations with training and its data included: "
            f"{results.efficiency['MD with moves']['per_million_evaluations_with_training']:.3g}.",
        ),
    ]  # fmt: skip


def _notes(results: Results) -> list[str]:
    return [
        "The moves are exact; the dynamics beside them keeps the error of its 1 fs time step, as does plain MD.",
        "The effective sample size of the draws cannot see what the generator never makes. The forward figure on frames of the target can, as far as "
        "those frames reach.",
        "Peptide bonds may turn cis only as far as training data or the broadened torsions reach them; chirality and hydrogen labels are kept by "
        "construction.",
        "Plain MD here is short. Where it made few transitions its own populations are not evidence, and the replica exchange is the better reference.",
    ]


def _provenance(results: Results) -> dict[str, str]:
    m = results.material
    steps = m.record["steps"]
    return {
        "command": m.record["command"] or "called from Python",
        "molecule": f"{m.record['name']}, {m.record['atoms']} atoms",
        "force field": " + ".join(m.record["forcefield"]),
        "System sha256": m.record["system_sha256"],
        "generator sha256": steps["train"]["sha256"],
        "seed": str(m.record["settings"]["seed"]),
        "training": f"{steps['train']['steps']} steps, {steps['train']['skipped']} skipped",
        **m.record["versions"],
    }
