"""Which dimensions a coupling moves."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def alternating_masks(dimension: int, layers: int, generator: torch.Generator) -> list[Tensor]:
    """Random halves, each followed by its complement; ``(dimension,)`` bool tensors, True where a layer moves."""
    masks: list[Tensor] = []
    while len(masks) < layers:
        order = torch.randperm(dimension, generator=generator)
        mask = torch.zeros(dimension, dtype=torch.bool)
        mask[order[: (dimension + 1) // 2]] = True
        masks += [mask, ~mask]
    return masks[:layers]


def checkered_masks(dimension: int, layers: int) -> list[Tensor]:
    """The even dimensions, then the odd ones, in turn; ``(dimension,)`` bool tensors, True where a layer moves."""
    even = torch.arange(dimension) % 2 == 0
    return [even if layer % 2 == 0 else ~even for layer in range(layers)]


def graph_masks(
    dimension: int, neighbours: Sequence[Sequence[int]], layers: int, generator: torch.Generator
) -> list[Tensor]:
    """Halves that part neighbours, each followed by its complement, so that what moves sees the neighbours it has.

    From random halves dimensions change sides while that parts more neighbours than it joins: a local maximum of the
    cut of the graph, another one for every two layers.

    Parameters
    ----------
    dimension : int
    neighbours : sequence of (int, int)
        The edges of the graph.
    layers : int
    generator : torch.Generator

    Returns
    -------
    list of Tensor of bool, (dimension,)
        True where a layer moves.

    Examples
    --------
    >>> chain = [(0, 1), (1, 2), (2, 3)]
    >>> mask, other = graph_masks(4, chain, 2, torch.Generator().manual_seed(0))
    >>> sum(bool(mask[i] != mask[j]) for i, j in chain) >= 2, bool((mask == ~other).all())
    (True, True)
    """
    near: list[list[int]] = [[] for _ in range(dimension)]
    for i, j in neighbours:
        if i != j:
            near[i].append(j)
            near[j].append(i)
    masks: list[Tensor] = []
    for start in alternating_masks(dimension, layers, generator)[::2]:
        side, changed = start.tolist(), True
        while changed:
            changed = False
            for i in torch.randperm(dimension, generator=generator).tolist():
                if 2 * sum(side[j] == side[i] for j in near[i]) > len(near[i]):
                    side[i], changed = not side[i], True
        mask = torch.tensor(side)
        masks += [mask, ~mask]
    return masks[:layers]
