"""Weights go into the flow they were taken from, or nowhere: no density without a word about another one."""

from __future__ import annotations

import copy

import pytest
import torch

from openmm_bg.errors import InputError
from openmm_bg.flows import AffineCoupling, MolecularFlow, RealNVP, SplineCoupling, SplineFlow

# free torsions 6 and 7; four blocks in a row for the local networks
BLOCKS = {"blocks": [0, 1, 2, 3, 0, 3, 1, 2], "bonded_blocks": [(0, 1), (1, 2), (2, 3)]}


def molecular(seed, **options):
    return MolecularFlow(8, [6, 7], {}, [5], hidden=8, torsion_hidden=8, seed=seed, **({"layers": 4} | options))


FLOWS = {
    "RealNVP": lambda seed: RealNVP(6, layers=4, hidden=(8,), seed=seed),
    "splines": lambda seed: SplineFlow([False, True] * 3, layers=4, hidden=(8,), seed=seed),
    "molecule": molecular,
    "molecule, RealNVP torsions": lambda seed: molecular(seed, torsion_model="realnvp"),
    "molecule, local networks": lambda seed: molecular(seed, **BLOCKS),
    "molecule, graph masks": lambda seed: molecular(seed, neighbours=[(0, 3), (1, 4), (2, 5)]),
    "molecule, spline layers": lambda seed: molecular(seed, layers=0, spline_layers=4),
}


def disturbed(flow):
    rng = torch.Generator().manual_seed(7)
    for parameter in flow.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=rng)
    return flow


@pytest.mark.parametrize("kind", FLOWS)
@pytest.mark.parametrize("strict", [True, False])
def test_weights_of_other_halves_are_refused(kind, strict):
    """Seeds 0 and 1 draw other halves for every kind; shapes agree nonetheless, but for those of local networks."""
    one, other = FLOWS[kind](0), FLOWS[kind](1)
    shapes, others = ({name: t.shape for name, t in flow.state_dict().items()} for flow in (one, other))
    assert shapes == others or "local" in kind
    with pytest.raises(InputError, match=r"coupling \S+ moves other dimensions.*its seed included"):
        other.load_state_dict(one.state_dict(), strict=strict)


@pytest.mark.parametrize("kind", FLOWS)
@pytest.mark.parametrize("copied", [False, True], ids=["built", "copied"])
def test_weights_of_the_same_halves_bring_the_same_density(kind, copied):
    trained, fresh = disturbed(FLOWS[kind](0)), FLOWS[kind](0)
    if copied:
        fresh = copy.deepcopy(fresh)
    y, _ = trained.sample(20, torch.Generator().manual_seed(1))
    assert not torch.equal(fresh.log_prob(y), trained.log_prob(y))
    fresh.load_state_dict(trained.state_dict())
    assert torch.equal(fresh.log_prob(y), trained.log_prob(y))


def test_a_copy_refuses_for_itself():
    """What was copied is held against its own halves, also once the original has gone."""
    flow = copy.deepcopy(RealNVP(6, layers=4, hidden=(8,), seed=0))
    with pytest.raises(InputError, match="moves other dimensions"):
        flow.load_state_dict(RealNVP(6, layers=4, hidden=(8,), seed=1).state_dict())


def test_halves_of_another_size_are_refused_too():
    few, many = torch.tensor([True, False, False]), torch.tensor([True, True, False])
    none = torch.zeros(3, dtype=torch.bool)
    for make in (lambda moved: AffineCoupling(moved, hidden=(4,)), lambda moved: SplineCoupling(moved, none)):
        with pytest.raises(InputError, match="coupling layer moves other dimensions"):
            make(few).load_state_dict(make(many).state_dict())


def test_halves_that_no_seed_decides_take_weights_of_any():
    one, other = (RealNVP(4, layers=4, hidden=(8,), networks="split", seed=seed) for seed in (0, 1))
    other.load_state_dict(disturbed(one).state_dict())
    y, log_prob = one.sample(10, torch.Generator().manual_seed(0))
    torch.testing.assert_close(other.log_prob(y), log_prob)
