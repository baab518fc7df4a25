"""The density of a molecule's shapes: internal coordinates and a flow of them.

The density of a conformation x is that of its shape: Lebesgue measure in R^3N modulo rigid motion, and on the
constraint manifold where bonds are constrained::

    log_prob(x) = log q(q(x)) - log J(q(x)) - 1/2 log det Z(x)

with q the mixture ``(1 - defensive) flow + defensive * broadened flow``. The second part has heavy tails in every
coordinate and keeps the largest p/q, which is what an independence sampler lives by, within bounds where the flow has
a hole.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from openmm_bg.coordinates import Frame, InternalCoordinates, half_turns_from
from openmm_bg.errors import InputError
from openmm_bg.flows import Flow, MolecularFlow
from openmm_bg.units import nanometers

CHUNK = 16384
"""Conformations that are worked on at once."""


class ShapeDensity(nn.Module):
    """A flow of internal coordinates as a density of conformations, which it can draw and evaluate.

    What :class:`~openmm_bg.BoltzmannGenerator` is without its energy and its molecule.

    Parameters
    ----------
    flow : Flow
        Density of the internal coordinates (or of the plain ones).
    coordinates : InternalCoordinates, optional
        None where the flow's samples are the configurations themselves: analytic densities.
    defensive : float
        Share of the broadened copy in the density, 0 to 1.

    Raises
    ------
    InputError
        For a share that is none, and a flow that is none or has other dimensions than the coordinates.
    """

    def __init__(self, flow: Flow, coordinates: InternalCoordinates | None, defensive: float):
        super().__init__()
        if not 0 <= defensive < 1:
            raise InputError(f"defensive must be at least 0 and below 1, not {defensive}.")
        if not isinstance(flow, Flow):
            raise InputError(f"flow must be a Flow of openmm_bg.flows, not {flow!r}.")
        if coordinates is not None and coordinates.dimension != flow.dimension:
            raise InputError(
                f"The flow has {flow.dimension} dimensions, but the coordinates have {coordinates.dimension}."
            )
        self.flow = flow.double()
        self.coordinates = None if coordinates is None else coordinates.double()
        self.defensive = float(defensive)

    @property
    def num_atoms(self) -> int | None:
        return None if self.coordinates is None else self.coordinates.num_atoms

    @property
    def informed(self) -> bool:
        """Whether chirality and scales are known, so that samples make sense."""
        return bool(getattr(self.flow, "informed", True))

    # -- learning from conformations

    def inform(self, positions: Any) -> None:
        """Learn centres, scales and chirality from conformations ``(n, atoms, 3)`` in nm; trained weights stay.

        Called by ``fit`` before maximum likelihood. The first usable conformation decides chirality and hydrogen labels
        where nothing has yet.

        Raises
        ------
        InputError
            If no conformation is one of this molecule, or if there are too few to measure covariances.
        """
        x = self._batch(positions)
        if self.coordinates is not None and not self.informed:
            self._handed_as(x)
        self._initialize(self._shapes(x)[0])

    def _handed_as(self, x: Tensor) -> None:
        """Take chirality and hydrogen labels from the first conformation that has a shape."""
        usable = torch.cat([torch.isfinite(self.coordinates(part)[1]) for part in x.split(CHUNK)])
        if usable.any():
            settings = self.coordinates.config()
            reference = x[usable.nonzero()[0, 0]].numpy()
            settings["half_turns"] = half_turns_from(self.coordinates.zmatrix, reference).tolist()
            self.coordinates = InternalCoordinates.from_config(settings)

    def _shapes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The coordinates of the flow, ``(m, dimension)``, of the conformations that lie in the support, and which."""
        if len(x) == 0:
            raise InputError("The data hold zero conformations.")
        if self.coordinates is None:
            inside = torch.isfinite(x).all(-1)
            q = x[inside]
        else:
            q, log_volume = (
                torch.cat(column) for column in zip(*(self.coordinates(part) for part in x.split(CHUNK)), strict=True)
            )
            inside = torch.isfinite(log_volume)
            q = q[inside]
        if len(q) == 0:
            raise InputError(
                "No conformation of the data is finite and has the chirality, hydrogen labels and constrained bond "
                "lengths of this generator; check that data and generator are of the same molecule."
            )
        return q, inside

    def _initialize(self, q: Tensor) -> None:
        if not isinstance(self.flow, MolecularFlow):
            return
        if len(q) <= self.flow.dimension:
            raise InputError(
                f"{len(q)} usable conformations cannot tell the covariance of {self.flow.dimension} coordinates; give "
                "more of them, or give positions to for_molecule and train on the energy alone."
            )
        self.flow.initialize(q)

    def _check_informed(self) -> None:
        if not self.informed:
            raise InputError(
                "This generator knows neither chirality nor scales yet; give positions to for_molecule, or fit it."
            )

    # -- densities

    @torch.no_grad()
    def sample_internal(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """``n`` draws of internal coordinates and their final log-density: ``(n, dimension)`` and ``(n,)``.

        The density does not depend on where a shape is placed. Draws outside the support have -inf.
        """
        self._check_informed()
        broad = int((torch.rand(n, generator=generator) < self.defensive).sum())
        parts = [
            self.flow.sample(size, generator, broadened=broadened)[0]
            for size, broadened in ((n - broad, False), (broad, True))
            if size
        ]
        q = torch.cat(parts) if parts else torch.empty(0, self.flow.dimension, dtype=torch.float64)
        q = q[torch.randperm(n, generator=generator)]
        log_q = self._log_mixture(q)
        if self.coordinates is None:
            return q, log_q
        _, log_volume = self.coordinates.inverse(q)
        return q, torch.where(torch.isfinite(log_volume), log_q - log_volume, -math.inf)

    @torch.no_grad()
    def log_prob(self, x: Tensor | np.ndarray) -> Tensor:
        """Log-density of conformations, float64.

        Parameters
        ----------
        x : Tensor, array or Quantity, (n, atoms, 3) or (atoms, 3)
            nm; ``(n, dimension)`` for a generator without coordinates.

        Returns
        -------
        Tensor, (n,)
            -inf outside the support: other chirality or hydrogen labels, broken constraints, values that are not
            finite.
        """
        self._check_informed()
        x = self._batch(x)
        return torch.cat([self._log_prob(part) for part in x.split(CHUNK)]) if len(x) else x.new_zeros(0)

    def _log_prob(self, x: Tensor) -> Tensor:
        if self.coordinates is None:
            return self._log_mixture(x)
        q, log_volume = self.coordinates(x)
        inside = torch.isfinite(log_volume)
        return torch.where(inside, self._log_mixture(q) - log_volume, -math.inf)

    def _log_mixture(self, q: Tensor) -> Tensor:
        plain, broad = self.flow.log_probs(q)
        if self.defensive == 0:
            return plain
        return torch.logaddexp(plain + math.log1p(-self.defensive), broad + math.log(self.defensive))

    @property
    def _event_shape(self) -> tuple[int, ...]:
        """Of one conformation: ``(atoms, 3)``, or ``(dimension,)`` without coordinates."""
        return (self.flow.dimension,) if self.coordinates is None else (self.coordinates.num_atoms, 3)

    def _batch(self, x: Tensor | np.ndarray) -> Tensor:
        shape = self._event_shape
        # torch would drop the unit of a Quantity without a word
        x = torch.as_tensor(x if isinstance(x, Tensor) else np.ascontiguousarray(nanometers(x)), dtype=torch.float64)
        if x.shape == shape:
            x = x[None]
        if x.shape[1:] != shape:
            raise InputError(
                f"Conformations must have the shape (n, {', '.join(map(str, shape))}), not {tuple(x.shape)}."
            )
        return x

    # -- placing shapes in space

    def frame(self, x: Tensor | np.ndarray) -> Frame | None:
        """Where conformations stand: the frame of their seed atoms; None for a generator without coordinates."""
        return None if self.coordinates is None else self.coordinates.frame(self._batch(x))

    @torch.no_grad()
    def place(self, q: Tensor, frame: Frame | None = None) -> Tensor:
        """Conformations of internal coordinates, in ``frame`` or the standard one: ``(n, atoms, 3)`` nm."""
        return q if self.coordinates is None else self.coordinates.inverse(q, frame)[0]
