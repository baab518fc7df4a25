"""Real force fields, read from every common format: nothing is left to OpenMM, and all of it agrees with OpenMM."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from openmm_bg.energies import ContextEnergy, ForceFieldEnergy

sys.path.insert(0, str(Path(__file__).parent))
import force_fields


def errors(name: str, compile: bool, **global_parameters: float) -> tuple[float, float]:
    """Largest relative errors of energies and of forces on thermal conformations."""
    system, _ = force_fields.make(name)
    energy = ForceFieldEnergy(system, 300, compile=compile)
    assert energy.fallback == ()
    reference = ContextEnergy(system, 300, platform="Reference")
    energy.set_global_parameters(global_parameters)
    reference.set_global_parameters(global_parameters)
    x = torch.as_tensor(force_fields.thermal(name))
    u, gradient = energy.value_and_gradient(x)
    v, expected = reference.value_and_gradient(x)
    assert torch.isfinite(v).all()
    of_energies = ((u - v).abs() / v.abs().clamp(min=1)).max()
    return float(of_energies), float((gradient - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("compile", [True, False])
@pytest.mark.parametrize("name", force_fields.BUILDERS)
def test_force_field(name: str, compile: bool) -> None:
    assert max(errors(name, compile)) < 1e-10


@pytest.mark.parametrize("sterics, electrostatics", [(1.0, 0.5), (0.5, 0.0), (0.0, 0.0)])
def test_alchemical_states(sterics: float, electrostatics: float) -> None:
    values = {"lambda_sterics": sterics, "lambda_electrostatics": electrostatics}
    assert max(errors("alchemical", True, **values)) < 1e-10


@pytest.mark.parametrize("name", force_fields.AMINO_ACIDS)
def test_amino_acid(name: str) -> None:
    assert max(errors(name, True)) < 1e-10


@pytest.mark.parametrize("name", ["amber99sbildn+amber99_obc", "charmm36_2024"])
def test_second_derivatives(name: str) -> None:
    """Central differences of OpenMM's forces."""
    system, _ = force_fields.make(name)
    x = torch.as_tensor(force_fields.thermal(name, 1))
    energy, reference = ForceFieldEnergy(system, 300), ContextEnergy(system, 300, platform="Reference")
    direction = torch.as_tensor(np.random.default_rng(3).normal(size=x.shape))
    y = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(energy(y).sum(), y, create_graph=True)
    (along,) = torch.autograd.grad((gradient * direction).sum(), y)
    step = 1e-6
    after, before = (reference.value_and_gradient(x + sign * step * direction)[1] for sign in (1, -1))
    difference = (after - before) / (2 * step)
    assert float((along - difference).abs().max() / difference.abs().max()) < 1e-6


def test_virtual_sites_have_no_gradient() -> None:
    system, _ = force_fields.make("TIP4P-Ew")
    sites = [i for i in range(system.getNumParticles()) if system.isVirtualSite(i)]
    assert len(sites) == 4
    x = torch.as_tensor(force_fields.thermal("TIP4P-Ew", 2))
    energy = ForceFieldEnergy(system, 300)
    u, gradient = energy.value_and_gradient(x)
    assert (gradient[:, sites] == 0).all()
    moved = x.clone()
    moved[:, sites] += 1.0
    assert torch.equal(energy(moved), u)
