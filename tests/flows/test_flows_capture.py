"""No pass of a molecule's flow asks the device for a value, so that a training step can be captured in a CUDA graph."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from openmm_bg.flows import MolecularFlow

# values read by Python, shapes that depend on values, constants copied from the host
REFUSED = ("_local_scalar_dense", "nonzero", "masked_select", "masked_scatter", "unique", "lift_fresh")


class Capturable(TorchDispatchMode):
    """Raises at operators that CUDA graphs cannot hold."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name.startswith(REFUSED):
            raise AssertionError(f"aten.{name} waits for the device")
        if name in ("index", "index_put", "index_put_") and any(
            i is not None and i.dtype == torch.bool for i in args[1]
        ):
            raise AssertionError("an index of bools has a shape that depends on its values")
        return function(*args, **(kwargs or {}))


FLOWS = {
    "spline": {},
    "realnvp": {"torsion_model": "realnvp"},
    "local": {"blocks": [0, 0, 0, 1, 1, 1, 1], "bonded_blocks": [(0, 1)], "torsion_conditions": [[], [0]]},
    "spline layers": {"spline_layers": 2},
    "mixing": {"mixing": True},
}


@pytest.fixture(params=FLOWS, ids=list(FLOWS))
def flow(request):
    flow = MolecularFlow(
        7, torsions=[4, 5], rotors={5: (3, 6)}, stiff_torsions=[3, 6], layers=4, hidden=8, torsion_hidden=8,
        **FLOWS[request.param],
    )  # fmt: skip
    flow.initialize(0.1 * torch.randn(300, 7, generator=torch.Generator().manual_seed(4)))
    return flow


@pytest.mark.parametrize("broadened", [False, True])
def test_draws_and_densities_wait_for_nothing(flow, broadened):
    rng = torch.Generator().manual_seed(0)
    with Capturable():
        q, _ = flow.sample(20, rng, broadened=broadened)
        flow.rsample(20, rng, broadened=broadened).nan_to_num().sum().backward()
        leaf = q.requires_grad_()
        flow.log_probs(leaf)[int(broadened)].sum().backward()
        flow.torsions.sample(20, rng, broadened=broadened)
    assert torch.isfinite(leaf.grad).all()


def test_a_training_step_waits_for_nothing(flow):
    rng = torch.Generator().manual_seed(0)
    with Capturable():
        t = flow.draw_torsions(20, rng).detach().nan_to_num()
        y, _, score = flow.draw_stiff_with_score(t, rng)
        q = flow.chart.join(t, y.detach().requires_grad_())
        loss = (score * y).sum() + flow.log_prob_torsions(t).square().mean() + flow.log_prob(q.detach()).mean()
        loss.backward()
        flow.log_prob_stiff(y.detach(), t).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in flow.parameters() if p.grad is not None)


def test_what_waits_is_refused():
    x = torch.arange(3.0)
    for waits in (lambda: x[x > 0], lambda: bool((x > 0).any()), lambda: x.new_tensor(1.0), lambda: x.sum().item()):
        with Capturable(), pytest.raises(AssertionError):
            waits()
