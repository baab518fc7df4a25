"""Torsions that are given a few of those before them."""

from __future__ import annotations

import pytest
import torch

from openmm_bg.flows import AutoregressiveSpline, Base, SplineTorsions
from openmm_bg.flows.local import nearby_conditions


def disturb(module: torch.nn.Module) -> None:
    rng = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data += 0.4 * torch.randn(parameter.shape, generator=rng, dtype=parameter.dtype)


def test_torsions_see_their_conditions_alone_and_wait_for_nothing_else():
    conditions = nearby_conditions([0, 0, 1, 1, 2, 2], [(0, 1), (1, 2)], reach=1, ends=[1, 3, 5])
    assert conditions == [[], [0], [0], [0, 2], [2], [2, 4]]
    chain = AutoregressiveSpline([1, 3] * 3, hidden=8, conditions=conditions).double()
    disturb(chain)
    # backbone after backbone, each rotor beside the backbone of the next block
    assert chain.steps == [(0, 1), (1, 3), (3, 5), (5, 6)]
    y = Base([True] * 6).double().sample(1, torch.Generator().manual_seed(3))
    before = chain.conditionals(y)[1]
    for j in range(6):
        there = y.clone()
        there[0, j] += 0.1
        changed = (chain.conditionals(there)[1] != before)[0].nonzero()[:, 0].tolist()
        assert changed == [i for i in range(6) if i == j or j in conditions[i]]
    for wrong in ([[], [1]], [[0], [0]], [[]]):
        with pytest.raises(ValueError, match="before it"):
            AutoregressiveSpline([1, 1], conditions=wrong)


def test_few_conditions_grow_linearly():
    def size(residues):
        blocks = [b for b in range(residues) for _ in range(3)]
        conditions = nearby_conditions(blocks, [(b, b + 1) for b in range(residues - 1)], reach=1)
        torsions = SplineTorsions([1] * len(blocks), hidden=8, conditions=conditions)
        return sum(p.numel() for p in torsions.parameters())

    assert size(24) == 3 * size(8)


def test_all_conditions_named_are_all_conditions():
    named = SplineTorsions([1, 3, 1], hidden=8, conditions=[[], [0], [0, 1]]).double()
    plain = SplineTorsions([1, 3, 1], hidden=8).double()
    disturb(named)
    weights = named.state_dict()
    weights["transform.networks.weight1"] = torch.nn.functional.pad(weights["transform.networks.weight1"], (0, 0, 0, 6))
    plain.load_state_dict(weights)
    for broadened in (False, True):
        one, two = (f.sample(50, torch.Generator().manual_seed(1), broadened=broadened) for f in (named, plain))
        torch.testing.assert_close(one, two)
