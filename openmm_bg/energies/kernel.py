"""Compiled energies: the kernel of `kernel_source`, built once per machine, fed with a model's numbers."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from openmm_bg.compilation import NUMBERS, NoCompiler, gpu_functions
from openmm_bg.compilation import library as _library
from openmm_bg.energies import expression, kernel_source
from openmm_bg.energies.kernel_source import Columns
from openmm_bg.energies.model import Model, PairwiseSums, Terms

__all__ = ["Kernel", "NoCompiler"]


class Kernel:
    """Energies and gradients of a model by compiled code, on the CPU or on a GPU.

    Parameters
    ----------
    model
        The formulas and their tables.
    global_parameters
        Values to start with.

    Raises
    ------
    NoCompiler
        From the first call, where nothing can compile.
    """

    def __init__(self, model: Model, global_parameters: Mapping[str, float]) -> None:
        self.model = model
        self.source = kernel_source.write(model)
        self.index = [_index(columns) for columns in self.source.columns]
        self.global_parameters = dict(global_parameters)
        self._ready: dict[tuple[torch.dtype, torch.device], _OnCPU | _OnGPU] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_ready": {}}

    def set_global_parameters(self, values: Mapping[str, float]) -> None:
        """Change what was computed from global parameters; nothing is compiled again."""
        self.global_parameters.update(values)
        for ready in self._ready.values():
            ready.fill(self)

    def __call__(self, x: Tensor, gradient: bool, scale: float = 1.0) -> tuple[Tensor, Tensor | None]:
        """Energies, ``(batch,)``, and gradients, ``(batch, atoms, 3)``, of x in nm: kJ/mol and nm, times `scale`."""
        key = (x.dtype, x.device)
        if key not in self._ready:
            if x.dtype not in NUMBERS:
                x = x.to(torch.float32)
                return self(x, gradient, scale)
            self._ready[key] = (_OnGPU if x.device.type == "cuda" else _OnCPU)(self, *key)
        return self._ready[key](x, gradient, scale)

    def numbers(self) -> list[np.ndarray]:
        """All tables in float64: of the parameters, then of the functions."""
        tables = [_parameters(columns, self.global_parameters) for columns in self.source.columns]
        return tables + [function.numbers() for function in self.source.functions]  # type: ignore[attr-defined]


class _OnCPU:
    """The kernel as a shared library; the GIL is released while it runs."""

    def __init__(self, kernel: Kernel, dtype: torch.dtype, device: torch.device) -> None:
        self.library = _library(kernel.source.text, NUMBERS[dtype])
        self.atoms, self.scratch = kernel.model.num_atoms, kernel.source.scratch * kernel.model.num_atoms
        self.dtype = np.float32 if dtype == torch.float32 else np.float64
        self.index = [np.ascontiguousarray(table, dtype=np.int32) for table in kernel.index]
        self.count = np.array([len(table) for table in self.index], dtype=np.int64)
        self.fill(kernel)

    def fill(self, kernel: Kernel) -> None:
        self.tables = [np.ascontiguousarray(table, dtype=self.dtype) for table in kernel.numbers()]
        self.arguments = (
            (ctypes.c_void_p * max(1, len(self.index)))(*(a.ctypes.data for a in self.index)),
            (ctypes.c_void_p * max(1, len(self.tables)))(*(a.ctypes.data for a in self.tables)),
            self.count.ctypes.data_as(ctypes.c_void_p),
        )

    def __call__(self, x: Tensor, gradient: bool, scale: float) -> tuple[Tensor, Tensor | None]:
        x = x.detach().contiguous()
        u = torch.empty(len(x), dtype=x.dtype)
        g = torch.empty_like(x) if gradient else None
        failed = self.library.evaluate(
            ctypes.c_void_p(x.data_ptr()),
            ctypes.c_void_p(u.data_ptr()),
            ctypes.c_void_p(None if g is None else g.data_ptr()),
            *map(ctypes.c_long, (len(x), self.atoms, self.scratch)),
            *self.arguments,
            ctypes.c_double(scale),
            ctypes.c_int(torch.get_num_threads() if len(x) > 64 else 1),
        )
        if failed:
            raise MemoryError("The compiled energy found no memory for its working arrays.")
        return u, g


class _OnGPU:
    """The kernel on a CUDA device, one conformation per thread, compiled by the NVRTC that torch brings along."""

    # Conformations at a time: enough to fill a device, few enough that the working arrays stay small.
    rows = 2**16

    def __init__(self, kernel: Kernel, dtype: torch.dtype, device: torch.device) -> None:
        self.functions = gpu_functions(kernel.source.text, NUMBERS[dtype], ("energy", "gradient"), device)
        self.atoms, self.scratch = kernel.model.num_atoms, kernel.source.scratch * kernel.model.num_atoms
        self.dtype, self.device = dtype, device
        self.index = [torch.as_tensor(table, dtype=torch.int32, device=device).contiguous() for table in kernel.index]
        self.count = torch.tensor([len(table) for table in self.index], dtype=torch.int64, device=device)
        self.fill(kernel)

    def fill(self, kernel: Kernel) -> None:
        self.tables = [torch.as_tensor(table).to(self.device, self.dtype).contiguous() for table in kernel.numbers()]
        self.pointers = [
            torch.tensor([t.data_ptr() for t in tensors] or [0], dtype=torch.int64, device=self.device)
            for tensors in (self.index, self.tables)
        ]

    def __call__(self, x: Tensor, gradient: bool, scale: float) -> tuple[Tensor, Tensor | None]:
        parts = [self._part(part, gradient) for part in x.detach().split(self.rows)]
        u = torch.cat([u for u, _ in parts]) * scale
        return u, torch.cat([g for _, g in parts]) * scale if gradient else None

    def _part(self, x: Tensor, gradient: bool) -> tuple[Tensor, Tensor]:
        lanes = len(x)
        columns = x.reshape(lanes, -1).t().contiguous()
        u, g = x.new_empty(lanes), torch.empty_like(columns if gradient else columns[:0])
        memory = x.new_empty(self.scratch * lanes)
        threads = 128
        self.functions[gradient](
            grid=((lanes + threads - 1) // threads, 1, 1),
            block=(threads, 1, 1),
            args=[columns, u, g, memory, lanes, self.atoms, *self.pointers, self.count],
        )
        return u, g.t().reshape(x.shape) if gradient else g


# ---- the numbers ---------------------------------------------------------------------------------------


def _index(columns: Columns) -> np.ndarray:
    source = columns.source
    if isinstance(source, Terms):
        return source.particles
    if columns.role == "first":
        return source.pairs
    if columns.role == "paired":
        return source.paired[columns.part][1]
    return np.arange(_atoms(source))[:, None]


def _atoms(sums: PairwiseSums) -> int:
    return len(next(iter(sums.parameters.values())))


def _parameters(columns: Columns, global_parameters: Mapping[str, float]) -> np.ndarray:
    """The values of the columns, ``(rows, columns)``; for both orders of a pair one row after the other."""
    source, index = columns.source, _index(columns)
    if columns.role in ("first", "paired"):
        assert isinstance(source, PairwiseSums)
        pairs = np.stack((index, index[:, ::-1]), 1).reshape(-1, 2) if columns.role == "first" else index
        values = {f"{k}{side}": v[pairs[:, side - 1]] for k, v in source.parameters.items() for side in (1, 2)}
        rows = len(pairs)
    else:
        values, rows = dict(source.parameters), len(index)
    known = {name: torch.as_tensor(v, dtype=torch.float64) for name, v in values.items()}
    known |= {name: torch.tensor(v, dtype=torch.float64) for name, v in global_parameters.items() if name not in known}
    like = torch.zeros(rows, dtype=torch.float64)
    computed = expression.evaluate(columns.nodes, known, like)
    table = [np.broadcast_to(v.numpy(), (rows,)) for v in computed]
    return np.stack(table, 1) if table else np.zeros((rows, 0))
