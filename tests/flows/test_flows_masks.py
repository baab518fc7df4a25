"""Halves of couplings."""

from __future__ import annotations

import torch

from openmm_bg.flows.masks import graph_masks


def test_masks_of_a_graph_part_neighbours():
    # a ring of even length can be parted whole, a triangle by two of its three edges
    ring = [(i, (i + 1) % 8) for i in range(8)]
    triangle = [(8, 9), (9, 10), (8, 10)]
    masks = graph_masks(11, ring + triangle, 20, torch.Generator().manual_seed(0))
    for mask, other in zip(masks[::2], masks[1::2], strict=True):
        assert torch.equal(mask, ~other)
        assert sum(bool(mask[i] != mask[j]) for i, j in triangle) == 2
        # at a local maximum nobody has more neighbours beside than across
        for i in range(8):
            assert bool(mask[i] != mask[i - 1]) or bool(mask[i] != mask[(i + 1) % 8])
    assert len({tuple(mask.tolist()) for mask in masks}) > 4, "every two layers part them in another way"
