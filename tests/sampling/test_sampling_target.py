"""The target at another temperature: its energy is scaled, the volume of its coordinates is not."""

from __future__ import annotations

import math

import pytest
import torch
from openmm import app

import openmm_bg as bg
from openmm_bg.flows import RealNVP
from openmm_bg.sampling.target import Target


@pytest.mark.parametrize("scale", [0.25, 1.0, 2.0])
@pytest.mark.parametrize("constraints", [None, app.HBonds], ids=["free", "constrained"])
def test_a_scaled_target_is_that_of_a_generator_at_another_temperature(constraints, scale):
    """Also where constraints add the mass metric, which knows no temperature."""
    molecule = bg.systems.load("alanine_dipeptide", constraints=constraints)
    run = bg.simulate(
        molecule.system, molecule.positions, temperature=300, n_frames=1, steps_per_frame=20, seed=1,
        platform="Reference", progress=False,
    )  # fmt: skip
    targets = []
    for temperature in (300.0, 300.0 / scale):
        generator = bg.BoltzmannGenerator.for_molecule(
            molecule.topology, molecule.system, temperature, positions=run.positions[0], compile=False
        )
        targets.append(Target(generator, torch.float64))
    target, other = targets
    q = generator.coordinates(torch.as_tensor(run.positions).double())[0].repeat(5, 1)
    q = q + 0.003 * torch.randn(q.shape, generator=torch.Generator().manual_seed(0), dtype=q.dtype)
    q[3, 5] = math.nan
    q[4, 0] = -0.1  # a bond of negative length
    value, gradient = target.value_and_gradient(q, scale)
    expected, expected_gradient = other.value_and_gradient(q)
    assert torch.allclose(value, expected, rtol=1e-12) and (value[3:] == math.inf).all()
    assert torch.isfinite(value[:3]).all()
    assert torch.allclose(gradient, expected_gradient, rtol=1e-9, atol=1e-9) and (gradient[3:] == 0).all()
    assert torch.allclose(target.value(q, scale), expected, rtol=1e-12)
    energies = target.energy(generator.coordinates.inverse(q)[0])
    assert torch.allclose(target.from_energies(q, energies, scale), expected, rtol=1e-12)
    assert target.evaluations == 10
    if scale != 1:
        assert not torch.allclose(value[:3], scale * target.value(q)[:3], rtol=1e-6)  # the volume would be scaled, too


def test_without_coordinates_the_whole_energy_is_scaled():
    well = bg.systems.load("double_well")
    target = Target(bg.BoltzmannGenerator(well, RealNVP(2, layers=2, hidden=(8,))), torch.float64)
    x = torch.tensor([[1.0, 0.5], [-2.0, 0.1], [math.nan, 0.0]], dtype=torch.float64)
    expected = bg.systems.load("double_well", beta=0.25)(x)
    assert torch.allclose(target.value(x, 0.25), expected)
    value, gradient = target.value_and_gradient(x, 0.25)
    leaf = x[:2].clone().requires_grad_()
    (slope,) = torch.autograd.grad(bg.systems.load("double_well", beta=0.25)(leaf).sum(), leaf)
    assert torch.allclose(value, expected) and torch.allclose(gradient[:2], slope) and (gradient[2] == 0).all()
    assert torch.allclose(target.from_energies(x, well(x), 0.25), expected)
