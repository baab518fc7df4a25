"""All atoms of a molecule from its bonds, angles and torsions: compiled, or by torch operations."""

from __future__ import annotations

import ctypes
import functools
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from openmm_bg import compilation
from openmm_bg.coordinates.geometry import place
from openmm_bg.coordinates.placement_source import SOURCE
from openmm_bg.coordinates.zmatrix import ZMatrix


class Placement(nn.Module):
    """Positions from full internal coordinates, differentiable any number of times.

    Compiled, the positions are one pass over the z-matrix, and so is their adjoint: what pulls at an atom is handed
    back to the three atoms it was placed by. A derivative that is to be differentiated again (``create_graph=True``)
    is taken by torch operations.

    Parameters
    ----------
    zmatrix : ZMatrix
    compile : bool
        Use the kernel, where there is a compiler and the numbers are float32 or float64; else, after a warning if
        nothing compiles, torch operations.

    Examples
    --------
    >>> place = Placement(ZMatrix((0, 1, 2), [[3, 2, 1, 0]]))
    >>> x, _ = place(torch.tensor([[0.1, 0.1, 0.1, torch.pi / 2, torch.pi / 2, 0.0]]))  # a square
    >>> (x[0, 3] - x[0, 0]).norm()
    tensor(0.1000)
    """

    order: Tensor
    standing: Tensor
    references: Tensor
    table: Tensor

    def __init__(self, zmatrix: ZMatrix, compile: bool = True) -> None:
        super().__init__()
        self.num_atoms = zmatrix.num_atoms
        self.compiled = compile
        # all atoms whose references stand are placed at once by torch operations, level by level
        level = dict.fromkeys(zmatrix.seed, 0)
        levels: dict[int, list[int]] = {}
        for index, (atom, *references) in enumerate(zmatrix.rows.tolist()):
            level[atom] = 1 + max(level[reference] for reference in references)
            levels.setdefault(level[atom], []).append(index)
        self._level_sizes = tuple(len(levels[depth]) for depth in sorted(levels))
        order = np.array([index for depth in sorted(levels) for index in levels[depth]], dtype=np.int64)
        standing = np.argsort([*zmatrix.seed, *zmatrix.rows[order, 0]])  # where each atom stands in that order
        tables = {"order": order, "standing": standing, "references": standing[zmatrix.rows[order, 1:]].T}
        tables["table"] = np.array([*zmatrix.seed, *zmatrix.rows.ravel()], dtype=np.int32)
        for name, values in tables.items():
            self.register_buffer(name, torch.tensor(values), persistent=False)

    def forward(self, full: Tensor, rotation: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Place all atoms.

        Parameters
        ----------
        full : Tensor, shape (batch, 3N-6)
            Bonds in nm, angles and torsions in radians.
        rotation : Tensor, shape (batch, 3, 3), optional
            Its first two columns are the directions of b -> a, and perpendicular to it towards c; by default x and y.

        Returns
        -------
        x : Tensor, shape (batch, N, 3)
            Positions in nm; the seed atom b at zero, as small numbers round less.
        defined : BoolTensor, shape (batch,)
            False where the references of an atom are collinear: positions and gradients there are finite and
            meaningless.
        """
        if rotation is not None:
            dtype = torch.promote_types(full.dtype, rotation.dtype)
            full, rotation = full.to(dtype), rotation.to(dtype).expand(len(full), 3, 3)
        if self.compiled and full.dtype in compilation.NUMBERS and full.device == self.table.device:
            try:
                return _Placed.apply(full, rotation, self)
            except compilation.NoCompiler as reason:
                self.compiled = False
                warnings.warn(
                    f"Internal coordinates are not compiled, and slower than they could be: {reason}.", stacklevel=2
                )
        return self.plain(full, rotation)

    def plain(self, full: Tensor, rotation: Tensor | None) -> tuple[Tensor, Tensor]:
        """The same by torch operations."""
        n = self.num_atoms
        lengths, angles, torsions = full.split([n - 1, n - 2, n - 3], 1)
        placed = _seed_positions(lengths[:, :2], angles[:, 0], rotation)
        r = lengths[:, 2:].index_select(1, self.order)
        theta = angles[:, 1:].index_select(1, self.order)
        phi = torsions.index_select(1, self.order)
        sine = theta.sin()
        along, across, out = theta.cos(), sine * phi.cos(), sine * phi.sin()
        defined = torch.ones_like(lengths[:, 0], dtype=torch.bool)
        start = 0
        for size in self._level_sizes:
            stop = start + size
            bond, middle, far = (placed.index_select(2, column[start:stop]) for column in self.references.unbind(0))
            directions = (part[:, start:stop] for part in (r, along, across, out))
            atoms, level_defined = place(bond, middle, far, *directions)
            placed = torch.cat([placed, atoms], 2)
            defined = defined & level_defined.all(1)
            start = stop
        return placed.index_select(2, self.standing).permute(1, 2, 0).contiguous(), defined


def _seed_positions(lengths: Tensor, theta: Tensor, rotation: Tensor | None) -> Tensor:
    """a, b, c, shape (3, batch, 3)."""
    zero = torch.zeros_like(theta)
    c_along, c_across = lengths[:, 1] * theta.cos(), lengths[:, 1] * theta.sin()
    along = torch.stack([lengths[:, 0], zero, c_along], 1)
    across = torch.stack([zero, zero, c_across], 1)
    if rotation is None:
        return torch.stack([along, across, torch.zeros_like(along)])
    e1, e2, _ = rotation.permute(2, 1, 0)
    return along * e1.unsqueeze(2) + across * e2.unsqueeze(2)


class _Placed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, full: Tensor, rotation: Tensor | None, placement: Placement) -> tuple[Tensor, Tensor]:
        x = full.new_empty(len(full), placement.num_atoms, 3)
        defined = full.new_empty(len(full), dtype=torch.bool)
        _run("place_batch", placement, full, rotation, _strided(x), [defined])
        ctx.placement = placement
        ctx.save_for_backward(full, rotation, x)
        ctx.mark_non_differentiable(defined)
        return x, defined

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: None) -> tuple[Tensor | None, Tensor | None, None]:
        full, rotation, x = ctx.saved_tensors
        if torch.is_grad_enabled():
            # someone differentiates this gradient: ordinary operations know how; fresh nodes, so that a derivative by
            # one does not run through the other
            inputs = [t if t is None else t.view_as(t) for t in (full, rotation)]
            needed = [t for t, need in zip(inputs, ctx.needs_input_grad[:2], strict=True) if need]
            found = iter(torch.autograd.grad(ctx.placement.plain(*inputs)[0], needed, gradient, create_graph=True))
            return *(next(found) if need else None for need in ctx.needs_input_grad[:2]), None
        g = gradient.flatten(1)
        if g.is_cuda:  # what the kernel writes to, laid out for its threads
            g = g.t().clone(memory_format=torch.contiguous_format).t()
        slope = torch.empty_like(full)
        turn = slope if rotation is None else torch.empty_like(rotation, memory_format=torch.contiguous_format)
        _run("pull_back_batch", ctx.placement, full, rotation, *map(_strided, (x, g, slope, turn)))
        return slope, None if rotation is None else turn, None


def _strided(t: Tensor) -> list[Tensor | int]:
    rows = t.flatten(1)
    return [rows, *rows.stride()]


def _run(name: str, placement: Placement, full: Tensor, rotation: Tensor | None, *rest: list[Any]) -> None:
    full = full.detach()
    arguments = [*_strided(full), *_strided(full if rotation is None else rotation.detach()), rotation is not None]
    arguments += [argument for group in rest for argument in group]
    arguments += [placement.table, placement.num_atoms, len(full)]
    number = compilation.NUMBERS[full.dtype]
    if full.is_cuda:
        functions = compilation.gpu_functions(_text(), number, _NAMES, full.device)
        if len(full):
            with torch.cuda.device(full.device):
                # few conformations per block, as a device has many processors and a batch is small
                grid, block = ((len(full) + 31) // 32, 1, 1), (32, 1, 1)
                functions[_NAMES.index(name)](grid=grid, block=block, args=arguments)
        return
    threads = torch.get_num_threads() if len(full) > 256 else 1
    pointers = [ctypes.c_void_p(a.data_ptr()) if isinstance(a, Tensor) else int(a) for a in arguments]
    if getattr(compilation.library(_text(), number), name)(*pointers, threads):
        raise MemoryError("The compiled coordinates found no memory for their working arrays.")


_NAMES = ("place_batch", "pull_back_batch")


@functools.cache
def _text() -> str:
    return compilation.prelude() + SOURCE
