"""The decoupled System against the true one and the molecule in vacuum; the integrator against its own reversal."""

from __future__ import annotations

import numpy as np
import openmm
import pytest
import toys
from openmm import app, unit

import openmm_bg as bg
from openmm_bg.app.decoupling import (
    ELECTROSTATICS,
    STERICS,
    decoupled_context,
    decoupled_system,
    propagate,
    switching_integrator,
)
from openmm_bg.errors import InputError
from openmm_bg.sampling.switching import schedule

REFERENCE = openmm.Platform.getPlatform("Reference")
ATOMS = np.arange(22)


@pytest.fixture(scope="module")
def solvated():
    """Alanine dipeptide and four waters with a virtual site each."""
    molecule = bg.systems.load("alanine_dipeptide")
    forcefield = app.ForceField("amber99sbildn.xml", "tip4pew.xml")
    modeller = app.Modeller(molecule.topology, molecule.positions * unit.nanometer)
    modeller.addSolvent(forcefield, model="tip4pew", boxSize=openmm.Vec3(2, 2, 2) * unit.nanometer)
    modeller.delete([residue for residue in modeller.topology.residues() if residue.name == "HOH"][4:])
    return modeller.topology, np.array(modeller.positions.value_in_unit(unit.nanometer)), forcefield


def system_of(solvated, method=app.PME, **options):
    topology, _, forcefield = solvated
    return forcefield.createSystem(topology, nonbondedMethod=method, nonbondedCutoff=0.8 * unit.nanometer, **options)


def energy(context, positions, coupling=None):
    context.setPositions(positions)
    if coupling is not None:
        context.setParameter(ELECTROSTATICS, coupling)
        context.setParameter(STERICS, coupling)
    return context.getState(energy=True).getPotentialEnergy()._value


def context_of(system):
    return openmm.Context(system, openmm.VerletIntegrator(0.001), REFERENCE)


@pytest.mark.parametrize("method", [app.NoCutoff, app.CutoffNonPeriodic, app.CutoffPeriodic, app.Ewald, app.PME])
def test_energies_of_the_two_ends(solvated, method):
    _, x, forcefield = solvated
    system = system_of(solvated, method)
    true, switched = context_of(system), context_of(decoupled_system(system, ATOMS))
    y = x + 0.002 * np.random.default_rng(0).normal(size=x.shape)
    difference = energy(true, y) - energy(true, x)
    assert energy(switched, y, 1) - energy(switched, x, 1) == pytest.approx(difference, abs=1e-6)
    # decoupled, the molecule may stand anywhere
    moved = x.copy()
    moved[ATOMS] = y[ATOMS] + [0.3, 0.5, -0.2]
    again = moved.copy()
    again[ATOMS] -= 0.4
    assert energy(switched, moved, 0) == pytest.approx(energy(switched, again, 0), abs=1e-6)
    assert abs(energy(switched, moved, 0.5) - energy(switched, again, 0.5)) > 1e-3
    if method in (app.NoCutoff, app.Ewald, app.PME):  # a reaction field acts inside molecules as well
        vacuum = forcefield.createSystem(bg.systems.load("alanine_dipeptide").topology, nonbondedMethod=app.NoCutoff)
        alone = context_of(vacuum)
        inside = energy(alone, y[ATOMS]) - energy(alone, x[ATOMS])
        assert energy(switched, moved, 0) - energy(switched, x, 0) == pytest.approx(inside, abs=1e-6)


def test_implicit_solvent_is_decoupled_as_well():
    system = toys.chain_system()
    nonbonded, solvent = openmm.NonbondedForce(), openmm.GBSAOBCForce()
    for index in range(6):
        if index > 3:
            system.addParticle(16.0)
        nonbonded.addParticle((-1) ** index * 0.3, 0.3, 0.5)
        solvent.addParticle((-1) ** index * 0.3, 0.15, 0.8)
    system.addForce(nonbonded)
    system.addForce(solvent)
    x = np.concatenate([toys.CHAIN_POSITIONS, [[0.5, 0.2, 0.1], [-0.4, -0.1, 0.5]]])
    y = x + 0.01 * np.random.default_rng(0).normal(size=x.shape)
    true, switched = context_of(system), context_of(decoupled_system(system, np.arange(4)))
    difference = energy(true, y) - energy(true, x)
    assert energy(switched, y, 1) - energy(switched, x, 1) == pytest.approx(difference, abs=1e-4)
    moved = x + np.array([[0.2, 0.1, 0.0]] * 4 + [[0.0] * 3] * 2)
    assert energy(switched, moved, 0) == pytest.approx(energy(switched, x, 0), abs=1e-9)


def test_forces_of_other_groups_and_forces_that_act_on_box_or_velocities_are_left_out(solvated):
    system = system_of(solvated)
    system.getForce(0).setForceGroup(7)
    system.addForce(openmm.MonteCarloBarostat(1, 300))
    names = {type(force).__name__ for force in decoupled_system(system, ATOMS, groups=~(1 << 7)).getForces()}
    assert not names & {"MonteCarloBarostat", "CMMotionRemover", type(system.getForce(0)).__name__}
    assert system.getNumForces() == 6


def test_refusals(solvated):
    def refused(text, change, atoms=ATOMS):
        system = system_of(solvated)
        change(system)
        with pytest.raises(InputError, match=text):
            decoupled_system(system, atoms)

    def nonbonded(system):
        (force,) = (force for force in system.getForces() if isinstance(force, openmm.NonbondedForce))
        return force

    refused("whole System", lambda system: None, np.arange(system_of(solvated).getNumParticles()))
    refused("GayBerneForce", lambda system: system.addForce(openmm.GayBerneForce()))
    refused("2 NonbondedForces", lambda system: system.addForce(openmm.NonbondedForce()))
    refused("LJPME", lambda system: nonbonded(system).setNonbondedMethod(openmm.NonbondedForce.LJPME))


def test_reversed_velocities_lead_back_through_every_step(solvated):
    """With constraints in the molecule, rigid water, virtual sites and a particle without a mass."""
    _, x, _ = solvated
    system = system_of(solvated, constraints=app.HBonds)
    system.setParticleMass(0, 0.0)
    for index in reversed(range(system.getNumConstraints())):
        if 0 in system.getConstraintParameters(index)[:2]:
            system.removeConstraint(index)
    steps, tolerance = 30, 1e-10
    integrator = switching_integrator(schedule(steps), 0.002, tolerance)
    context = decoupled_context(context_of(system), decoupled_system(system, ATOMS), integrator)

    def go(order):
        propagate(integrator, order)
        state = context.getState(positions=True, velocities=True)
        return state.getPositions(asNumpy=True)._value, state.getVelocities(asNumpy=True)._value

    context.setPositions(x)
    context.applyConstraints(tolerance)
    context.setVelocitiesToTemperature(300, 1)
    start = context.getState(positions=True).getPositions(asNumpy=True)._value
    arrived, velocities = go(range(steps))
    assert context.getParameter(ELECTROSTATICS) == context.getParameter(STERICS) == 0
    assert np.abs(arrived - start).max() > 0.01
    np.testing.assert_array_equal(arrived[0], start[0])
    for index in range(system.getNumConstraints()):
        i, j, distance = system.getConstraintParameters(index)
        assert np.linalg.norm(arrived[i] - arrived[j]) == pytest.approx(distance._value, rel=1e-7)
    sites = [i for i in range(system.getNumParticles()) if system.isVirtualSite(i)]
    assert len(sites) == 4
    for i in sites:
        site = system.getVirtualSite(i)
        parents = [site.getParticle(k) for k in range(3)]
        weights = [site.getWeight(k) for k in range(3)]
        np.testing.assert_allclose(arrived[i], np.dot(weights, arrived[parents]), atol=1e-9)
    context.setVelocities(-velocities)
    back, _ = go(range(steps)[::-1])
    np.testing.assert_allclose(back, start, atol=1e-9)
    # the couplings of another order do not lead back
    context.setPositions(arrived)
    context.setVelocities(-velocities)
    assert np.abs(go(range(steps))[0] - start).max() > 1e-4


def test_total_energy_is_conserved_without_switching(solvated):
    """Over 0.2 ps with rigid water and constrained hydrogens, at fixed full coupling: within the step's own error."""
    _, x, _ = solvated
    system = system_of(solvated, constraints=app.HBonds)
    integrator = switching_integrator(np.ones((20, 2)), 0.0005, 1e-10)
    context = decoupled_context(context_of(system), decoupled_system(system, ATOMS), integrator)
    context.setPositions(x)
    openmm.LocalEnergyMinimizer.minimize(context, maxIterations=50)
    context.setVelocitiesToTemperature(300, 1)
    totals = []
    for _ in range(20):
        propagate(integrator, range(20))
        state = context.getState(energy=True)
        totals.append((state.getPotentialEnergy() + state.getKineticEnergy())._value)
    assert np.std(totals) < 0.3
