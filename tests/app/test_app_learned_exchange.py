"""Learned exchange beside openmm.app: exact averages, and what an exchange leaves alone."""

from __future__ import annotations

import csv
import math
import warnings

import numpy as np
import openmm
import pytest
import torch
import toys
from openmm import app, unit
from toys import FACTOR, HOT, KT, TEMPERATURE, JacobianDropped, exact_chain

import openmm_bg as bg
from openmm_bg.app import LearnedReplicaExchangeSampler
from openmm_bg.coordinates import InternalCoordinates
from openmm_bg.flows import Base, Composition, ConditionalWhitening, Flow, MolecularFlow
from openmm_bg.sampling import GeneratorMap, log_exchange_acceptance

# -- the chain of four atoms at two temperatures, and generators that learned neither well


def chain_generator(temperature, seed, coordinates=InternalCoordinates, topology=True):
    """Centres and scales of the force field, and random weights on top."""
    flow = MolecularFlow(6, [5], {}, [], layers=2, hidden=8, torsion_hidden=8, seed=seed).double()
    scale = math.sqrt(temperature / TEMPERATURE)
    scales = torch.tensor([toys.BOND_SIGMA] * 3 + [toys.ANGLE_SIGMA] * 2 + [0.5], dtype=torch.float64) * scale
    centre = torch.tensor([toys.BOND] * 3 + [toys.ANGLE] * 2 + [toys.TORSION_PHASE + math.pi], dtype=torch.float64)
    flow.initialize_at(centre, scales)
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=random, dtype=parameter.dtype)
    return bg.BoltzmannGenerator(
        None,
        flow,
        coordinates(toys.chain_zmatrix(), compile=False),
        topology=toys.chain_topology() if topology else None,
    )


def plain_generator(temperature, shift=1.0):
    """A linear map of all coordinates: quick. The torsion is that of all temperatures: no image leaves the circle."""
    scale = math.sqrt(temperature / TEMPERATURE)
    linear = ConditionalWhitening(6).double()
    linear.set_scales(
        torch.tensor([toys.BOND + 0.004 * shift] * 3 + [toys.ANGLE - 0.05 * shift] * 2 + [0.0], dtype=torch.float64),
        torch.tensor([toys.BOND_SIGMA] * 3 + [toys.ANGLE_SIGMA] * 2 + [1 / scale], dtype=torch.float64) * scale,
    )
    coordinates = InternalCoordinates(toys.chain_zmatrix(), compile=False)
    flow = Flow(Base([False] * 6), Composition([linear]))
    return bg.BoltzmannGenerator(None, flow, coordinates, topology=toys.chain_topology())


def chain_deviations(coordinates=InternalCoordinates, walkers=2000, steps=20, burn=5):
    """The rule on many walkers in Cartesian coordinates; moments of the cold one in standard errors."""
    pair = GeneratorMap(chain_generator(HOT, 1, coordinates), chain_generator(TEMPERATURE, 2, coordinates))
    inner = InternalCoordinates(toys.chain_zmatrix(), compile=False)
    rng = np.random.default_rng(0)

    def place(q):
        return inner.inverse(torch.from_numpy(q))[0]

    def reduced(x, factor):
        q, log_volume = inner(x)
        return np.where(torch.isfinite(log_volume), toys.chain_energy(q.numpy()) / factor, np.inf)

    cold = place(exact_chain(walkers, 1.0, rng))
    total, accepted = 0.0, 0.0
    for step in range(steps):
        hot = place(exact_chain(walkers, FACTOR, rng))
        (new_cold, log_det), (new_hot, log_det_inverse) = pair.exchange(hot, cold)
        ratio = log_exchange_acceptance(
            reduced(hot, FACTOR), reduced(cold, 1.0), reduced(new_hot, FACTOR), reduced(new_cold, 1.0),
            log_det, log_det_inverse,
        )  # fmt: skip
        yes = torch.from_numpy(-rng.standard_exponential(walkers) <= ratio)
        cold = torch.where(yes[:, None, None], new_cold, cold)
        accepted += float(yes.double().mean()) / steps
        if step >= burn:
            total = total + toys.chain_moments(inner(cold)[0].numpy()) / (steps - burn)
    return (total.mean(0) - toys.chain_exact()) / (total.std(0, ddof=1) / math.sqrt(walkers)), accepted


def test_chain_moments_are_exact():
    found, accepted = chain_deviations()
    assert np.abs(found).max() < 3.5
    assert accepted > 0.1


def test_chain_moments_are_wrong_without_the_volume_element():
    found, _ = chain_deviations(JacobianDropped)
    assert np.abs(found).max() > 10


# -- the same through a Simulation


class ExactHot:
    """Instead of dynamics: the replica in the last state is drawn anew, the others do nothing of their own."""

    def simulateReplica(self, index, steps=None):
        if self.replicaStateIndex[index] != len(self.states) - 1:
            context = self.simulation.context
            context.setState(self.replicaConformation[index])
            return
        self._draws = getattr(self, "_draws", np.random.default_rng(11))
        q = torch.from_numpy(exact_chain(1, FACTOR, self._draws))
        context = self.simulation.context
        context.setState(self.replicaConformation[index])
        generator = self._maps.generators[-1]
        at = torch.from_numpy(toys.positions_of(self.simulation)[self._maps.atoms])[None]
        x = toys.positions_of(self.simulation).copy()
        x[self._maps.atoms] = generator.place(q, generator.frame(at))[0].numpy()
        context.setPositions(x)
        self.replicaConformation[index] = context.getState(positions=True, velocities=True, parameters=True)


class ExactHotSampler(ExactHot, LearnedReplicaExchangeSampler):
    pass


TEMPERATURES = [{"temperature": TEMPERATURE * unit.kelvin}, {"temperature": HOT}]


def chain_sampler(kind=LearnedReplicaExchangeSampler, states=TEMPERATURES, generators=None, **options):
    simulation = toys.simulation_of(toys.chain_system(), toys.chain_topology(), toys.CHAIN_POSITIONS)
    if generators is None:
        generators = [plain_generator(TEMPERATURE), plain_generator(HOT, 0)]
    return kind(states, simulation, 5, generators, seed=3, **options)


@pytest.fixture(scope="module")
def exchanged():
    """A run of exchanges alone: the sampler, positions of the cold replica, kinetic energies after exchanges."""
    sampler = chain_sampler(ExactHotSampler)
    frames, kinetic = [], {0: [], 1: []}
    sampler.reporters.append(lambda s: frames.append(s._positions(s.replicaStateIndex.index(0))))
    masses = np.array([12.0, 16.0, 16.0, 12.0])[:, None]
    for _ in range(400):
        sampler.simulate(1)
        # or the base class would rescale velocities that are new
        assert sampler._previousReplicaStateIndex == sampler.replicaStateIndex
        if sampler.lastAttempts[0].accepted:
            for state, conformation in zip(sampler.replicaStateIndex, sampler.replicaConformation, strict=True):
                kinetic[state].append(0.5 * np.sum(masses * conformation.getVelocities(asNumpy=True)._value ** 2))
    return sampler, np.array(frames), kinetic


def test_the_cold_replica_of_a_sampler_has_exact_moments(exchanged):
    sampler, frames, _ = exchanged
    q = InternalCoordinates(toys.chain_zmatrix(), compile=False)(torch.from_numpy(frames))[0].numpy()
    blocks = toys.chain_moments(q).reshape(20, 20, 4).mean(1)
    deviation = (blocks.mean(0) - toys.chain_exact()) / (blocks.std(0, ddof=1) / math.sqrt(20))
    assert np.abs(deviation).max() < 3.5
    statistics = sampler.statistics
    assert statistics.attempts[0, 1] == 400 and statistics.refused[0, 1] == 0
    assert 0.4 < statistics.acceptance[0, 1] < 0.7
    assert statistics.round_trips.sum() > 60


def test_velocities_are_drawn_at_the_temperature_of_the_new_state(exchanged):
    _, _, kinetic = exchanged
    for state, temperature in ((0, TEMPERATURE), (1, HOT)):
        exact = 6 * KT * temperature / TEMPERATURE
        assert len(kinetic[state]) > 120
        assert np.mean(kinetic[state]) == pytest.approx(exact, abs=4 * exact / math.sqrt(6 * len(kinetic[state])))


def test_an_exchange_is_weighed_by_the_energies_of_the_context_and_changes_nothing_else():
    """One attempt, done by hand: with a bystander, a restraint on it, and a Context parameter that scales torsions."""
    system = toys.chain_system()
    system.addParticle(40.0)
    restraint = openmm.CustomExternalForce("100*((x-2)^2+y^2+z^2)")
    restraint.addParticle(4)
    system.addForce(restraint)
    pull = openmm.CustomBondForce("scale*5*(r-0.3)^2")
    pull.addGlobalParameter("scale", 1.0)
    pull.addBond(3, 4)
    system.addForce(pull)
    topology = toys.chain_topology()
    topology.addAtom("AR", app.element.argon, topology.addResidue("AR", topology.addChain()))
    positions = np.concatenate([toys.CHAIN_POSITIONS, [[2.1, 0.1, 0.0]]])
    simulation = toys.simulation_of(system, topology, positions)
    states = [{"temperature": TEMPERATURE, "scale": 1.0}, {"temperature": HOT, "scale": 0.2}]
    generators = [plain_generator(TEMPERATURE), plain_generator(HOT, 0)]
    sampler = LearnedReplicaExchangeSampler(states, simulation, 20, generators, atoms=[0, 1, 2, 3], seed=4)
    tried = []
    attempt = sampler.attemptExchange

    def watched(i, j):
        before = [sampler._positions(k).copy() for k in (0, 1)], sampler.replicaStateIndex[:]
        tried.append((before, attempt(i, j), [sampler._positions(k).copy() for k in (0, 1)]))
        return tried[-1][1]

    sampler.attemptExchange = watched
    sampler.exchangesPerIteration = 2  # the second one starts from what the first one left
    sampler.simulate(30)
    assert 5 < sampler.statistics.accepted[0, 1] < 60
    integrator = openmm.VerletIntegrator(0.001)
    context = openmm.Context(system, integrator, openmm.Platform.getPlatform("Reference"))

    def reduced(x, state):
        context.setParameter("scale", states[state]["scale"])
        context.setPositions(x)
        energy = context.getState(energy=True).getPotentialEnergy()._value
        return energy / (unit.MOLAR_GAS_CONSTANT_R * states[state]["temperature"] * unit.kelvin)._value * 1000

    pair = GeneratorMap(generators[1], generators[0])
    for (x, index), outcome, after in tried:
        hot, cold = index.index(1), index.index(0)
        molecule = [torch.from_numpy(x[k][:4])[None] for k in (hot, cold)]
        (down, log_det), (up, log_det_inverse) = pair.forward(molecule[0]), pair.inverse(molecule[1])
        new = [x[0].copy(), x[1].copy()]
        new[hot][:4], new[cold][:4] = down[0].numpy(), up[0].numpy()
        expected = (
            reduced(x[hot], 1) + reduced(x[cold], 0) - reduced(new[hot], 0) - reduced(new[cold], 1)
            + float(log_det) + float(log_det_inverse)
        )  # fmt: skip
        if math.isfinite(expected):
            assert outcome.mapped and not outcome.refused
            assert outcome.log_acceptance == pytest.approx(expected, abs=1e-8)
        else:
            assert outcome.refused
        for k in (0, 1):
            np.testing.assert_allclose(after[k], new[k] if outcome.accepted else x[k], rtol=0, atol=1e-12)
            np.testing.assert_array_equal(after[k][4], x[k][4])


def test_one_generator_for_all_states_is_ordinary_replica_exchange():
    """Three states, two of them of one generator: these exchange by the rule of the base class, and so does a third."""
    generator = plain_generator(TEMPERATURE)
    states = [{"temperature": t} for t in (300.0, 400.0, 520.0, 900.0)]
    sampler = chain_sampler(states=states, generators=[generator, generator, None, plain_generator(HOT, 0)])
    seen = []
    attempt = sampler.attemptExchange

    def watched(i, j):
        si, sj = sampler.replicaStateIndex[i], sampler.replicaStateIndex[j]
        e, kT = sampler.replicaStateEnergy, sampler._kT
        exponent = (e[i][si] - e[j][si]) / kT[si] + (e[j][sj] - e[i][sj]) / kT[sj]  # as in openmm.app
        before = [sampler._positions(k).copy() for k in (i, j)]
        velocities = [sampler.replicaConformation[k].getVelocities(asNumpy=True)._value.copy() for k in range(4)]
        seen.append((attempt(i, j), exponent, velocities))
        moved = any(not np.array_equal(a, sampler._positions(k)) for a, k in zip(before, (i, j), strict=True))
        assert moved == (seen[-1][0].mapped and seen[-1][0].accepted)
        return seen[-1][0]

    sampler.attemptExchange = watched
    sampler.exchangesPerIteration = 1
    for _ in range(80):
        before = sampler.replicaStateIndex[:]
        sampler.simulate(1)
        outcome, exponent, velocities = seen[-1]
        mapped = set(outcome.states) in ({0, 3}, {1, 3})
        assert outcome.mapped == mapped
        if mapped:
            continue
        assert outcome.log_acceptance == pytest.approx(exponent, abs=1e-10)
        for k, (old, new) in enumerate(zip(before, sampler.replicaStateIndex, strict=True)):
            scale = math.sqrt(states[new]["temperature"] / states[old]["temperature"])
            found = sampler.replicaConformation[k].getVelocities(asNumpy=True)._value
            np.testing.assert_allclose(found, velocities[k] * scale, rtol=1e-12)
    assert sum(outcome.accepted for outcome, *_ in seen if not outcome.mapped) > 20


def test_equal_temperatures_and_equal_generators_always_exchange():
    states = [{"temperature": TEMPERATURE}] * 2
    sampler = chain_sampler(states=states, generators=[plain_generator(TEMPERATURE) for _ in range(2)])
    sampler.simulate(20)
    assert sampler.statistics.acceptance[0, 1] == 1
    assert all(abs(a.log_acceptance) < 1e-9 for a in sampler.lastAttempts)


def test_states_may_share_the_temperature_of_the_integrator():
    system = toys.chain_system()
    bond = openmm.CustomBondForce("scale*100*(r-0.4)^2")
    bond.addGlobalParameter("scale", 1.0)
    bond.addBond(0, 3)
    system.addForce(bond)
    simulation = toys.simulation_of(system, toys.chain_topology(), toys.CHAIN_POSITIONS)
    generators = [plain_generator(TEMPERATURE), plain_generator(TEMPERATURE, 0)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sampler = LearnedReplicaExchangeSampler([{"scale": 1.0}, {"scale": 0.0}], simulation, 5, generators, seed=1)
    sampler.simulate(30)
    assert 0 < sampler.statistics.accepted[0, 1]


def test_reporters_of_openmm_see_the_state_that_made_the_sample(tmp_path):
    sampler = chain_sampler()
    reporter = app.ReplicaExchangeReporter(
        str(tmp_path / "run"), 1, sampler, trajectoryPerState=True, trajectoryPerReplica=True, trajectoryFormat="dcd",
        energy=True, checkpoints=True,
    )  # fmt: skip
    states = []
    sampler.reporters += [reporter, lambda s: states.append(s.replicaStateIndex[:])]
    sampler.simulate(12)
    with open(tmp_path / "run" / "log.csv") as file:
        rows = list(csv.reader(file))[1:]
    assert [[int(value) for value in row[2:]] for row in rows] == states
    assert len({tuple(s) for s in states}) == 2, "some exchange was accepted"
    energies = np.loadtxt(tmp_path / "run" / "energy.csv", delimiter=",").reshape(-1, 2, 2)
    assert np.isfinite(energies).all() and np.allclose(energies[..., 0], energies[..., 1] * FACTOR)
    for name in ("state_0.dcd", "replica_1.dcd"):
        assert (tmp_path / "run" / name).stat().st_size > 1000
    again = chain_sampler()
    app.ReplicaExchangeReporter(str(tmp_path / "run"), 1, again, trajectoryFormat="dcd", resume=True)
    assert again.currentIteration == 12 and again.replicaStateIndex == states[-1]
    again.simulate(2)


def test_a_resumed_run_gives_the_numbers_of_one_that_was_not_interrupted(tmp_path):
    def energies(sampler, n):
        values = []
        sampler.reporters.append(lambda s: values.append([e[0]._value for e in s.replicaStateEnergy]))
        sampler.simulate(n)
        return values

    def new():
        sampler = chain_sampler()
        sampler.simulation.integrator.setRandomNumberSeed(7)
        sampler.simulation.context.reinitialize(preserveState=True)
        return sampler

    whole = new()
    first = energies(whole, 15)
    whole.saveCheckpoint(tmp_path / "chk")
    rest = energies(whole, 15)
    resumed = new()
    resumed.loadCheckpoint(tmp_path / "chk")
    assert resumed.currentIteration == 15
    assert energies(resumed, 15) == rest != first
    assert resumed.statistics.state_dict() == whole.statistics.state_dict()
    other = chain_sampler(generators=[plain_generator(TEMPERATURE, 0), plain_generator(HOT, 0)])
    with pytest.raises(bg.InputError, match="other states or generators"):
        other.loadCheckpoint(tmp_path / "chk")


# -- constraints


def trimer_pair(mass_metric=True):
    """Two generators of one angle whose map doubles the distance from 90 degrees."""
    system, topology, _, positions = toys.trimer()
    coordinates = InternalCoordinates(
        bg.ZMatrix((0, 1, 2), np.zeros((0, 4), dtype=int)),
        constraints=[(0, 1, 0.1), (1, 2, 0.12)],
        masses=toys.TRIMER_MASSES,
        compile=False,
    )
    if not mass_metric:
        coordinates.mass_metric = None
    generators = []
    for width in (0.35, 0.7):
        flow = MolecularFlow(1, [], {}, [], layers=1, hidden=4)
        flow.initialize_at(torch.tensor([math.pi / 2]), torch.tensor([width]))
        generators.append(bg.BoltzmannGenerator(None, flow, coordinates))
    return system, topology, positions, generators


def exact_angles(n, rng):
    theta = np.linspace(0, np.pi, 100_001)
    measure = np.sin(theta) * np.sqrt((5 / 12) ** 2 - (np.cos(theta) / 3) ** 2)
    cumulative = np.cumsum(measure)
    return np.interp(rng.uniform(size=(n, 1)), cumulative / cumulative[-1], theta)


@pytest.mark.parametrize("mass_metric", [True, False])
def test_constrained_trimer_needs_the_mass_metric_term(mass_metric):
    """No potential: what is accepted depends on the measure of the constraint manifold alone."""
    *_, generators = trimer_pair(mass_metric)
    pair, coordinates = GeneratorMap(*generators), generators[0].coordinates
    rng = np.random.default_rng(5)
    walkers, total = 4000, 0.0
    cold = coordinates.inverse(torch.from_numpy(exact_angles(walkers, rng)))[0]
    for step in range(40):
        hot = coordinates.inverse(torch.from_numpy(exact_angles(walkers, rng)))[0]
        (down, log_det), (_, log_det_inverse) = pair.exchange(hot, cold)
        ratio = log_exchange_acceptance(0.0, 0.0, 0.0, 0.0, log_det, log_det_inverse)
        yes = torch.from_numpy(-rng.standard_exponential(walkers) <= ratio)
        cold = torch.where(yes[:, None, None], down, cold)
        if step >= 10:
            total = total + coordinates(cold)[0].cos().square()[:, 0].numpy() / 30
    deviation = (total.mean() - 0.2947) / (total.std(ddof=1) / math.sqrt(walkers))
    assert abs(deviation) < 3.5 if mass_metric else abs(deviation) > 8


def test_constraints_hold_after_an_exchange():
    system, topology, positions, generators = trimer_pair()
    simulation = toys.simulation_of(system, topology, positions)
    states = [{"temperature": HOT}, {"temperature": TEMPERATURE}]
    sampler = LearnedReplicaExchangeSampler(states, simulation, 10, generators, seed=2)
    accepted = 0
    for _ in range(40):
        sampler.simulate(1)
        accepted += sampler.lastAttempts[0].accepted
        if sampler.lastAttempts[0].accepted:
            for state in sampler.replicaConformation:
                x, v = state.getPositions(asNumpy=True)._value, state.getVelocities(asNumpy=True)._value
                for i, j, length in ((0, 1, 0.1), (1, 2, 0.12)):
                    assert np.linalg.norm(x[i] - x[j]) == pytest.approx(length, rel=1e-9)
                    assert abs((x[i] - x[j]) @ (v[i] - v[j])) / length < 1e-4
    assert accepted > 5


def test_other_constraints_are_refused():
    system, topology, _, generators = trimer_pair()
    system.setConstraintParameters(1, 1, 2, 0.125)
    simulation = toys.simulation_of(system, topology, None)
    with pytest.raises(bg.InputError, match=r"generator keeps 0\.12 nm"):
        LearnedReplicaExchangeSampler(TEMPERATURES, simulation, 10, generators)


# -- what is refused


def test_a_conformation_outside_the_support_is_refused_and_counted():
    def generator(temperature, shift=1.0):
        made = plain_generator(temperature, shift)
        settings = made.coordinates.config() | {"half_turns": [1]}
        made.coordinates = InternalCoordinates.from_config(settings)
        return made

    sampler = chain_sampler(generators=[generator(TEMPERATURE), generator(HOT, 0)])
    x = toys.CHAIN_POSITIONS
    torsion = float(InternalCoordinates(toys.chain_zmatrix(), compile=False)(torch.tensor(x)[None])[0][0, 5])
    sampler.simulation.context.setPositions(x if torsion < 0 else x * np.array([1, 1, -1]))
    start = sampler.simulation.context.getState(positions=True, velocities=True, parameters=True)
    sampler.replicaConformation = [start, start]
    sampler.stepsPerIteration = 0
    sampler.simulate(5)
    assert sampler.statistics.refused[0, 1] == 5 and sampler.statistics.accepted[0, 1] == 0
    assert sampler.lastAttempts[0].refused and sampler.replicaStateIndex == [0, 1]
    np.testing.assert_array_equal(sampler._positions(0), start.getPositions(asNumpy=True)._value)


def test_energies_that_cannot_be_evaluated_reject(monkeypatch):
    sampler = chain_sampler()
    sampler.simulate(1)
    exchange = sampler._maps.exchange

    def clash(i, j, positions):
        made = exchange(i, j, positions)
        for x, _ in made:
            x[0] = x[1]
        return made

    monkeypatch.setattr(sampler._maps, "exchange", clash)
    sampler.simulate(3)
    assert not sampler.lastAttempts[0].accepted and not sampler.lastAttempts[0].refused
    assert all(np.isfinite(sampler._positions(k)).all() for k in (0, 1))


def no_generators():
    return [None, plain_generator(HOT, 0)]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"generators": [None, None]}, "at least two states"),
        ({"generators": [None] * 3}, "3 generators were given for 2 states"),
        ({"states": [{"groups": {0}}, {"groups": {0, 1}}]}, "Context parameters instead"),
    ],
)
def test_samplers_that_cannot_work_are_refused(options, said):
    with pytest.raises(bg.InputError, match=said):
        chain_sampler(**options)


def test_one_generator_alone_is_refused():
    with pytest.raises(bg.InputError, match="at least two states"):
        chain_sampler(generators=no_generators())


def test_forces_the_integrator_leaves_out_and_barostats_are_refused():
    generators = [plain_generator(TEMPERATURE), plain_generator(HOT, 0)]
    simulation = toys.simulation_of(toys.chain_system(), toys.chain_topology(), toys.CHAIN_POSITIONS)
    simulation.system.getForce(1).setForceGroup(3)
    simulation.integrator.setIntegrationForceGroups({0})
    with pytest.raises(bg.InputError, match="leaves out the HarmonicAngleForce of force group 3"):
        LearnedReplicaExchangeSampler(TEMPERATURES, simulation, 5, generators)
    system = toys.chain_system()
    nonbonded = openmm.NonbondedForce()
    for _ in range(4):
        nonbonded.addParticle(0.0, 0.1, 0.0)
    nonbonded.setNonbondedMethod(openmm.NonbondedForce.CutoffPeriodic)
    system.addForce(nonbonded)
    system.addForce(openmm.MonteCarloBarostat(1.0, TEMPERATURE))
    system.setDefaultPeriodicBoxVectors(*(3 * np.eye(3)))
    simulation = toys.simulation_of(system, toys.chain_topology(), toys.CHAIN_POSITIONS)
    with pytest.raises(bg.InputError, match="constant volume"):
        LearnedReplicaExchangeSampler(TEMPERATURES, simulation, 5, generators)
