r"""Small steps in the latent space of a flow.

With z the latents of the current conformation x and b the base density of the flow, a kernel that is reversible with
respect to b proposes z', and x' = x(z'). Seen in x, that kernel is reversible with respect to the density of the flow,
``p(x) = b(z) / |dx/dz|``, so that

.. math::

    \log\alpha = -\beta (U(x') - U(x)) + \log p(x) - \log p(x'),

the form of an independent proposal. p is the density of the flow alone, not of its mixture with a broadened copy: the
latents are the flow's. In a perfect flow every step is accepted, however long; in a poor one short steps still are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from openmm_bg.errors import InputError
from openmm_bg.flows import wrap
from openmm_bg.sampling.adaptation import Adaptation, proposals_needed
from openmm_bg.sampling.latents import latents_of

TARGET_ACCEPTANCE = 0.25
"""Acceptance that the step length is adapted to; 0.234 is optimal for random walks in many dimensions."""

LARGEST_BATCH = 64
"""Networks of a molecule take about the same time for one conformation and for this many."""


def latent_step(
    z: Tensor, step: float, circular: Tensor, std: float = 1.0, generator: torch.Generator | None = None
) -> Tensor:
    """One step of every row that leaves the base density invariant, and is reversible with respect to it.

    Normal latents make a preconditioned Crank-Nicolson step ``sqrt(1 - step^2) z + step std xi``, circular ones a
    wrapped normal step of variance ``-log(1 - step^2)``: both forget at the rate sqrt(1 - step^2).

    Parameters
    ----------
    z : Tensor, (n, dimension)
    step : float
        Between 0 and 1.
    circular : Tensor of bool, (dimension,)
    std : float
        Of the normal latents.
    generator : torch.Generator, optional

    References
    ----------
    Cotter, Roberts, Stuart and White, Stat. Sci. 28, 424 (2013).

    Examples
    --------
    >>> z = torch.zeros(2, 3)
    >>> latent_step(z, 0.1, torch.tensor([True, False, False])).shape
    torch.Size([2, 3])
    """
    noise = torch.randn(z.shape, generator=generator, dtype=z.dtype)
    turned = wrap(z + math.sqrt(-math.log1p(-(step**2))) * noise)
    return torch.where(circular, turned, math.sqrt(1 - step**2) * z + step * std * noise)


class LatentProposals:
    """Steps from the current conformation, in batches: what follows an acceptance is thrown away by who uses them.

    The frame of the seed atoms stays where it is, as with independent proposals, and ``log_prob`` holds the volume of
    the coordinates and the mass-metric term of constraints. Images of rotors: see :mod:`openmm_bg.sampling.latents`. A
    step keeps the image where latents do not tell it; the move is then reversible on each image by itself, and between
    images independent proposals and dynamics carry the molecule.

    Parameters
    ----------
    generator : BoltzmannGenerator
    seed : int
    step : float
        Length of the steps, between 0 and 1; see :func:`latent_step`.
    batch_size : int
        Proposals drawn from one conformation at once.

    Attributes
    ----------
    step, batch_size
        As given, or as adapted.
    adaptation : Adaptation
        Open until it is closed.

    Raises
    ------
    InputError
        If the step is not between 0 and 1, the flow has other latents, or the generator is not informed yet.

    Notes
    -----
    A flow that integrates a velocity is invertible to within its integrator's error, and so far the move is exact.
    """

    kind = "latent"
    state_dependent = True

    def __init__(self, generator: Any, seed: int, step: float = 0.2, batch_size: int = 16):
        if not 0 < step < 1:
            raise InputError(f"The latent step must lie between 0 and 1, not at {step}.")
        if not getattr(generator, "informed", True):
            raise InputError(
                "This generator knows neither chirality nor scales yet; give positions to for_molecule, or fit it."
            )
        self.generator = generator
        self.step = float(step)
        self.batch_size = int(batch_size)
        self.adaptation = Adaptation()
        self._latents = latents_of(generator.flow)
        self._random = torch.Generator().manual_seed(int(seed))
        self._forget()

    def _forget(self) -> None:
        # conformations whose latents are known, (n, atoms, 3), and these
        self._known: tuple[NDArray[np.float64], Tensor, Tensor] | None = None

    @torch.no_grad()
    def log_prob(self, positions: NDArray[np.float64]) -> float:
        """Log density of the flow at one conformation (atoms, 3) in nm; -inf outside its support."""
        x = torch.from_numpy(np.array(positions, dtype=np.float64))[None]
        if self.generator.coordinates is None:
            q, log_volume = x.reshape(1, -1), x.new_zeros(1)
        else:
            q, log_volume = self.generator.coordinates(x)
        z, image, log_prob = self._inverse(q)
        # what was known before is not looked at: a run that is resumed does not know it either
        self._known = x.numpy(), z, image
        return float(torch.where(torch.isfinite(log_volume), log_prob - log_volume, -math.inf)[0])

    @torch.no_grad()
    def take(self, n: int, at: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """At most `n`, and at most `batch_size`, steps from a conformation.

        Parameters
        ----------
        n : int
        at : ndarray, shape (atoms, 3)
            Current positions in nm, of finite log_prob.

        Returns
        -------
        positions : ndarray, shape (m, atoms, 3)
            nm; NaN for steps out of the support.
        log_prob : ndarray, shape (m,)
            -inf for these.
        """
        n = min(n, self.batch_size)
        z, image = (part.expand(n, -1) for part in self._locate(at))
        q = self._latents.forward(
            latent_step(z, self.step, self._latents.circular, self._latents.std, self._random), image
        )
        z, image, log_prob = self._inverse(q)
        if self.generator.coordinates is None:
            x, log_volume = q, q.new_zeros(n)
        else:
            frame = self.generator.frame(torch.from_numpy(np.array([at] * n, dtype=np.float64)))
            x, log_volume = self.generator.coordinates.inverse(q, frame)
        log_prob = torch.where(torch.isfinite(log_volume), log_prob - log_volume, -math.inf)
        placed = x.numpy(force=True).astype(np.float64).reshape(n, -1, 3)
        self._known = placed, z, image
        return placed, log_prob.numpy(force=True).astype(np.float64)

    def _inverse(self, q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        inside = torch.isfinite(q).all(-1)
        z, image, log_prob = self._latents.inverse(torch.where(inside[:, None], q, 0.0))
        return z, image, torch.where(inside, log_prob, -math.inf)

    def _locate(self, at: NDArray[np.float64]) -> tuple[Tensor, Tensor]:
        """Latents (1, dimension) and images of a conformation, which is mostly one that was proposed."""
        for _ in range(2):
            if self._known is not None:
                x, z, image = self._known
                found = np.flatnonzero((x == at).all((1, 2)))
                if len(found):
                    return z[found[:1]], image[found[:1]]
            self.log_prob(at)
        raise InputError("Positions that are not finite have no latents.")

    def learn(self, acceptance: float) -> None:
        """Adapt step length and batch to the accepted fraction of a series of steps.

        Raises
        ------
        InputError
            If the adaptation is closed.
        """
        gain = self.adaptation.observe(acceptance)
        logit = math.log(self.step / (1 - self.step)) + 2 * gain * (acceptance - TARGET_ACCEPTANCE)
        # at the ends a step would be none, or an independent draw
        self.step = min(max(1 / (1 + math.exp(-logit)), 1e-4), 0.999)
        self.batch_size = proposals_needed(self.adaptation.acceptance, LARGEST_BATCH)

    def state_dict(self) -> dict[str, NDArray[Any]]:
        """Arrays from which :meth:`load_state_dict` continues with exactly the same proposals."""
        numbers = {"step": self.step, "batch_size": self.batch_size, **self.adaptation.state_dict()}
        return {
            "random": self._random.get_state().numpy().copy(),
            **{name: np.array(value) for name, value in numbers.items()},
        }

    def load_state_dict(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Continue from what :meth:`state_dict` returned."""
        self._random.set_state(torch.from_numpy(np.array(state["random"], dtype=np.uint8)))
        self.step, self.batch_size = float(state["step"]), int(state["batch_size"])
        self.adaptation.load_state_dict({name: state[name].item() for name in self.adaptation.state_dict()})
        self._forget()
