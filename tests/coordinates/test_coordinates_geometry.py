"""Distances, angles and dihedrals against mdtraj and against their definitions."""

from __future__ import annotations

import math

import mdtraj
import numpy as np
import pytest
import torch

from openmm_bg.coordinates import angle, dihedral, distance
from openmm_bg.coordinates.geometry import place

PAIR, TRIPLE, QUADRUPLE = (torch.arange(n)[None] for n in (2, 3, 4))


@pytest.fixture
def points() -> torch.Tensor:
    return torch.randn(200, 7, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_equal_to_mdtraj(points):
    generator = np.random.default_rng(2)
    atoms = np.array([generator.permutation(7)[:4] for _ in range(20)])
    trajectory = mdtraj.Trajectory(points.numpy(), None)
    trajectory.xyz = points.numpy()  # mdtraj computes in single precision
    for ours, theirs, columns in (
        (distance, mdtraj.compute_distances, 2),
        (angle, mdtraj.compute_angles, 3),
        (dihedral, mdtraj.compute_dihedrals, 4),
    ):
        values = ours(points, torch.tensor(atoms[:, :columns]))
        reference = theirs(trajectory, atoms[:, :columns], periodic=False)
        deviation = np.abs(np.exp(1j * values.numpy()) - np.exp(1j * reference))
        assert np.median(deviation) < 1e-6 and deviation.max() < 1e-3


def test_sign_of_the_dihedral():
    # Looking along the axis (from j to k, down -z), the far bond is turned by 90 degrees clockwise.
    x = torch.tensor([[[1.0, 0, 1], [0, 0, 1], [0, 0, 0], [0, -1, 0]]], dtype=torch.float64)
    assert dihedral(x, QUADRUPLE).item() == pytest.approx(math.pi / 2)
    assert dihedral(x * torch.tensor([1.0, -1.0, 1.0]), QUADRUPLE).item() == pytest.approx(-math.pi / 2)


def test_trans_is_plus_pi_and_never_minus_pi():
    for z in (0.0, -0.0, 1e-200, -1e-200):
        x = torch.tensor([[[-1.0, 1, 0], [-1, 0, 0], [1, 0, 0], [1, -1, z]]], dtype=torch.float64)
        assert dihedral(x, QUADRUPLE).item() == math.pi


@pytest.mark.parametrize("bend", [1e-9, 1e-6, 1e-3, math.pi - 1e-6, math.pi - 1e-9])
def test_angles_near_collinear_keep_full_precision(bend):
    x = torch.tensor([[[1.0, 0, 0], [0, 0, 0], [math.cos(bend), math.sin(bend), 0]]], dtype=torch.float64)
    assert angle(x, TRIPLE).item() == pytest.approx(bend, abs=1e-15)


def test_gradients(points):
    x = points[:3, :4].clone().requires_grad_()
    for function, atoms in ((distance, PAIR), (angle, TRIPLE), (dihedral, QUADRUPLE)):
        assert torch.autograd.gradcheck(lambda x, f=function, a=atoms: f(x, a), x)
        assert torch.autograd.gradgradcheck(lambda x, f=function, a=atoms: f(x, a), x)


def test_degenerate_geometries_have_zero_gradient():
    straight = [[0.0, 0, 0], [1, 0, 0], [2, 0, 0], [3, 1, 0]]
    folded = [[0.0, 0, 0], [1, 0, 0], [0.5, 0, 0], [3, 1, 0]]
    same = [[1.0, 1, 1]] * 4
    fine = [[1.0, 0, 0], [0, 0, 0], [0, 1, 0], [0, 1, 1]]
    x = torch.tensor([straight, folded, same, fine], dtype=torch.float64, requires_grad=True)
    theta, phi = angle(x, TRIPLE)[:, 0], dihedral(x, QUADRUPLE)[:, 0]
    assert theta[0] == math.pi and theta[1] == 0 and theta[2].isnan() and theta[3] == math.pi / 2
    assert phi[:3].isnan().all() and phi[3].isfinite()
    assert distance(x, PAIR)[2] == 0
    for value in (theta, phi, distance(x, PAIR)[:, 0]):
        (gradient,) = torch.autograd.grad(value.sum(), x, retain_graph=True)
        assert gradient.isfinite().all() and (gradient[2] == 0).all() and (gradient[3] != 0).any()
    (gradient,) = torch.autograd.grad(phi.sum(), x)
    assert (gradient[:3] == 0).all()


def test_place_is_the_inverse_of_measuring(points):
    r, theta, phi = torch.full((200,), 0.15), torch.full((200,), 1.9), torch.linspace(-3.1, 3.1, 200)
    r, theta, phi = (value.double() for value in (r, theta, phi))
    references = [points[:, i].T for i in range(3)]
    directions = theta.cos(), theta.sin() * phi.cos(), theta.sin() * phi.sin()
    atom, defined = place(*references, r, *directions)
    x = torch.stack([atom.T, points[:, 0], points[:, 1], points[:, 2]], 1)
    assert defined.all()
    torch.testing.assert_close(distance(x, PAIR)[:, 0], r)
    torch.testing.assert_close(angle(x, TRIPLE)[:, 0], theta)
    torch.testing.assert_close(dihedral(x, QUADRUPLE)[:, 0], phi)
