"""The generator: one exact density, by closed forms and by reweighting; wrong input."""

from __future__ import annotations

import copy
import itertools
import math

import numpy as np
import openmm
import pytest
import torch
from openmm import app, unit
from scipy.integrate import quad
from scipy.stats import chi2

import openmm_bg as bg
from openmm_bg.coordinates import InternalCoordinates, ZMatrix
from openmm_bg.energies import ContextEnergy
from openmm_bg.flows import MolecularFlow, RealNVP, SplineFlow
from openmm_bg.units import thermal_energy

KT = thermal_energy(300)
METHYL = 3  # rotors of alanine dipeptide: two caps and the side chain


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def disturb(module: torch.nn.Module, size: float, seed: int = 0) -> None:
    """Random weights, so that nothing holds by the identity alone."""
    generator = rng(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)


def rotations(n: int, seed: int = 0) -> torch.Tensor:
    q, r = torch.linalg.qr(torch.randn(n, 3, 3, generator=rng(seed), dtype=torch.float64))
    q = q * r.diagonal(dim1=1, dim2=2).sign()[:, None]
    return q * q.det().sign()[:, None, None]


def topology_of(elements: str, bonds: list[tuple[int, int]], residues: int = 1) -> app.Topology:
    topology = app.Topology()
    chain = topology.addChain()
    atoms = []
    for _ in range(residues):
        residue = topology.addResidue("MOL", chain)
        atoms += [topology.addAtom(f"{e}{i}", app.Element.getBySymbol(e), residue) for i, e in enumerate(elements)]
    for i, j in bonds:
        topology.addBond(atoms[i], atoms[j])
    return topology


CHAIN = "HOOH", [(0, 1), (1, 2), (2, 3)]
LENGTH, STIFF, ANGLE, BEND, TWIST = [0.097, 0.147, 0.097], [2e5, 1e5, 2e5], 1.75, 300.0, 3.0


def peroxide(constraints: bool = False) -> tuple[app.Topology, openmm.System, np.ndarray]:
    """H-O-O-H with harmonic bonds and angles and a cosine torsion: its partition function is a product."""
    system = openmm.System()
    for mass in (1.0, 16.0, 16.0, 1.0):
        system.addParticle(mass)
    bonds, angles, torsions = openmm.HarmonicBondForce(), openmm.HarmonicAngleForce(), openmm.PeriodicTorsionForce()
    for i in range(3):
        if constraints and i != 1:
            system.addConstraint(i, i + 1, LENGTH[i])
        else:
            bonds.addBond(i, i + 1, LENGTH[i], STIFF[i])
    for i in range(2):
        angles.addAngle(i, i + 1, i + 2, ANGLE, BEND)
    torsions.addTorsion(0, 1, 2, 3, 2, 0.4, TWIST)
    for force in (bonds, angles, torsions):
        system.addForce(force)
    up = np.array([-math.cos(ANGLE), math.sin(ANGLE), 0]) * LENGTH[0]
    out = np.array([math.cos(ANGLE) * -1, math.sin(ANGLE) * math.cos(1.9), math.sin(ANGLE) * math.sin(1.9)]) * LENGTH[2]
    middle = np.array([LENGTH[1], 0, 0])
    positions = np.array([up * [-1, 1, 1], np.zeros(3), middle, middle + out])
    return topology_of(*CHAIN), system, positions


def peroxide_log_z(constraints: bool = False) -> float:
    """log of the integral of exp(-u) over shapes, one dimension at a time."""
    total = 0.0
    for i in range(3):
        if constraints and i != 1:
            total += 2 * math.log(LENGTH[i]) + 0.5 * math.log(1 / 1 + 1 / 16)
        else:

            def bond(r, i=i):
                return r * r * math.exp(-STIFF[i] * (r - LENGTH[i]) ** 2 / (2 * KT))

            total += math.log(quad(bond, LENGTH[i] - 0.06, LENGTH[i] + 0.06, points=[LENGTH[i]])[0])
    total += 2 * math.log(quad(lambda a: math.sin(a) * math.exp(-BEND * (a - ANGLE) ** 2 / (2 * KT)), 0, math.pi)[0])
    return total + math.log(quad(lambda p: math.exp(-TWIST * (1 + math.cos(2 * p - 0.4)) / KT), -math.pi, math.pi)[0])


def log_mean(log_w: torch.Tensor) -> tuple[float, float]:
    """log E[w] and its standard error."""
    w = (log_w - log_w.max()).exp()
    error = float(w.std() / w.mean()) / math.sqrt(len(w))
    return float(w.mean().log() + log_w.max()), error


@pytest.fixture(scope="module")
def frames(alanine):
    """Alanine dipeptide from a short dynamics, nm."""
    run = bg.simulate(
        alanine.system, alanine.positions, temperature=300, n_frames=100, steps_per_frame=20, seed=1,
        platform="Reference", progress=False,
    )  # fmt: skip
    return torch.as_tensor(np.asarray(run.positions), dtype=torch.float64)


@pytest.fixture(scope="module", params=["spline", "realnvp"])
def generator(request, alanine, frames):
    """Informed by data, with random weights, and a good share of the broadened copy."""
    made = bg.BoltzmannGenerator.for_molecule(
        alanine.topology, alanine.system, 300, positions=alanine.positions, flow=request.param, defensive=0.5
    )
    made.inform(frames)
    disturb(made.flow, 0.03)
    return made


@pytest.fixture(scope="module")
def constrained():
    """Alanine dipeptide with constrained hydrogens, a generator of it, and frames of its dynamics."""
    molecule = bg.systems.load("alanine_dipeptide", constraints=app.HBonds)
    run = bg.simulate(
        molecule.system, molecule.positions, temperature=300, n_frames=80, steps_per_frame=20, seed=1,
        platform="Reference", progress=False,
    )  # fmt: skip
    x = torch.as_tensor(np.asarray(run.positions), dtype=torch.float64)
    made = bg.BoltzmannGenerator.for_molecule(molecule.topology, molecule.system, 300)
    made.inform(x)
    disturb(made.flow, 0.03)
    return molecule, made, x


# -- the density is that of the samples


@pytest.mark.parametrize("constraints", [False, True], ids=["free", "constrained"])
@pytest.mark.parametrize("flow", ["spline", "realnvp"])
@pytest.mark.parametrize("defensive", [0.0, 0.3])
def test_mean_weight_is_the_partition_function(flow, constraints, defensive):
    topology, system, positions = peroxide(constraints)
    made = bg.BoltzmannGenerator.for_molecule(
        topology, system, 300, positions=positions, flow=flow, defensive=defensive
    )
    disturb(made.flow, 0.02)
    samples = made.sample(20_000, seed=1)
    value, error = log_mean(samples.log_weights)
    assert error < 0.03
    assert abs(value - peroxide_log_z(constraints)) < 4 * error


def test_mass_metric_of_two_constraints_that_share_an_atom():
    masses, k, length = (12.0, 3.0, 12.0), 12.0, 0.15
    system = openmm.System()
    for mass in masses:
        system.addParticle(mass)
    for i in range(2):
        system.addConstraint(i, i + 1, length)
    angle = openmm.HarmonicAngleForce()
    angle.addAngle(0, 1, 2, 1.6, k)
    system.addForce(angle)
    positions = np.array([[length, 0, 0], [0, 0, 0], [0, length, 0]])
    topology = topology_of("COC", [(0, 1), (1, 2)])
    made = bg.BoltzmannGenerator.for_molecule(topology, system, 300, positions=positions)
    assert made.flow.dimension == 1

    def density(theta):
        metric = (1 / 12 + 1 / 3) ** 2 - (math.cos(theta) / 3) ** 2
        return length**4 * math.sin(theta) * math.sqrt(metric) * math.exp(-k * (theta - 1.6) ** 2 / (2 * KT))

    value, error = log_mean(made.sample(40_000, seed=1).log_weights)
    assert error < 0.005
    assert abs(value - math.log(quad(density, 0, math.pi)[0])) < 4 * error


@pytest.mark.parametrize(
    "flow", [RealNVP(2, layers=4, hidden=(16,)), SplineFlow([False, True], layers=4, hidden=(16,))]
)
@pytest.mark.parametrize("defensive", [0.0, 0.5])
def test_histogram_of_samples_is_the_density(flow, defensive):
    made = bg.BoltzmannGenerator(bg.systems.load("double_well"), copy.deepcopy(flow), defensive=defensive)
    disturb(made.flow, 0.12)
    n, bins, fine = 40_000, 16, 24
    y = made.sample_internal(n, rng(1))[0]
    edge = math.pi
    counts = torch.histogramdd(y, bins=[bins, bins], range=[-edge, edge] * 2).hist.flatten()
    axis = (torch.arange(bins * fine, dtype=torch.float64) + 0.5) / (bins * fine) * 2 * edge - edge
    grid = torch.cartesian_prod(axis, axis)
    density = made.log_prob(grid).exp() * (2 * edge / (bins * fine)) ** 2
    expected = n * density.view(bins, fine, bins, fine).sum((1, 3)).flatten()
    outside = torch.tensor([n - counts.sum(), n - expected.sum()])
    big = expected > 10
    observed = torch.cat([counts[big], (counts[~big].sum() + outside[0])[None]])
    predicted = torch.cat([expected[big], (expected[~big].sum() + outside[1])[None]])
    statistic = float(((observed - predicted) ** 2 / predicted).sum())
    assert chi2.sf(statistic, len(observed) - 1) > 1e-4


def test_parts_of_the_mixture_average_to_one(generator):
    """E_mix[q_part / q_mix] = 1 for each part: shares and densities of both are those of the draws."""
    q, _ = generator.sample_internal(8000, rng(3))
    usable = torch.isfinite(q).all(-1)
    with torch.no_grad():
        plain, broad = generator.flow.log_probs(q)
        mixed = generator._log_mixture(q)
    for part in (plain, broad):
        ratio = torch.where(usable, (part - mixed).exp(), 0.0)
        # what a realnvp loses off its cut is lost by both
        assert abs(float(ratio.mean()) - float(usable.double().mean())) < 4 * float(ratio.std()) / math.sqrt(len(q))
        assert ratio.max() <= 2 + 1e-9


@pytest.mark.parametrize("defensive", [0.0, 0.03, 0.5])
def test_log_prob_is_that_of_the_mixture(generator, frames, defensive):
    made = copy.deepcopy(generator)
    made.defensive = defensive
    q, log_volume = made.coordinates(frames)
    plain, broad = made.flow.log_probs(q)
    density = (1 - defensive) * (plain - plain).exp() + defensive * (broad - plain).exp()
    assert torch.allclose(made.log_prob(frames), plain + density.log() - log_volume, rtol=0, atol=1e-9)


def test_density_of_samples_and_of_their_positions_agree(generator):
    samples = generator.sample(500, seed=1)
    inside = torch.isfinite(samples.log_prob)
    assert inside.float().mean() > 0.9
    again = generator.log_prob(samples.positions[inside])
    assert (again - samples.log_prob[inside]).abs().max() < 1e-8
    assert samples.positions.dtype == samples.log_prob.dtype == samples.log_weights.dtype == torch.float64
    again = generator.log_weights(samples.positions[inside])
    assert torch.equal(again.isfinite(), samples.log_weights[inside].isfinite())


def test_samples_outside_the_support_count_and_say_so(alanine, frames):
    made = bg.BoltzmannGenerator.for_molecule(alanine.topology, alanine.system, positions=alanine.positions)
    disturb(made.flow, 0.02)
    with torch.no_grad():  # some bond lengths come out negative
        made.flow.stiff.transforms[-1].mean[:2] = 0.005
    samples = made.sample(200, seed=2)
    outside = samples.log_prob == -math.inf
    assert len(samples) == 200 and 0 < outside.sum() < 200
    assert samples.positions[outside].isnan().all() and samples.positions[~outside].isfinite().all()
    assert (samples.reduced_energy[outside] == math.inf).all() and (samples.log_weights[outside] == -math.inf).all()


def test_pose_does_not_matter(generator, frames):
    turned = frames @ rotations(len(frames)).transpose(1, 2) + 3 * torch.randn(len(frames), 1, 3, generator=rng(2))
    assert (generator.log_prob(turned) - generator.log_prob(frames)).abs().max() < 1e-9


def test_a_frame_comes_back_in_place_and_in_energy(generator, frames):
    """Shapes are a bijection: what bgflow's mixed coordinates lose (2 kT median) must not be lost here."""
    x = frames @ rotations(len(frames), 5).transpose(1, 2) + 0.7
    back = generator.place(generator.coordinates(x)[0], generator.frame(x))
    assert (back - x).abs().max() < 1e-12
    difference = generator.energy.potential(back) - generator.energy.potential(x)
    assert difference.abs().max() < 1e-8


def test_energy_and_weights_of_samples(generator):
    samples = generator.sample(50, seed=3)
    usable = torch.isfinite(samples.log_prob)
    context = ContextEnergy(generator.system, 300, platform="Reference")
    with torch.no_grad():
        reference = context(samples.positions[usable])
    finite = torch.isfinite(reference)
    assert torch.allclose(samples.reduced_energy[usable][finite], reference[finite], rtol=1e-6, atol=1e-6)
    weights = -samples.reduced_energy - samples.log_prob
    assert torch.equal(samples.log_weights[usable], weights[usable])


# -- support


def test_relabelled_rotors_keep_the_density_of_torsions(generator, frames):
    zmatrix = generator.coordinates.zmatrix
    assert len(zmatrix.rotors) == METHYL
    t, _ = generator.flow.chart.split(generator.coordinates(frames)[0])
    for rotor in zmatrix.rotors:
        first, second, third = (int(zmatrix.torsions[row][0]) for row in rotor)
        relabelled = frames.clone()
        relabelled[:, [first, second, third]] = frames[:, [second, third, first]]
        assert torch.isfinite(generator.log_prob(relabelled)).all()
        turned, _ = generator.flow.chart.split(generator.coordinates(relabelled)[0])
        turn = (turned - t + math.pi) % (2 * math.pi) - math.pi
        assert torch.allclose(turn.abs().max(1).values, torch.tensor(2 * math.pi / 3).double(), atol=1e-9)
        assert (turn.abs() > 1e-9).sum(1).eq(1).all()
        with torch.no_grad():
            difference = generator.flow.log_prob_torsions(turned) - generator.flow.log_prob_torsions(t)
        assert difference.abs().max() < 1e-9


def test_sampled_rotors_take_all_three_places(generator):
    q, log_prob = generator.sample_internal(3000, rng(4))
    t, _ = generator.flow.chart.split(q[torch.isfinite(log_prob)])
    for column in range(t.shape[1]):
        if generator.flow.torsions.multiplicity[column] == 3:
            places = torch.bincount(((t[:, column] + math.pi) / (2 * math.pi / 3)).long().clamp(0, 2), minlength=3)
            assert (places / len(t) - 1 / 3).abs().max() < 4 * math.sqrt(2 / 9 / len(t))


def test_other_handedness_has_no_density(generator, frames):
    mirrored = frames * torch.tensor([-1.0, 1.0, 1.0])
    assert (generator.log_prob(mirrored) == -math.inf).all()
    zmatrix = generator.coordinates.zmatrix
    first, second, _ = (int(zmatrix.torsions[row][0]) for row in zmatrix.rotors[0])
    swapped = frames.clone()
    swapped[:, [first, second]] = frames[:, [second, first]]
    assert (generator.log_prob(swapped) == -math.inf).all()


def test_d_alanine_has_no_density(generator, alanine, frames):
    index = {(a.residue.name, a.name): a.index for a in alanine.topology.atoms()}
    alpha, hydrogen = index["ALA", "CA"], index["ALA", "HA"]
    corners = frames[:, [index["ALA", name] for name in ("N", "C", "CB")]]
    # HA on the other side of the plane of its three neighbours
    normal = torch.linalg.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0], dim=1)
    normal = normal / normal.norm(dim=1, keepdim=True)
    d_form = frames.clone()
    height = ((frames[:, hydrogen] - frames[:, alpha]) * normal).sum(1, keepdim=True)
    d_form[:, hydrogen] = frames[:, hydrogen] - 2 * height * normal
    assert (generator.log_prob(d_form) == -math.inf).all()


def test_bad_rows_have_no_density_and_leave_the_others_alone(generator, frames):
    bad = frames[:6].clone()
    bad[1, 4, 2] = math.nan
    bad[2, 0, 0] = math.inf
    bad[3] = 0.0
    bad[4] = torch.linspace(0, 1, 22)[:, None]
    values = generator.log_prob(bad)
    assert (values[1:5] == -math.inf).all()
    assert torch.allclose(values[[0, 5]], generator.log_prob(frames[[0, 5]]), rtol=0, atol=1e-9)
    assert (generator.log_weights(bad)[1:4] == -math.inf).all()


def test_far_from_the_data_the_density_falls(generator, frames):
    """No clamping: a stretched bond has the small density that its latents say."""
    q, _ = generator.coordinates(frames[:1])
    stretched = q.repeat(5, 1)
    stretched[:, 10] += torch.tensor([0.0, 0.05, 0.1, 0.5, 5.0])
    values = generator.log_prob(generator.place(stretched))
    assert torch.isfinite(values).all() and (values[1:] < values[:-1] - 20).all()


def test_broken_weights_are_not_hidden(alanine):
    made = bg.BoltzmannGenerator.for_molecule(alanine.topology, alanine.system, positions=alanine.positions)
    with torch.no_grad():
        made.flow.stiff.transforms[0].network[-1].bias.fill_(math.nan)
    samples = made.sample(10, seed=0)
    assert not torch.isfinite(samples.log_weights).any()
    with pytest.raises(ValueError):
        bg.sampling.reweighting.effective_sample_size(made.log_weights(alanine.positions))


# -- constraints


def test_constrained_samples_satisfy_their_constraints(constrained):
    molecule, made, _ = constrained
    assert made.flow.dimension == 3 * 22 - 6 - molecule.system.getNumConstraints()
    samples = made.sample(200, seed=1)
    inside = torch.isfinite(samples.log_prob)
    x = samples.positions[inside]
    assert len(x) > 100
    for k in range(molecule.system.getNumConstraints()):
        i, j, distance = molecule.system.getConstraintParameters(k)
        deviation = (x[:, i] - x[:, j]).norm(dim=1) - distance.value_in_unit(unit.nanometer)
        assert deviation.abs().max() < 1e-9
    assert (made.log_prob(x) - samples.log_prob[inside]).abs().max() < 1e-8


def test_constrained_dynamics_lies_in_the_support(constrained):
    _, made, x = constrained
    assert torch.isfinite(made.log_prob(x)).all()
    broken = x.clone()
    hydrogen = next(a.index for a in made.topology.atoms() if a.element.symbol == "H")
    broken[:, hydrogen] += 0.01
    assert (made.log_prob(broken) == -math.inf).all()


def test_constraints_the_coordinates_cannot_express_are_refused(alanine):
    ring = topology_of("CCC", [(0, 1), (1, 2), (0, 2)])
    system = openmm.System()
    for _ in range(3):
        system.addParticle(12.0)
    for i, j in [(0, 1), (1, 2), (0, 2)]:
        system.addConstraint(i, j, 0.15)
    # the triangle of all constraints is rigid: nothing is left to generate
    with pytest.raises(bg.InputError):
        bg.BoltzmannGenerator.for_molecule(ring, system)
    angles = bg.systems.load("alanine_dipeptide", constraints=app.HAngles)
    with pytest.raises(bg.InputError, match="HBonds"):
        bg.BoltzmannGenerator.for_molecule(angles.topology, angles.system)


def test_all_bonds_constrained_works(alanine):
    molecule = bg.systems.load("alanine_dipeptide", constraints=app.AllBonds)
    run = bg.simulate(
        molecule.system, molecule.positions, temperature=300, n_frames=3, steps_per_frame=20, seed=1,
        platform="Reference", progress=False,
    )  # fmt: skip
    made = bg.BoltzmannGenerator.for_molecule(molecule.topology, molecule.system, 300, positions=run.positions[0])
    assert made.flow.dimension == 3 * 22 - 6 - 21
    assert torch.isfinite(made.log_prob(run.positions)).all()
    samples = made.sample(50, seed=1)
    inside = torch.isfinite(samples.log_prob)
    assert inside.any()
    assert (made.log_prob(samples.positions[inside]) - samples.log_prob[inside]).abs().max() < 1e-8


# -- random numbers


def test_a_seed_repeats_a_draw_and_nothing_global_moves(generator):
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    one, same, other = (generator.sample(20, seed=s) for s in (1, 1, 2))
    for name in ("positions", "log_prob", "reduced_energy", "log_weights"):
        assert torch.equal(getattr(one, name).nan_to_num(), getattr(same, name).nan_to_num())
    assert not torch.equal(one.log_prob, other.log_prob)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002
    stream = rng(1)
    first, second = generator.sample(20, generator=stream), generator.sample(20, generator=stream)
    assert torch.equal(first.log_prob, one.log_prob) and not torch.equal(first.log_prob, second.log_prob)


def test_making_a_generator_leaves_global_numbers_alone(alanine):
    state = torch.get_rng_state()
    made = [bg.BoltzmannGenerator.for_molecule(alanine.topology, alanine.system, seed=s) for s in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), state)
    weights = [torch.cat([p.flatten() for p in g.flow.parameters()]) for g in made]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


# -- input


def test_units_of_positions(generator, frames):
    expected = generator.log_prob(frames[:3])
    array = frames[:3].numpy()
    assert torch.equal(generator.log_prob(array), expected)
    assert torch.equal(generator.log_prob(array * unit.nanometer), expected)
    assert torch.allclose(generator.log_prob(unit.Quantity(10 * array, unit.angstrom)), expected)
    origins = [generator.frame(x).origin for x in (array, unit.Quantity(10 * array, unit.angstrom))]
    assert torch.allclose(*origins)
    assert generator.log_prob(array[0]).shape == (1,)
    assert generator.log_prob(array[:0]).shape == (0,)
    with pytest.raises(bg.InputError, match="nm"):
        generator.log_prob(unit.Quantity(array, unit.kelvin))


@pytest.mark.parametrize("shape", [(3, 21, 3), (22, 2), (2, 3, 22, 3), (66,)])
def test_positions_of_another_shape_are_refused(generator, shape):
    for method in (generator.log_prob, generator.log_weights, generator.frame, generator.inform):
        with pytest.raises(bg.InputError, match="shape"):
            method(np.zeros(shape))


def test_wrong_numbers_of_samples_and_seeds(generator):
    with pytest.raises(bg.InputError, match="at least 1"):
        generator.sample(0)
    with pytest.raises(bg.InputError, match="not both"):
        generator.sample(1, seed=1, generator=rng())
    silent = bg.BoltzmannGenerator(None, RealNVP(2, layers=2, hidden=(8,)))
    for method in (lambda: silent.sample(1), lambda: silent.log_weights(torch.zeros(1, 2))):
        with pytest.raises(bg.InputError, match="no energy"):
            method()


def test_for_molecule_refuses_what_does_not_fit(alanine):
    make = bg.BoltzmannGenerator.for_molecule
    _, small, positions = peroxide()
    with pytest.raises(bg.InputError, match="22 atoms"):
        make(alanine.topology, small)
    two = topology_of("HOOH", [*CHAIN[1], (4, 5), (5, 6), (6, 7)], residues=2)
    double = openmm.System()
    for _ in range(8):
        double.addParticle(1.0)
    with pytest.raises(bg.InputError, match="molecule"):
        make(two, double)
    periodic = copy.deepcopy(small)
    force = openmm.NonbondedForce()
    force.setNonbondedMethod(openmm.NonbondedForce.CutoffPeriodic)
    for _ in range(4):
        force.addParticle(0, 0.1, 0)
    periodic.addForce(force)
    with pytest.raises(bg.InputError, match="periodic"):
        make(topology_of(*CHAIN), periodic)
    chain = topology_of(*CHAIN)
    for wrong in (positions[:3], positions[None], positions * math.nan):
        with pytest.raises(bg.InputError, match="positions"):
            make(chain, small, positions=wrong)
    with pytest.raises(bg.InputError, match="minimise"):
        make(chain, small, positions=np.arange(4)[:, None] * np.ones(3))
    for wrong in ("splines", 3, RealNVP):
        with pytest.raises(bg.InputError, match="flow"):
            make(chain, small, flow=wrong)
    with pytest.raises(bg.InputError, match="dimensions"):
        make(chain, small, flow=RealNVP(5, layers=2, hidden=(8,)))
    for wrong in (-0.1, 1.0):
        with pytest.raises(bg.InputError, match="defensive"):
            make(chain, small, defensive=wrong)
    with pytest.raises(bg.InputError, match="temperature"):
        make(chain, small, -300)
    assert make(chain, small, 310 * unit.kelvin).temperature == 310


def test_general_form_refuses_parts_that_do_not_fit(alanine):
    well = bg.systems.load("double_well")
    with pytest.raises(bg.InputError, match="shape"):
        bg.BoltzmannGenerator(well, RealNVP(3, layers=2, hidden=(8,)))
    coordinates = InternalCoordinates(ZMatrix.from_topology(topology_of(*CHAIN)))
    with pytest.raises(bg.InputError, match="shape"):
        bg.BoltzmannGenerator(well, RealNVP(6, layers=2, hidden=(8,)), coordinates)
    with pytest.raises(bg.InputError, match="22 atoms"):
        bg.BoltzmannGenerator(None, RealNVP(6, layers=2, hidden=(8,)), coordinates, topology=alanine.topology)


def test_any_flow_of_the_right_dimension_works():
    topology, system, positions = peroxide()
    flow = RealNVP(6, layers=2, hidden=(8,))
    made = bg.BoltzmannGenerator.for_molecule(topology, system, positions=positions, flow=flow)
    assert made.informed and torch.isfinite(made.log_prob(positions)).all()


def test_uninformed_generators_are_refused_and_learn_from_data(alanine, frames):
    made = bg.BoltzmannGenerator.for_molecule(alanine.topology, alanine.system)
    assert not made.informed
    for method in (lambda: made.sample(1), lambda: made.log_prob(frames), lambda: made.sample_internal(1, rng())):
        with pytest.raises(bg.InputError, match="chirality"):
            method()
    data = frames.clone()
    data[0] = math.nan  # must not decide what is left and right
    made.inform(data.numpy() * unit.nanometer)
    assert made.informed
    assert torch.isfinite(made.log_prob(frames)).all()
    assert (made.log_prob(frames * torch.tensor([-1.0, 1.0, 1.0])) == -math.inf).all()
    half_turns = made.coordinates.half_turns
    made.inform(data[1:])
    assert np.array_equal(made.coordinates.half_turns, half_turns) and np.abs(half_turns).sum() > 5


def test_inform_works_without_a_system(alanine, frames, constrained):
    """Coordinates know their own constraints: another kind of energy must not lose them."""
    molecule, made, x = constrained
    plain = InternalCoordinates(
        made.coordinates.zmatrix, constraints=made.coordinates.constraints, masses=made.coordinates.masses
    )
    flow = MolecularFlow.from_config(made.flow.config())
    other = bg.BoltzmannGenerator(ContextEnergy(molecule.system, 300), flow, plain, topology=molecule.topology)
    assert other.system is None and not other.informed
    other.inform(x)
    assert other.coordinates.constraints == made.coordinates.constraints
    assert np.array_equal(other.coordinates.half_turns, made.coordinates.half_turns)
    assert other.matches(molecule.topology, molecule.system)
    assert not other.matches(alanine.topology, alanine.system)


def test_data_that_cannot_inform_are_refused(generator, alanine, frames):
    made = bg.BoltzmannGenerator.for_molecule(alanine.topology, alanine.system)
    with pytest.raises(bg.InputError, match="zero"):
        made.inform(frames[:0])
    with pytest.raises(bg.InputError, match="No conformation"):
        made.inform(frames * math.nan)
    assert not made.informed
    with pytest.raises(bg.InputError, match="No conformation"):
        generator.inform(frames * torch.tensor([-1.0, 1.0, 1.0]))
    with pytest.raises(bg.InputError, match="covariance"):
        generator.inform(frames[:30])


def test_copies_and_scales_are_independent(alanine):
    """Nothing is shared by a deepcopy, and an infinitely soft spring does not break the first guess."""
    plain = bg.BoltzmannGenerator.for_molecule(alanine.topology, alanine.system, positions=alanine.positions)
    twin = copy.deepcopy(plain)
    before = plain.log_prob(alanine.positions)
    disturb(twin.flow, 0.1)
    assert torch.equal(plain.log_prob(alanine.positions), before)
    topology, system, positions = peroxide()
    for force, index in itertools.product(system.getForces()[:1], range(3)):
        i, j, r, _ = force.getBondParameters(index)
        force.setBondParameters(index, i, j, r, 0.0)
    made = bg.BoltzmannGenerator.for_molecule(topology, system, positions=positions)
    assert torch.isfinite(made.log_prob(positions)).all()
