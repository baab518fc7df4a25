"""The energy of latents against the density of the generator it comes from, and against differences."""

from __future__ import annotations

import math

import pytest
import torch

import openmm_bg as bg
from openmm_bg.errors import InputError
from openmm_bg.flows import RealNVP
from openmm_bg.sampling import LatentEnergy


@pytest.fixture(scope="module")
def parts():
    molecule = bg.systems.load("alanine_dipeptide")
    generator = bg.BoltzmannGenerator.for_molecule(
        molecule.topology, molecule.system, 300, positions=molecule.positions, compile=False, defensive=0.0
    )
    return generator, LatentEnergy(generator)


def latents(latent: LatentEnergy, n: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(3)
    w = torch.randn(n, *latent.event_shape, generator=random, dtype=torch.float64)
    circular = torch.tensor(latent.circular)
    # small in what is stiff: a random conformation without overlaps is rare
    return torch.where(circular, math.pi * (2 * torch.rand(w.shape, generator=random, dtype=w.dtype) - 1), 0.3 * w)


def test_density_is_that_of_the_generator(parts):
    generator, latent = parts
    w = latents(latent, 16)
    x = latent.positions(w)
    circular = torch.tensor(latent.circular)
    log_base = (-0.5 * w.square() - 0.5 * math.log(2 * math.pi)).where(~circular, -math.log(2 * math.pi)).sum(-1)
    # log p(x) - log q(x) of the untrained flow, whose latents are w: the volume elements cancel
    expected = -(generator.log_weights(x) + log_base)
    assert torch.allclose(latent(w), expected, rtol=1e-8, atol=1e-6)


def test_gradient_is_that_of_the_value(parts):
    _, latent = parts
    w = latents(latent, 4)
    value, gradient = latent.reduced_and_gradient(w)
    assert torch.isfinite(value).all()
    step = 1e-6
    for i in range(0, w.shape[1], 7):
        up, down = w.clone(), w.clone()
        up[:, i] += step
        down[:, i] -= step
        difference = (latent(up) - latent(down)) / (2 * step)
        # where atoms touch the energy is large and its differences lose digits
        scale = 1 + gradient.abs().max(-1).values
        assert ((difference - gradient[:, i]).abs() / scale).max() < 1e-5
    leaf = w.clone().requires_grad_()
    (by_autograd,) = torch.autograd.grad(latent(leaf).sum(), leaf)
    assert torch.equal(by_autograd, gradient)


def test_latents_of_conformations_are_those_they_came_from(parts):
    _, latent = parts
    w = latents(latent, 16)
    back = latent.latents(latent.positions(w))
    turn = (back - w)[:, torch.tensor(latent.circular)]
    assert torch.allclose(turn, 2 * math.pi * (turn / (2 * math.pi)).round(), atol=1e-7)
    still = ~torch.tensor(latent.circular)
    assert torch.allclose(back[:, still], w[:, still], atol=1e-6)
    # the conformation it was informed of lies where all stiff coordinates have their centre
    given = latent.latents(torch.as_tensor(bg.systems.load("alanine_dipeptide").positions).double()[None])
    assert given[:, still].abs().max() < 0.01 and latent(given) < 10 + latent(latents(latent, 64)).min()


def test_torsions_are_periodic(parts):
    _, latent = parts
    w = latents(latent, 4)
    turned = w.clone()
    turned[:, 0] += 2 * math.pi
    assert latent.circular[0]
    assert torch.allclose(latent(w), latent(turned), rtol=1e-9)


def test_errors():
    with pytest.raises(InputError, match="MolecularFlow"):
        LatentEnergy(bg.BoltzmannGenerator(bg.systems.load("double_well"), RealNVP(2, layers=2, hidden=(4,))))
    molecule = bg.systems.load("alanine_dipeptide")
    blank = bg.BoltzmannGenerator.for_molecule(molecule.topology, molecule.system, 300, compile=False)
    with pytest.raises(InputError, match="give positions"):
        LatentEnergy(blank)
