"""Latents of every kind of flow: one bijection, and the flow's own density."""

from __future__ import annotations

import math

import pytest
import torch

from openmm_bg import flows
from openmm_bg.errors import InputError
from openmm_bg.sampling.latents import latents_of


def shaken(flow, seed=0):
    """A flow whose weights are no longer those of the identity."""
    random = torch.Generator().manual_seed(seed)
    for parameter in flow.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=random)
    return flow.double().eval()


def molecular(torsion_model):
    flow = flows.MolecularFlow(
        8, torsions=[6, 7], rotors={6: (4, 5)}, stiff_torsions=[4, 5], torsion_model=torsion_model, layers=2, hidden=16
    )
    flow.initialize(0.1 * torch.randn(200, 8, generator=torch.Generator().manual_seed(1)))
    return flow


def no_torsions():
    flow = flows.MolecularFlow(3, torsions=[], rotors={}, stiff_torsions=[2], layers=2, hidden=16)
    flow.initialize(0.1 * torch.randn(200, 3, generator=torch.Generator().manual_seed(1)))
    return flow


KINDS = {
    "plain": lambda: flows.SplineFlow([False, True, True], layers=4, hidden=(16,)),
    "realnvp": lambda: flows.RealNVP(3, layers=4, hidden=(16,)),
    "spline torsions": lambda: flows.SplineTorsions([1, 3], hidden=8),
    "affine torsions": lambda: flows.AffineTorsions(
        [1, 3], layers=4, hidden=(16,), generator=torch.Generator().manual_seed(0)
    ),
    "molecular, spline": lambda: molecular("spline"),
    "molecular, realnvp": lambda: molecular("realnvp"),
    "molecular without torsions": no_torsions,
}


@pytest.mark.parametrize("kind", KINDS)
def test_density_is_the_flows_and_the_map_is_inverted(kind):
    flow = shaken(KINDS[kind]())
    q = flow.sample(300, torch.Generator().manual_seed(3))[0]
    q = q[torch.isfinite(q).all(-1)]
    assert len(q) > 200
    latents = latents_of(flow)
    with torch.no_grad():
        z, image, log_prob = latents.inverse(q)
        back = latents.forward(z, image)
        torch.testing.assert_close(log_prob, flow.log_prob(q), rtol=0, atol=1e-9)
    circle = torch.cos(back - q) - 1
    assert (torch.where((back - q).abs() > 1, circle.abs(), (back - q).abs()) < 1e-6).all()
    assert z.shape == q.shape and latents.circular.shape == (q.shape[1],)


@pytest.mark.parametrize("model", ["spline", "affine"])
def test_images_of_a_rotor_are_told_apart(model):
    """Three angles a third of a turn apart have one density, and come back to themselves."""
    flow = shaken(KINDS[f"{model} torsions"]())
    latents = latents_of(flow)
    q = torch.tensor([[0.3, -3.0 + 2 * math.pi / 3 * k] for k in range(3)], dtype=torch.float64)
    with torch.no_grad():
        z, image, log_prob = latents.inverse(q)
        torch.testing.assert_close(latents.forward(z, image), flows.wrap(q), rtol=0, atol=1e-9)
    torch.testing.assert_close(log_prob, log_prob[:1].expand(3), rtol=0, atol=1e-9)
    assert len({round(v, 6) for v in (z if model == "spline" else image)[:, 1].tolist()}) == 3


def test_what_leaves_an_unrolled_circle_is_no_sample():
    latents = latents_of(shaken(KINDS["affine torsions"]()))
    far = torch.tensor([[50.0, 0.0]], dtype=torch.float64)
    with torch.no_grad():
        assert torch.isnan(latents.forward(far, torch.zeros(1, 2, dtype=torch.float64))).all()


def test_other_flows_are_refused():
    class Own(flows.Flow):
        pass

    plain = KINDS["plain"]()
    with pytest.raises(InputError, match="not a Own"):
        latents_of(Own(plain.base, plain.transform))
    box = flows.BoxBase([(-1, 1)] * 3)
    with pytest.raises(InputError, match="independent proposals"):
        latents_of(flows.Flow(box, plain.transform))
