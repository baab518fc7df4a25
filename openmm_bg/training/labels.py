"""What the target says of the training data."""

from __future__ import annotations

import torch
from torch import Tensor

from openmm_bg.errors import InputError
from openmm_bg.sampling.target import Target


class Labels:
    """Energies of the data, found once, when an objective first asks."""

    def __init__(self, data: Tensor | None, energies: Tensor | None, target: Target | None):
        self.data, self.target = data, target
        self.value: Tensor | None = None
        self.gradient: Tensor | None = None
        if data is not None and energies is not None and target is not None:
            self.value = target.from_energies(data, energies.to(data))

    def found(self) -> dict[str, Tensor]:
        """What has been evaluated so far, by name."""
        known = {"value": self.value, "gradient": self.gradient}
        return {name: tensor for name, tensor in known.items() if tensor is not None}

    def __call__(self, gradient: bool) -> tuple[Tensor, Tensor | None]:
        if self.target is None:
            raise InputError("The energies of the data are needed, but the generator has no energy.")
        if gradient and self.gradient is None:
            pairs = [self.target.value_and_gradient(part) for part in self.data.split(4096)]
            self.value, self.gradient = (torch.cat(column) for column in zip(*pairs, strict=True))
        elif self.value is None:
            self.value = torch.cat([self.target.value(part) for part in self.data.split(4096)])
        return self.value, self.gradient
