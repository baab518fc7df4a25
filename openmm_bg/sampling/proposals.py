"""What proposes conformations to a chain: the interface, and the queue of independent ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from openmm_bg.errors import InputError


class ProposalGenerator(Protocol):
    """What the moves need of a generator; :class:`openmm_bg.BoltzmannGenerator` offers it."""

    coordinates: Any
    """None where the density is one of plain Cartesian coordinates."""

    def sample_internal(self, n: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Internal coordinates (n, dimension) and their final log density (n,), -inf for invalid draws."""
        ...

    def place(self, q: torch.Tensor, frame: Any) -> torch.Tensor:
        """Positions (n, atoms, 3) in nm of internal coordinates in a frame."""
        ...

    def frame(self, x: torch.Tensor) -> Any:
        """Frame of the seed atoms of positions (n, atoms, 3)."""
        ...

    def log_prob(self, x: torch.Tensor) -> torch.Tensor:
        """Log density (n,) of positions (n, atoms, 3)."""
        ...


class Proposals(Protocol):
    """A source of proposals with the density that the Metropolis-Hastings ratio needs of them.

    For independent proposals ``log_prob`` is the density they are drawn from. A state-dependent source moves x by a
    kernel K that is reversible with respect to a density q, ``q(x) K(x, x') = q(x') K(x', x)``, and gives that. Either
    way the ratio is ``-(u' - u) + log_prob(x) - log_prob(x')``.
    """

    kind: str
    """"independent" or "latent"."""

    state_dependent: bool
    """Whether what was drawn is useless once the chain has moved."""

    def take(self, n: int, at: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """At most `n` proposals for a molecule at (atoms, 3) nm, and their log densities."""
        ...

    def log_prob(self, positions: NDArray[np.float64]) -> float:
        """Log density of one conformation (atoms, 3) in nm; -inf outside the support."""
        ...


class IndependenceProposals:
    """A queue of conformations drawn from a generator in batches.

    One network call per proposal is slow; the queue draws `batch_size` at a time and hands them out one
    after the other. What it holds depends on nothing but the seed, so it may be stored, restored or thrown
    away at any moment without a bias.

    Parameters
    ----------
    generator : BoltzmannGenerator
    seed : int or torch.Generator
        A seed, or a generator of random numbers that the queue then owns.
    batch_size : int
        Conformations drawn at once.
    """

    kind = "independent"
    state_dependent = False

    def __init__(self, generator: ProposalGenerator, seed: int | torch.Generator, batch_size: int = 256):
        if batch_size < 1:
            raise InputError(f"batch_size must be at least 1, not {batch_size}.")
        self.generator = generator
        self.batch_size = int(batch_size)
        self._random = seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(int(seed))
        self._drawn: tuple[torch.Tensor, torch.Tensor] | None = None

    def __len__(self) -> int:
        """Conformations drawn and not yet used."""
        return 0 if self._drawn is None else len(self._drawn[1])

    def take(self, n: int, at: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """The next `n` conformations, standing where the molecule stands now, and their log densities.

        Parameters
        ----------
        n : int
        at : ndarray, shape (atoms, 3)
            Current positions in nm. Their seed atoms give the frame, which a move does not change; so all
            `n` may be tried one after the other, whether earlier ones are accepted or not.

        Returns
        -------
        positions : ndarray, shape (n, atoms, 3)
            nm; NaN for invalid draws.
        log_prob : ndarray, shape (n,)
            -inf for invalid draws.
        """
        q, log_prob = self._drawn or self.generator.sample_internal(self.batch_size, self._random)
        while len(log_prob) < n:
            more = self.generator.sample_internal(self.batch_size, self._random)
            q, log_prob = torch.cat([q, more[0]]), torch.cat([log_prob, more[1]])
        self._drawn = q[n:], log_prob[n:]
        frame = self.generator.frame(torch.cat([self._batch(at)] * n))
        placed = self.generator.place(q[:n], frame).numpy(force=True).astype(np.float64).reshape(n, -1, 3)
        return placed, log_prob[:n].numpy(force=True).astype(np.float64)

    def log_prob(self, positions: NDArray[np.float64]) -> float:
        """Log density of one conformation (atoms, 3) in nm; -inf outside the generator's support."""
        return float(self.generator.log_prob(self._batch(positions))[0])

    def _batch(self, positions: NDArray[np.float64]) -> torch.Tensor:
        x = torch.from_numpy(np.array(positions, dtype=np.float64))[None]
        return x if self.generator.coordinates is not None else x.reshape(1, -1)

    def state_dict(self) -> dict[str, NDArray[Any]]:
        """Arrays from which :meth:`load_state_dict` continues with exactly the same proposals."""
        q, log_prob = self._drawn or (torch.zeros(0), torch.zeros(0))
        return {
            "random": self._random.get_state().numpy().copy(),
            "q": q.numpy(force=True).copy(),
            "log_prob": log_prob.numpy(force=True).copy(),
        }

    def load_state_dict(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Continue from what :meth:`state_dict` returned."""
        self._random.set_state(torch.from_numpy(np.array(state["random"], dtype=np.uint8)))
        q, log_prob = (torch.from_numpy(np.array(state[name])) for name in ("q", "log_prob"))
        self._drawn = (q, log_prob) if len(log_prob) else None
