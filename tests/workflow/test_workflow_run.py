"""The whole job from a name or a PDB file to report.html, in one go, step by step, and after every kind of stop."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import mdtraj
import numpy as np
import pytest
import torch
from interruptions import interrupt_at
from openmm import app

import openmm_bg as bg
from openmm_bg import cli, workflow
from openmm_bg.analysis import left_handed
from openmm_bg.app import BoltzmannGeneratorSampler
from openmm_bg.errors import InputError
from openmm_bg.workflow.material import read_dcd
from openmm_bg.workflow.settings import RunSettings

DATA = Path(__file__).resolve().parents[1] / "data"
SHORT = [
    "--rehearsal", "--training-steps", "10", "--md-steps", "2000", "--production-steps", "5000", "--samples", "200",
    "--quiet",
]  # fmt: skip
BRIEF = [*SHORT, "--data", "exchange", "--exchange-iterations", "20", "--likelihood-steps", "20"]
ADAPTIVE = [*SHORT, "--rounds", "1", "--likelihood-steps", "10", "--workers", "1"]
FILES = {
    "prepare": ("molecule.pdb", "system.xml"),
    "simulate": ("exchange.npz", "exchange_frames.npz", "training.npz", "md.npz"),
    "train": ("training.checkpoint", "training.jsonl", "generator.bg"),
    "sample": ("samples.npz", "moves.checkpoint", "moves.csv", "trajectory.dcd"),
    "compare": ("summary.json",),
    "report": ("report.html",),
}


def run_json(folder: Path) -> dict:
    return json.loads((folder / "run.json").read_text())


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A whole run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    assert cli.main(["run", "alanine_dipeptide", "--output", str(folder), *BRIEF]) == 0
    return folder


def rewound(finished: Path, folder: Path, last: str) -> Path:
    """A copy of a finished run as it was when the step ``last`` was done."""
    shutil.copytree(finished, folder)
    record = run_json(folder)
    steps = list(FILES)
    for step in steps[steps.index(last) + 1 :]:
        record["begun"].remove(step)
        del record["steps"][step]
        for name in FILES[step]:
            (folder / name).unlink()
    (folder / "run.json").write_text(json.dumps(record))
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return bg.BoltzmannGenerator.load(folder / "generator.bg").flow.state_dict()


def assert_same_weights(one: Path, other: Path) -> None:
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def assert_same_result(one: Path, other: Path) -> None:
    """Moves, trajectory and every number of the summary but the clock's."""
    assert (one / "moves.csv").read_bytes() == (other / "moves.csv").read_bytes()
    # byte for byte, but for the date in the title of a DCD file
    assert np.array_equal(read_dcd(one / "trajectory.dcd", 22), read_dcd(other / "trajectory.dcd", 22))
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (one, other)]
    for summary in summaries:
        del summary["cost"]["seconds"], summary["cost"]["resumed"], summary["command"], summary["generator_sha256"]
    assert summaries[0] == summaries[1]


def refused(capsys, *arguments: str) -> str:
    """The one sentence with which a command declines."""
    capsys.readouterr()
    assert cli.main(list(arguments)) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and captured.err.startswith("openmm-bg: ") and "Traceback" not in captured.err
    return captured.err


# -- what a run leaves


def test_a_run_leaves_every_file_and_nothing_else(finished):
    expected = {name for names in FILES.values() for name in names} | {"run.json", ".lock"}
    assert {path.name for path in finished.iterdir()} == expected
    record = run_json(finished)
    assert list(record["steps"]) == list(workflow.STEPS)
    assert record["command"].startswith("openmm-bg run alanine_dipeptide --output")


def test_the_trajectory_loads_with_the_molecule_and_is_what_the_report_reads(finished):
    trajectory = mdtraj.load(str(finished / "trajectory.dcd"), top=str(finished / "molecule.pdb"))
    assert trajectory.xyz.shape == (50, 22, 3)
    np.testing.assert_allclose(read_dcd(finished / "trajectory.dcd", 22), trajectory.xyz, rtol=0, atol=1e-7)
    topology = app.PDBFile(str(finished / "molecule.pdb")).topology
    assert topology.getNumBonds() == 21


def test_the_generator_belongs_to_the_molecule(finished):
    generator = bg.BoltzmannGenerator.load(finished / "generator.bg")
    molecule = bg.systems.load("alanine_dipeptide")
    assert generator.matches(molecule.topology, molecule.system)
    assert torch.isfinite(generator.sample(50, seed=1).log_prob).any()
    with np.load(finished / "samples.npz") as draws:
        assert draws["positions"].shape == (200, 22, 3)
    assert generator.provenance["training"]["steps"] == 30


def test_the_summary_is_strict_json_and_agrees_with_the_files(finished):
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    summary = json.loads((finished / "summary.json").read_text(), parse_constant=refuse)
    rows = np.loadtxt(finished / "moves.csv", delimiter=",", skiprows=1)
    assert summary["moves"]["proposed"] == len(rows) == 250
    assert summary["moves"]["accepted"] == int(rows[:, 2].sum())
    chain = read_dcd(finished / "trajectory.dcd", 22)
    phi = mdtraj.compute_dihedrals(
        mdtraj.Trajectory(chain, mdtraj.Topology.from_openmm(bg.systems.load("alanine_dipeptide").topology)),
        [[4, 6, 8, 14]],
        periodic=False,
    )
    assert summary["left_handed_share"]["ALA2"]["MD with moves"]["value"] == pytest.approx(left_handed(phi).mean())
    cost, held_out = summary["cost"]["force_evaluations"], summary["generator"]["held_out_frames"]
    assert cost["MD with moves"] == 5250
    # 200 draws and the held-out frames after training, those frames again beside the draws of the sample step
    assert cost["diagnosis"] == 200 + 2 * held_out and cost["independent draws"] == 200
    assert cost["training"] == run_json(finished)["steps"]["train"]["evaluations"]
    assert summary["diagnosis"]["ess"] == pytest.approx(summary["generator"]["ess"])
    assert summary["diagnosis"] == run_json(finished)["steps"]["sample"]["diagnosis"]


def test_the_report_stands_alone(finished):
    page = (finished / "report.html").read_text()
    assert page.startswith("<!DOCTYPE html>") and page.rstrip().endswith("</html>")
    assert re.findall(r"<script[^>]*>", page) == ["<script>"] and "<link" not in page and "@import" not in page
    assert "fetch(" not in page and "XMLHttpRequest" not in page
    for target in re.findall(r'(?:src|href)="([^"]*)"', page):
        assert target.startswith(("#", "data:")), target
    assert re.findall(r"https?://(?!www\.w3\.org)", page) == []
    assert "Where the molecule is" in page and "ALA2 φψ W2" in page
    assert "The largest weights fall off with a Pareto k of" in page and "cis peptide bond before NME 3" in page
    assert "far shorter than usual" in page and "Passed" not in page
    assert "nan" not in re.sub(r"<[^>]*>", " ", page).lower().split()


def test_a_finished_run_is_left_as_it_is(finished, capsys):
    before = {path.name: path.stat().st_mtime_ns for path in finished.iterdir() if path.name != ".lock"}
    assert cli.main(["run", "alanine_dipeptide", "--output", str(finished), "--resume", "--quiet"]) == 0
    assert capsys.readouterr().out.count("done before") == 6
    assert {path.name: path.stat().st_mtime_ns for path in finished.iterdir() if path.name != ".lock"} == before


# -- one step after the other, interrupted on the way


def test_steps_one_by_one_with_interruptions_give_the_same_run(finished, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "steps"
    output = ["--output", str(folder)]
    assert cli.main(["simulate", "alanine_dipeptide", *output, *BRIEF]) == 0
    assert list(run_json(folder)["steps"]) == ["prepare", "simulate"]
    for name in ("exchange_frames.npz", "training.npz", "md.npz"):
        with np.load(folder / name) as mine, np.load(finished / name) as theirs:
            assert np.array_equal(mine["positions"], theirs["positions"])

    capsys.readouterr()
    assert cli.main(["sample", *output]) == 2
    assert "sample needs what train makes" in capsys.readouterr().err

    with monkeypatch.context() as patch:
        interrupt_at(patch, torch.optim.Adam, "step", 17)
        assert cli.main(["train", *output, "--quiet"]) == 130
    captured = capsys.readouterr()
    assert "interrupted; what is done is in" in captured.err and "Traceback" not in captured.err
    assert not (folder / "generator.bg").exists() and (folder / "training.checkpoint").exists()
    assert cli.main(["train", *output, "--quiet"]) == 0
    out = capsys.readouterr().out
    assert "The effective sample size is" in out and "Pareto k of" in out
    assert_same_weights(folder, finished)
    trained, before = (run_json(f)["steps"]["train"] for f in (folder, finished))
    assert trained["resumed"] is True and trained["diagnosis"] == before["diagnosis"]

    with monkeypatch.context() as patch:
        interrupt_at(patch, BoltzmannGeneratorSampler, "_iterate", 33)
        assert cli.main(["sample", *output, "--quiet"]) == 130
    assert len(read_dcd(folder / "trajectory.dcd", 22)) == 33
    assert cli.main(["sample", *output, "--quiet"]) == 0
    assert cli.main(["report", str(folder), "--quiet"]) == 0
    assert_same_result(folder, finished)
    assert "last leg" in (folder / "report.html").read_text()


def test_a_killed_run_goes_on(finished, tmp_path):
    folder = rewound(finished, tmp_path / "killed", "simulate")
    command = [sys.executable, "-m", "openmm_bg.cli", "train", "--output", str(folder), "--quiet"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 120
        while not (folder / "training.jsonl").exists():  # the trainer has begun
            assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert process.returncode == -signal.SIGKILL
    assert not (folder / "generator.bg").exists()
    assert list(run_json(folder)["steps"]) == ["prepare", "simulate"]
    assert cli.main(["run", "alanine_dipeptide", "--output", str(folder), "--resume", "--quiet"]) == 0
    assert_same_weights(folder, finished)
    assert_same_result(folder, finished)


def test_a_budget_ends_training_and_is_kept(finished, tmp_path, monkeypatch, capsys):
    whole, folder = (rewound(finished, tmp_path / name, "simulate") for name in ("whole", "stopped"))
    assert cli.main(["train", "--output", str(whole), "--quiet", "--budget", "3000"]) == 0
    record = run_json(whole)
    assert record["settings"]["budget"] == "3000"
    assert 3000 <= record["steps"]["train"]["evaluations"] < 4024

    train = ["train", "--output", str(folder), "--quiet"]
    before = (folder / "run.json").read_bytes()
    assert "neither a time" in refused(capsys, *train, "--budget", "an hour")
    assert (folder / "run.json").read_bytes() == before
    with monkeypatch.context() as patch:
        interrupt_at(patch, torch.optim.Adam, "step", 22)
        assert cli.main([*train, "--budget", "3000"]) == 130
    assert "began its training for 3000, not 1h" in refused(capsys, *train, "--budget", "1h")
    assert cli.main(train) == 0
    assert_same_weights(folder, whole)
    assert run_json(folder)["steps"]["train"]["steps"] == record["steps"]["train"]["steps"]


# -- folders that were tampered with


@pytest.fixture
def copy(finished, tmp_path):
    return rewound(finished, tmp_path / "copy", "train")


def test_a_truncated_generator_is_refused(copy, capsys):
    content = (copy / "generator.bg").read_bytes()
    (copy / "generator.bg").write_bytes(content[: len(content) // 2])
    assert "is not a whole generator file" in refused(capsys, "sample", "--output", str(copy))
    assert not (copy / "samples.npz").exists() and not (copy / "trajectory.dcd").exists()


def test_a_folder_in_use_by_another_run_is_refused(copy, capsys):
    with workflow.Run.open(copy):
        assert "in use by another run" in refused(capsys, "sample", "--output", str(copy))
        assert "in use by another run" in refused(capsys, "run", "alanine_dipeptide", "--output", str(copy), "--resume")
    assert "is not empty" in refused(capsys, "run", "alanine_dipeptide", "--output", str(copy))


def test_a_run_of_another_molecule_or_with_other_options_is_not_resumed(copy, tmp_path, capsys):
    shutil.copy(DATA / "ace_ala_ala_nme.pdb", tmp_path / "other.pdb")
    resume = ["--output", str(copy), "--resume"]
    before = (copy / "run.json").read_bytes()
    error = refused(capsys, "run", str(tmp_path / "other.pdb"), *resume)
    assert "holds a run of alanine_dipeptide, not of" in error
    error = refused(capsys, "run", "alanine_dipeptide", *resume, "--temperature", "310")
    assert "temperature None, not 310.0" in error
    assert (copy / "run.json").read_bytes() == before


@pytest.mark.parametrize(
    ("damage", "phrase"),
    [
        (lambda text: text[: len(text) // 2], "is not the record of a run, or it is damaged"),
        (lambda text: "", "is not the record of a run, or it is damaged"),
        (lambda text: "[]", "is not the record of a run, or it is damaged"),
        (lambda text: "\x00\xff", "is not the record of a run, or it is damaged"),
        (lambda text: text.replace('"steps"', '"stairs"'), "'steps' is missing"),
        (lambda text: text.replace('"samples": 200', '"samples": -200'), "samples must be a whole number"),
        (lambda text: text.replace('"samples": 200', '"sample": 200'), "is not the record of a run, or it is damaged"),
        (lambda text: text.replace('"ladders": 4,', ""), "settings are not those of this version"),
        (lambda text: re.sub(r'"atoms": 22', '"atoms": "many"', text), "atoms is not what it should be"),
    ],
)
def test_a_damaged_record_is_refused(copy, capsys, damage, phrase):
    text = damage((copy / "run.json").read_text())
    (copy / "run.json").write_bytes(text.encode("latin-1"))
    error = refused(capsys, "run", "alanine_dipeptide", "--output", str(copy), "--resume")
    assert phrase in error and "run.json" in error
    assert (copy / "run.json").read_bytes() == text.encode("latin-1")


def test_a_system_that_was_altered_is_refused_before_it_is_read(copy, capsys):
    xml = (copy / "system.xml").read_text()
    (copy / "system.xml").write_text(xml.replace("<Forces>", '<Forces><Force type="PythonForce"/>'))
    assert "would run code" in refused(capsys, "sample", "--output", str(copy))
    (copy / "system.xml").write_text(xml.replace('k="', 'k="1', 1))
    assert "was altered" in refused(capsys, "sample", "--output", str(copy))


def test_a_trajectory_cut_in_a_frame_is_refused(finished, tmp_path):
    content = (finished / "trajectory.dcd").read_bytes()
    (tmp_path / "cut.dcd").write_bytes(content[:-10])
    with pytest.raises(InputError, match="middle of a frame"):
        read_dcd(tmp_path / "cut.dcd", 22)
    with pytest.raises(InputError, match="not a DCD file of 21 atoms"):
        read_dcd(finished / "trajectory.dcd", 21)


def test_a_boxed_trajectory_is_read(tmp_path):
    molecule = bg.systems.load("alanine_dipeptide")
    topology = app.PDBFile(str(Path(bg.systems.__file__).with_name("alanine_dipeptide.pdb"))).topology
    topology.setPeriodicBoxVectors(np.diag([3.0, 4.0, 5.0]))
    with open(tmp_path / "boxed.dcd", "wb") as file:
        dcd = app.DCDFile(file, topology, 0.001)
        for shift in (0.0, 1.0):
            dcd.writeModel((molecule.positions + shift) * app.topology.nanometers)
    read = read_dcd(tmp_path / "boxed.dcd", 22)
    np.testing.assert_allclose(read, np.stack([molecule.positions, molecule.positions + 1]), atol=1e-6)


# -- other molecules


def test_a_molecule_without_backbone_torsions(tmp_path, capsys):
    folder = tmp_path / "run"
    source = tmp_path / "amide.pdb"
    shutil.copy(DATA / "n_methylacetamide.pdb", source)
    assert cli.main(["run", str(source), "--output", str(folder), *ADAPTIVE, "--temperature", "310"]) == 0
    assert "the potential energy:" in capsys.readouterr().out
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["temperature_K"] == 310 and summary["left_handed_share"] == {}
    assert [d["name"] for d in summary["against_md"]["distances"]] == ["energy W2"]
    page = (folder / "report.html").read_text()
    assert "No residue of this molecule has both φ and ψ" in page
    assert "Where the molecule is" not in page and "Populations" not in page and "Crossings" not in page
    # the file that was given is not needed any more
    source.unlink()
    with workflow.Run.open(folder) as run:
        assert run.molecule().num_atoms == 12


def test_a_molecule_of_two_residues_by_its_sequence(tmp_path, monkeypatch, capsys):
    folder, built = tmp_path / "run", []
    peptide = bg.systems.peptide
    monkeypatch.setattr(bg.systems, "peptide", lambda *a, **k: built.append(a) or peptide(*a, **k))
    assert cli.main(["run", "ACE ALA ALA NME", "--output", str(folder), *ADAPTIVE]) == 0
    assert built == [("ACE ALA ALA NME",)]  # once
    assert run_json(folder)["source"] == "ACE ALA ALA NME"
    assert cli.main(["run", "ACE  ALA ALA NME", "--output", str(folder), "--resume", "--quiet"]) == 0
    assert "holds a run of ACE ALA ALA NME, not of" in refused(
        capsys, "run", "ACE ALA NME", "--output", str(folder), "--resume"
    )
    summary = json.loads((folder / "summary.json").read_text())
    assert list(summary["left_handed_share"]) == ["ALA2", "ALA3"] == list(summary["effective_samples"])
    page = (folder / "report.html").read_text()
    for text in ("Where ALA2 is", "Where ALA3 is", "Free energy along φ of ALA3", "ALA3, MD with moves"):
        assert text in page


# -- settings


def test_settings_say_what_is_wrong():
    for wrong in (
        {"held_out": 0.0}, {"held_out": float("nan")}, {"held_out": True},
        {"data": "exchange", "exchange_iterations": 100, "held_out": 0.005}, {"data": "exchange", "replicas": 1},
        {"bursts": True}, {"samples": 1e5}, {"walkers": 1}, {"rounds": 0}, {"data": "md"}, {"ladders": 4},
        {"data": "exchange", "walkers": 20},
        {"temperature": float("nan")}, {"steps_per_iteration": 10**6}, {"flow": "spine"},
        {"budget": "a while"}, {"data": "exchange", "ladders": 0}, {"heating_steps": -1},
    ):  # fmt: skip
        with pytest.raises(InputError) as caught:
            RunSettings(**wrong)
        assert str(caught.value).endswith(".") and "\n" not in str(caught.value)


def test_a_named_molecule_is_built_once(monkeypatch):
    built = []
    load = bg.systems.load
    monkeypatch.setattr(bg.systems, "load", lambda *a, **k: built.append(a) or load(*a, **k))
    assert workflow.load_molecule("alanine_dipeptide", None, 310.0).temperature == 310
    assert workflow.load_molecule("alanine_dipeptide", None, None).temperature == 300
    assert len(built) == 2


def test_a_folder_with_no_run_is_begun_with_resume_and_named_without(tmp_path):
    with pytest.raises(InputError, match="holds no run"):
        with workflow.Run.open(tmp_path / "nothing"):
            pass
    with workflow.Run.start("alanine_dipeptide", tmp_path / "new", RunSettings.rehearsal(), resume=True) as run:
        run.run("prepare")
        assert run.molecule().num_atoms == 22
    assert (tmp_path / "new" / "run.json").exists()
