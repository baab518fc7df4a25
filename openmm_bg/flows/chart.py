"""How a molecule's internal coordinates are cut into free torsions and what is stiff."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from openmm_bg.flows.base import permute, wrap


class Chart(nn.Module):
    """Internal coordinates q to (free torsions t, stiff coordinates y), a shear of unit Jacobian.

    A stiff torsion is measured from its centre, in (-pi, pi). A rotor's torsion becomes the mean over its three
    hydrogens, ``t = phi_1 + (d_2 + d_3) / 3`` with d the torsions of the two that hang on the first: relabelling them
    cyclically turns t by exactly 2 pi / 3 and leaves its density alone.

    Parameters
    ----------
    dimension : int
    torsions : sequence of int
        Columns of q that are free torsions.
    rotors : dict of int to (int, int)
        For a free torsion that is a rotor, the columns of the two torsions that hang on it.
    stiff_torsions : sequence of int
        Columns of q that are torsions and not free.
    """

    def __init__(
        self,
        dimension: int,
        torsions: Sequence[int],
        rotors: dict[int, tuple[int, int]],
        stiff_torsions: Sequence[int],
    ):
        super().__init__()
        stiff = [i for i in range(dimension) if i not in set(torsions)]
        siblings = torch.zeros(len(stiff), len(torsions))
        for torsion, (second, third) in rotors.items():
            for other in (second, third):
                siblings[stiff.index(other), list(torsions).index(torsion)] = 1
        periodic = torch.tensor([i in set(stiff_torsions) for i in stiff], dtype=torch.bool)
        self.register_buffer("free", torch.tensor(list(torsions), dtype=torch.long), persistent=False)
        self.register_buffer("stiff", torch.tensor(stiff, dtype=torch.long), persistent=False)
        self.register_buffer("siblings", siblings, persistent=False)
        self.register_buffer("periodic", periodic, persistent=False)
        self.register_buffer("together", torch.cat([self.free, self.stiff]), persistent=False)
        self.register_buffer("order", torch.argsort(self.together), persistent=False)
        self.register_buffer("centre", torch.zeros(len(stiff)))

    @torch.no_grad()
    def set_centre(self, q: Tensor) -> None:
        """Measure stiff torsions from their circular mean over samples ``(n, dimension)``."""
        angles = q[:, self.stiff]
        mean = torch.atan2(angles.sin().mean(0), angles.cos().mean(0))
        self.centre.copy_(torch.where(self.periodic, mean, 0.0))

    def split(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """``(t, y)`` of shapes ``(batch, torsions)`` and ``(batch, stiff)``."""
        free, stiff = permute(q, self.together, self.order).split([len(self.free), len(self.stiff)], 1)
        t = wrap(free + wrap(stiff) @ self.siblings / 3)
        return t, torch.where(self.periodic, wrap(stiff - self.centre), stiff)

    def join(self, t: Tensor, y: Tensor) -> Tensor:
        """The inverse of :meth:`split`; rows of NaN where a stiff torsion has left (-pi, pi) about its centre."""
        stiff = y + self.centre
        inside = ~(self.periodic & (y.abs() >= math.pi)).any(-1, keepdim=True)
        stiff = torch.where(self.periodic, wrap(stiff), stiff)
        q = permute(torch.cat([wrap(t - stiff @ self.siblings / 3), stiff], -1), self.order, self.together)
        return torch.where(inside, q, math.nan)
