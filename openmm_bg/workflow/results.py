"""What a run has shown: the numbers of summary.json, and the sentence that sums them up."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from openmm_bg.analysis import (
    BASINS,
    Backbone,
    Chain,
    Comparison,
    Population,
    backbone_dihedrals,
    compare,
    effective_sample_size,
    energy_w2,
    format_value,
    left_handed,
    populations,
)
from openmm_bg.analysis import (
    measure as measure_distance,
)
from openmm_bg.analysis.diagnosis import jsonable
from openmm_bg.errors import InputError
from openmm_bg.workflow.material import Material
from openmm_bg.workflow.settings import TRAINING_STEPS, RunSettings

_FEW_TRANSITIONS = 10
_FEW_DRAWS = 50
_FEW_FRAMES = 20
_LISTED = 5


@dataclass
class Ensemble:
    """One of the ensembles that are held against each other.

    Attributes
    ----------
    backbone : Backbone or None
        None for a molecule without a residue that has both phi and psi.
    energy : ndarray, (frames,)
        kT.
    weights : ndarray, (frames,), or None
    populations : tuple of tuples of Population
        For every residue.
    size : tuple of float
        For every residue, effective samples: of phi > 0 in a simulation, of the draws otherwise.
    """

    backbone: Backbone | None
    energy: np.ndarray
    weights: np.ndarray | None
    populations: tuple[tuple[Population, ...], ...]
    size: tuple[float, ...]


@dataclass
class Results:
    """Everything measured once, for the summary and for the page.

    Attributes
    ----------
    material : Material
    against_md : Comparison
        MD with moves against plain MD.
    where_md_went : Comparison
        The same without the frames of basins that plain MD never reached, about which it says nothing.
    other : str
        What else it is held against: "replica exchange", or "the reweighted draws" of an adaptive run.
    against_other : Comparison or None
        None where too few draws hold all the weight.
    ensembles : dict of str to Ensemble
    residues : tuple of str
        Those with phi and psi; may be empty.
    slowest : int
        The residue whose chains are drawn and headlined.
    chains : dict of str to Chain
        What says how fast a simulation samples: phi > 0 of the slowest residue, or the energy without residues.
    efficiency : dict
        Effective samples per force evaluation, by residue (or "energy") and simulation.
    summary : dict
        For summary.json.
    """

    material: Material
    against_md: Comparison
    where_md_went: Comparison
    other: str
    against_other: Comparison | None
    ensembles: dict[str, Ensemble]
    residues: tuple[str, ...]
    slowest: int
    chains: dict[str, Chain]
    efficiency: dict[str, dict[str, dict[str, float]]]
    summary: dict[str, Any]

    @property
    def key(self) -> str:
        """The headlined entry of ``efficiency``."""
        return self.residues[self.slowest] if self.residues else "energy"

    @property
    def is_short(self) -> bool:
        """Whether this was but a rehearsal."""
        record, usual = self.material.record, RunSettings()
        trained, simulated = record["steps"]["train"]["steps"], record["settings"]["md_steps"]
        return 10 * trained < TRAINING_STEPS[record["settings"]["data"]] or 10 * simulated < usual.md_steps

    @property
    def observable(self) -> str:
        """What the chains follow, in words."""
        if not self.residues:
            return "the potential energy"
        return "φ > 0" if len(self.residues) == 1 else f"φ > 0 of {self.key}"

    def is_shown(self, name: str) -> bool:
        """Whether an ensemble can be drawn: weights that a few draws hold alone make a picture of nothing."""
        weights = self.ensembles[name].weights
        return weights is None or _kish(weights) >= _FEW_DRAWS

    @property
    def unmeasured(self) -> list[str]:
        """Populations that neither reference could confirm or contradict, for want of transitions."""
        known = [self.against_md] if self.against_other is None else [self.against_md, self.against_other]
        rows = zip(*(comparison.populations for comparison in known), strict=True)
        return [_short(row[0].name) for row in rows if all(pair.agrees is None for pair in row)]


def measure(material: Material) -> Results:
    """Compare MD with moves to plain MD and to what else there is, and weigh what everything cost."""
    m = material
    inside = np.isfinite(m.log_weights)
    weights = np.exp(m.log_weights[inside] - m.log_weights[inside].max())
    has_backbone = _has_backbone(m)
    ensembles = {
        name: _ensemble(m, positions, energy, w, drawn=name in ("generator", "reweighted"), backbone=has_backbone)
        for name, positions, energy, w in (
            ("MD", m.md, m.md_energy, None),
            *([] if m.exchange is None else [("replica exchange", m.exchange, m.exchange_energy, None)]),
            ("generator", m.samples[inside], m.sample_energy[inside], None),
            ("reweighted", m.samples[inside], m.sample_energy[inside], weights),
            ("MD with moves", m.chain, m.chain_energy, None),
        )
    }
    first = ensembles["MD"].backbone
    residues = () if first is None else first.residues
    settings, steps = m.record["settings"], m.record["steps"]
    per_frame = {
        "MD": settings["steps_per_iteration"],
        "MD with moves": settings["steps_per_iteration"] + settings["proposals_per_iteration"],
    }
    series = {name: _series(ensembles[name]) for name in per_frame}
    preparation = sum(training_cost(steps).values())
    efficiency = {
        key: _efficiency({name: Chain(series[name][k], per_frame[name]) for name in per_frame}, preparation)
        for k, key in enumerate(residues or ("energy",))
    }
    slowest = _slowest(list(efficiency.values()))
    chains = {name: Chain(series[name][slowest], per_frame[name]) for name in per_frame}
    moved = (m.chain, m.chain_energy)
    against_md = _compare(m, (m.md, m.md_energy), moved, has_backbone)
    other, against_other = "the reweighted draws", None
    if m.exchange is not None:
        other, against_other = "replica exchange", _compare(m, (m.exchange, m.exchange_energy), moved, has_backbone)
    elif _kish(weights) >= _FEW_DRAWS:
        # draws are independent and cannot be cut into blocks: the chain is the side that has a floor
        against_other = _compare(m, moved, (m.samples[inside], m.sample_energy[inside]), has_backbone, weights)
    where_md_went = _where_md_went(m, against_md, ensembles["MD with moves"])
    results = Results(
        m, against_md, where_md_went, other, against_other, ensembles, residues, slowest, chains, efficiency, {}
    )
    results.summary = _summary(results)
    return results


def _has_backbone(m: Material) -> bool:
    try:
        backbone_dihedrals(m.md[:1], m.topology)
    except InputError:
        return False  # positions and topology belong together: what it refuses is the want of a peptide chain
    return True


def _ensemble(
    m: Material, positions: np.ndarray, energy: np.ndarray, weights: np.ndarray | None, *, drawn: bool, backbone: bool
) -> Ensemble:
    if not backbone:
        return Ensemble(None, energy, weights, (), ())
    angles = backbone_dihedrals(positions, m.topology)
    pops = tuple(populations(phi, psi, weights) for phi, psi in zip(angles.phi.T, angles.psi.T, strict=True))
    if drawn:
        n = float(len(energy)) if weights is None else _kish(weights)
        size: tuple[float, ...] = (n,) * len(angles.residues)
    else:
        size = tuple(effective_sample_size(left_handed(phi)) for phi in angles.phi.T)
    return Ensemble(angles, energy, weights, pops, size)


def _kish(weights: np.ndarray) -> float:
    return float(weights.sum() ** 2 / (weights**2).sum())


def _series(ensemble: Ensemble) -> np.ndarray:
    """(observables, frames): phi > 0 of every residue, or the energy."""
    if ensemble.backbone is None:
        return ensemble.energy[None]
    return left_handed(ensemble.backbone.phi.T).astype(float)


def _compare(
    m: Material,
    reference: tuple[np.ndarray, np.ndarray],
    samples: tuple[np.ndarray, np.ndarray],
    backbone: bool,
    weights: np.ndarray | None = None,
) -> Comparison:
    """Positions and energies of either side."""
    n = min(2000, len(reference[0]) // 2, len(samples[0]))
    if backbone:
        return compare(
            reference[0], samples[0], topology=m.topology, reference_energies=reference[1],
            sample_energies=samples[1], weights=weights, n=n,
        )  # fmt: skip
    # no residue with phi and psi: what is left to compare is the energy
    rng = np.random.default_rng(0)
    distance = measure_distance("energy W2", energy_w2, reference[1], samples[1], rng, weights=weights, unit="kT")
    kish = None if weights is None else _kish(weights)
    return Comparison((distance,), (), len(reference[0]), len(samples[0]), kish, n, 5, 0)


def _where_md_went(m: Material, against_md: Comparison, chain: Ensemble) -> Comparison:
    """MD with moves against plain MD, in the basins that both know."""
    if chain.backbone is None:
        return against_md
    basins, residues = {basin.name: basin for basin in BASINS}, chain.backbone.residues
    kept = np.ones(len(m.chain), dtype=bool)
    for pair in against_md.populations:
        if pair.agrees is False and pair.reference.value == 0 and pair.reference.name in basins:
            angles = chain.backbone.pair(residues.index(pair.residue)).T
            kept &= ~basins[pair.reference.name].contains(*angles)
    if kept.all() or kept.sum() < _FEW_FRAMES:
        return against_md
    return _compare(m, (m.md, m.md_energy), (m.chain[kept], m.chain_energy[kept]), True)


def training_cost(steps: dict[str, Any]) -> dict[str, int]:
    """Evaluations for data and training, by name."""
    simulate, train = steps["simulate"], steps["train"]
    if "walker_evaluations" in train:
        return {"walkers": train["walker_evaluations"], "training": train["evaluations"]}
    return {
        "replica exchange": simulate["exchange_evaluations"],
        "bursts": simulate["burst_evaluations"],
        "training": train["evaluations"],
    }


def _efficiency(chains: dict[str, Chain], preparation: int) -> dict[str, dict[str, float]]:
    """Effective samples of an observable, per force evaluation."""
    result: dict[str, dict[str, float]] = {}
    for name, chain in chains.items():
        series = np.asarray(chain.series)
        evaluations = int(series.size * chain.evaluations_per_frame)
        size = effective_sample_size(series)
        result[name] = {
            "effective_samples": size,
            "force_evaluations": evaluations,
            "per_million_evaluations": 1e6 * size / evaluations,
        }
        if np.isin(series, (0.0, 1.0)).all():
            result[name]["transitions"] = int(np.count_nonzero(np.diff(series)))
    moves = result["MD with moves"]
    everything = moves["force_evaluations"] + preparation
    moves["per_million_evaluations_with_training"] = 1e6 * moves["effective_samples"] / everything
    return result


def _slowest(efficiency: list[dict[str, dict[str, float]]]) -> int:
    """The residue with the fewest effective samples, of those that crossed at all; the first where none did."""
    sizes = [entry["MD with moves"]["effective_samples"] for entry in efficiency]
    moved = [k for k, size in enumerate(sizes) if size > 0]
    return min(moved, key=lambda k: sizes[k]) if moved else 0


def _summary(results: Results) -> dict[str, Any]:
    m, steps = results.material, results.material.record["steps"]
    proposed, accepted = steps["sample"]["proposed"], steps["sample"]["accepted"]
    shares = {
        residue: {
            name: {"value": e.populations[k][-1].value, "error": e.populations[k][-1].error}
            for name, e in results.ensembles.items()
        }
        for k, residue in enumerate(results.residues)
    }
    summary = {
        "molecule": m.record["name"],
        "temperature_K": m.record["temperature"],
        "verdict": verdict(results),
        "generator": m.quality,
        "diagnosis": steps["sample"]["diagnosis"],
        "moves": {
            "proposed": proposed,
            "accepted": accepted,
            "acceptance": accepted / proposed,
            "refused": steps["sample"]["refused"],
        },
        "left_handed_share": shares,
        "effective_samples": results.efficiency,
        "against_md": results.against_md.to_dict(),
        f"against_{results.other.removeprefix('the ').replace(' ', '_')}": None
        if results.against_other is None
        else results.against_other.to_dict(),
        "cost": {
            "force_evaluations": {
                **training_cost(steps),
                "diagnosis": sum(steps[name]["diagnosis_evaluations"] for name in ("train", "sample")),
                "plain MD": steps["simulate"]["md_evaluations"],
                "independent draws": steps["sample"]["draw_evaluations"],
                "MD with moves": steps["sample"]["md_steps"] + proposed,
            },
            "seconds": {name: step["seconds"] for name, step in steps.items()},
            "resumed": [name for name, step in steps.items() if step.get("resumed")],
        },
        "settings": m.record["settings"],
        "versions": m.record["versions"],
        "system_sha256": m.record["system_sha256"],
        "generator_sha256": steps["train"]["sha256"],
        "command": m.record["command"],
    }
    if m.rounds:
        summary["adaptation"] = {
            "converged": steps["train"]["converged"],
            "verdict": steps["train"]["verdict"],
            "rounds": m.rounds,
        }
    return jsonable(summary)


def verdict(results: Results) -> str:
    """Whether MD with moves agrees with its references, and what could not be said."""
    other = results.other
    missed = _never_reached(results.against_md)
    md = [name for name in _differs(results.where_md_went) if name not in missed]
    differs = [] if results.against_other is None else _differs(results.against_other)
    if differs and md:
        text = f"MD with moves differs from {other} in {_listed(differs)}, from plain MD in {_listed(md)}."
    elif differs:
        text = f"MD with moves agrees with plain MD, but differs from {other} in {_listed(differs)}."
    elif results.against_other is None:
        text = (
            f"MD with moves differs from plain MD in {_listed(md)}."
            if md
            else "MD with moves agrees with plain MD wherever that went."
        ) + f" A handful of draws holds all the weight, so {other} say nothing."
    elif md:
        text = f"MD with moves agrees with {other}, but differs from plain MD in {_listed(md)}."
    elif missed:
        text = (
            f"MD with moves agrees with {other} within its error, and with plain MD wherever that went: "
            f"it never crossed to or from {_listed(missed)}."
        )
    else:
        text = f"MD with moves agrees with plain MD and with {other} within their errors."
    if not results.material.accepted.any():
        text += " Not one move was accepted, so this is plain MD."
    if results.unmeasured:
        text += f" Not measured, for want of transitions: {', '.join(results.unmeasured)}."
    return text


def is_good(results: Results) -> bool:
    """Whether a reader may take the verdict as it stands."""
    if results.against_other is None:
        return False
    missed = _never_reached(results.against_md)
    differs = set(_differs(results.where_md_went)) - set(missed) or _differs(results.against_other)
    return bool(not differs and not results.unmeasured and results.material.accepted.any() and not results.is_short)


def _differs(comparison: Comparison) -> list[str]:
    """What differs by itself; what only follows from that is left out."""
    if not comparison.contrasts:  # an energy alone
        return [d.name for d in comparison.distances if not d.within_floor]
    return [_short(c.name) for c in comparison.contrasts if c.differs and c.name not in comparison.consequences]


def _never_reached(comparison: Comparison) -> list[str]:
    """Basins whose border the reference never crossed: it is no evidence against samples that do."""
    return [_short(p.name) for p in comparison.populations if p.agrees is False and math.isnan(p.reference.error)]


def _listed(names: list[str]) -> str:
    more = len(names) - _LISTED
    return ", ".join(names[:_LISTED]) + (f" and {more} more" if more > 0 else "")


def _short(name: str) -> str:
    """A basin without its definition, which the tables give."""
    return name.split(" (")[0]


def headline(results: Results) -> str:
    """A few lines for the terminal."""
    q, moves = results.material.quality, results.summary["moves"]
    return "\n".join(
        [
            "",
            verdict(results),
            f"  generator: ESS {100 * q['ess']:.1f} % of {q['n']} draws, forward figure {100 * q['forward']:.1f} % and "
            f"largest log p/q {format_value(q['largest_log_ratio'])} on {q['held_out_frames']} held-out frames",
            f"  moves: {moves['accepted']} of {moves['proposed']} accepted ({100 * moves['acceptance']:.1f} %), "
            f"{moves['refused']} refused",
            f"  {results.observable}: {_efficiency_text(results)}",
        ]
    )


def _efficiency_text(results: Results) -> str:
    md, moves = (results.efficiency[results.key][name] for name in ("MD", "MD with moves"))
    if not moves["effective_samples"]:
        return "no transition in MD with moves"
    text = f"{moves['per_million_evaluations']:.3g} effective samples per million force evaluations with moves"
    if results.residues and md["transitions"] < _FEW_TRANSITIONS:
        return f"{text}; plain MD made {md['transitions']} transitions, too few to say"
    return f"{text}, {md['per_million_evaluations']:.3g} without"
