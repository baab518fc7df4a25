"""Tables that keep their precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

from torch import Tensor, nn


class ExactTables(nn.Module):
    """A module whose own buffers stay in double precision under ``.to(dtype)``; they do follow to a device.

    Constrained lengths and masses are facts about a molecule: float32 and back would change them for good.
    They are cast where they are used.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        tables = self.named_buffers(recurse=False)
        exact = {name: table for name, table in tables if table.is_floating_point()}
        super()._apply(fn, recurse)
        for name, table in exact.items():
            self.register_buffer(name, table.to(getattr(self, name).device))
        return self
