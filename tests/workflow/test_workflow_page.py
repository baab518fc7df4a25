"""What a run's page claims, from ensembles whose truth is known."""

from __future__ import annotations

import dataclasses
import json
import re

import numpy as np
import pytest
import torch

from openmm_bg.analysis import diagnose
from openmm_bg.coordinates import InternalCoordinates, ZMatrix
from openmm_bg.workflow import page as run_page
from openmm_bg.workflow.material import Material
from openmm_bg.workflow.results import headline, is_good, measure, verdict
from openmm_bg.workflow.settings import TRAINING_STEPS, RunSettings

STEP = {"seconds": 1.0}


def conformations(molecule, phi: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Alanine dipeptide with given phi (radians) and psi near 60 degrees; everything else as in its file."""
    zmatrix = ZMatrix.from_topology(molecule.topology)
    coordinates = InternalCoordinates(zmatrix)
    q, _ = coordinates(torch.as_tensor(molecule.positions)[None])
    q = q.repeat(len(phi), 1)
    torsions = [frozenset(row) for row in zmatrix.torsions.tolist()]
    for atoms, values in (((4, 6, 8, 14), phi), ((6, 8, 14, 16), 1.0 + 0.3 * rng.standard_normal(len(phi)))):
        column = len(zmatrix.bonds) + len(zmatrix.angles) + torsions.index(frozenset(atoms))
        q[:, column] = torch.as_tensor(values)
    return coordinates.inverse(q)[0].numpy()


@pytest.fixture(scope="module")
def material(alanine) -> Material:
    """Four ensembles of one and the same law: phi > 0 with probability 0.3, Gaussian energies, even weights."""
    rng = np.random.default_rng(1)

    def ensemble(n: int, share: float = 0.3) -> tuple[np.ndarray, np.ndarray]:
        phi = np.where(rng.random(n) < share, 1.0, -1.5) + 0.2 * rng.standard_normal(n)
        return conformations(alanine, phi, rng), -25 + 5 * rng.standard_normal(n)

    (md, md_energy), (exchange, exchange_energy) = ensemble(400), ensemble(400)
    (chain, chain_energy), (samples, sample_energy) = ensemble(400), ensemble(600)
    samples[:5] = np.nan
    log_weights = 0.3 * rng.standard_normal(600)
    log_weights[:5] = -np.inf
    steps = {
        "prepare": STEP,
        "simulate": {**STEP, "exchange_evaluations": 1000, "burst_evaluations": 100, "md_evaluations": 200_000},
        "train": {**STEP, "evaluations": 5000, "steps": 8000, "skipped": 0, "sha256": "f" * 64},
        "sample": {**STEP, "proposed": 400, "accepted": 200, "refused": 0, "md_steps": 200_000, "resumed": True},
    }
    steps["train"]["diagnosis_evaluations"] = 20_123
    steps["sample"] |= {"draw_evaluations": 600, "diagnosis_evaluations": 400}
    steps["sample"]["diagnosis"] = diagnose(
        log_weights, np.zeros(20), regions={"left": (log_weights > 0, np.zeros(20, dtype=bool))}
    ).to_dict()  # fmt: skip
    record = {
        "name": "alanine_dipeptide", "description": "Alanine dipeptide.", "temperature": 300.0, "atoms": 22,
        "forcefield": ["amber99sbildn.xml"], "settings": dataclasses.asdict(RunSettings(data="exchange")),
        "command": "", "versions": {}, "system_sha256": "0" * 64, "steps": steps,
    }  # fmt: skip
    return Material(
        record=record, topology=alanine.topology, md=md, md_energy=md_energy, exchange=exchange,
        exchange_energy=exchange_energy, samples=samples, sample_energy=sample_energy, log_weights=log_weights,
        held_out_log_weights=0.3 * rng.standard_normal(100), chain=chain, chain_energy=chain_energy,
        accepted=rng.random(400) < 0.5,
        training=[
            {"seconds": 1.0, "stage": "likelihood", "nll": -200.0},
            {"seconds": 2.0, "stage": "energy", "nll": 5.0, "log_variance": 1.5, "ess": 0.4},
        ],
        rounds=[],
        quality={
            "ess": 0.9, "ess_clipped": 0.9, "n": 600, "acceptance": 0.8, "forward": 0.9, "largest_log_ratio": 1.0,
            "held_out_frames": 100, "log_z": 0.0, "log_z_error": 0.01,
        },
    )  # fmt: skip


def test_equal_ensembles_agree_and_the_page_says_so(material, tmp_path):
    results = measure(material)
    assert is_good(results) and results.unmeasured == []
    assert verdict(results) == "MD with moves agrees with plain MD and with replica exchange within their errors."
    run_page.write(tmp_path / "report.html", results)
    page = (tmp_path / "report.html").read_text()
    for text in ("Passed", "reweighted", "Memory of φ &gt; 0", "mean -log q", "var log w", "1, last leg", "Pareto k"):
        assert text in page, text
    assert re.search(r"diagnosis, after training and of the draws</t[hd]>\s*<td[^>]*>20,523<", page)
    assert "φ > 0: " in headline(results) and "effective samples per million" in headline(results)


def test_the_numbers_are_those_of_the_ensembles(material):
    summary = measure(material).summary
    for name in ("MD", "replica exchange", "generator", "reweighted", "MD with moves"):
        entry = summary["left_handed_share"]["ALA2"][name]
        assert abs(entry["value"] - 0.3) < 4 * entry["error"] < 0.2
    moves = summary["effective_samples"]["ALA2"]["MD with moves"]
    assert moves["force_evaluations"] == 400 * 510
    assert moves["effective_samples"] == pytest.approx(400, rel=0.5)  # independent frames
    assert moves["per_million_evaluations_with_training"] == pytest.approx(
        1e6 * moves["effective_samples"] / (400 * 510 + 6100)
    )
    assert summary["cost"]["resumed"] == ["sample"]
    cost = summary["cost"]["force_evaluations"]
    assert (cost["training"], cost["diagnosis"], cost["independent draws"]) == (5000, 20_523, 600)


def test_a_chain_of_another_law_is_called_different(material):
    other = dataclasses.replace(material, chain=material.chain[::-1].copy(), chain_energy=material.chain_energy + 4)
    results = measure(other)
    assert not is_good(results)
    assert "differs from replica exchange in energy" in verdict(results)


def test_plain_md_that_never_crossed_is_no_evidence(material, alanine):
    rng = np.random.default_rng(2)
    inside = conformations(alanine, -1.5 + 0.2 * rng.standard_normal(400), rng)
    results = measure(dataclasses.replace(material, md=inside))
    assert not results.against_md.agrees and results.where_md_went.agrees
    assert "with plain MD wherever that went: it never crossed to or from " in verdict(results)
    assert "ALA2 left" in verdict(results) and is_good(results)
    # where it went, it is evidence
    results = measure(dataclasses.replace(material, md=inside, md_energy=material.md_energy + 4))
    assert "differs from plain MD in energy." in verdict(results) and not is_good(results)
    # what the replica exchange never saw is not forgiven
    results = measure(dataclasses.replace(material, exchange=inside))
    assert "differs from replica exchange in ALA2 " in verdict(results) and not is_good(results)


def test_moves_that_were_never_accepted_are_no_success(material):
    results = measure(dataclasses.replace(material, accepted=np.zeros(400, dtype=bool)))
    assert not is_good(results) and "Not one move was accepted" in verdict(results)


def test_what_was_not_measured_is_named(material, alanine, tmp_path):
    rng = np.random.default_rng(2)
    stuck = {
        name: conformations(alanine, -1.5 + 0.2 * rng.standard_normal(400), rng) for name in ("md", "exchange", "chain")
    }
    results = measure(dataclasses.replace(material, **stuck))
    assert not is_good(results) and "Not measured, for want of transitions: " in verdict(results)
    assert "ALA2 left" in results.unmeasured
    assert "no transition in MD with moves" in headline(results)
    run_page.write(tmp_path / "report.html", results)
    page = (tmp_path / "report.html").read_text()
    assert "With care" in page and "none seen" in page and "Memory of" not in page


def test_infinities_and_uneven_weights_are_shown_as_what_they_are(material, tmp_path):
    log_weights = np.where(np.arange(600) == 300, 60.0, material.log_weights)
    quality = {**material.quality, "largest_log_ratio": np.inf, "forward": 0.0, "log_z_error": np.nan}
    held_out = np.where(np.arange(100) == 7, np.inf, material.held_out_log_weights)
    uneven = dataclasses.replace(
        material, log_weights=log_weights, held_out_log_weights=held_out, quality=quality
    )  # fmt: skip
    results = measure(uneven)
    json.dumps(results.summary, allow_nan=False)
    assert results.summary["generator"]["largest_log_ratio"] is None
    run_page.write(tmp_path / "report.html", results)
    page = (tmp_path / "report.html").read_text()
    assert "Reweighted draws are left out" in page and "some of them are out of reach" in page


# -- adaptive runs, which have no replica exchange


@pytest.fixture
def adaptive(material) -> Material:
    """The same ensembles, as an adaptive run leaves them."""
    figures = {"ess": 0.7, "ess_clipped": 0.72, "forward": 0.6, "largest_log_ratio": None}
    moves = {"tried": 200, "accepted": 150, "refused": 0}
    common = {"moves": moves, "evaluations": {"dynamics": 900, "training": 100}, "seconds": 12.0}
    rounds = [
        {**common, "round": 0, "failures": ["nothing was trained yet"], "moves": {}},
        {**common, "round": 1, "failures": ["the largest log p/q is inf, above 6"], "figures": figures},
        {**common, "round": 2, "failures": [], "figures": {**figures, "largest_log_ratio": 2.5}},
        {**common, "round": 2, "closed": True, "figures": {**figures, "largest_log_ratio": 1.5}},
    ]
    steps = {**material.record["steps"], "simulate": {**STEP, "md_evaluations": 200_000}}
    steps["train"] = {
        **steps["train"], "walker_evaluations": 70_000, "converged": True, "verdict": "The convergence test held."
    }  # fmt: skip
    record = {**material.record, "steps": steps, "settings": dataclasses.asdict(RunSettings())}
    return dataclasses.replace(material, record=record, exchange=None, exchange_energy=None, rounds=rounds)


def test_an_adaptive_run_is_held_against_its_reweighted_draws(adaptive, tmp_path):
    results = measure(adaptive)
    assert verdict(results) == "MD with moves agrees with plain MD and with the reweighted draws within their errors."
    assert is_good(results) and "replica exchange" not in results.ensembles
    summary = json.loads(json.dumps(results.summary, allow_nan=False))
    assert summary["adaptation"]["converged"] and len(summary["adaptation"]["rounds"]) == 4
    assert "against_replica_exchange" not in summary and summary["against_reweighted_draws"]["sample_kish"] > 300
    cost = summary["cost"]["force_evaluations"]
    assert (cost["walkers"], cost["training"]) == (70_000, 5000)
    moves = summary["effective_samples"]["ALA2"]["MD with moves"]
    assert moves["per_million_evaluations_with_training"] == pytest.approx(
        1e6 * moves["effective_samples"] / (400 * 510 + 75_000)
    )
    run_page.write(tmp_path / "report.html", results)
    page = re.sub(r"<[^>]*>", " ", (tmp_path / "report.html").read_text())
    for text in ("Rounds of adaptation", "the largest log p/q is inf, above 6", "the last training", "75.0", "held",
                 "Populations against the reweighted draws", "The convergence test held."):  # fmt: skip
        assert text in page, text
    assert "replica exchange" not in page and "bursts" not in page


def test_draws_of_another_law_are_called_different(adaptive):
    results = measure(dataclasses.replace(adaptive, sample_energy=adaptive.sample_energy + 4))
    assert not is_good(results) and "differs from the reweighted draws in energy" in verdict(results)


def test_weights_that_one_draw_holds_are_no_evidence(adaptive, tmp_path):
    log_weights = np.where(np.arange(600) == 300, 60.0, adaptive.log_weights)
    results = measure(dataclasses.replace(adaptive, log_weights=log_weights))
    assert results.against_other is None and not is_good(results)
    assert "A handful of draws holds all the weight, so the reweighted draws say nothing." in verdict(results)
    assert results.summary["against_reweighted_draws"] is None
    run_page.write(tmp_path / "report.html", results)
    assert "Populations against the reweighted draws" not in (tmp_path / "report.html").read_text()


def test_a_short_adaptive_run_says_so(adaptive):
    training = {**adaptive.record["steps"]["train"], "steps": TRAINING_STEPS["adaptive"] // 10 - 1}
    steps = {**adaptive.record["steps"], "train": training}
    short = dataclasses.replace(adaptive, record={**adaptive.record, "steps": steps})
    assert measure(short).is_short and not measure(adaptive).is_short
