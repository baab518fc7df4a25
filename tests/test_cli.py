"""What the command says: help, lists, and one sentence for every input that cannot be used, with nothing touched."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import mdtraj
import numpy as np
import openmm
import pytest
import torch

from openmm_bg import ContextEnergy, __version__, cli, systems, workflow
from openmm_bg.analysis import multistate

ALANINE = (files("openmm_bg.systems") / "alanine_dipeptide.pdb").read_text()
ATOMS = [line for line in ALANINE.splitlines() if line.startswith(("ATOM", "HETATM"))]


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """Run the command in a folder of its own; returns exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str, str]:
        try:
            code = cli.main(list(arguments))
        except SystemExit as stopped:
            code = int(stopped.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def tree(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Everything below a folder: names, contents and times."""
    return {
        str(path.relative_to(folder)): (path.read_bytes() if path.is_file() else b"", path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
    }


def assert_refused(call, tmp_path: Path, arguments: list[str], phrase: str) -> None:
    """One sentence on stderr, exit code 2, nothing on stdout, and not a file touched."""
    before = tree(tmp_path)
    code, out, err = call(*arguments)
    assert code == 2
    assert out == ""
    assert err.startswith("openmm-bg: ") and err.endswith((".\n", "?\n")) and err.count("\n") == 1, err
    assert "Traceback" not in err
    assert phrase in err, err
    assert tree(tmp_path) == before


def test_help_shows_the_steps(call):
    code, out, err = call("--help")
    assert code == 0 and err == ""
    for word in (
        "run",
        "simulate",
        "train",
        "sample",
        "report",
        "compare",
        "systems",
        "doctor",
        "report.html",
        "--resume",
    ):
        assert word in out


@pytest.mark.parametrize("step", ["run", "simulate", "train", "sample", "report", "compare", "systems", "doctor"])
def test_every_step_has_help(call, step):
    code, out, err = call(step, "--help")
    assert code == 0 and err == "" and out.startswith(f"usage: openmm-bg {step}")


def test_version(call):
    assert call("--version") == (0, f"openmm_bg {__version__}\n", "")


def test_systems_lists_every_name_with_a_sentence(call):
    code, out, err = call("systems")
    assert code == 0 and err == ""
    listed, _, more = out.partition("\n\n")
    assert 'openmm-bg run "ACE SER NME"' in more
    rows = [line.split(maxsplit=1) for line in listed.splitlines()]
    assert tuple(name for name, _ in rows) == systems.names()
    assert all(sentence.endswith(".") for _, sentence in rows)


def test_systems_as_json(call):
    code, out, err = call("systems", "--json")
    assert code == 0 and err == ""
    assert tuple(json.loads(out)) == systems.names()


def test_the_doctor_finds_this_installation_well(call):
    code, out, err = call("doctor")
    assert code == 0 and err == "" and out.endswith("\nThis installation works.\n") and "FAULT" not in out
    for text in ("openmm_bg " + __version__, "Reference works.", "energies are", "softcore.xml"):
        assert text in out
    code, out, err = call("doctor", "--json")
    found = json.loads(out)
    assert code == 0 and found["works"] is True
    assert {f["topic"] for f in found["findings"]} >= {"versions", "OpenMM platforms", "GPU", "compiler"}


def test_the_doctor_tells_what_is_broken(call, monkeypatch):
    def absent(name):
        if name == "deeptime":
            raise importlib.metadata.PackageNotFoundError(name)
        return "0.1"

    monkeypatch.setattr(importlib.metadata, "version", absent)
    monkeypatch.setattr("openmm_bg.compilation.library", lambda *a: 1 / 0)
    code, out, _ = call("doctor")
    assert code == 1
    assert "FAULT openmm 0.1 is not the" in out and "FAULT failed with ZeroDivisionError" in out
    assert "note  deeptime is not installed" in out and "what is marked above has to be mended first" in out


def test_the_installed_command():
    command = Path(sys.executable).with_name("openmm-bg")
    result = subprocess.run([command, "run"], capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.startswith("openmm-bg: the following arguments are required")


# -- molecules that cannot be used


def without_hydrogens() -> str:
    return "\n".join([line for line in ATOMS if line[12:16].strip()[0] != "H"] + ["END", ""])


def second_molecule() -> str:
    shifted = [f"{line[:21]}B{line[22:30]}{float(line[30:38]) + 20:8.3f}{line[38:]}" for line in ATOMS]
    return "\n".join([*ATOMS, "TER", *shifted, "TER", "END", ""])


MOLECULES = {
    "garbage.pdb": ("x" * 4000, "holds no atoms"),
    "empty.pdb": ("", "holds no atoms"),
    "broken.pdb": (ALANINE.replace(ATOMS[5], ATOMS[5][:30] + "   not-a-number"), "could not be read as a PDB file"),
    "truncated.pdb": (ALANINE[: ALANINE.index(ATOMS[9]) + 40], "truncated.pdb"),
    "half.pdb": ("\n".join(ATOMS[:14]), "ALA 2"),
    "nan.pdb": (ALANINE.replace(ATOMS[3], ATOMS[3][:30] + "     nan" + ATOMS[3][38:]), "not finite"),
    "ligand.pdb": (ALANINE.replace("ALA", "LIG"), "LIG 2"),
    "bare.pdb": (without_hydrogens(), "lacks hydrogens"),
    "pair.pdb": (second_molecule(), "one connected molecule"),
    "structure.cif": ("data_1\nloop_\n_atom_site.id\nATOM 1 C CA ALA A 1 0 0 0\n", "could not be read"),
    "stacked.pdb": (
        "\n".join([f"{line[:30]}{0:8.3f}{0:8.3f}{0:8.3f}{line[54:]}" for line in ATOMS] + ["END", ""]), "collinear",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MOLECULES)
def test_a_molecule_that_cannot_be_used(call, tmp_path, name):
    content, phrase = MOLECULES[name]
    (tmp_path / name).write_text(content)
    source = name if name.endswith(".pdb") else str(tmp_path / name)
    assert_refused(call, tmp_path, ["run", source, "--output", "out"], phrase)


def test_a_binary_file_is_no_molecule(call, tmp_path):
    (tmp_path / "binary.pdb").write_bytes(bytes(range(256)) * 40)
    assert_refused(call, tmp_path, ["run", "binary.pdb", "--output", "out"], "holds no atoms")


# -- words and numbers that cannot be used

ALA = ["alanine_dipeptide", "--output", "out"]
EXCHANGE = [*ALA, "--data", "exchange"]
WORDS = {
    "missing file": (["run", "nowhere.pdb", "--output", "out"], "There is no PDB file nowhere.pdb"),
    "a folder as a file": (["run", "./", "--output", "out"], "There is no PDB file"),
    "unknown molecule": (["run", "alanine_dipeptid", "--output", "out"], "Did you mean 'alanine_dipeptide'?"),
    "empty name": (["run", "", "--output", "out"], "There is no target named ''"),
    "unknown residue": (
        ["run", "ACE ALX NME", "--output", "out"],
        "There is no residue 'ALX' in the three-letter code:",
    ),
    "cap in the middle": (["run", "ALA ACE NME", "--output", "out"], "ACE caps the start of a peptide"),
    "residues in small letters": (
        ["run", "ace ala nme", "--output", "out"],
        "no residue 'ace' in the three-letter code",
    ),
    "one-letter code": (["run", "ELIL", "--output", "out"], 'such as "GLU LEU ILE LEU"'),
    "hyphens": (["run", "ACE-ALA-NME", "--output", "out"], 'set apart by blanks, not hyphens: "ACE ALA NME"'),
    "force field without residues": (
        ["run", "ACE ALA NME", "--output", "out", "--forcefield", "tip3p.xml"],
        "has no template ACE",
    ),
    "density at a temperature": (["run", "double_well", "--temperature", "310"], "is an analytic density, not a"),
    "density": (["run", "double_well", "--output", "out"], "is an analytic density, not a molecule"),
    "temperature nan": (["run", *ALA, "--temperature", "nan"], "temperature must be a positive finite number"),
    "temperature inf": (["run", *ALA, "--temperature", "inf"], "temperature must be a positive finite number"),
    "temperature -5": (["run", *ALA, "--temperature", "-5"], "temperature must be a positive finite number"),
    "temperature 0": (["run", *ALA, "--temperature", "0"], "temperature must be a positive finite number"),
    "temperature word": (["run", *ALA, "--temperature", "hot"], "invalid float value: 'hot'"),
    "hotter than the ladder": (["run", *ALA, "--temperature", "1200"], "must lie below the highest one"),
    "ladders of walkers": (["run", *ALA, "--ladders", "4"], "ladders is of the data 'exchange', and these are"),
    "walkers of ladders": (
        ["run", *ALA, "--data", "exchange", "--walkers", "4"],
        "walkers is of the data 'adaptive', and these are 'exchange'",
    ),
    "other data": (["run", *ALA, "--data", "md"], "invalid choice: 'md'"),
    "one walker": (["run", *ALA, "--walkers", "1"], "walkers must be a whole number of at least 2"),
    "few walkers": (["run", *ALA, "--walkers", "2", "--round-steps", "100"], "too few for 60 coordinates; give more w"),
    "odd round": (["run", *ALA, "--round-steps", "99"], "interval must divide the 99 steps of a round"),
    "no workers": (["run", *ALA, "--workers", "0"], "workers must be a whole number of at least 1"),
    "no such device": (["run", *ALA, "--device", "tpu"], "There is no device 'tpu' here"),
    "no such platform": (["run", *ALA, "--platform", "Abacus"], "no OpenMM platform 'Abacus' here; choose one of Ref"),
    "small budget": (["run", *ALA, "--budget", "1e6"], "1000000 evaluations leaves too little for training"),
    "ladder nan": (["run", *ALA, "--highest-temperature", "nan"], "highest_temperature must be a positive finite"),
    "zero frames": (
        ["run", *EXCHANGE, "--exchange-iterations", "0"],
        "exchange_iterations must be a whole number of at",
    ),
    "one frame": (
        ["simulate", *EXCHANGE, "--exchange-iterations", "1"],
        "exchange_iterations must be a whole number of",
    ),
    "no ladder": (["run", *EXCHANGE, "--ladders", "0"], "ladders must be a whole number of at least 1"),
    "negative training": (["run", *ALA, "--training-steps", "-1"], "training_steps must be a whole number of at least"),
    "negative likelihood": (["run", *ALA, "--likelihood-steps", "-1"], "likelihood_steps must be a whole number"),
    "negative MD": (["run", *ALA, "--md-steps", "-500"], "md_steps must be a whole number of at least 1"),
    "negative production": (["run", *ALA, "--production-steps", "-1"], "production_steps must be a whole number"),
    "production too short": (["run", *ALA, "--production-steps", "100"], "production_steps must be at least 10000"),
    "no proposals": (["run", *ALA, "--proposals-per-iteration", "0"], "proposals_per_iteration must be"),
    "fraction of a step": (["run", *ALA, "--md-steps", "1.5"], "invalid int value: '1.5'"),
    "few samples": (["run", *ALA, "--samples", "5"], "samples must be a whole number of at least 100"),
    "negative seed": (["run", *ALA, "--seed", "-1"], "seed must be a whole number of at least 0"),
    "large seed": (["run", *ALA, "--seed", "4000000000"], "seed must be at most"),
    "budget word": (["run", *ALA, "--budget", "soon"], "'soon' is neither a time (90s, 10min, 2h) nor a number of"),
    "budget of nothing": (["run", *ALA, "--budget", "0min"], "'0min' is neither a time"),
    "negative budget": (["simulate", *ALA, "--budget=-1e6"], "'-1e6' is neither a time"),
    "budget of steps": (["run", *ALA, "--budget", "1e6", "--training-steps", "9"], "takes the place of"),
    "budget of nowhere": (["train", "--output", "nowhere", "--budget", "10min"], "nowhere holds no run"),
    "unknown flow": (["run", *ALA, "--flow", "glow"], "invalid choice: 'glow'"),
    "abbreviated option": (["run", *ALA, "--temp", "310"], "unrecognized arguments: --temp 310"),
    "force field of a name": (["run", *ALA, "--forcefield", "amber14-all.xml"], "has a force field of its own"),
    "no molecule": (["run", "--output", "out"], "required: molecule"),
    "no command": ([], "required: COMMAND"),
    "unknown command": (["walk"], "invalid choice: 'walk'"),
    "train nothing": (["train", "--output", "nowhere"], "nowhere holds no run"),
    "report of nothing": (["report", "nowhere"], "nowhere holds no run"),
    "report without a folder": (["report"], "required: FOLDER"),
    "compare a run": (["compare", "--output", "results"], "required: SAMPLES, --top"),
    "sample without output": (["sample"], "required: --output"),
}


@pytest.mark.parametrize("case", WORDS)
def test_words_and_numbers_that_cannot_be_used(call, tmp_path, case):
    arguments, phrase = WORDS[case]
    assert_refused(call, tmp_path, arguments, phrase)


def test_force_fields_that_cannot_be_used(call, tmp_path):
    (tmp_path / "my.pdb").write_text(ALANINE)
    (tmp_path / "broken.xml").write_text("<ForceField><AtomTypes>")
    run = ["run", "my.pdb", "--output", "out", "--forcefield"]
    assert_refused(call, tmp_path, [*run, "no_such.xml"], "no_such.xml")
    assert_refused(call, tmp_path, [*run, "broken.xml"], "broken.xml")
    assert_refused(call, tmp_path, [*run, "tip3p.xml"], "template")


def test_too_little_data_for_the_molecule_is_refused_before_it_is_made(call, tmp_path):
    path = Path(__file__).with_name("data") / "ace_ala_ala_nme.pdb"
    settings = workflow.RunSettings(data="exchange", ladders=2, exchange_iterations=20, bursts=2)
    with pytest.raises(ValueError, match="training conformations are too few for 90 coordinates"):
        with workflow.Run.start(str(path), tmp_path / "out", settings):
            pass
    assert not (tmp_path / "out").exists()


# -- folders that cannot be used


def test_a_folder_in_use_is_left_alone(call, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("important")
    assert_refused(call, tmp_path, ["run", *ALA], "out is not empty")
    assert_refused(call, tmp_path, ["run", *ALA, "--resume"], "out is not empty")
    assert_refused(call, tmp_path, ["sample", "--output", "out"], "out holds no run")


def test_a_file_is_no_folder(call, tmp_path):
    (tmp_path / "out").write_text("a file")
    assert_refused(call, tmp_path, ["run", *ALA], "out is a file")
    assert_refused(call, tmp_path, ["run", *ALA, "--resume"], "out is a file")
    assert_refused(call, tmp_path, ["train", "--output", "out"], "out holds no run")
    assert_refused(call, tmp_path, ["run", "alanine_dipeptide", "--output", "out/below"], "Not a directory")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(call, tmp_path):
    (tmp_path / "out").mkdir(mode=0o500)
    assert_refused(call, tmp_path, ["run", *ALA], "Permission denied")


# -- two trajectories


@pytest.fixture
def trajectories(tmp_path, alanine) -> Path:
    """A molecule, two trajectories of it, and what is wrong in many ways."""
    (tmp_path / "m.pdb").write_text(ALANINE)
    (tmp_path / "system.xml").write_text(openmm.XmlSerializer.serialize(alanine.system))
    topology = mdtraj.load(str(tmp_path / "m.pdb")).topology
    noise = np.random.default_rng(0).normal(size=(2, 60, 22, 3))
    for name, x in zip(("a", "b"), alanine.positions + 0.004 * noise, strict=True):
        mdtraj.Trajectory(x, topology).save(str(tmp_path / f"{name}.dcd"))
    x[7] = np.nan
    np.save(tmp_path / "nan.npy", x)
    np.save(tmp_path / "empty.npy", x[:0])
    np.save(tmp_path / "one.npy", x[:1])
    mdtraj.Trajectory(x[:, :20], topology.subset(range(20))).save(str(tmp_path / "short.dcd"))
    (tmp_path / "a.foo").write_text("hello")
    np.savetxt(tmp_path / "five.txt", np.ones(5))
    np.savetxt(tmp_path / "w.txt", np.ones(60))
    np.save(tmp_path / "zero.npy", np.zeros(60))
    np.save(tmp_path / "zero_log.npy", np.full(60, -np.inf))
    np.savez(tmp_path / "states.npz", reduced_energies=np.zeros((2, 50)), counts=np.array([25, 25]))
    bare = [line.replace(line[17:20], "LIG") for line in ATOMS]
    (tmp_path / "bare.pdb").write_text("\n".join([*bare, "END", ""]))
    return tmp_path


AB = ["compare", "a.dcd", "b.dcd", "--top", "m.pdb"]
FIELD = ["--forcefield", "amber99sbildn.xml", "amber99_obc.xml"]
PAIRS = {
    "missing trajectory": (["compare", "a.dcd", "c.dcd", "--top", "m.pdb"], "There is no file c.dcd"),
    "missing topology": (["compare", "a.dcd", "b.dcd", "--top", "c.pdb"], "There is no file c.pdb"),
    "no topology": (["compare", "a.dcd", "b.dcd"], "required: --top"),
    "a topology that is none": (["compare", "a.dcd", "b.dcd", "--top", "a.foo"], "could not be read as a topology"),
    "a topology without bonds": (["compare", "a.dcd", "b.dcd", "--top", "bare.pdb"], "has no bonds"),
    "a folder": (["compare", ".", "b.dcd", "--top", "m.pdb"], "There is no file ."),
    "other atoms": (["compare", "a.dcd", "short.dcd", "--top", "m.pdb"], "could not be read as frames of 22 atoms"),
    "frames of NaN": (["compare", "a.dcd", "nan.npy", "--top", "m.pdb"], "not finite in 1 of 60 frames"),
    "no frames": (["compare", "a.dcd", "empty.npy", "--top", "m.pdb"], "empty.npy holds no frames"),
    "one frame": (
        ["compare", "a.dcd", "one.npy", "--top", "m.pdb"],
        "but there are 1 of the samples",
    ),
    "unknown ending": (["compare", "a.dcd", "a.foo", "--top", "m.pdb"], "a.foo is of a kind that mdtraj does not read"),
    "few weights": ([*AB, "--weights", "five.txt"], "there are 60 frames; give one weight for each"),
    "weights of zero": ([*AB, "--weights", "zero.npy"], "All weights are zero"),
    "log weights of zero": ([*AB, "--log-weights", "zero_log.npy"], "are zero, so there is nothing to compare"),
    "two kinds of weights": ([*AB, "--weights", "w.txt", "--log-weights", "w.txt"], "not allowed with argument"),
    "nothing to smooth": ([*AB, "--smooth"], "--smooth needs the weights of the samples"),
    "states of other frames": ([*AB, "--reference-states", "states.npz"], "states.npz has 50 frames and a.dcd 60"),
    "no points": ([*AB, "--n", "0"], "n and repeats must be 2 or more"),
    "a long lag": ([*AB, "--lag", "60"], "A lag of 60 frames needs more than 61"),
    "negative seed": ([*AB, "--seed", "-1"], "seed must be 0 or more"),
    "no such force field": ([*AB, "--forcefield", "none.xml"], "none.xml"),
    "a System that is none": ([*AB, "--system", "m.pdb"], "m.pdb is not a serialised OpenMM System"),
    "no such device": ([*AB, *FIELD, "--device", "tpu"], "There is no device 'tpu' here"),
    "no such platform": ([*AB, *FIELD, "--platform", "TPU"], "TPU"),
    "temperature": ([*AB, *FIELD, "--temperature", "-3"], "temperature must be a positive finite number"),
    "free frames": ([*AB, "--seconds", "0", "1"], "seconds must be a positive finite number"),
}


@pytest.mark.parametrize("case", PAIRS)
def test_trajectories_that_cannot_be_compared(call, trajectories, case):
    arguments, phrase = PAIRS[case]
    assert_refused(call, trajectories, arguments, phrase)


def test_compare_prints_a_verdict(call, trajectories):
    code, out, err = call(*AB, "--n", "20", "--seconds", "10", "20", "--force-evaluations", "1e6", "1e6")
    assert code == 0 and err == ""
    assert "Too little to tell: " in out and "the bonds and angles that differ most:" in out
    assert "per million force evaluations" in out.splitlines()[-1] and "per second" in out.splitlines()[-1]


def test_weights_from_states_and_smoothed_ones(call, trajectories):
    """Two temperatures of which the first is wanted: frames weigh as exp(-u_1) / (exp(f_1 - u_1) + exp(f_2 - u_2))."""
    u = np.random.default_rng(1).gamma(20, size=60)
    np.savez(trajectories / "two.npz", reduced_energies=np.stack([u, 0.9 * u]), counts=np.array([30, 30]))
    found = multistate(np.stack([u, 0.9 * u]), np.array([30, 30]))
    np.save(trajectories / "log_w.npy", found.log_weights)
    records = []
    for given in (["--reference-states", "two.npz"], ["--reference-log-weights", "log_w.npy"]):
        code, out, err = call(*AB, "--n", "20", "--json", "--smooth", "--weights", "w.txt", *given)
        assert code == 0 and err == ""
        records.append(json.loads(out))
    assert records[0]["tests"] == records[1]["tests"]
    assert records[0]["sample_kish"] == pytest.approx(60) and records[0]["pareto_k"] is not None


@pytest.mark.parametrize("how", [FIELD, ["--system", "system.xml", "--platform", "Reference"]])
def test_compare_as_json_with_energies_and_weights(call, trajectories, how):
    arguments = [*AB, "--n", "20", "--json", "--quiet", "--weights", "w.txt", "--temperature", "310", *how]
    code, out, err = call(*arguments)
    assert code == 0 and err == ""
    record = json.loads(out)
    (energy,) = [d for d in record["tests"] if d["name"] == "energy"]
    assert record["sample_kish"] == pytest.approx(60) and record["command"].startswith("openmm-bg compare a.dcd b.dcd")
    system = openmm.XmlSerializer.deserialize((trajectories / "system.xml").read_text())
    x = mdtraj.load(str(trajectories / "a.dcd"), top=str(trajectories / "m.pdb")).xyz
    exact = float(ContextEnergy(system, 310)(torch.as_tensor(x.astype(float))).mean())
    assert energy["reference"] == pytest.approx(exact, rel=1e-5)


def test_a_reader_that_leaves_early_is_no_error():
    command = Path(sys.executable).with_name("openmm-bg")
    process = subprocess.Popen([command, "systems"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 1


def test_the_folder_has_a_default(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results" / "my").mkdir(parents=True)
    (tmp_path / "results" / "my" / "here.txt").write_text("kept")
    (tmp_path / "my.pdb").write_text((Path(systems.__file__).parent / "alanine_dipeptide.pdb").read_text())
    assert_refused(call, tmp_path, ["run", "my.pdb"], "results/my is not empty")
    (tmp_path / "results" / "ACE-GLY-NME").mkdir()
    (tmp_path / "results" / "ACE-GLY-NME" / "here.txt").write_text("kept")
    assert_refused(call, tmp_path, ["run", " ACE  GLY NME"], "results/ACE-GLY-NME is not empty")
