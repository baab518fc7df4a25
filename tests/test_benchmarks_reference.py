"""The reference that benchmarks compare with: ladders of known populations, known errors, files that resume."""

import json
import math
import sys
from pathlib import Path

import mdtraj
import numpy as np
import openmm
import pytest
import torch
from openmm import app

import openmm_bg as bg
from openmm_bg.errors import InputError
from openmm_bg.units import GAS_CONSTANT

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"

# the tests of the wheel run outside the checkout, and the wheel does not ship the benchmarks
if not BENCHMARKS.is_dir():
    pytest.skip("the benchmarks folder is not beside the tests", allow_module_level=True)

# scripts, no package: they can be imported only once their folder is on the path (hence E402)
sys.path.insert(0, str(BENCHMARKS))
from reference import Reference, Reservoir, parse  # noqa: E402
from reference_ladders import Ladders  # noqa: E402
from reference_statistics import Backbone, describe, effective_samples, measure  # noqa: E402


def double_well() -> bg.systems.Molecule:
    """One atom with two minima along x, the right one lower."""
    system = openmm.System()
    system.addParticle(12.0)
    force = openmm.CustomExternalForce("4*((x/0.1)^2-1)^2 - 0.5*x/0.1 + 500*(y^2+z^2)")
    force.addParticle(0, [])
    system.addForce(force)
    topology = app.Topology()
    topology.addAtom("C", app.element.carbon, topology.addResidue("C", topology.addChain()))
    return bg.systems.Molecule("well", topology, system, np.array([[-0.1, 0.0, 0.0]]), 150.0, "Two wells.", ())


def test_ladders_have_the_populations_of_every_temperature():
    temperatures = np.array([150.0, 300.0, 600.0])
    ladders = Ladders(double_well(), temperatures, 100, 1, "cpu")
    ladders.advance(500)
    ladders.cool()
    right = []
    for k in range(200):
        ladders.advance(10)
        ladders.exchange()
        if k >= 50:
            right.append((ladders.walkers.positions[:, 0, 0] > 0).view(100, 3).numpy())
    means = np.mean(right, 0)
    x = np.linspace(-0.3, 0.3, 20001)
    energy = 4.0 * ((x / 0.1) ** 2 - 1) ** 2 - 5 * x
    for k, temperature in enumerate(temperatures):
        w = np.exp(-energy / (GAS_CONSTANT * temperature))
        error = means[:, k].std(ddof=1) / math.sqrt(100)
        assert means[:, k].mean() == pytest.approx(w[x > 0].sum() / w.sum(), abs=4 * error)
        assert error < 0.03
    assert (ladders.tried.numpy() == 100 * 100).all() and 0.2 < (ladders.accepted / ladders.tried).min() < 1


def test_energies_after_an_exchange_are_those_of_the_positions(alanine):
    ladders = Ladders(alanine, np.array([300.0, 330.0, 360.0]), 8, 1, "cpu")
    ladders.advance(50)
    for _ in range(4):
        energy = ladders.exchange()
        assert energy.flatten().numpy() == pytest.approx(ladders.walkers.potential_energy().numpy(), abs=1e-3)
    assert ladders.accepted.min() > 0


def test_a_walker_that_turns_a_centre_goes_back_the_way_it_came(alanine, monkeypatch):
    ladders = Ladders(alanine, np.array([300.0, 400.0]), 4, 1, "cpu")
    walkers = ladders.walkers
    before, velocities = walkers.positions.clone(), walkers.velocities.clone()

    def mirror_one(steps: int) -> None:
        walkers.positions, walkers.velocities = before + 0.01, velocities + 1
        walkers.positions[2] *= torch.tensor([-1.0, 1.0, 1.0])

    monkeypatch.setattr(walkers, "advance", mirror_one)
    ladders.advance(10)
    others = [i for i in range(8) if i != 2]
    assert torch.equal(walkers.positions[2], before[2]) and torch.equal(walkers.velocities[2], -velocities[2])
    assert torch.equal(walkers.positions[others], before[others] + 0.01) and ladders.turned == 1


def test_heavy_hydrogens_leave_the_energy_as_it_is(alanine):
    ladders = Ladders(alanine, np.array([300.0, 400.0]), 4, 1, "cpu")
    system = ladders.walkers.energy.system
    masses = [system.getParticleMass(i)._value for i in range(22)]
    assert min(masses) == 4.0 and max(masses) == alanine.system.getParticleMass(5)._value
    x = torch.tensor(alanine.positions)[None]
    assert float(ladders.walkers.energy.potential(x)) == float(bg.ForceFieldEnergy(alanine.system, 300).potential(x))


def test_every_offered_frame_is_kept_with_the_same_probability():
    counts = np.zeros((5, 20))
    for seed in range(300):
        reservoir = Reservoir(10, 1, 1, seed)
        for k in range(20):
            number = 5.0 * k + torch.arange(5)
            reservoir.offer(k, number[:, None, None].expand(5, 1, 3), number[:, None].numpy())
        frames, energy, origin = reservoir.sorted()
        assert (frames[:, 0, 0] == 5 * origin[:, 1] + origin[:, 0]).all() and (energy[:, 0] == frames[:, 0, 0]).all()
        counts[origin[:, 0], origin[:, 1]] += 1
    # 30 expected in each of 100 cells that share 300 * 10 draws
    assert ((counts - 30) ** 2 / (30 * 0.9)).sum() == pytest.approx(99, abs=5 * math.sqrt(2 * 99))


@pytest.mark.parametrize("name", ["alanine_dipeptide", "elil"])
def test_backbone_torsions_are_those_of_mdtraj(name):
    topology = bg.systems.load(name).topology
    backbone = Backbone.of(topology)
    theirs = mdtraj.Trajectory(np.zeros((1, topology.getNumAtoms(), 3)), mdtraj.Topology.from_openmm(topology))
    for kind, compute in (("phi", mdtraj.compute_phi), ("psi", mdtraj.compute_psi)):
        assert backbone.atoms[list(backbone.columns(kind).values())].tolist() == compute(theirs)[0].tolist()
    # mdtraj knows no omega of caps
    own = {tuple(row) for row in backbone.atoms[list(backbone.columns("omega").values())].tolist()}
    assert own >= set(map(tuple, mdtraj.compute_omega(theirs)[0].tolist()))
    assert list(backbone.columns("omega")) == {"elil": ["GLU1", "LEU2", "ILE3"]}.get(name, ["ACE1", "ALA2"])


def test_errors_of_correlated_ladders_are_the_known_ones():
    # a first-order autoregressive chain: g = (1 + a) / (1 - a) = 19
    random, a = np.random.default_rng(1), 0.9
    x = np.zeros((100, 3000))
    x[:, 0] = random.normal(size=100)
    for k in range(1, 3000):
        x[:, k] = a * x[:, k - 1] + math.sqrt(1 - a * a) * random.normal(size=100)
    found = measure(x)
    assert found["error"] == pytest.approx(math.sqrt(19 / x.size), rel=0.25)
    assert found["effective_samples"] == pytest.approx(x.size / 19, rel=0.25) and abs(found["halves"]) < 4
    assert abs(measure(x + np.linspace(0, 0.3, 3000))["halves"]) > 4


def test_populations_are_named_by_residue_and_by_the_string_of_basins():
    backbone = Backbone(
        ("omega ACE1", "phi ALA2", "psi ALA2", "omega ALA2", "phi ALA3", "psi ALA3"), np.zeros((6, 4), int)
    )
    helix, sheet, left = (-60, -40), (-70, 140), (60, 40)
    rows = [(180, *sheet, 180, *helix)] * 6 + [(180, *left, -175, *sheet)] * 3 + [(5, *sheet, 170, *helix)]
    torsions = np.radians(np.array(rows, dtype=float))[None].repeat(8, 0)
    found = describe(np.zeros((8, 10)), torsions, backbone)
    values = {name: m["value"] for name, m in found["populations"].items()}
    expected = {
        "ALA2 a": 0, "ALA2 b": 0.7, "ALA2 l": 0.3, "ALA3 a": 0.7, "ALA3 b": 0.3, "ALA3 l": 0, "joint ba": 0.7,
        "joint lb": 0.3, "ACE1 cis": 0.1, "ALA2 cis": 0,
    }  # fmt: skip
    assert values == pytest.approx(expected)
    assert effective_samples(found) == 0.0


def options(folder: Path, *more: str):
    required = f"alanine_dipeptide --minutes 1 --seed 3 --output {folder / 'frames.npz'}"
    small = f"--summary {folder / 'summary.npz'} --ladders 8 --temperatures 2 --highest 350 --steps 5 --every 2"
    return parse([*required.split(), *small.split(), "--hot", "0.02", "--equilibration", "0.03", *more])


def test_a_run_that_was_stopped_goes_on_bitwise_and_its_files_agree(tmp_path, alanine):
    straight, stopped = Reference(options(tmp_path)), Reference(options(tmp_path))
    for _ in range(14):
        straight.iterate()
    for _ in range(8):
        stopped.iterate()
    stopped.save(tmp_path / "checkpoint.npz")
    resumed = Reference(options(tmp_path))
    resumed.restore(tmp_path / "checkpoint.npz")
    for _ in range(6):
        resumed.iterate()
    # 2 hot and 3 discarded iterations, then every other one
    assert len(straight.series) == 4 and (np.stack(resumed.series) == np.stack(straight.series)).all()
    assert torch.equal(resumed.ladders.walkers.positions, straight.ladders.walkers.positions)
    found = resumed.write()
    with np.load(tmp_path / "frames.npz") as frames, np.load(tmp_path / "summary.npz") as summary:
        x = frames["positions"]
        provenance = json.loads(str(frames["provenance"]))
        assert x.shape == (32, 22, 3) and frames["potential_energy"].shape == (32, 2)
        assert (np.lexsort((frames["row"], frames["ladder"])) == np.arange(32)).all()
        phi = mdtraj.compute_phi(mdtraj.Trajectory(x, mdtraj.Topology.from_openmm(alanine.topology)))[1][:, 0]
        column = summary["names"].tolist().index("phi ALA2")
        assert np.cos(summary["dihedrals"][:, column] - phi) == pytest.approx(1, abs=1e-5)
        assert (summary["energy"] == frames["potential_energy"][:, 0]).all()
        assert summary["energy"].mean() == pytest.approx(found["mean_energy"]["value"], rel=1e-5)
    assert "never for training" in provenance["use"] and provenance["populations"].keys() == found["populations"].keys()
    with pytest.raises(InputError, match=r"differs in frames"):
        Reference(options(tmp_path, "--frames", "20")).restore(tmp_path / "checkpoint.npz")


def test_few_ladders_are_refused(tmp_path):
    with pytest.raises(InputError, match="8 ladders or more"):
        Reference(options(tmp_path, "--ladders", "4"))
