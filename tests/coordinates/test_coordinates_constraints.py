"""Constraints: exact constants, the mass metric, and the ensemble of constrained dynamics."""

from __future__ import annotations

import copy
import json
import math

import numpy as np
import openmm
import pytest
import torch
from openmm import app, unit

from openmm_bg.coordinates import InternalCoordinates, MassMetric, ZMatrix, frozen_coordinates
from openmm_bg.errors import InputError

pytestmark = pytest.mark.usefixtures("form")

TRIMER = ZMatrix.from_bonds(3, [(0, 1), (1, 2)], "CHC")
TRIMER_BONDS = [(0, 1, 0.1), (1, 2, 0.1)]
TRIMER_MASSES = [12.0, 3.0, 12.0]
COSINE_SQUARED = 0.2947  # of constrained dynamics; 1/3 without the mass metric, 0.3769 with the wrong sign


def constraints_of(system):
    constraints = [system.getConstraintParameters(i) for i in range(system.getNumConstraints())]
    return [(i, j, length.value_in_unit(unit.nanometer)) for i, j, length in constraints]


@pytest.fixture(scope="module")
def hydrogen_bonds(dipeptide, form):
    """Alanine dipeptide with constraints=HBonds: coordinates and exactly constrained positions."""
    system = app.ForceField("amber99sbildn.xml").createSystem(dipeptide.topology, constraints=app.HBonds)
    coordinates = InternalCoordinates(dipeptide.zmatrix, constraints=constraints_of(system), masses=dipeptide.masses)
    full, _ = InternalCoordinates(dipeptide.zmatrix)(dipeptide.frames)
    x, _ = coordinates.inverse(full[:, coordinates.free])
    return coordinates, x


def mass_metric_volume(coordinates, masses, q):
    """log sqrt det(A^T M A) - 3/2 sum log m with A = dx/d(q, position, rotation), for one shape.

    The Riemannian volume of the constraint manifold in the metric of the kinetic energy: what dynamics with constraints
    samples, from the positions alone and without any determinant of constraints.
    """
    x, _ = coordinates.inverse(q[None])
    shape = torch.autograd.functional.jacobian(lambda q: coordinates.inverse(q[None])[0].reshape(-1), q)
    shift = torch.eye(3, dtype=torch.float64).repeat(len(x[0]), 1)
    turn = torch.stack([torch.linalg.cross(axis.expand_as(x[0]), x[0]).reshape(-1) for axis in shift[:3]], 1)
    a = torch.cat([shape, shift, turn], 1)
    m = torch.tensor(masses, dtype=torch.float64)
    metric = a.T @ (m.repeat_interleave(3)[:, None] * a)
    return 0.5 * torch.linalg.slogdet(metric).logabsdet - 1.5 * m.log().sum()


def test_constrained_bonds_are_exact_constants(hydrogen_bonds):
    coordinates, x = hydrogen_bonds
    assert len(coordinates.constraints) == 12 and coordinates.dimension == 48 == len(coordinates.free)
    for i, j, length in coordinates.constraints:
        assert ((x[:, i] - x[:, j]).norm(dim=1) - length).abs().max() < 1e-15
    q, log_volume = coordinates(x)
    back, inverse_log_volume = coordinates.inverse(q, coordinates.frame(x))
    assert (back - x).abs().max() < 1e-12
    torch.testing.assert_close(inverse_log_volume, log_volume, rtol=0, atol=1e-12)


def test_mass_metric_against_its_definition(hydrogen_bonds, dipeptide):
    """Z = C M^-1 C^T as one dense matrix, with C by autograd."""
    coordinates, x = hydrogen_bonds
    pairs = torch.tensor([c[:2] for c in coordinates.constraints])
    inverse_masses = 1 / torch.tensor(dipeptide.masses, dtype=torch.float64).repeat_interleave(3)
    free_log_volume = InternalCoordinates(dipeptide.zmatrix)(x)[1]
    for row, expected in zip(x[:5], (coordinates(x)[1] - free_log_volume)[:5], strict=True):
        c = torch.autograd.functional.jacobian(lambda x: (x[pairs[:, 0]] - x[pairs[:, 1]]).norm(dim=1), row).flatten(1)
        dense = 0.5 * torch.linalg.slogdet((c * inverse_masses) @ c.T).logabsdet
        torch.testing.assert_close(expected, dense, rtol=0, atol=1e-11)
        torch.testing.assert_close(coordinates.mass_metric(row[None])[0], dense, rtol=0, atol=1e-11)


def test_volume_is_that_of_the_kinetic_metric(hydrogen_bonds, dipeptide):
    coordinates, x = hydrogen_bonds
    q, log_volume = coordinates(x[:5])
    volume = torch.stack([mass_metric_volume(coordinates, dipeptide.masses, row) for row in q])
    torch.testing.assert_close(log_volume, volume, rtol=0, atol=1e-9)


def test_volume_with_all_bonds_of_a_chain(dipeptide):
    """Blocks of many coupled constraints: all 21 bonds of the dipeptide, one block."""
    system = app.ForceField("amber99sbildn.xml").createSystem(dipeptide.topology, constraints=app.AllBonds)
    coordinates = InternalCoordinates(dipeptide.zmatrix, constraints=constraints_of(system), masses=dipeptide.masses)
    assert coordinates.dimension == 39 and set(coordinates.kinds) == {"angle", "torsion"}
    full, _ = InternalCoordinates(dipeptide.zmatrix)(dipeptide.frames[:5])
    q = full[:, coordinates.free]
    volume = torch.stack([mass_metric_volume(coordinates, dipeptide.masses, row) for row in q])
    torch.testing.assert_close(coordinates.inverse(q)[1], volume, rtol=0, atol=1e-9)


def test_spread_of_the_term(hydrogen_bonds):
    """Known from long dynamics: 3e-4 kT for HBonds, which is why leaving it out would hardly be noticed there."""
    coordinates, x = hydrogen_bonds
    assert 1e-4 < coordinates.mass_metric(x).std() < 1e-3


def test_trimer_by_quadrature():
    coordinates = InternalCoordinates(TRIMER, constraints=TRIMER_BONDS, masses=TRIMER_MASSES)
    assert coordinates.kinds == ("angle",)
    nodes, weights = np.polynomial.legendre.leggauss(200)
    theta = torch.tensor(math.pi / 2 * (nodes + 1))[:, None]
    x, log_volume = coordinates.inverse(theta)
    density = torch.tensor(weights) * log_volume.exp()
    assert ((density * theta[:, 0].cos() ** 2).sum() / density.sum()).item() == pytest.approx(COSINE_SQUARED, abs=5e-5)
    torch.testing.assert_close(coordinates(x)[1], log_volume)


def test_trimer_by_dynamics():
    """200 trimers without a potential under OpenMM's constrained dynamics."""
    count = 200
    system = openmm.System()
    for index in range(count):
        for mass in TRIMER_MASSES:
            system.addParticle(mass)
        for i, j, length in TRIMER_BONDS:
            system.addConstraint(3 * index + i, 3 * index + j, length)
    integrator = openmm.LangevinMiddleIntegrator(300, 5, 0.002)
    integrator.setRandomNumberSeed(11)
    context = openmm.Context(system, integrator, openmm.Platform.getPlatformByName("Reference"))
    theta = np.random.default_rng(12).uniform(0.3, 2.8, count)
    third = 0.1 * np.stack([np.cos(theta), np.sin(theta), 0 * theta], 1)
    start = np.zeros((count, 3, 3))
    start[:, 0, 0], start[:, 2] = 0.1, third
    context.setPositions(start.reshape(-1, 3))
    context.setVelocitiesToTemperature(300, 13)
    integrator.step(500)
    values = []
    for _ in range(60):
        integrator.step(100)
        x = context.getState(getPositions=True).getPositions(asNumpy=True)._value.reshape(count, 3, 3)
        values.append(np.einsum("bi,bi->b", x[:, 0] - x[:, 1], x[:, 2] - x[:, 1]) ** 2 / 0.1**4)
    per_trimer = np.mean(values, 0)  # independent of one another
    error = per_trimer.std(ddof=1) / math.sqrt(count)
    assert error < 0.006
    assert abs(per_trimer.mean() - COSINE_SQUARED) < 4 * error
    assert abs(per_trimer.mean() - 1 / 3) > 4 * error  # the test could tell


def test_rigid_water():
    water = ZMatrix.from_bonds(3, [(0, 1), (0, 2)], "OHH")
    settle = [(0, 1, 0.09572), (0, 2, 0.09572), (1, 2, 0.15139)]
    coordinates = InternalCoordinates(water, constraints=settle, masses=[15.999, 1.008, 1.008])
    assert coordinates.dimension == 0 and coordinates.kinds == ()
    x, log_volume = coordinates.inverse(torch.zeros(2, 0, dtype=torch.float64))
    for i, j, length in settle:
        assert ((x[:, i] - x[:, j]).norm(dim=1) - length).abs().max() < 1e-15
    q, forward_log_volume = coordinates(x)
    assert q.shape == (2, 0)
    torch.testing.assert_close(forward_log_volume, log_volume)


def test_rigid_angle_in_a_larger_molecule():
    """A frozen angle: the volume is that of the kinetic metric up to the constant between angle and distance."""
    chain = ZMatrix.from_bonds(5, [(0, 1), (1, 2), (2, 3), (3, 4)], "CCOCC")
    a, b, c = chain.seed
    rigid = [(a, b, 0.15), (b, c, 0.14), (a, c, 0.24)]
    masses = [12.0, 13.0, 16.0, 5.0, 2.0]
    coordinates = InternalCoordinates(chain, constraints=rigid, masses=masses)
    assert coordinates.dimension == 6
    q = torch.rand(5, 6, generator=torch.Generator().manual_seed(4), dtype=torch.float64) + 0.5
    volume = torch.stack([mass_metric_volume(coordinates, masses, row) for row in q])
    difference = coordinates.inverse(q)[1] - volume
    assert (difference - difference[0]).abs().max() < 1e-10


def test_positions_off_the_manifold_have_no_density(hydrogen_bonds):
    coordinates, x = hydrogen_bonds
    i, j, _ = coordinates.constraints[3]
    hydrogen = i if coordinates.masses[i] < 2 else j
    heavy = i + j - hydrogen
    for stretch, allowed in ((9e-4, True), (-9e-4, True), (1.1e-3, False), (-1.1e-3, False), (0.1, False)):
        moved = x.clone()
        moved[:, hydrogen] += stretch * (x[:, hydrogen] - x[:, heavy])
        log_volume = coordinates(moved)[1]
        assert (log_volume.isfinite() == allowed).all()
        if allowed:  # within the tolerance the constants count: stretching along the bond changes nothing
            torch.testing.assert_close(log_volume, coordinates(x)[1], rtol=0, atol=1e-11)


def test_gradients():
    chain = ZMatrix.from_bonds(5, [(0, 1), (1, 2), (2, 3), (3, 4)], "CCCCC")
    constraints = [(0, 1, 0.15), (1, 2, 0.15), (2, 3, 0.14)]
    coordinates = InternalCoordinates(chain, constraints=constraints, masses=[1.0, 2.0, 3.0, 4.0, 5.0])
    q = torch.rand(2, 6, generator=torch.Generator().manual_seed(4), dtype=torch.float64) + 0.5
    x = coordinates.inverse(q)[0].requires_grad_()
    q.requires_grad_()
    assert torch.autograd.gradcheck(coordinates, x)
    assert torch.autograd.gradcheck(coordinates.inverse, q)
    broken = torch.cat([x.detach(), x.detach() * math.nan, torch.zeros_like(x), 1.1 * x.detach()]).requires_grad_()
    out, log_volume = coordinates(broken)
    assert log_volume.isfinite().tolist() == [True] * 2 + [False] * 6
    (gradient,) = torch.autograd.grad(out.sum() + log_volume.sum(), broken)
    (alone,) = torch.autograd.grad(sum(value.sum() for value in coordinates(x)), x)
    assert (gradient[2:] == 0).all()
    torch.testing.assert_close(gradient[:2], alone)


def test_stored_and_single_precision(hydrogen_bonds):
    coordinates, x = hydrogen_bonds
    stored = InternalCoordinates.from_config(json.loads(json.dumps(coordinates.config())))
    there_and_back = copy.deepcopy(coordinates).to(torch.float32).to(torch.float64)
    for other in (stored, there_and_back):
        for mine, theirs in zip(coordinates(x), other(x), strict=True):
            assert torch.equal(mine, theirs)
    q, log_volume = copy.deepcopy(coordinates).to(torch.float32)(x.float())
    assert q.dtype == torch.float32 and (log_volume - coordinates(x)[1]).abs().max() < 1e-3


def test_lengths_with_units():
    coordinates = InternalCoordinates(
        TRIMER, constraints=[(0, 1, 1 * unit.angstrom), (1, 2, 0.1 * unit.nanometer)], masses=TRIMER_MASSES
    )
    assert coordinates.constraints == tuple(TRIMER_BONDS)


def test_hydrogen_distances_are_refused(dipeptide):
    """constraints=HAngles fixes H-H distances that no z-matrix angle spans."""
    system = app.ForceField("amber99sbildn.xml").createSystem(dipeptide.topology, constraints=app.HAngles)
    with pytest.raises(InputError, match=r"constrained distance between atoms \d+ and \d+ is neither"):
        InternalCoordinates(dipeptide.zmatrix, constraints=constraints_of(system), masses=dipeptide.masses)


def test_ring_closures_are_refused():
    ring = ZMatrix.from_bonds(4, [(0, 1), (1, 2), (2, 3), (3, 0)], "CCCC")
    i, j = ring.closures[0]
    with pytest.raises(InputError, match=f"between atoms {i} and {j} is neither"):
        frozen_coordinates(ring, [(i, j, 0.15)])


@pytest.mark.parametrize(
    ("constraints", "match"),
    [
        ([(0, 2, 0.15)], "neither"),  # the angle without its bonds
        ([*TRIMER_BONDS, (1, 0, 0.1)], "twice"),
        ([(0, 3, 0.1)], "does not join"),
        ([(0, 1, 0.0)], "positive"),
        ([(0, 1, math.nan)], "positive"),
        ([*TRIMER_BONDS, (0, 2, 0.3)], "no triangle"),
        ([*TRIMER_BONDS, (0, 2, 0.2)], "no triangle"),
    ],
)
def test_refused_constraints(constraints, match):
    with pytest.raises(InputError, match=match):
        InternalCoordinates(TRIMER, constraints=constraints, masses=TRIMER_MASSES)


def test_masses_are_needed():
    with pytest.raises(InputError, match="need masses"):
        InternalCoordinates(TRIMER, constraints=TRIMER_BONDS)
    with pytest.raises(InputError, match=r"atoms \[1\] have no positive"):
        InternalCoordinates(TRIMER, constraints=TRIMER_BONDS, masses=[12.0, 0.0, 12.0])
    with pytest.raises(InputError, match="one number per atom"):
        MassMetric([(0, 5)], [1.0, 1.0])
