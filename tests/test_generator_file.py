"""The generator's file: rebuilt in a new process, whole or refused, data and never code."""

from __future__ import annotations

import copy
import json
import math
import os
import struct
import subprocess
import sys

import numpy as np
import openmm
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openmm import app
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

import openmm_bg as bg
from openmm_bg import generator_file
from openmm_bg.flows import RealNVP, SplineFlow


def disturb(module: torch.nn.Module, size: float) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)


def python_force(state):
    """A function that pickle finds by name, so that OpenMM can write a PythonForce around it."""
    return 0.0, np.zeros((2, 3))


def reseal(content: bytes, change) -> bytes:
    """A file whose header was changed by someone who also renewed the checksum."""
    (size,) = struct.unpack("<Q", content[:8])
    header = json.loads(json.loads(content[8 : 8 + size])["__metadata__"]["openmm_bg"])
    tensors = load_tensors(content)
    change(header)
    sha = generator_file._digest(header, tensors)
    return save_tensors(tensors, {"openmm_bg": json.dumps(header, sort_keys=True), "sha256": sha})


@pytest.fixture(scope="module")
def molecules(alanine):
    """A spline generator of free, and a realnvp generator of constrained, alanine dipeptide: informed, disturbed."""
    made = {}
    constrained = bg.systems.load("alanine_dipeptide", constraints=app.HBonds)
    for molecule, flow in ((alanine, "spline"), (constrained, "realnvp")):
        run = bg.simulate(
            molecule.system, molecule.positions, temperature=300, n_frames=80, steps_per_frame=10, seed=1,
            platform="Reference", progress=False,
        )  # fmt: skip
        generator = bg.BoltzmannGenerator.for_molecule(
            molecule.topology, molecule.system, 310, flow=flow, defensive=0.07
        )
        generator.inform(run.positions)
        disturb(generator.flow, 0.02)
        generator.provenance = {"frames": 80, "note": 'é "quoted"', "share": 0.1, "nested": [1, {"a": None}]}
        made[flow] = generator, np.asarray(run.positions)[:20]
    return made


@pytest.fixture(scope="module")
def small():
    """A file of a few kilobytes."""
    generator = bg.BoltzmannGenerator(bg.systems.load("double_well"), RealNVP(2, layers=2, hidden=(4,)))
    disturb(generator.flow, 0.1)
    generator.provenance = {"seed": 1}
    return generator


SCRIPT = """
import sys, numpy, torch
import openmm_bg as bg
torch.set_num_threads(1)
for path in sys.argv[1:]:
    generator = bg.BoltzmannGenerator.load(path)
    x = numpy.load(path + ".npy")
    numpy.save(path + ".log_prob.npy", generator.log_prob(x).numpy())
    numpy.save(path + ".samples.npy", generator.sample(10, seed=4).positions.numpy())
    print(generator.fingerprint)
"""


def test_local_networks_come_back(alanine, tmp_path):
    generator = bg.BoltzmannGenerator.for_molecule(
        alanine.topology, alanine.system, 300, positions=alanine.positions, local=True, compile=False
    )
    disturb(generator.flow, 0.02)
    generator.save(tmp_path / "local.bg")
    loaded = bg.BoltzmannGenerator.load(tmp_path / "local.bg")
    log_prob = generator.sample_internal(20, torch.Generator().manual_seed(1))[1]
    assert torch.equal(loaded.sample_internal(20, torch.Generator().manual_seed(1))[1], log_prob)
    assert loaded.flow.config()["blocks"] == generator.flow.config()["blocks"]
    assert len(set(loaded.flow.config()["blocks"])) == 3


def test_a_new_process_gives_the_same_bits_without_data(molecules, tmp_path):
    paths, fingerprints = [], []
    for name, (generator, frames) in molecules.items():
        path = str(tmp_path / name)
        fingerprints.append(generator.save(path))
        assert fingerprints[-1] == generator.fingerprint
        np.save(path + ".npy", frames)
        paths.append(path)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT, *paths]
    out = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert out.stdout.split() == fingerprints
    for path, (generator, frames) in zip(paths, molecules.values(), strict=True):
        expected = generator.log_prob(frames).numpy()
        assert np.isfinite(expected).all()
        assert expected.tobytes() == np.load(path + ".log_prob.npy").tobytes()
        assert generator.sample(10, seed=4).positions.numpy().tobytes() == np.load(path + ".samples.npy").tobytes()


def test_everything_comes_back(molecules, tmp_path):
    for generator, frames in molecules.values():
        path = tmp_path / "deep" / "folder" / "a.bg"
        generator.save(path)
        loaded = bg.BoltzmannGenerator.load(path)
        assert loaded.provenance == generator.provenance
        assert (loaded.temperature, loaded.defensive, loaded.informed) == (310, 0.07, True)
        assert loaded.check_simulation(generator.topology, generator.system) is None
        assert loaded.matches(generator.topology, generator.system)
        names = [[(a.name, a.residue.name, a.residue.id) for a in g.topology.atoms()] for g in (loaded, generator)]
        assert names[0] == names[1]
        assert generator_file.system_hash(loaded.system) == generator_file.system_hash(generator.system)
        assert torch.equal(loaded.log_weights(frames), generator.log_weights(frames))
        assert all(p.dtype == torch.float64 for p in loaded.flow.parameters())
        assert loaded.save(path) == generator.fingerprint


def test_fingerprint_is_that_of_the_contents(small):
    first = small.fingerprint
    assert first == small.fingerprint and len(first) == 64
    for change in (
        lambda g: setattr(g, "defensive", 0.04),
        lambda g: g.provenance.update(seed=2),
        lambda g: next(g.flow.parameters()).data.view(-1)[0].add_(1e-12),
    ):
        other = copy.deepcopy(small)
        change(other)
        assert other.fingerprint != first


def test_uninformed_generators_survive(alanine, tmp_path):
    generator = bg.BoltzmannGenerator.for_molecule(alanine.topology, alanine.system)
    generator.save(tmp_path / "a.bg")
    assert not bg.BoltzmannGenerator.load(tmp_path / "a.bg").informed


@pytest.mark.parametrize(
    "flow",
    [
        RealNVP(2, layers=3, hidden=(8,)),
        RealNVP(2, layers=3, hidden=(8,), networks="split"),
        RealNVP(2, layers=3, hidden=(8,), networks="masked"),
        SplineFlow([False, True], layers=2, hidden=(8,)),
    ],
)
def test_analytic_densities_need_their_energy_again(flow, tmp_path):
    well = bg.systems.load("double_well")
    generator = bg.BoltzmannGenerator(well, flow)
    disturb(flow, 0.1)
    generator.save(tmp_path / "a.bg")
    x = torch.randn(10, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    silent = bg.BoltzmannGenerator.load(tmp_path / "a.bg")
    assert torch.equal(silent.log_prob(x), generator.log_prob(x))
    with pytest.raises(bg.InputError, match="no energy"):
        silent.sample(1)
    loaded = bg.BoltzmannGenerator.load(tmp_path / "a.bg", energy=well)
    assert torch.equal(loaded.sample(50, seed=1).log_weights, generator.sample(50, seed=1).log_weights)
    with pytest.raises(bg.InputError, match="shape"):
        bg.BoltzmannGenerator.load(tmp_path / "a.bg", energy=type(bg.systems.load("gmm40"))([[0.0]], 1.0))


def test_other_flows_cannot_be_saved(tmp_path):
    class Mine(RealNVP):
        pass

    generator = bg.BoltzmannGenerator(None, Mine(2, layers=2, hidden=(4,)))
    with pytest.raises(bg.InputError, match="class Mine"):
        generator.save(tmp_path / "a.bg")
    assert not list(tmp_path.iterdir())


# -- broken files


@pytest.mark.parametrize("share", [0.0, 0.001, 0.01, 0.3, 0.7, 0.999])
def test_truncated_files_are_refused(molecules, tmp_path, share):
    generator, _ = molecules["spline"]
    content = generator_file.pack(generator)[0]
    path = tmp_path / "a.bg"
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(bg.InputError, match="truncated"):
        bg.BoltzmannGenerator.load(path)


def contents(generator: bg.BoltzmannGenerator) -> tuple:
    weights = {name: t.numpy().tobytes() for name, t in generator.flow.state_dict().items()}
    return weights, generator.flow.config(), generator.defensive, generator.provenance


@pytest.mark.parametrize("place", [-1, -100, -200])
def test_an_altered_weight_is_noticed(small, tmp_path, place):
    content = bytearray(generator_file.pack(small)[0])
    content[place] ^= 1
    (tmp_path / "a.bg").write_bytes(content)
    with pytest.raises(bg.InputError, match="altered"):
        bg.BoltzmannGenerator.load(tmp_path / "a.bg")


@given(place=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_an_altered_byte_is_noticed(small, tmp_path, place, flip):
    content = bytearray(generator_file.pack(small)[0])
    content[int(place * len(content))] ^= flip
    path = tmp_path / "a.bg"
    path.write_bytes(content)
    try:
        loaded = bg.BoltzmannGenerator.load(path)
    except bg.InputError:
        return
    # another spelling of the same thing, such as a tab for a space
    assert contents(loaded) == contents(small)


@pytest.mark.parametrize("name", ["sha256", "openmm_bg", "defensive", "weight", "F64", "format", "RealNVP"])
def test_an_altered_word_is_noticed(small, tmp_path, name):
    content = generator_file.pack(small)[0]
    path = tmp_path / "a.bg"
    path.write_bytes(content.replace(name.encode(), name[::-1].encode(), 1))
    with pytest.raises(bg.InputError):
        bg.BoltzmannGenerator.load(path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not a file of ours at all",
        struct.pack("<Q", 2) + b"{}",
        struct.pack("<Q", 2**62) + b"{}",
        struct.pack("<Q", 4) + b"null",
        save_tensors({"a": torch.zeros(2)}),
        save_tensors({"a": torch.zeros(2)}, {"openmm_bg": "3"}),
        save_tensors({"a": torch.zeros(2)}, {"openmm_bg": json.dumps({"format": generator_file.FORMAT})}),
    ],
)
def test_other_files_are_refused(tmp_path, content):
    path = tmp_path / "a.bg"
    path.write_bytes(content)
    with pytest.raises(bg.InputError, match="not a whole generator file"):
        bg.BoltzmannGenerator.load(path)


def test_missing_files_and_folders_are_refused(tmp_path):
    for path in (tmp_path / "nothing.bg", tmp_path):
        with pytest.raises(bg.InputError, match="no generator file"):
            bg.BoltzmannGenerator.load(path)


def test_another_format_is_named(small, tmp_path):
    path = tmp_path / "a.bg"
    path.write_bytes(reseal(generator_file.pack(small)[0], lambda h: h.update(format="openmm_bg generator 99")))
    with pytest.raises(bg.InputError, match="generator 99"):
        bg.BoltzmannGenerator.load(path)


@pytest.mark.parametrize(
    "change",
    [
        lambda h: h.pop("provenance"),
        lambda h: h.update(defensive=7),
        lambda h: h.update(defensive="much"),
        lambda h: h.update(system="<System/>"),
        lambda h: h.update(system=[1]),
        lambda h: h["flow"].update({"class": "eval"}),
        lambda h: h["flow"]["config"].update(layers=4),
        lambda h: h["flow"]["config"].update(unknown=4),
        lambda h: h.update(topology={"residues": [], "atoms": [["C", "C", 5]], "bonds": []}),
        lambda h: h.update(coordinates={"zmatrix": 1}),
    ],
)
def test_nonsense_under_a_right_checksum_is_refused(small, tmp_path, change):
    path = tmp_path / "a.bg"
    path.write_bytes(reseal(generator_file.pack(small)[0], change))
    with pytest.raises(bg.InputError):
        bg.BoltzmannGenerator.load(path)


# -- code


def forbidden(*_):
    raise AssertionError("the System was deserialised")


@pytest.mark.parametrize(
    "disguise",
    [
        lambda xml: xml,
        lambda xml: xml.replace("PythonForce", "&#80;ythonForce"),
        lambda xml: '<!DOCTYPE x [<!ENTITY p "Python">]>' + xml.replace('type="PythonForce"', 'type="&p;Force"'),
    ],
)
def test_a_python_force_is_refused_before_it_is_read(molecules, tmp_path, monkeypatch, disguise):
    system = openmm.System()
    for _ in range(2):
        system.addParticle(1.0)
    system.addForce(openmm.PythonForce(python_force))
    xml = disguise(openmm.XmlSerializer.serialize(system))
    generator, _ = molecules["spline"]
    path = tmp_path / "a.bg"
    path.write_bytes(reseal(generator_file.pack(generator)[0], lambda h: h.update(system=xml)))
    monkeypatch.setattr(openmm.XmlSerializer, "deserialize", forbidden)
    for energy in (None, generator.energy):
        with pytest.raises(bg.InputError, match="run code"):
            bg.BoltzmannGenerator.load(path, energy=energy)


def test_a_python_force_within_another_force_is_refused(molecules, tmp_path, monkeypatch):
    system = openmm.System()
    for _ in range(2):
        system.addParticle(1.0)
    outer = openmm.CustomCVForce("c")
    outer.addCollectiveVariable("c", openmm.PythonForce(python_force))
    system.addForce(outer)
    xml = openmm.XmlSerializer.serialize(system)
    path = tmp_path / "a.bg"
    path.write_bytes(reseal(generator_file.pack(molecules["spline"][0])[0], lambda h: h.update(system=xml)))
    monkeypatch.setattr(openmm.XmlSerializer, "deserialize", forbidden)
    with pytest.raises(bg.InputError, match="run code"):
        bg.BoltzmannGenerator.load(path)


def test_a_generator_with_a_python_force_cannot_be_saved(alanine, tmp_path):
    system = copy.deepcopy(alanine.system)
    system.addForce(openmm.PythonForce(python_force))
    with pytest.warns(UserWarning, match="PythonForce"):
        generator = bg.BoltzmannGenerator.for_molecule(alanine.topology, system)
    with pytest.raises(bg.InputError, match="run code"):
        generator.save(tmp_path / "a.bg")
    assert not list(tmp_path.iterdir())


def test_no_pickle_inside(molecules):
    content = generator_file.pack(molecules["spline"][0])[0]
    assert not content.startswith((b"PK", b"\x80"))
    (size,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + size])
    metadata = header.pop("__metadata__")
    assert {entry["dtype"] for entry in header.values()} <= {"F64", "BOOL", "I64"}
    assert max(entry["data_offsets"][1] for entry in header.values()) == len(content) - 8 - size
    assert set(metadata) == {"openmm_bg", "sha256"} and isinstance(json.loads(metadata["openmm_bg"]), dict)


# -- writing


def test_an_interrupted_write_leaves_the_old_file(small, tmp_path, monkeypatch):
    path = tmp_path / "a.bg"
    path.write_bytes(b"old")

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        small.save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["a.bg"] and path.read_bytes() == b"old"
    monkeypatch.undo()
    small.save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["a.bg"]
    assert bg.BoltzmannGenerator.load(path).fingerprint == small.fingerprint


def test_weights_are_stored_to_the_last_bit(small, tmp_path):
    parameter = next(small.flow.parameters())
    with torch.no_grad():
        parameter.view(-1)[0] = math.nextafter(0.1, 1)
    small.save(tmp_path / "a.bg")
    loaded = next(bg.BoltzmannGenerator.load(tmp_path / "a.bg").flow.parameters())
    assert loaded.view(-1)[0].item() == math.nextafter(0.1, 1)
