"""Networks that see only their surroundings: one small perceptron per block, all evaluated together.

What a stiff coordinate of a chain does depends on the residues beside it and hardly on those far away. A network per
residue, with the residues within reach as its input, grows linearly with the chain and does not have to learn that the
rest is irrelevant.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from openmm_bg.flows.columns import Batched, Selection


class Surroundings(NamedTuple):
    """Which block every dimension and every feature of a context belongs to, and which blocks see which.

    Attributes
    ----------
    dimensions, context : tuple of int
    near : Tensor of bool, (blocks, 2 * blocks)
        ``near[i, j]``: block i sees the dimensions of block j; ``near[i, blocks + j]``: the features of block j.
    """

    dimensions: tuple[int, ...]
    context: tuple[int, ...]
    near: Tensor

    @classmethod
    def of(
        cls, dimensions: Sequence[int], context: Sequence[int], edges: Sequence[Sequence[int]], reach: int
    ) -> Surroundings:
        """Blocks see the dimensions of those within ``reach`` steps along the edges, and the features of those within
        one step more.
        """
        blocks = 1 + max(*dimensions, *context, *(i for edge in edges for i in edge), 0)
        near = [_within(blocks, edges, steps) for steps in (reach, reach + 1)]
        return cls(tuple(dimensions), tuple(context), torch.cat(near, 1))

    def network(
        self, keep: Sequence[int], move: Sequence[int], hidden: int, numbers: int = 2, together: bool = False
    ) -> LocalPerceptron:
        """Some numbers for every moved dimension, from the kept ones and the context."""
        blocks = len(self.near)
        inputs = [self.dimensions[i] for i in keep] + [blocks + block for block in self.context]
        return LocalPerceptron(inputs, [self.dimensions[i] for i in move], self.near, hidden, numbers, together)


def _within(blocks: int, edges: Sequence[Sequence[int]], reach: int) -> Tensor:
    """Which blocks are within ``reach`` steps of which, ``(blocks, blocks)`` bool."""
    steps = torch.eye(blocks)
    for i, j in edges:
        steps[i, j] = steps[j, i] = 1
    return torch.linalg.matrix_power(steps.double(), reach) > 0


def nearby_conditions(
    blocks: Sequence[int], edges: Sequence[Sequence[int]], reach: int, ends: Collection[int] = ()
) -> list[list[int]]:
    """For every angle the angles before it that lie within ``reach`` blocks.

    Parameters
    ----------
    blocks : sequence of int
        The block of every angle.
    edges : sequence of (int, int)
        Which blocks are bonded to each other.
    reach : int
    ends : collection of int
        Angles that no angle of another block is given, such as rotors: those of different blocks are then drawn
        together.

    Returns
    -------
    list of lists of int
        ``conditions`` of :class:`~openmm_bg.flows.AutoregressiveSpline`.

    Examples
    --------
    >>> nearby_conditions([0, 0, 1, 1, 2], [(0, 1), (1, 2)], reach=1, ends=[1])
    [[], [0], [0], [0, 2], [2, 3]]
    """
    near = _within(1 + max(*blocks, *(i for edge in edges for i in edge), 0), edges, reach).tolist()
    return [
        [j for j in range(i) if near[mine][blocks[j]] and (blocks[j] == mine or j not in ends)]
        for i, mine in enumerate(blocks)
    ]


class LocalPerceptron(Batched, nn.Module):
    """One SiLU perceptron of two hidden layers per block; inputs from blocks within reach, outputs to its own.

    Parameters
    ----------
    inputs, outputs : sequence of int
        The block of every input and of every output.
    near : Tensor of bool, (blocks, blocks)
        ``near[i, j]``: block i sees the inputs of block j.
    hidden : int
        Units of each hidden layer, in each block.
    numbers : int
        Numbers per output, zero at initialisation.
    together : bool
        ``columns`` gives all numbers of the first output, then all of the second, and so on; otherwise the first number
        of every output, then the second of every output.

    Examples
    --------
    >>> near = torch.eye(2).bool()
    >>> network = LocalPerceptron([0, 0, 1], [0, 1, 1], near, hidden=8)
    >>> network.columns(torch.zeros(3, 5), None).shape
    torch.Size([6, 5])
    """

    def __init__(
        self,
        inputs: Sequence[int],
        outputs: Sequence[int],
        near: Tensor,
        hidden: int,
        numbers: int = 2,
        together: bool = False,
    ) -> None:
        super().__init__()
        blocks = sorted(set(outputs))
        seen = [[i for i, block in enumerate(inputs) if near[mine, block]] for mine in blocks]
        own = [[i for i, block in enumerate(outputs) if block == mine] for mine in blocks]
        wide, many = max(1, *map(len, seen)), max(map(len, own))
        # a row of zeros behind the inputs fills up what blocks with fewer of them lack
        rows = [s + [len(inputs)] * (wide - len(s)) for s in seen]
        places = {output: row * many + k for row, indices in enumerate(own) for k, output in enumerate(indices)}
        order = torch.tensor([[places[i] * numbers + n for n in range(numbers)] for i in range(len(outputs))])
        order = (order if together else order.T).flatten().tolist()
        self.inputs = Selection([i for row in rows for i in row], len(inputs))
        self.outputs = Selection(order, len(blocks) * many * numbers)
        self.shape = (len(blocks), wide, many * numbers)
        fan_in = torch.tensor([max(1, len(s)) for s in seen])[:, None, None]
        self.weight1 = nn.Parameter(torch.randn(len(blocks), wide, hidden) / fan_in.sqrt())
        self.bias1 = nn.Parameter(torch.randn(len(blocks), 1, hidden) * 0.1)
        self.weight2 = nn.Parameter(torch.randn(len(blocks), hidden, hidden) / hidden**0.5)
        self.bias2 = nn.Parameter(torch.zeros(len(blocks), 1, hidden))
        self.weight3 = nn.Parameter(torch.zeros(len(blocks), hidden, many * numbers))
        self.bias3 = nn.Parameter(torch.zeros(len(blocks), 1, many * numbers))

    def weights(self) -> list[Tensor]:
        return [self.weight1, self.bias1, self.weight2, self.bias2, self.weight3, self.bias3]

    def gather(self, kept: Tensor, context: Tensor | None) -> Tensor:
        given = [kept] if context is None else [kept, context]
        blocks, wide, _ = self.shape
        return self.inputs(torch.cat([*given, kept.new_zeros(1, kept.shape[1])])).view(blocks, wide, -1)

    def spread(self, gradient: Tensor, kept: int, context: bool) -> tuple[Tensor, Tensor | None]:
        whole = self.inputs.back(gradient.flatten(0, 1), None if context else kept)
        return whole[:kept], whole[kept:] if context else None

    def arrange(self, out: Tensor) -> Tensor:
        return self.outputs(out.flatten(0, 1))

    def disarrange(self, gradient: Tensor) -> Tensor:
        blocks, _, outputs = self.shape
        return self.outputs.back(gradient).view(blocks, outputs, -1)
