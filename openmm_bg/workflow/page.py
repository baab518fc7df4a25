"""The page of a run: report.html."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from openmm_bg.analysis import (
    Card,
    Comparison,
    Status,
    Summary,
    Table,
    format_value,
    report,
)
from openmm_bg.workflow.page_figures import figures
from openmm_bg.workflow.results import Results, is_good, training_cost, verdict

_DISTANCE = ("distance", "value", "floor", "debiased", "n", "verdict")
_POPULATION = ("population, %", "reference", "MD with moves", "difference", "verdict")
_REVERSED = ("population, %", "MD with moves", "reweighted draws", "difference", "verdict")


def write(path: Path, results: Results) -> None:
    """Write report.html."""
    status = Status.GOOD if is_good(results) else Status.CAUTION
    summary = Summary(verdict(results), status, " ".join(_lead(results)), _cards(results))
    report(
        path, title=f"{results.material.record['name']}: molecular dynamics with generator moves", summary=summary,
        figures=figures(results), tables=_tables(results), notes=_notes(results), provenance=_provenance(results),
    )  # fmt: skip


def _lead(results: Results) -> list[str]:
    record = results.material.record
    settings = record["settings"]
    text = [
        f"{record['description'].rstrip('.')}, at {record['temperature']:g} K.",
        f"Molecular dynamics and Boltzmann generator moves ran together: every {settings['steps_per_iteration']} steps "
        f"the generator proposed {settings['proposals_per_iteration']} whole conformations, each accepted or rejected "
        "exactly.",
    ]
    if results.material.rounds:
        text.append(f"The generator learned from walkers that it moved itself. {record['steps']['train']['verdict']}")
    if results.is_short:
        text.append("This run is far shorter than usual: it shows that everything works, and its numbers mean little.")
    return text


def _cards(results: Results) -> list[Card]:
    q, summary = results.material.quality, results.summary
    md, moves = (results.efficiency[results.key][name] for name in ("MD", "MD with moves"))
    without = f"plain MD {format_value(md['per_million_evaluations'])}"
    if results.residues:
        without += f" from {md['transitions']} transitions"
    reached = np.isfinite(q["largest_log_ratio"])
    largest = f"largest log p/q {format_value(q['largest_log_ratio'])}" if reached else "some of them are out of reach"
    return [
        Card("Effective sample size", f"{100 * q['ess']:.1f} %", f"of {q['n']:,} independent draws, nothing clipped"),
        Card(
            "The same seen from the target", f"{100 * q['forward']:.1f} %",
            f"1/E[p/q] on {q['held_out_frames']:,} held-out frames; {largest}",
        ),
        Card("Accepted moves", f"{100 * summary['moves']['acceptance']:.1f} %", f"of {summary['moves']['proposed']:,}"),
        Card(
            f"Effective samples of {results.observable}",
            f"{moves['per_million_evaluations']:,.0f}" if moves["effective_samples"] else "none seen",
            f"per million force evaluations of MD with moves; {without}",
        ),
    ]  # fmt: skip


def _tables(results: Results) -> list[Table]:
    tables = []
    if results.residues:
        tables += [_populations(results), _crossings(results)]
    tables += _comparison(
        "plain MD", results.against_md,
        "The floor is the same distance between two blocked halves of the reference, at the same number of points: "
        "nothing below it can be told apart.",
    )  # fmt: skip
    if results.against_other is not None:
        tables += _comparison(
            results.other, results.against_other,
            "Independent draws have no blocks, so MD with moves is the side with a floor here. Both are exact, and "
            "blind to what neither ever makes."
            if results.material.exchange is None
            else "The exchange also supplied the training data; MD with moves is exact whatever the training was.",
        )  # fmt: skip
    diagnosis = results.summary["diagnosis"]
    return [
        *tables, _generator(results.material.quality, diagnosis), *_basins(diagnosis), *_rounds(results), _cost(results)
    ]  # fmt: skip


def _populations(results: Results) -> Table:
    rows = [
        (
            name if len(results.residues) == 1 else f"{residue}, {name}",
            *(format_value(100 * p.value, 100 * p.error) for p in ensemble.populations[k]),
            f"{ensemble.size[k]:,.0f}",
        )
        for k, residue in enumerate(results.residues)
        for name, ensemble in results.ensembles.items()
        if results.is_shown(name)
    ]
    names = [p.name for p in results.ensembles["MD"].populations[0]]
    return Table(
        "Populations, %", ("ensemble", *names, "effective samples"), rows,
        "Errors from the statistical inefficiency; '?' where a run never crossed and so measured no error. Effective "
        "samples are those of φ > 0 in a simulation, and of draws their number, or Kish's size of their weights.",
    )  # fmt: skip


def _crossings(results: Results) -> Table:
    rows = [
        (
            name if len(results.residues) == 1 else f"{residue}, {name}",
            f"{entry['transitions']:,}",
            format_value(entry["effective_samples"]),
            f"{entry['force_evaluations']:,}",
            format_value(entry["per_million_evaluations"]),
        )
        for residue, entries in results.efficiency.items()
        for name, entry in entries.items()
    ]
    columns = ("simulation", "transitions", "effective samples", "force evaluations", "samples per million")
    return Table("Crossings of φ = 0", columns, rows, "Training and its data are not in this table; below, they are.")


def _comparison(name: str, comparison: Comparison, caption: str) -> list[Table]:
    tables = [Table(f"MD with moves against {name}", _DISTANCE, comparison.distance_rows(), caption)]
    if comparison.populations:
        sides = _POPULATION if comparison.sample_kish is None else _REVERSED
        tables.append(Table(f"Populations against {name}", sides, comparison.population_rows()))
    return tables


def _generator(q: dict[str, Any], diagnosis: dict[str, Any]) -> Table:
    k, error = _number(diagnosis["pareto_k"]), _number(diagnosis["pareto_k_error"])
    rows = [
        ("effective sample size, unclipped", f"{100 * q['ess']:.2f} % of {q['n']:,}"),
        ("the same with the largest 0.01 % of the weights clipped", f"{100 * q['ess_clipped']:.2f} %"),
        ("Pareto k of the largest weights", format_value(k, error)),
        ("stationary acceptance of an independence chain", f"{100 * q['acceptance']:.2f} %"),
        ("forward figure 1/E[p/q]", f"{100 * q['forward']:.2f} % on {q['held_out_frames']:,} held-out frames"),
        ("largest log p/q on held-out frames", format_value(q["largest_log_ratio"])),
        ("log Z", format_value(q["log_z"], q["log_z_error"])),
    ]
    return Table("The generator", ("figure", "value"), rows, " ".join(diagnosis["findings"].values()))


def _basins(diagnosis: dict[str, Any]) -> list[Table]:
    """Where the generator is, and where frames of the target are that training never saw."""
    rows = [
        (
            region["name"],
            format_value(100 * region["share"], 100 * region["share_error"]),
            format_value(100 * region["drawn"], 100 * region["drawn_error"]),
            format_value(_number(region["ratio"]), _number(region["ratio_error"])),
        )
        for region in diagnosis["regions"]
    ]
    columns = ("basin", "held-out frames, %", "draws, %", "mean p/q on those frames")
    caption = "A generator that makes a basin too rarely has a large mean p/q there."
    return [Table("Basins of the generator", columns, rows, caption)] if rows else []


def _rounds(results: Results) -> list[Table]:
    """How adaptation went: every round as it was judged on frames that training had not seen."""
    rows = []
    for record in results.material.rounds:
        if "figures" not in record:
            continue
        f, moves = record["figures"], record["moves"]
        rows.append((
            "the last training" if record.get("closed") else f"{record['round']}",
            f"{100 * f['ess']:.1f} ({100 * f['ess_clipped']:.1f})",
            f"{100 * f['forward']:.1f}",
            format_value(math.inf if f["largest_log_ratio"] is None else f["largest_log_ratio"]),
            f"{100 * moves['accepted'] / moves['tried']:.1f}" if moves["tried"] else "none tried",
            "; ".join(record.get("failures", [])) or ("" if record.get("closed") else "held"),
            f"{sum(record['evaluations'].values()):,}",
            f"{record['seconds']:,.0f}",
        ))  # fmt: skip
    columns = ("after round", "ESS, % (clipped)", "forward figure, %", "largest log p/q", "walkers' moves accepted, %",
               "convergence test", "evaluations so far", "seconds so far")  # fmt: skip
    caption = results.summary["adaptation"]["verdict"] if rows else ""
    return [Table("Rounds of adaptation", columns, rows, caption)] if rows else []


def _number(value: float | None) -> float:
    """JSON has None for what was not measured."""
    return math.nan if value is None else value


def _cost(results: Results) -> Table:
    cost = results.summary["cost"]
    evaluations = {name: f"{count:,}" for name, count in cost["force_evaluations"].items()}
    seconds = {
        name: f"{value:,.0f}" + (", last leg" if name in cost["resumed"] else "")
        for name, value in cost["seconds"].items()
    }
    moves = results.efficiency[results.key]["MD with moves"]
    return Table(
        "What it cost", ("step", "force or energy evaluations", "seconds"),
        [
            *((name, evaluations[name], "") for name in training_cost(results.material.record["steps"])),
            ("plain MD, for comparison", evaluations["plain MD"], ""),
            ("simulate, in all", "", seconds["simulate"]),
            ("train, in all", "", seconds["train"]),
            ("independent draws", evaluations["independent draws"], ""),
            ("MD with moves", evaluations["MD with moves"], ""),
            ("sample, both", "", seconds["sample"]),
            ("diagnosis, after training and of the draws", evaluations["diagnosis"], ""),
        ],
        f"Effective samples of {results.observable} per million evaluations of MD with moves, with training and its "
        f"data included: {format_value(moves['per_million_evaluations_with_training'])}.",
    )  # fmt: skip


def _notes(results: Results) -> list[str]:
    notes = [
        "The moves are exact; the dynamics beside them keeps the error of its 1 fs time step, as does plain MD.",
        "The effective sample size of the draws cannot see what the generator never makes. The forward figure on "
        "frames of the target can, as far as those frames reach.",
        "Peptide bonds turn cis as far as training found such conformations; chirality and hydrogen labels are kept by "
        "construction.",
    ]
    if results.residues:
        notes.append(
            "φ > 0 leaves out the strip beyond 150°, into which the sheet leaks over ±180° without crossing a barrier. "
            "Plain MD here is short. Where it made few transitions its own populations are not evidence"
            + (", and the replica exchange is the better reference." if results.material.exchange is not None else ".")
        )
    else:
        notes.append(
            "No residue of this molecule has both φ and ψ: the ensembles were compared by their potential energies "
            "alone."
        )
    if len(results.residues) > 1:
        notes.append(
            f"Of the residues that crossed φ = 0 at all, {results.key} gave the fewest effective samples: the figures "
            "follow it."
        )
    return notes


def _provenance(results: Results) -> dict[str, str]:
    m = results.material
    steps, budget = m.record["steps"], m.record["settings"]["budget"]
    return {
        "command": m.record["command"] or "called from Python",
        "molecule": f"{m.record['name']}, {m.record['atoms']} atoms",
        "force field": " + ".join(m.record["forcefield"]),
        "System sha256": m.record["system_sha256"],
        "generator sha256": steps["train"]["sha256"],
        "seed": str(m.record["settings"]["seed"]),
        "training": f"{steps['train']['steps']} steps, {steps['train']['skipped']} skipped"
        + (f", on a budget of {budget}" if budget else ""),
        **m.record["versions"],
    }
