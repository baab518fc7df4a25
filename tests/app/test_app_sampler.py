"""What a move leaves alone, what it refuses, what is written, and how a run is resumed."""

from __future__ import annotations

import csv
import io
import json
import math
from itertools import pairwise

import mdtraj
import numpy as np
import openmm
import pytest
import torch
import toys
from openmm import app, unit
from toys import CHAIN_POSITIONS, ProductFlow, positions_of, velocities_of

from openmm_bg import app as bg_app
from openmm_bg.coordinates import InternalCoordinates
from openmm_bg.errors import InputError
from openmm_bg.generator import BoltzmannGenerator
from openmm_bg.sampling.archive import save_arrays

Sampler = bg_app.BoltzmannGeneratorSampler


def chain(**options):
    return toys.simulation_of(toys.chain_system(), toys.chain_topology(), CHAIN_POSITIONS, **options)


class Spoiled(BoltzmannGenerator):
    """Places NaN, or atoms on top of each other, while claiming a finite density."""

    value = math.nan

    def place(self, q, frame=None):
        return torch.full_like(super().place(q, frame), self.value)


def spoiled(value):
    good = toys.chain_generator()
    generator = Spoiled(None, good.flow, good.coordinates, topology=good.topology, defensive=0)
    generator.value = value
    return generator


# -- what moves leave alone


def test_step_time_and_box_do_not_move():
    simulation = chain()
    sampler = Sampler(toys.chain_generator(), simulation, 10, 5, seed=1)
    simulation.step(10)
    before = simulation.context.getState()
    sampler.attemptMoves(20)
    after = simulation.context.getState()
    assert sampler.numAccepted > 0
    assert (
        (after.getStepCount(), after.getTime()) == (before.getStepCount(), before.getTime()) == (10, before.getTime())
    )
    assert after.getPeriodicBoxVectors() == before.getPeriodicBoxVectors()


def test_iterations_and_counters():
    simulation = chain()
    sampler = Sampler(toys.chain_generator(), simulation, 10, 5, seed=1)
    assert math.isnan(sampler.acceptanceRate)
    sampler.step(35)
    assert (simulation.currentStep, sampler.currentIteration, sampler.numProposed) == (35, 3, 15)
    assert sampler.acceptanceRate == sampler.numAccepted / 15
    assert 0 < sampler.numAccepted < 15 and sampler.numRefused == 0


def test_rejection_restores_everything_bitwise():
    simulation = chain()
    # A generator far too wide and off: all proposals are bad.
    flow = ProductFlow([0.2] * 3 + [1.0] * 2 + [0.0], [1e-3] * 5 + [0.5], [False] * 5 + [True])
    generator = BoltzmannGenerator(
        None, flow, InternalCoordinates(toys.chain_zmatrix()), topology=toys.chain_topology(), defensive=0.5
    )
    flow.log_probs = lambda y: (torch.full((len(y),), -1e3, dtype=torch.float64),) * 2
    sampler = Sampler(generator, simulation, 10, 5, seed=1)
    simulation.step(7)
    x, v = positions_of(simulation), velocities_of(simulation)
    attempts = sampler.attemptMoves(10)
    assert not any(a.accepted for a in attempts) and all(math.isfinite(a.log_acceptance) for a in attempts)
    np.testing.assert_array_equal(positions_of(simulation), x)
    np.testing.assert_array_equal(velocities_of(simulation), v)


def test_velocities_are_redrawn_at_the_integrators_temperature():
    simulation = chain()
    sampler = Sampler(toys.chain_generator(), simulation, 10, 1, seed=1)
    simulation.integrator.setTemperature(900.0)
    kinetic = []
    while len(kinetic) < 200:
        v = velocities_of(simulation)
        if sampler.attemptMove().accepted:
            assert not np.array_equal(velocities_of(simulation), v)
            masses = np.array([12.0, 16.0, 16.0, 12.0])[:, None]
            kinetic.append(0.5 * (masses * velocities_of(simulation) ** 2).sum())
    expected = 6 * 3 * toys.KT
    assert np.mean(kinetic) == pytest.approx(expected, abs=4 * expected / math.sqrt(6 * 200))


def test_beta_is_the_integrators_at_that_moment():
    simulation = chain()
    sampler = Sampler(toys.chain_generator(), simulation, 10, 1, seed=1)
    for temperature in (300.0, 600.0):
        simulation.integrator.setTemperature(temperature)
        a = sampler.attemptMove()
        while a.log_acceptance == -math.inf:
            a = sampler.attemptMove()
        beta = 1 / (toys.KT * temperature / 300)
        expected = -beta * (a.proposed_potential_energy - a.potential_energy) + a.log_prob - a.proposed_log_prob
        assert a.log_acceptance == pytest.approx(expected, rel=1e-12)


def test_energy_is_the_contexts_in_the_integrators_force_groups():
    system = toys.chain_system()
    system.getForce(2).setForceGroup(3)
    simulation = toys.simulation_of(system, toys.chain_topology(), CHAIN_POSITIONS)
    simulation.integrator.setIntegrationForceGroups({0})
    sampler = Sampler(toys.chain_generator(), simulation, 10, 1, seed=1)
    expected = simulation.context.getState(energy=True, groups={0}).getPotentialEnergy()._value
    whole = simulation.context.getState(energy=True).getPotentialEnergy()._value
    assert sampler.attemptMove().potential_energy == expected != whole


# -- what is rejected, refused, or an error


@pytest.mark.parametrize("platform", ["Reference", "CPU"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nonfinite_proposals_are_rejections_and_the_context_stays_usable(platform, value):
    simulation = chain(platform=platform)
    sampler = Sampler(spoiled(value), simulation, 10, 5, seed=1)
    x = positions_of(simulation)
    attempts = sampler.attemptMoves()
    assert [a.accepted for a in attempts] == [False] * 5
    assert all(math.isnan(a.proposed_potential_energy) and a.log_acceptance == -math.inf for a in attempts)
    np.testing.assert_array_equal(positions_of(simulation), x)
    simulation.step(20)
    assert np.isfinite(positions_of(simulation)).all()
    assert sampler.numAccepted == 0 and sampler.numProposed == 15


def raise_beyond(state):
    x = state.getPositions(asNumpy=True)._value
    if np.linalg.norm(x[0] - x[1]) > 0.155:
        raise ValueError("no energy there")
    return 0.0, np.zeros((4, 3))


@pytest.mark.parametrize(
    "force",
    [
        pytest.param(lambda: openmm.PythonForce(raise_beyond), id="exception"),
        pytest.param(lambda: _nan_beyond(), id="NaN"),
    ],
)
def test_energies_that_fail_are_rejections(force):
    system = toys.chain_system()
    system.addForce(force())
    simulation = toys.simulation_of(system, toys.chain_topology(), CHAIN_POSITIONS)
    sampler = Sampler(toys.chain_generator(), simulation, 10, 5, seed=1)
    attempts = sampler.attemptMoves(60)
    failed = [a for a in attempts if a.proposed_potential_energy == math.inf]
    assert failed and not any(a.accepted for a in failed)
    assert any(a.accepted for a in attempts)
    x = positions_of(simulation)
    assert np.linalg.norm(x[0] - x[1]) < 0.155


def _nan_beyond():
    force = openmm.CustomBondForce("1e-9*sqrt(0.155-r)")
    force.addBond(0, 1)
    return force


def test_an_error_of_the_context_itself_is_not_swallowed():
    calls = []

    def compute(state):
        calls.append(0)
        if len(calls) > 1:
            raise ValueError("broken for good")
        return 0.0, np.zeros((4, 3))

    system = toys.chain_system()
    system.addForce(openmm.PythonForce(compute))
    simulation = toys.simulation_of(system, toys.chain_topology(), CHAIN_POSITIONS)
    sampler = Sampler(toys.chain_generator(), simulation, 10, 5, seed=1)
    with pytest.raises(openmm.OpenMMException, match="broken for good"):
        sampler.attemptMoves(60)


def test_a_current_state_outside_the_support_is_refused_and_counted():
    generator = toys.chain_generator()
    torsion = generator.coordinates(torch.tensor(CHAIN_POSITIONS)[None])[0][0, 5]
    generator.coordinates = InternalCoordinates(toys.chain_zmatrix(), half_turns=[-int(torsion.sign())])
    simulation = chain()
    sampler = Sampler(generator, simulation, 10, 4, seed=1)
    attempts = sampler.attemptMoves()
    assert sampler.numRefused == sampler.numProposed == 4 and sampler.numAccepted == 0
    assert all(a.refused and a.log_prob == -math.inf and a.log_acceptance == -math.inf for a in attempts)
    np.testing.assert_array_equal(positions_of(simulation), CHAIN_POSITIONS)
    simulation.step(5)


def test_a_broken_simulation_is_an_error():
    simulation = chain()
    sampler = Sampler(toys.chain_generator(), simulation, 10, 5, seed=1)
    simulation.context.setPositions(np.full((4, 3), math.nan))
    with pytest.raises(ValueError, match="already failed"):
        sampler.attemptMoves()


def test_an_integrator_without_a_temperature_is_refused():
    simulation = app.Simulation(
        toys.chain_topology(),
        toys.chain_system(),
        openmm.VerletIntegrator(0.001),
        openmm.Platform.getPlatform("Reference"),
    )
    with pytest.raises(InputError, match="VerletIntegrator has no temperature"):
        Sampler(toys.chain_generator(), simulation)


def test_another_molecule_is_refused_and_another_system_only_warned_about():
    system, topology = toys.harmonic_system()
    with pytest.raises(InputError, match="4 atoms"):
        Sampler(toys.chain_generator(), toys.simulation_of(system, topology, np.zeros((1, 3))))
    other = toys.chain_topology()
    next(other.atoms()).element = app.element.carbon
    with pytest.raises(InputError):
        Sampler(toys.chain_generator(), toys.simulation_of(toys.chain_system(), other, CHAIN_POSITIONS))
    stiffer = toys.chain_system()
    stiffer.addForce(openmm.CustomTorsionForce("theta"))
    generator = BoltzmannGenerator.for_molecule(toys.chain_topology(), toys.chain_system(), positions=CHAIN_POSITIONS)
    with pytest.warns(UserWarning, match="differs"):
        Sampler(generator, toys.simulation_of(stiffer, toys.chain_topology(), CHAIN_POSITIONS))


def test_constraints_must_be_the_generators():
    system = toys.chain_system()
    system.addConstraint(0, 1, 0.15)
    with pytest.raises(InputError, match="constrain"):
        Sampler(toys.chain_generator(topology=False), toys.simulation_of(system, toys.chain_topology(), None))
    trimer, topology, generator, positions = toys.trimer()
    trimer.setParticleMass(0, 10.0)
    with pytest.raises(InputError, match="masses"):
        Sampler(generator, toys.simulation_of(trimer, topology, positions))


def test_proposals_that_break_a_constraint_are_an_error():
    system, topology, generator, positions = toys.trimer()
    simulation = toys.simulation_of(system, topology, positions)
    generator.coordinates.values[0] = 0.11
    # an invalid draw is not checked: several, and always the same
    sampler = Sampler(generator, simulation, 10, 20, seed=1)
    with pytest.raises(InputError, match="does not keep it"):
        sampler.attemptMoves()


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"stepsPerIteration": 0}, "stepsPerIteration"),
        ({"proposalsPerIteration": 2.5}, "proposalsPerIteration"),
        ({"stepsPerIteration": 10, "checkpointInterval": 25}, "multiple"),
        ({"resume": True}, "checkpointFile"),
        ({"atoms": [0, 1, 2]}, "4 atoms"),
        ({"atoms": [0, 1, 2, 2]}, "different"),
        ({"atoms": [0, 1, 2, 9]}, "between 0 and 3"),
        ({"atoms": "all"}, "list of particle"),
        ({"atoms": [0, 2, 1, 3]}, "bonds"),  # the right elements in an order with other bonds
    ],
)
def test_senseless_arguments_are_refused(options, word):
    with pytest.raises(InputError, match=word):
        Sampler(toys.chain_generator(), chain(), **options)


# -- a molecule in a larger System


def test_atoms_moves_only_the_molecule():
    """The chain at the end of a System that holds two other particles, one of them bound to it."""
    system, topology = openmm.System(), app.Topology()
    box = topology.addResidue("AR", topology.addChain())
    for _ in range(2):
        system.addParticle(39.9)
        topology.addAtom("AR", app.element.argon, box)
    residue = topology.addResidue("HOO", topology.addChain())
    atoms = [topology.addAtom(a.name, a.element, residue) for a in toys.chain_topology().atoms()]
    for a, b in pairwise(atoms):
        topology.addBond(a, b)
    for mass in (12.0, 16.0, 16.0, 12.0):
        system.addParticle(mass)
    tether = openmm.HarmonicBondForce()
    tether.addBond(0, 5, 0.4, 10.0)
    system.addForce(tether)
    positions = np.concatenate([[[0.5, 0, 0], [0, 0.6, 0]], CHAIN_POSITIONS])
    simulation = toys.simulation_of(system, topology, positions)
    sampler = Sampler(toys.chain_generator(), simulation, 10, 20, atoms=[2, 3, 4, 5], seed=1)
    energy = simulation.context.getState(energy=True).getPotentialEnergy()._value
    attempts = sampler.attemptMoves()
    assert attempts[0].potential_energy == pytest.approx(energy)
    assert sampler.numAccepted > 0
    np.testing.assert_array_equal(positions_of(simulation)[:2], positions[:2])
    assert not np.allclose(positions_of(simulation)[5], positions[5])
    with pytest.raises(InputError):
        Sampler(toys.chain_generator(), simulation, atoms=[0, 1, 2, 3])
    with pytest.raises(InputError, match="atoms="):
        Sampler(toys.chain_generator(), simulation)


def test_virtual_sites_follow():
    system, topology = toys.chain_system(), toys.chain_topology()
    system.addParticle(0.0)
    system.setVirtualSite(4, openmm.TwoParticleAverageSite(0, 3, 0.5, 0.5))
    topology.addAtom("M", None, next(topology.residues()))
    pull = openmm.CustomExternalForce("50*((x-0.1)^2+y^2+z^2)")
    pull.addParticle(4)
    system.addForce(pull)
    positions = np.concatenate([CHAIN_POSITIONS, [0.5 * (CHAIN_POSITIONS[0] + CHAIN_POSITIONS[3])]])
    simulation = toys.simulation_of(system, topology, positions)
    sampler = Sampler(toys.chain_generator(), simulation, 10, 1, atoms=[0, 1, 2, 3], seed=1)
    for _ in range(30):
        attempt = sampler.attemptMove()
        x = positions_of(simulation)
        np.testing.assert_allclose(x[4], 0.5 * (x[0] + x[3]), atol=1e-12)
        energy = simulation.context.getState(energy=True).getPotentialEnergy()._value
        expected = attempt.proposed_potential_energy if attempt.accepted else attempt.potential_energy
        assert energy == pytest.approx(expected, abs=1e-9)
    assert sampler.numAccepted > 0


# -- reporters and files


@pytest.mark.parametrize("first", [True, False])
def test_reporters_see_the_state_before_the_moves_wherever_they_stand(first, tmp_path):
    simulation = chain()
    state_file = io.StringIO()
    reporters = [
        app.DCDReporter(str(tmp_path / "md.dcd"), 10),
        app.StateDataReporter(state_file, 10, step=True, potentialEnergy=True),
    ]
    log = io.StringIO()
    if first:
        simulation.reporters += reporters
    Sampler(toys.chain_generator(), simulation, 10, 3, seed=1, logFile=log)
    if not first:
        simulation.reporters += reporters
    simulation.step(100)
    rows = list(csv.DictReader(io.StringIO(log.getvalue())))
    firsts = [float(r["Potential Energy (kJ/mole)"]) for r in rows[::3]]
    reported = [float(line.split(",")[1]) for line in state_file.getvalue().splitlines()[1:]]
    np.testing.assert_allclose(reported, firsts, rtol=1e-12)
    frames = mdtraj.load(str(tmp_path / "md.dcd"), top=mdtraj.Topology.from_openmm(toys.chain_topology())).xyz
    context = simulation.context
    for frame, energy in zip(frames, firsts, strict=True):
        context.setPositions(frame.astype(float))
        assert context.getState(energy=True).getPotentialEnergy()._value == pytest.approx(energy, abs=1e-3)


def test_order_of_reporters_does_not_change_the_run():
    logs = []
    for first in (True, False):
        simulation, log = chain(), io.StringIO()
        reporter = app.StateDataReporter(io.StringIO(), 5, potentialEnergy=True)
        if first:
            simulation.reporters.append(reporter)
        Sampler(toys.chain_generator(), simulation, 10, 3, seed=1, logFile=log)
        if not first:
            simulation.reporters.append(reporter)
        simulation.step(100)
        logs.append(log.getvalue())
    assert logs[0] == logs[1]


def test_log_holds_every_attempt_in_full_precision(tmp_path):
    simulation = chain()
    sampler = Sampler(toys.chain_generator(), simulation, 10, 3, seed=1, logFile=tmp_path / "bg.csv")
    attempts = []
    move = sampler.attemptMove
    sampler.attemptMove = lambda: attempts.append(move()) or attempts[-1]
    simulation.step(50)
    text = (tmp_path / "bg.csv").read_text()
    assert text.startswith('"Step","Iteration","Accepted","Refused","Potential Energy (kJ/mole)"')
    rows = list(csv.reader(io.StringIO(text)))[1:]
    assert len(rows) == 15
    for index, (row, attempt) in enumerate(zip(rows, attempts, strict=True)):
        assert [int(v) for v in row[:4]] == [attempt.step, 1 + index // 3, attempt.accepted, attempt.refused]
        np.testing.assert_array_equal([float(v) for v in row[4:]], attempt[3:8])
        assert attempt.step == 10 * (1 + index // 3)


def test_trajectory_and_reporters_see_the_state_after_the_moves(tmp_path):
    simulation = chain()
    sampler = Sampler(toys.chain_generator(), simulation, 10, 5, seed=1, trajectoryFile=tmp_path / "bg.dcd")
    seen = []
    sampler.reporters.append(lambda s: seen.append(positions_of(s.simulation)))
    simulation.step(60)
    frames = mdtraj.load(str(tmp_path / "bg.dcd"), top=mdtraj.Topology.from_openmm(toys.chain_topology())).xyz
    assert frames.shape == (6, 4, 3)
    np.testing.assert_allclose(frames, seen, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"energy": toys.CheapChain()}], ids=["every proposal", "two stages"])
def test_states_file_holds_every_conformation_once_with_its_weight(tmp_path, options):
    simulation = chain()
    sampler = Sampler(toys.chain_generator(), simulation, 10, 8, seed=1, statesFile=tmp_path / "all.dcd", **options)
    seen = []
    move = sampler.attemptMove
    sampler.attemptMove = lambda: (move(), seen.append((simulation.currentStep, positions_of(simulation))))[0]
    simulation.step(60)
    frames = mdtraj.load(str(tmp_path / "all.dcd"), top=mdtraj.Topology.from_openmm(toys.chain_topology())).xyz
    rows = np.loadtxt(tmp_path / "all.dcd.csv", delimiter=",", skiprows=1, dtype=int)
    assert len(frames) == len(rows) <= len(seen) and rows[:, 1].min() >= 1
    steps, weights = rows.T
    np.testing.assert_array_equal(np.repeat(steps, weights), [step for step, _ in seen])
    np.testing.assert_allclose(np.repeat(frames, weights, 0), [x for _, x in seen], atol=1e-6)


def test_existing_files_are_not_overwritten(tmp_path):
    for name in ("logFile", "trajectoryFile", "checkpointFile", "statesFile"):
        path = tmp_path / "old"
        path.write_text("precious")
        other = tmp_path / f"{name}.csv"
        with pytest.raises(InputError, match="not empty"):
            Sampler(toys.chain_generator(), chain(), **({"logFile": other} | {name: path}))
        assert path.read_text() == "precious" and not other.exists()


def test_hook_can_be_overridden():
    class Never(Sampler):
        def attemptMove(self):
            self._walker.refused = True
            return super().attemptMove()

    simulation = chain()
    sampler = Never(toys.chain_generator(), simulation, 10, 2)
    simulation.step(10)
    assert sampler.numRefused == 2


# -- checkpoint and resume


def run(directory, steps, resume=False, generator=toys.chain_generator, **options):
    simulation = chain(seed=99 if resume else 1)
    sampler = Sampler(
        generator(),
        simulation,
        10,
        3,
        seed=None if resume else 5,
        logFile=directory / "bg.csv",
        trajectoryFile=directory / "bg.dcd",
        statesFile=directory / "all.dcd",
        checkpointFile=directory / "bg.chk",
        checkpointInterval=50,
        resume=resume,
        **options,
    )
    simulation.step(steps - simulation.currentStep)
    return simulation, sampler


LATENT = {"generator": toys.stretched_generator, "latentShare": 0.6, "latentStep": 0.5}


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="plain"),
        pytest.param({"energy": toys.CheapChain()}, id="two stages"),
        pytest.param(LATENT, id="latent"),
        pytest.param(LATENT | {"energy": toys.CheapChain()}, id="latent in two stages"),
        pytest.param(LATENT | {"adaptationIterations": 3}, id="adapted before"),
        pytest.param(LATENT | {"adaptationIterations": 12}, id="still adapting"),
    ],
)
def test_killed_and_resumed_run_equals_the_uninterrupted_one(tmp_path, options):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    expected, sampler = run(whole, 150, **options)
    x, v = positions_of(expected), velocities_of(expected)
    run(parts, 87, **options)  # killed: what follows the checkpoint at step 50 is lost
    assert {line.split(",")[0] for line in (parts / "bg.csv").read_text().splitlines()[1:]} == {
        str(10 * k) for k in range(1, 9)
    }
    resumed, again = run(parts, 150, resume=True, **options)
    np.testing.assert_array_equal(positions_of(resumed), x)
    np.testing.assert_array_equal(velocities_of(resumed), v)
    for name in ("bg.csv", "all.dcd.csv"):
        assert (parts / name).read_bytes() == (whole / name).read_bytes()
    for name in (
        "currentIteration", "numProposed", "numAccepted", "numRefused", "statistics", "proposalsPerIteration",
        "latentStep", "adapting", "adaptationIterations",
    ):  # fmt: skip
        assert getattr(again, name) == getattr(sampler, name), name
    top = mdtraj.Topology.from_openmm(toys.chain_topology())
    for name in ("all.dcd", "bg.dcd"):
        frames = [mdtraj.load(str(folder / name), top=top).xyz for folder in (whole, parts)]
        np.testing.assert_array_equal(*frames)
    assert len(frames[0]) == 15
    assert sorted(p.name for p in parts.iterdir()) == ["all.dcd", "all.dcd.csv", "bg.chk", "bg.csv", "bg.dcd"]


def test_training_does_not_reach_a_running_sampler():
    simulation, generator = chain(), toys.chain_generator()
    sampler = Sampler(generator, simulation, 10, 1, seed=1)
    before = sampler.attemptMove()
    generator.flow.location += 0.1
    after = sampler.attemptMove()
    expected = before.proposed_log_prob if before.accepted else before.log_prob
    assert after.log_prob == pytest.approx(expected, abs=1e-10)


def test_output_that_the_checkpoint_does_not_know_is_begun_but_not_overwritten(tmp_path):
    simulation = chain()
    Sampler(toys.chain_generator(), simulation, 10, 2, checkpointFile=tmp_path / "chk", checkpointInterval=10)
    simulation.step(10)
    arguments = {"checkpointFile": tmp_path / "chk", "resume": True}
    for name in ("logFile", "trajectoryFile"):
        (tmp_path / "old").write_text("precious")
        with pytest.raises(InputError, match="not empty"):
            Sampler(toys.chain_generator(), chain(), 10, 2, **arguments, **{name: tmp_path / "old"})
        assert (tmp_path / "old").read_text() == "precious"
    simulation = chain()
    Sampler(toys.chain_generator(), simulation, 10, 2, logFile=tmp_path / "new", **arguments)
    simulation.step(10)
    assert [line.split(",")[0] for line in (tmp_path / "new").read_text().splitlines()] == ['"Step"', "20", "20"]


def test_same_seed_same_run_and_other_seed_another(tmp_path):
    results = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        simulation = chain()
        Sampler(toys.chain_generator(), simulation, 10, 3, seed=seed, logFile=tmp_path / name)
        simulation.step(50)
        results.append((tmp_path / name).read_text())
    assert results[0] == results[1] != results[2]


def test_checkpoints_that_do_not_fit_are_refused(tmp_path):
    run(tmp_path, 50)
    arguments = {"checkpointFile": tmp_path / "bg.chk", "resume": True}
    other = toys.chain_generator()
    other.flow.location += 0.01
    with pytest.raises(InputError, match="another generator"):
        Sampler(other, chain(), 10, 3, **arguments)
    with pytest.raises(InputError, match="stepsPerIteration=10"):
        Sampler(toys.chain_generator(), chain(), 20, 3, **arguments)
    with pytest.raises(InputError, match="proposalsPerIteration=3"):
        Sampler(toys.chain_generator(), chain(), 10, 4, **arguments)
    with pytest.raises(InputError, match="twoStage=False"):
        Sampler(toys.chain_generator(), chain(), 10, 3, **arguments, energy=toys.CheapChain())
    with pytest.raises(InputError, match="adaptationIterations=0"):
        Sampler(toys.chain_generator(), chain(), 10, 3, **arguments, adaptationIterations=4)
    with pytest.raises(InputError, match="does not fit"):
        Sampler(toys.chain_generator(), chain(platform="CPU"), 10, 3, **arguments)
    (tmp_path / "bg.csv").write_text("")
    with pytest.raises(InputError, match="belongs to the checkpoint"):
        Sampler(toys.chain_generator(), chain(), 10, 3, logFile=tmp_path / "bg.csv", **arguments)
    with pytest.raises(InputError, match="no file"):
        Sampler(toys.chain_generator(), chain(), 10, 3, checkpointFile=tmp_path / "none", resume=True)
    (tmp_path / "bg.chk").write_bytes(b"garbage")
    with pytest.raises(InputError, match="damaged"):
        Sampler(toys.chain_generator(), chain(), 10, 3, **arguments)


def test_checkpoints_of_the_first_format_are_refused_in_a_sentence(tmp_path):
    run(tmp_path, 50)
    with np.load(tmp_path / "bg.chk") as file:
        arrays = dict(file)
    header = json.loads(arrays.pop("header").item())
    save_arrays(tmp_path / "old.chk", {**header, "format": 1}, **arrays)
    with pytest.raises(InputError, match="another version of openmm_bg; start a new run from its last conformation"):
        Sampler(toys.chain_generator(), chain(), 10, 3, checkpointFile=tmp_path / "old.chk", resume=True)


def test_units_are_openmms():
    assert toys.KT == pytest.approx((unit.MOLAR_GAS_CONSTANT_R * 300 * unit.kelvin)._value / 1000)
