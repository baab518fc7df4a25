"""The default run, whose generator moves the walkers it learns from: what it leaves, and after every kind of stop."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from interruptions import interrupt_at

import openmm_bg as bg
from openmm_bg import cli
from openmm_bg.sampling import Walkers
from openmm_bg.workflow.material import read_dcd

BRIEF = [
    "--rehearsal", "--walkers", "24", "--rounds", "1", "--likelihood-steps", "4", "--training-steps", "8",
    "--md-steps", "2000", "--production-steps", "2000", "--samples", "200", "--quiet",
]  # fmt: skip


def run_json(folder: Path) -> dict:
    return json.loads((folder / "run.json").read_text())


def summary_of(folder: Path) -> dict:
    """Every number but the clock's."""
    summary = json.loads((folder / "summary.json").read_text())
    del summary["cost"]["seconds"], summary["cost"]["resumed"], summary["command"], summary["generator_sha256"]
    for record in summary["adaptation"]["rounds"]:
        del record["seconds"]
    return summary


def assert_same(one: Path, other: Path) -> None:
    weights = [bg.BoltzmannGenerator.load(folder / "generator.bg").flow.state_dict() for folder in (one, other)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert (one / "moves.csv").read_bytes() == (other / "moves.csv").read_bytes()
    assert np.array_equal(read_dcd(one / "trajectory.dcd", 22), read_dcd(other / "trajectory.dcd", 22))
    assert summary_of(one) == summary_of(other)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A whole run that nothing disturbed, its walkers in this process."""
    folder = tmp_path_factory.mktemp("adaptive") / "finished"
    assert cli.main(["run", "alanine_dipeptide", "--output", str(folder), *BRIEF, "--workers", "1"]) == 0
    return folder


def test_what_a_run_leaves(finished):
    assert {path.name for path in finished.iterdir()} == {
        ".lock", "run.json", "molecule.pdb", "system.xml", "md.npz", "training.checkpoint", "training.jsonl",
        "walkers.npz", "generator.bg", "samples.npz", "moves.checkpoint", "moves.csv", "trajectory.dcd",
        "summary.json", "report.html",
    }  # fmt: skip
    record, generator = run_json(finished), bg.BoltzmannGenerator.load(finished / "generator.bg")
    train = record["steps"]["train"]
    assert generator.provenance["adaptation"] == {
        "rounds": 1, "closed": True, "converged": False, "verdict": train["verdict"]
    }  # fmt: skip
    assert train["verdict"].startswith("The convergence test did not hold within 1 round: the ")
    # a quarter of the likelihood again, because the walkers went where the generator was not
    assert train["steps"] == 4 + 30 + 1 + 8 and train["evaluations"] == 38 * 512
    with np.load(finished / "walkers.npz") as file:
        assert file["positions"].shape == (240, 22, 3)
    assert record["settings"]["data"] == "adaptive" and record["settings"]["ladders"] is None


def test_what_a_run_says(finished):
    summary = json.loads((finished / "summary.json").read_text())
    kinds = [(record["round"], record.get("closed", False)) for record in summary["adaptation"]["rounds"]]
    assert kinds == [(0, False), (1, False), (1, True)]
    assert summary["generator"]["held_out_frames"] == 240
    last = summary["adaptation"]["rounds"][-1]["figures"]
    assert summary["generator"]["forward"] == pytest.approx(last["forward"], rel=0.5, abs=0.1)
    cost, spent = summary["cost"]["force_evaluations"], summary["adaptation"]["rounds"][-1]["evaluations"]
    assert cost["training"] == spent["training"] and cost["walkers"] == sum(spent.values()) - spent["training"]
    assert spent["dynamics"] == 24 * (500 + 200 + 3 * 200 + 5 * 2)
    text = re.sub(r"<[^>]*>", " ", (finished / "report.html").read_text())
    for phrase in ("Rounds of adaptation", "The generator learned from walkers that it moved itself.", "walkers"):
        assert phrase in text
    assert "replica exchange" not in text and "far shorter than usual" in text


def test_a_run_that_is_stopped_again_and_again_gives_the_same_numbers(finished, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "stopped"
    begin = ["run", "alanine_dipeptide", "--output", str(folder), *BRIEF, "--workers", "1"]
    train = ["train", "--output", str(folder), "--quiet", "--workers", "1"]
    for command, owner, method, call in (
        (begin, Walkers, "advance", 2), (train, torch.optim.Adam, "step", 12), (train, torch.optim.Adam, "step", 26),
        (train, Walkers, "advance", 0),
    ):  # fmt: skip
        with monkeypatch.context() as patch:
            interrupt_at(patch, owner, method, call)
            assert cli.main(command) == 130
        assert not (folder / "generator.bg").exists()
    assert cli.main(train) == 0
    out = capsys.readouterr().out
    assert "train: walkers of MD and the generator, in turn, going on" in out
    assert re.search(r"afterwards: ESS .*; \d+ % of the walkers' moves accepted", out)
    assert cli.main([*begin, "--resume"]) == 0
    assert_same(folder, finished)


def test_json_is_all_that_is_printed(finished, capsys):
    assert cli.main(["run", "alanine_dipeptide", "--output", str(finished), "--resume", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((finished / "summary.json").read_text())


def test_moves_on_another_platform(finished, tmp_path):
    folder = tmp_path / "elsewhere"
    shutil.copytree(finished, folder)
    record = run_json(folder)
    assert record["steps"].pop("sample")["platform"] == "Reference"
    (folder / "run.json").write_text(json.dumps(record))
    (folder / "moves.checkpoint").unlink()
    assert cli.main(["sample", "--output", str(folder), "--quiet", "--platform", "CPU"]) == 0
    again = run_json(folder)["steps"]["sample"]
    assert again["platform"] == "CPU" and again["proposed"] == 100


def test_a_killed_run_goes_on_with_more_workers(finished, tmp_path):
    folder = tmp_path / "killed"
    shutil.copytree(finished, folder)
    record = run_json(folder)
    for step, names in {
        "train": ("training.checkpoint", "training.jsonl", "walkers.npz", "generator.bg"),
        "sample": ("samples.npz", "moves.checkpoint", "moves.csv", "trajectory.dcd"),
        "compare": ("summary.json",), "report": ("report.html",),
    }.items():  # fmt: skip
        record["begun"].remove(step)
        del record["steps"][step]
        for name in names:
            (folder / name).unlink()
    (folder / "run.json").write_text(json.dumps(record))
    command = [sys.executable, "-m", "openmm_bg.cli", "train", "--output", str(folder), "--quiet", "--workers", "1"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 240
        while not (folder / "training.checkpoint").exists():  # the first dynamics is done
            assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (folder / "generator.bg").exists()
    resume = ["run", "alanine_dipeptide", "--output", str(folder), "--resume", "--quiet", "--workers", "2"]
    assert cli.main(resume) == 0
    assert_same(folder, finished)


def test_a_scheduler_that_is_not_there_is_one_sentence(tmp_path, capsys):
    pytest.importorskip("distributed", reason="distributed is not installed: pip install openmm_bg[dask]")
    run = ["run", "alanine_dipeptide", "--output", str(tmp_path / "out"), *BRIEF, "--scheduler", "nowhere"]
    assert cli.main(run) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("openmm-bg: There is no Dask scheduler at nowhere") and captured.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_other_data_are_another_run(finished, capsys):
    resume = ["run", "alanine_dipeptide", "--output", str(finished), "--resume", "--quiet"]
    assert cli.main([*resume, "--data", "exchange"]) == 2
    assert "data adaptive, not exchange" in capsys.readouterr().err
    # where the walkers run is no part of what a run is
    assert cli.main([*resume, "--workers", "7"]) == 0


@pytest.mark.slow
def test_a_cluster_gives_the_same_run(finished, tmp_path):
    distributed = pytest.importorskip("distributed", reason="distributed is not installed: pip install openmm_bg[dask]")
    folder = tmp_path / "cluster"
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, dashboard_address=None, local_directory=tmp_path, silence_logs=50
    ) as cluster:
        run = ["run", "alanine_dipeptide", "--output", str(folder), *BRIEF, "--scheduler", cluster.scheduler_address]
        assert cli.main(run) == 0
    assert_same(folder, finished)


@pytest.mark.slow
def test_alanine_dipeptide_from_its_structure_to_convergence(tmp_path):
    """The usual settings, but for a shorter last training: within minutes, and right about the basins."""
    folder = tmp_path / "run"
    assert cli.main(
        ["run", "alanine_dipeptide", "--output", str(folder), "--training-steps", "2000", "--md-steps", "20000",
         "--production-steps", "100000", "--samples", "50000", "--quiet"]
    ) == 0  # fmt: skip
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["adaptation"]["converged"], summary["adaptation"]["verdict"]
    q = summary["generator"]
    assert q["ess"] > 0.8 and q["forward"] > 0.5 and q["largest_log_ratio"] < 8
    assert summary["moves"]["acceptance"] > 0.7
    # benchmarks/references: replica exchange of 25,600 effective samples
    share = summary["left_handed_share"]["ALA2"]["reweighted"]
    assert abs(share["value"] - 0.0207) < 4 * np.hypot(share["error"], 0.0008)
    assert summary["cost"]["force_evaluations"]["walkers"] + q["n"] < 1e7
