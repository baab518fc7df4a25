"""Switching moves: exact averages of a chain among charged particles, and what must not change in water."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import numpy as np
import openmm
import pytest
import torch
import toys
from openmm import app, unit
from toys import KT

import openmm_bg as bg
from openmm_bg.app import switching, switching_walker
from openmm_bg.app.decoupling import ELECTROSTATICS, STERICS
from openmm_bg.app.switching import SwitchingSampler
from openmm_bg.coordinates import InternalCoordinates
from openmm_bg.errors import InputError
from openmm_bg.sampling.switching import Switch

DATA = Path(__file__).resolve().parents[1] / "data"
REFERENCE = openmm.Platform.getPlatform("Reference")

# -- the chain of four atoms among three particles in a periodic box

BOX, BATH = 1.3, 3
BIAS, BIAS_PHASE = 4.0, 2.5  # kJ/mol on the torsion, known to the simulation's Context alone


def surrounded():
    system = toys.chain_system()
    bias = openmm.PeriodicTorsionForce()
    bias.addTorsion(0, 1, 2, 3, 1, BIAS_PHASE, 0.0)
    system.addForce(bias)
    nonbonded = openmm.NonbondedForce()
    nonbonded.setNonbondedMethod(openmm.NonbondedForce.PME)
    nonbonded.setCutoffDistance(0.49 * BOX)
    nonbonded.setPMEParameters(4.5, 10, 10, 10)  # coarse: this is the energy, whether accurate or not
    nonbonded.setUseDispersionCorrection(False)
    for charge in (0.12, -0.12, 0.12, -0.12):
        nonbonded.addParticle(charge, 0.3, 0.5)
    for charge in (0.12, -0.12, 0.0)[:BATH]:
        system.addParticle(20.0)
        nonbonded.addParticle(charge, 0.32, 1.0)
    for i in range(4):
        for j in range(i):
            nonbonded.addException(i, j, 0, 1, 0)
    system.addForce(nonbonded)
    system.setDefaultPeriodicBoxVectors((BOX, 0, 0), (0, BOX, 0), (0, 0, BOX))
    return system


def surrounded_topology():
    topology = toys.chain_topology()
    for _ in range(BATH):
        topology.addAtom("AR", app.element.argon, topology.addResidue("AR", topology.addChain()))
    return topology


SURROUNDED = np.concatenate([toys.CHAIN_POSITIONS, [[0.6, 0.2, 0.1], [-0.4, -0.1, 0.5], [0.2, 0.6, -0.3]]])


def bias_on(simulation):
    """Change a force where only the simulation's Context sees it, as metadynamics does."""
    force = simulation.system.getForce(3)
    force.setTorsionParameters(0, 0, 1, 2, 3, 1, BIAS_PHASE, BIAS)
    force.updateParametersInContext(simulation.context)


def surrounded_sampler(timeStep=0.01, steps=4, tries=4, generator=None, **options):
    simulation = toys.simulation_of(surrounded(), surrounded_topology(), SURROUNDED, time_step=timeStep)
    generator = toys.chain_generator() if generator is None else generator
    return SwitchingSampler(generator, simulation, range(4), steps, 10, 1, tries, seed=1, **options)


def observables(x):
    """Torsion, variance of the bonds in units of the unperturbed one, angles, and particles near the last atom."""
    q = InternalCoordinates(toys.chain_zmatrix())(torch.tensor(x[:, :4]))[0].numpy()
    bonds = (((q[:, :3] - toys.BOND) / toys.BOND_SIGMA) ** 2).mean(1)
    d = x[:, 4:] - x[:, 3:4]
    near = np.exp(-10 * ((d - BOX * np.round(d / BOX)) ** 2).sum(2)).sum(1)
    return np.stack([np.cos(q[:, 5]), np.sin(q[:, 5]), bonds, np.cos(q[:, 3:5]).mean(1), near], axis=1)


def draw(grid, log_density, n, rng):
    cumulative = np.exp(log_density - log_density.max()).cumsum()
    return np.interp(rng.random(n) * cumulative[-1], cumulative, grid)


@pytest.fixture(scope="module")
def equilibrium():
    """Conformations (n, 7, 3) and their weights: the chain on its own, particles anywhere, then importance sampling."""
    rng, n = np.random.default_rng(0), 6000
    r, theta, phi = (
        np.linspace(0.08, 0.22, 4001),
        np.linspace(1e-3, np.pi - 1e-3, 4001),
        np.linspace(-np.pi, np.pi, 4001),
    )
    bonds = [draw(r, -0.5 * ((r - toys.BOND) / toys.BOND_SIGMA) ** 2 + 2 * np.log(r), n, rng) for _ in range(3)]
    angles = [
        draw(theta, -0.5 * ((theta - toys.ANGLE) / toys.ANGLE_SIGMA) ** 2 + np.log(np.sin(theta)), n, rng)
        for _ in range(2)
    ]
    torsion = draw(
        phi, -(toys.TORSION * np.cos(phi - toys.TORSION_PHASE) + BIAS * np.cos(phi - BIAS_PHASE)) / KT, n, rng
    )
    q = torch.tensor(np.stack([*bonds, *angles, torsion], axis=1))
    chain = InternalCoordinates(toys.chain_zmatrix()).inverse(q)[0].numpy()
    turns = np.linalg.qr(rng.normal(size=(n, 3, 3)))[0]
    turns *= np.linalg.det(turns)[:, None, None]  # rotations
    chain = chain @ turns + BOX * rng.random((n, 1, 3))
    x = np.concatenate([chain, BOX * rng.random((n, BATH, 3))], axis=1)
    system = surrounded()
    for index in reversed(range(4)):
        system.removeForce(index)
    context = openmm.Context(system, openmm.VerletIntegrator(0.001), REFERENCE)
    log_w = np.array([-energy(context, positions) / KT for positions in x])
    weights = np.exp(log_w - log_w.max())
    return x, weights / weights.sum()


def energy(context, positions, **parameters):
    context.setPositions(positions)
    for name, value in parameters.items():
        context.setParameter(name, value)
    return context.getState(energy=True).getPotentialEnergy()._value


def deviation(sampler, equilibrium, starts=25, moves=7, burn=3):
    """Of the observables after some moves from equilibrium, in standard errors over independent starts."""
    x, weights = equilibrium
    exact = weights @ observables(x)
    bias_on(sampler.simulation)
    means = []
    for start in x[np.random.default_rng(5).choice(len(x), size=starts, p=weights)]:
        sampler.simulation.context.setPositions(start)
        frames = [sampler.attemptMoves() and toys.positions_of(sampler.simulation) for _ in range(moves)]
        means.append(observables(np.array(frames[burn:])).mean(0))
    means = np.array(means)
    return (means.mean(0) - exact) / (means.std(0, ddof=1) / math.sqrt(starts))


@pytest.mark.parametrize(("timeStep", "steps", "tries"), [(0.01, 4, 1), (0.028, 3, 4)], ids=["one try", "large step"])
def test_averages_are_exact(equilibrium, timeStep, steps, tries):
    sampler = surrounded_sampler(timeStep, steps, tries)
    assert np.abs(deviation(sampler, equilibrium)).max() < 3.5
    assert sampler.acceptanceRate > 0.1


def perturbation_work_only(walker, steps):
    """Faulty: the work of changing the coupling and what the ends need, without the work of the finite time step."""
    context, couplings = walker._decoupled, np.concatenate([[[1, 1]], walker._couplings])

    def potential(row):
        for name, value in zip((ELECTROSTATICS, STERICS), couplings[row].tolist(), strict=True):
            context.setParameter(name, value)
        return context.getState(energy=True).getPotentialEnergy()._value / walker._kT

    walker.draw_velocities()
    work = potential(0) - walker.energy()
    for k in range(steps):
        work += potential(k + 1) - potential(k)
        walker.propagate(range(k, k + 1))
    middle = walker.propose()
    walker.draw_velocities()
    for k in reversed(range(steps)):
        walker.propagate(range(k, k - 1, -1))
        work += potential(k) - potential(k + 1)
    work += walker.energy() - potential(0)
    return Switch(work, work, middle.log_ratio - work)


def test_averages_are_wrong_without_the_shadow_work(equilibrium, monkeypatch):
    monkeypatch.setattr(switching_walker, "switch", perturbation_work_only)
    z = deviation(surrounded_sampler(0.028, 3), equilibrium)
    assert z[2] < -5


def test_averages_are_wrong_without_the_true_energy_of_the_ends(equilibrium, monkeypatch):
    class Switched(switching_walker.SwitchingWalker):
        def energy(self):
            super().energy()
            return energy(self._decoupled, self._end, lambda_electrostatics=1, lambda_sterics=1) / self._kT

    monkeypatch.setattr(switching, "SwitchingWalker", Switched)
    assert np.abs(deviation(surrounded_sampler(), equilibrium)[:2]).max() > 6


def test_averages_are_wrong_without_the_density(equilibrium):
    generator = toys.chain_generator()
    generator.flow.location[5], generator.flow.scale[5] = 0.0, 0.9  # beside where the torsion is found
    sampler = surrounded_sampler(steps=1, tries=6, generator=generator)
    queue = sampler._proposals
    take, queue.log_prob = queue.take, lambda positions: 0.0
    queue.take = lambda n, at: (take(n, at)[0], np.zeros(n))
    assert np.abs(deviation(sampler, equilibrium, starts=80)).max() > 5


@pytest.mark.slow
@pytest.mark.parametrize("massMetric", [True, False])
def test_constrained_trimer_has_the_mass_metric_measure(massMetric):
    """Two constrained bonds, no potential, and a particle beside: <cos^2> needs the term of the density."""
    system, topology, generator, positions = toys.trimer()
    if not massMetric:
        generator.coordinates.mass_metric = None
    nonbonded = openmm.NonbondedForce()
    for _ in range(3):
        nonbonded.addParticle(0, 0.3, 0)
    system.addParticle(20.0)
    nonbonded.addParticle(0, 0.3, 0)
    system.addForce(nonbonded)
    topology.addAtom("AR", app.element.argon, topology.addResidue("AR", topology.addChain()))
    positions = np.concatenate([positions, [[1.0, 0, 0]]])
    simulation = toys.simulation_of(system, topology, positions)
    sampler = SwitchingSampler(generator, simulation, range(3), 1, 10, 1, 2, 0.004, seed=3)
    values = []
    for _ in range(2000):
        sampler.attemptMoves()
        x = toys.positions_of(simulation)
        values.append(((x[0] - x[1]) @ (x[2] - x[1]) / (0.1 * 0.12)) ** 2)
    blocks = np.reshape(values, (50, -1)).mean(1)
    error = blocks.std(ddof=1) / math.sqrt(50)
    if massMetric:
        assert abs(blocks.mean() - 0.2947) < 3 * error
    else:
        assert blocks.mean() - 0.2947 > 3 * error


# -- what a move leaves alone


def everything(simulation):
    state = simulation.context.getState(positions=True, velocities=True, parameters=True)
    x, v = state.getPositions(asNumpy=True)._value, state.getVelocities(asNumpy=True)._value
    return x, v, state.getStepCount(), state.getTime()._value, state.getPeriodicBoxVectors(asNumpy=True)._value


def test_a_rejected_move_leaves_everything_bit_identical(monkeypatch):
    sampler = surrounded_sampler()
    sampler.simulation.context.setVelocitiesToTemperature(300, 2)
    before = everything(sampler.simulation)
    monkeypatch.setattr(switching_walker, "accept", lambda ratio, rng: False)
    attempts = sampler.attemptMoves(3)
    assert all(math.isfinite(attempt.log_acceptance) for attempt in attempts)
    for old, new in zip(before, everything(sampler.simulation), strict=True):
        np.testing.assert_array_equal(old, new)
    assert sampler.numAccepted == 0 and sampler.numProposed == 3


def test_the_box_of_a_simulation_at_constant_pressure_is_the_one_of_the_move():
    system = surrounded()
    system.addForce(openmm.MonteCarloBarostat(50.0, toys.TEMPERATURE, 5))
    simulation = toys.simulation_of(system, surrounded_topology(), SURROUNDED, time_step=0.002)
    sampler = SwitchingSampler(toys.chain_generator(), simulation, range(4), 4, 50, 2, seed=1)
    boxes = []

    def look(sampler):
        boxes.append(
            [everything(simulation)[4], sampler._decoupled.getState().getPeriodicBoxVectors(asNumpy=True)._value]
        )

    sampler.reporters.append(look)
    simulation.step(500)
    boxes = np.array(boxes)
    assert len(np.unique(boxes[:, 0, 0, 0])) > 3, "the barostat acts in the dynamics"
    np.testing.assert_array_equal(boxes[:, 0], boxes[:, 1])
    assert sampler.numProposed == 20 and sampler.numAccepted > 0
    box = everything(simulation)[4]
    accepted = sampler.numAccepted
    while sampler.numAccepted == accepted:
        sampler.attemptMoves()
    np.testing.assert_array_equal(everything(simulation)[4], box)
    assert simulation.currentStep == 500


def test_a_protocol_that_blows_up_is_rejected():
    sampler = surrounded_sampler(switchingStepSize=5.0)
    before = everything(sampler.simulation)
    attempts = sampler.attemptMoves(3)
    assert not any(attempt.accepted for attempt in attempts) and math.isnan(sampler.workMean)
    np.testing.assert_array_equal(before[0], everything(sampler.simulation)[0])


def test_a_conformation_that_the_generator_cannot_make_is_refused():
    sampler = surrounded_sampler()
    sampler._proposals.log_prob = lambda positions: -math.inf
    (attempt,) = sampler.attemptMoves(1)
    assert attempt.refused and not attempt.accepted and attempt.tried == 0 and sampler.numRefused == 1


def test_log_statistics_and_seed(tmp_path):
    samplers = []
    for name in ("one.csv", "two.csv"):
        sampler = surrounded_sampler(logFile=tmp_path / name)
        sampler.simulation.step(60)
        samplers.append(sampler)
    assert (tmp_path / "one.csv").read_bytes() == (tmp_path / "two.csv").read_bytes()
    rows = list(csv.DictReader((tmp_path / "one.csv").open()))
    assert len(rows) == 6 == sampler.numProposed
    works = -np.array([float(row["Log Acceptance"]) for row in rows])
    assert sampler.workMean == pytest.approx(works.mean()) and sampler.workStd == pytest.approx(works.std(ddof=1))
    assert sampler.statistics["switching"].accepted == sum(int(row["Accepted"]) for row in rows) == sampler.numAccepted
    assert all(math.isfinite(float(row["Decoupling Work (kT)"]) + float(row["Recoupling Work (kT)"])) for row in rows)


def test_a_resumed_run_gives_the_numbers_of_one_that_was_not_interrupted(tmp_path):
    files = {name: tmp_path / f"{name}.x" for name in ("logFile", "checkpointFile")}
    whole = surrounded_sampler(logFile=tmp_path / "whole.csv")
    whole.simulation.step(40)
    first = surrounded_sampler(**files, checkpointInterval=20)
    first.simulation.step(30)
    second = surrounded_sampler(**files, checkpointInterval=20, resume=True)
    second.simulation.step(20)
    assert (tmp_path / "whole.csv").read_bytes() == files["logFile"].read_bytes()
    np.testing.assert_array_equal(everything(whole.simulation)[0], everything(second.simulation)[0])
    assert second.statistics == whole.statistics


# -- explicit water


def test_alanine_dipeptide_in_water():
    molecule = bg.systems.load("alanine_dipeptide")
    modeller = app.Modeller(molecule.topology, molecule.positions * unit.nanometer)
    forcefield = app.ForceField("amber99sbildn.xml", "tip3p.xml")
    modeller.addSolvent(forcefield, boxSize=openmm.Vec3(2, 2, 2) * unit.nanometer)
    system = forcefield.createSystem(modeller.topology, nonbondedMethod=app.PME, nonbondedCutoff=0.8 * unit.nanometer)
    system.addForce(openmm.MonteCarloBarostat(1.0, 300))
    simulation = toys.simulation_of(system, modeller.topology, None, "CPU")
    simulation.context.setPositions(modeller.positions)
    simulation.minimizeEnergy(maxIterations=20)
    simulation.context.setVelocitiesToTemperature(300, 1)
    generator = bg.BoltzmannGenerator.load(DATA / "alanine_small.bg")
    sampler = SwitchingSampler(generator, simulation, range(22), 10, 5, seed=1)
    simulation.step(10)
    assert sampler.numProposed == 2 and math.isfinite(sampler.workMean)


# -- refusals


def test_refusals():
    def refused(text, *changes, atoms=range(4), **options):
        system = surrounded()
        for change in changes:
            change(system)
        simulation = toys.simulation_of(system, surrounded_topology(), SURROUNDED)
        with pytest.raises(InputError, match=text):
            SwitchingSampler(toys.chain_generator(), simulation, atoms, **{"switchingSteps": 4, **options})
        assert not simulation.reporters

    refused("Give atoms=", atoms=None)
    refused("makes 4 atoms", atoms=range(3))
    refused("only one belongs to the generator", lambda system: system.addConstraint(3, 4, 0.3))
    refused("constrains 1 distances", lambda system: system.addConstraint(0, 1, toys.BOND))
    refused("CustomNonbondedForce", lambda system: system.addForce(custom_nonbonded()))
    refused("switchingSteps must be a positive", switchingSteps=0)
    refused("proposalsPerMove must be a positive", proposalsPerMove=0.5)
    refused(r"shape \(4, 2\)", couplings=[[1, 0]])
    refused("positive finite number", switchingStepSize=-1)
    simulation = app.Simulation(surrounded_topology(), surrounded(), openmm.VerletIntegrator(0.001), REFERENCE)
    with pytest.raises(InputError, match="has no temperature"):
        SwitchingSampler(toys.chain_generator(), simulation, range(4), 4)


def custom_nonbonded():
    force = openmm.CustomNonbondedForce("r")
    for _ in range(4 + BATH):
        force.addParticle([])
    return force
