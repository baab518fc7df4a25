"""Files of every kind come in as they went out, silently; what cannot be read is told in one sentence."""

from __future__ import annotations

import mdtraj
import numpy as np
import pytest

from openmm_bg.analysis import read_topology, read_trajectory, read_weights
from openmm_bg.errors import InputError


@pytest.fixture(scope="module")
def frames(alanine):
    x = alanine.positions + 0.01 * np.random.default_rng(0).normal(size=(7, 22, 3))
    return mdtraj.Trajectory(x, mdtraj.Topology.from_openmm(alanine.topology))


@pytest.mark.parametrize("ending", ["dcd", "xtc", "trr", "nc", "pdb", "gro", "xyz", "npz", "npy"])
def test_formats_come_back(frames, tmp_path, capfd, ending):
    path = tmp_path / f"x.{ending}"
    if ending == "npz":
        np.savez(path, positions=frames.xyz, other=np.zeros(3))
    elif ending == "npy":
        np.save(path, frames.xyz)
    else:
        frames.save(str(path))
    capfd.readouterr()
    read = read_trajectory(path, frames.topology)
    np.testing.assert_allclose(read, frames.xyz, atol=1e-3 if ending in ("xtc", "gro") else 1e-4)
    assert read.dtype == np.float32
    some = read_trajectory(path, frames.topology, atoms=[3, 8])
    np.testing.assert_array_equal(some, read[:, [3, 8]])
    captured = capfd.readouterr()
    assert captured.out == "" == captured.err


def test_a_topology_comes_from_a_pdb_file(frames, tmp_path):
    frames[0].save(str(tmp_path / "m.pdb"))
    assert read_topology(tmp_path / "m.pdb").n_bonds == 21


def test_molecules_that_a_box_has_cut_are_made_whole(frames, tmp_path):
    boxed = mdtraj.Trajectory((frames.xyz + 0.3) % 2.0, frames.topology)
    boxed.unitcell_lengths, boxed.unitcell_angles = np.full((7, 3), 2.0), np.full((7, 3), 90.0)
    boxed.save(str(tmp_path / "x.dcd"))
    read = read_trajectory(tmp_path / "x.dcd", frames.topology)
    gaps = [np.linalg.norm(x[:, 6] - x[:, 14], axis=1) for x in (read, frames.xyz)]
    np.testing.assert_allclose(*gaps, atol=1e-5)


def test_weights_of_every_kind(tmp_path):
    log_w = np.array([0.5, -np.inf, 1.0])
    np.save(tmp_path / "w.npy", np.arange(3))
    np.savetxt(tmp_path / "w.txt", log_w)
    np.savez(tmp_path / "w.npz", log_weights=log_w, weights=np.ones(3))
    np.savez(tmp_path / "samples.npz", positions=np.zeros((3, 2, 3)), reduced_energy=-log_w, log_prob=np.zeros(3))
    assert read_weights(tmp_path / "w.npy", 3).tolist() == [0, 1, 2]
    assert read_weights(tmp_path / "w.npz", 3).tolist() == [1, 1, 1]
    for name in ("w.txt", "w.npz", "samples.npz"):
        np.testing.assert_allclose(read_weights(tmp_path / name, 3, logarithms=True), np.exp(log_w - 1))


def test_what_cannot_be_read_is_told(frames, tmp_path):
    topology = frames.topology
    (tmp_path / "x.foo").write_text("hello")
    (tmp_path / "x.dcd").write_text("hello")
    (tmp_path / "x.txt").write_text("one two")
    (tmp_path / "x.npz").write_text("PK")
    np.save(tmp_path / "empty.npy", np.zeros((0, 22, 3)))
    np.save(tmp_path / "flat.npy", np.zeros((4, 66)))
    np.savez(tmp_path / "two.npz", a=np.zeros(3), b=np.zeros(3))
    np.save(tmp_path / "nan.npy", np.full(3, np.nan))
    np.save(tmp_path / "nothing.npy", np.full(3, -np.inf))
    frames.atom_slice(range(20)).save(str(tmp_path / "short.dcd"))
    frames.atom_slice(range(20)).save(str(tmp_path / "short.pdb"))
    for read, phrase in (
        (lambda: read_trajectory(tmp_path / "nowhere.dcd", topology), "There is no file"),
        (lambda: read_trajectory(tmp_path, topology), "There is no file"),
        (lambda: read_trajectory(tmp_path / "x.foo", topology), "is of a kind that mdtraj does not read"),
        (lambda: read_trajectory(tmp_path / "x.dcd", topology), "could not be read as frames of 22 atoms"),
        (lambda: read_trajectory(tmp_path / "short.dcd", topology), "could not be read as frames of 22 atoms"),
        (lambda: read_trajectory(tmp_path / "short.pdb", topology), "has 20 atoms and the topology 22"),
        (lambda: read_trajectory(tmp_path / "empty.npy", topology), "holds no frames"),
        (lambda: read_trajectory(tmp_path / "flat.npy", topology), "holds an array of shape (4, 66)"),
        (lambda: read_trajectory(tmp_path / "two.npz", topology), "holds no array named positions"),
        (lambda: read_trajectory(tmp_path / "x.npz", topology), "could not be read"),
        (lambda: read_topology(tmp_path / "x.foo"), "could not be read as a topology"),
        (lambda: read_weights(tmp_path / "x.txt", 3), "could not be read as a column of numbers"),
        (lambda: read_weights(tmp_path / "nan.npy", 4), "there are 4 frames; give one weight for each"),
        (lambda: read_weights(tmp_path / "nan.npy", 3, logarithms=True), "NaN or +inf"),
        (
            lambda: read_weights(tmp_path / "nothing.npy", 3, logarithms=True),
            "are zero, so there is nothing to compare",
        ),
    ):
        with pytest.raises(InputError) as caught:
            read()
        text = str(caught.value)
        assert phrase in text and text.endswith(".") and "\n" not in text, text
