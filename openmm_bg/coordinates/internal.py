"""Positions to bonds, angles and torsions and back, with the exact volume element."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from openmm_bg import units
from openmm_bg.coordinates.constraints import Constraint, MassMetric, frozen_coordinates
from openmm_bg.coordinates.geometry import angle, collinearity_threshold, dihedral, distance
from openmm_bg.coordinates.placement import Placement
from openmm_bg.coordinates.tables import ExactTables
from openmm_bg.coordinates.zmatrix import ZMatrix
from openmm_bg.errors import InputError

CONSTRAINT_TOLERANCE = 1e-3
"""Relative deviation of a constrained distance beyond which a conformation is off the constraint manifold."""


class Frame(NamedTuple):
    """Where a molecule stands: the pose that its shape leaves open.

    Attributes
    ----------
    origin : Tensor, shape (batch, 3)
        Position of the seed atom b in nm.
    rotation : Tensor, shape (batch, 3, 3)
        Its columns are the axes of the seed: along b -> a; perpendicular to it towards c; their cross
        product.
    """

    origin: Tensor
    rotation: Tensor


class InternalCoordinates(ExactTables):
    r"""The bijection between positions and (shape q, pose g).

    q holds bond lengths (nm), angles and torsions (radians); g is the position of the seed atom b and the
    rotation of the seed frame. The volume elements are related by

    .. math::

        d^{3N}x = J(q)\, dq\, d^3x_b\, d\mu(R), \qquad J = \prod_{bonds} r^2 \prod_{angles} \sin\theta

    over all bonds and angles, those of the seed included, with no further constant: mu is the Haar measure of
    the rotations (left and right are the same) normalised to :math:`d^3\omega` at :math:`R = 1`, of total
    mass 8 pi^2. A density of shapes p(q) thus has the density p(q) / J(q) with respect to Lebesgue measure
    modulo rigid motion.

    With constraints, the coordinates they fix are constants and leave q, and J is multiplied by sqrt(det Z),
    the mass-metric factor that makes constrained dynamics the reference (see :class:`MassMetric`).

    Parameters
    ----------
    zmatrix : ZMatrix
    constraints : sequence of (i, j, distance)
        Distances as Quantity or in nm. Each must freeze a z-matrix coordinate (see :func:`frozen_coordinates`).
    masses : array, shape (N,), optional
        In Da; needed with constraints.
    half_turns : array of -1, 0, +1, shape (N-3,), optional
        +1 keeps the torsion of that row in (0, pi), -1 in (-pi, 0); see :func:`half_turns_from`. 0: anywhere.
    compile : bool
        Place the atoms by a compiled kernel, on the CPU or on a GPU, some ten times faster or more. It is the same for
        all molecules, made at the first call of :meth:`inverse` in some seconds and kept on disk
        (``$OPENMM_BG_CACHE``). Where nothing compiles, a warning says so and torch operations are used, as with False.
        Not part of :meth:`config`.

    Attributes
    ----------
    num_atoms, dimension : int
        N, and the length of q: 3N - 6 less the number of constraints.
    free : LongTensor, shape (dimension,)
        Positions of the entries of q in the full vector [bonds | angles | torsions].
    torsion_rows : LongTensor, shape (dimension,)
        For every entry of q that is a torsion, its z-matrix row; -1 for the others.
    kinds : tuple of str
        "bond", "angle" or "torsion" for every entry of q.

    Raises
    ------
    InputError
        For constraints that the z-matrix cannot express, missing masses, or half turns of the wrong shape.

    Examples
    --------
    >>> water = InternalCoordinates(ZMatrix.from_bonds(3, [(0, 1), (0, 2)], ["O", "H", "H"]))
    >>> x = torch.tensor([[[0.0, 0.0, 0.0], [0.1, 0.0, 0.0], [0.0, 0.1, 0.0]]], dtype=torch.float64)
    >>> q, log_volume = water(x)
    >>> q
    tensor([[0.1000, 0.1000, 1.5708]], dtype=torch.float64)
    >>> back, _ = water.inverse(q, water.frame(x))
    >>> torch.allclose(back, x)
    True
    """

    free: Tensor
    torsion_rows: Tensor
    bonds: Tensor
    angles: Tensor
    torsions: Tensor
    frozen: Tensor
    turns: Tensor
    constrained: Tensor
    values: Tensor
    lengths: Tensor

    def __init__(
        self,
        zmatrix: ZMatrix,
        *,
        constraints: Sequence[Constraint] = (),
        masses: Sequence[float] | np.ndarray | None = None,
        half_turns: Sequence[int] | np.ndarray | None = None,
        compile: bool = True,
    ) -> None:
        super().__init__()
        self.zmatrix = zmatrix
        self.num_atoms = zmatrix.num_atoms
        self.constraints = tuple((int(i), int(j), float(units.nanometers(r))) for i, j, r in constraints)
        self.masses = self._checked_masses(masses)
        self.half_turns = self._checked_half_turns(half_turns)
        self._num_bonds, self._num_angles = len(zmatrix.bonds), len(zmatrix.angles)
        full = 3 * self.num_atoms - 6

        frozen = frozen_coordinates(zmatrix, self.constraints)
        free = [index for index in range(full) if index not in frozen]
        first_torsion = self._num_bonds + self._num_angles
        self.dimension = len(free)
        self.kinds = tuple(
            "bond" if index < self._num_bonds else "angle" if index < first_torsion else "torsion" for index in free
        )
        # Stands in for rows outside the domain, so that they yield finite gradients (times zero).
        values = np.repeat([0.1, 1.9, 1.0], [self._num_bonds, self._num_angles, len(zmatrix.rows)])
        values[first_torsion:] *= np.where(self.half_turns == 0, 1, self.half_turns)
        values[list(frozen)] = list(frozen.values())

        self._register_indices("bonds", zmatrix.bonds)
        self._register_indices("angles", zmatrix.angles)
        self._register_indices("torsions", zmatrix.torsions)
        self._register_indices("free", free)
        self._register_indices("frozen", sorted(frozen))
        self._register_indices("torsion_rows", [max(index - first_torsion, -1) for index in free])
        self._register_indices("turns", self.half_turns)
        self._register_indices("constrained", np.reshape([pair[:2] for pair in self.constraints], (-1, 2)))
        self.register_buffer("values", torch.tensor(values, dtype=torch.float64))
        self.register_buffer("lengths", torch.tensor([c[2] for c in self.constraints], dtype=torch.float64))
        self.placement = Placement(zmatrix, compile)
        self.mass_metric: MassMetric | None = None
        if self.masses is not None and self.constraints:
            self.mass_metric = MassMetric([pair[:2] for pair in self.constraints], self.masses)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Shape of positions.

        Parameters
        ----------
        x : Tensor, shape (batch, N, 3)
            Positions in nm.

        Returns
        -------
        q : Tensor, shape (batch, dimension)
            Torsions in (-pi, pi].
        log_volume : Tensor, shape (batch,)
            ``log J + 1/2 log det Z``. It is +inf, with q = 0 and a zero gradient, where the positions are not
            finite, three atoms of an angle or torsion are collinear, a constrained distance is off by more
            than a relative 1e-3, or a half turn is violated: such a conformation has no density under any
            generator.
        """
        if x.ndim != 3 or x.shape[1:] != (self.num_atoms, 3):
            raise InputError(f"positions have the shape (batch, {self.num_atoms}, 3), not {tuple(x.shape)}.")
        usable = x.detach().abs().amax((1, 2)) < _largest(x.dtype)  # False for NaN as well
        x = torch.where(usable[:, None, None], x, 0.0)
        full = torch.cat([distance(x, self.bonds), angle(x, self.angles), dihedral(x, self.torsions)], 1)
        usable = usable & self._in_domain(full.detach())
        if self.constraints:
            deviation = distance(x.detach(), self.constrained) / self.lengths.to(x.dtype) - 1
            usable = usable & (deviation.abs() <= CONSTRAINT_TOLERANCE).all(1)
            full = full.index_copy(1, self.frozen, self._constants(full))
        log_volume, usable = self._log_volume(full, x, usable)
        q = full.index_select(1, self.free) if self.constraints else full
        return torch.where(usable[:, None], q, 0.0), log_volume

    def inverse(self, q: Tensor, frame: Frame | None = None) -> tuple[Tensor, Tensor]:
        """Positions of a shape.

        Parameters
        ----------
        q : Tensor, shape (batch, dimension)
            Torsions are taken modulo 2 pi.
        frame : Frame, optional
            The pose; by default b lies at the origin, a on the positive x axis, c in the upper half of the xy
            plane.

        Returns
        -------
        x : Tensor, shape (batch, N, 3)
            Positions in nm.
        log_volume : Tensor, shape (batch,)
            ``log J + 1/2 log det Z``, the same number that :meth:`forward` gives for x. It is +inf, with x =
            NaN and a zero gradient, where q or the frame is not finite, a length is not positive, an angle is
            not between 0 and pi, a half turn is violated, or the references of an atom are collinear.
        """
        if q.ndim != 2 or q.shape[1] != self.dimension:
            raise InputError(f"internal coordinates have the shape (batch, {self.dimension}), not {tuple(q.shape)}.")
        full = q
        if self.constraints:
            full = self.values.to(q.dtype).repeat(len(q), 1).index_copy(1, self.free, q)
        usable = self._in_domain(full.detach())
        if frame is not None:
            frame, steady = _finite(frame)
            usable = usable & steady
        full = torch.where(usable[:, None], full, self.values.to(q.dtype))
        x, defined = self.placement(full, None if frame is None else frame.rotation)
        log_volume, usable = self._log_volume(full, x, usable & defined)
        x = x if frame is None else x + frame.origin[:, None, :]
        return torch.where(usable[:, None, None], x, math.nan), log_volume

    def frame(self, x: Tensor) -> Frame:
        """The pose of positions (batch, N, 3): ``inverse(forward(x)[0], frame(x))`` gives x back.

        NaN where the seed atoms are collinear.
        """
        a, b, c = (x[:, atom] for atom in self.zmatrix.seed)
        first, arm = a - b, c - b
        third = torch.linalg.cross(first, arm, dim=1)
        e1 = first / first.norm(dim=1, keepdim=True)
        e3 = third / third.norm(dim=1, keepdim=True)
        return Frame(b, torch.stack([e1, torch.linalg.cross(e3, e1, dim=1), e3], 2))

    def config(self) -> dict[str, Any]:
        """Everything needed to build the same coordinates again, fit for JSON."""
        return {
            "zmatrix": self.zmatrix.to_dict(),
            "constraints": [list(constraint) for constraint in self.constraints],
            "masses": None if self.masses is None else self.masses.tolist(),
            "half_turns": self.half_turns.tolist(),
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """The coordinates that :meth:`config` described."""
        unknown = set(config) ^ {"zmatrix", "constraints", "masses", "half_turns"}
        if unknown:
            raise InputError(
                f"stored coordinates have zmatrix, constraints, masses, half_turns; check {sorted(unknown)}."
            )
        return cls(
            ZMatrix.from_dict(config["zmatrix"]),
            constraints=config["constraints"],
            masses=config["masses"],
            half_turns=config["half_turns"],
        )

    def extra_repr(self) -> str:
        return f"num_atoms={self.num_atoms}, dimension={self.dimension}, constraints={len(self.constraints)}"

    # The domain and the volume element

    def _in_domain(self, full: Tensor) -> Tensor:
        lengths, angles, torsions = self._split(full)
        bent = (angles > 0) & (angles < math.pi) & (angles.sin() > collinearity_threshold(full.dtype))
        inside = (full.abs() < _largest(full.dtype)).all(1) & (lengths > 0).all(1) & bent.all(1)
        if self.half_turns.any():
            turns = self.turns.to(full.dtype)
            inside = inside & ((turns == 0) | (torsions.sin() * turns > 0)).all(1)
        return inside

    def _log_volume(self, full: Tensor, x: Tensor, usable: Tensor) -> tuple[Tensor, Tensor]:
        lengths, angles, _ = self._split(torch.where(usable[:, None], full, self.values.to(full.dtype)))
        log_volume = 2 * lengths.log().sum(1) + angles.sin().log().sum(1)
        if self.mass_metric is not None:
            log_volume = log_volume + self.mass_metric(x, usable)
        usable = usable & log_volume.detach().isfinite()
        return torch.where(usable, log_volume, math.inf), usable

    def _split(self, full: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        first_torsion = self._num_bonds + self._num_angles
        return full[:, : self._num_bonds], full[:, self._num_bonds : first_torsion], full[:, first_torsion:]

    def _constants(self, full: Tensor) -> Tensor:
        return self.values.to(full.dtype).index_select(0, self.frozen).expand(len(full), -1)

    # Tables

    def _register_indices(self, name: str, values: Sequence[int] | np.ndarray) -> None:
        self.register_buffer(name, torch.from_numpy(np.array(values, dtype=np.int64)))

    def _checked_masses(self, masses: Sequence[float] | np.ndarray | None) -> np.ndarray | None:
        if masses is None:
            if self.constraints:
                raise InputError(
                    "constraints need masses, one per atom in Da: dynamics with constraints depends on them."
                )
            return None
        values = np.array(masses, dtype=np.float64)
        if values.shape != (self.num_atoms,):
            raise InputError(f"masses have the shape ({self.num_atoms},), one per atom, not {values.shape}.")
        return values

    def _checked_half_turns(self, half_turns: Sequence[int] | np.ndarray | None) -> np.ndarray:
        rows = self.num_atoms - 3
        values = np.zeros(rows, np.int8) if half_turns is None else np.array(half_turns)
        if values.shape != (rows,) or not np.isin(values, (-1, 0, 1)).all():
            raise InputError(f"half_turns are {rows} numbers out of -1, 0 and +1, one per z-matrix row.")
        return values.astype(np.int8)


def _largest(dtype: torch.dtype) -> float:
    # Coordinates beyond this overflow in the fourth-order products of a dihedral.
    return torch.finfo(dtype).max ** 0.2


def _finite(frame: Frame) -> tuple[Frame, Tensor]:
    flat = torch.cat([frame.origin, frame.rotation.flatten(1)], 1).detach()
    steady = (flat.abs() < _largest(flat.dtype)).all(1)
    eye = torch.eye(3).to(frame.rotation)
    rotation = torch.where(steady[:, None, None], frame.rotation, eye)
    return Frame(torch.where(steady[:, None], frame.origin, 0.0), rotation), steady
