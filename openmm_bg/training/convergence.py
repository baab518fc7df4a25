"""When adaptation may end: figures on frames that training has not seen, and thresholds that are stated beforehand."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from openmm_bg.errors import InputError
from openmm_bg.flows import MolecularFlow
from openmm_bg.generator import BoltzmannGenerator
from openmm_bg.sampling.metropolis import independence_acceptance
from openmm_bg.sampling.reweighting import (
    effective_sample_size,
    forward_effective_sample_size,
    largest_log_ratio,
    log_normalizer,
    reweighted_mean,
)

Regions = Callable[[NDArray[np.float64]], Mapping[str, NDArray[np.bool_]]]
"""Positions (n, atoms, 3) in nm to the basins by name, and which conformations lie in each; rows of NaN lie nowhere."""

_CHUNK = 16384


@dataclass(frozen=True)
class Basin:
    """A basin as the generator's reweighted draws see it, and as the walkers do.

    Attributes
    ----------
    share, error : float
        Of the reweighted draws.
    walkers, walkers_error : float
        Share of the walkers' frames; its error is their spread from walker to walker.
    """

    share: float
    error: float
    walkers: float
    walkers_error: float

    @property
    def free_energy(self) -> float:
        """-log of the share, in kT."""
        return -math.log(self.share) if self.share > 0 else math.inf

    @property
    def free_energy_error(self) -> float:
        return self.error / self.share if self.share > 0 else math.inf


@dataclass(frozen=True)
class Figures:
    """How good a generator is, by its own draws and on held-out frames of the target.

    Attributes
    ----------
    ess, ess_clipped, acceptance : float
        Of the draws, see :class:`~openmm_bg.sampling.EffectiveSampleSize` and
        :func:`~openmm_bg.sampling.independence_acceptance`.
    forward, largest_log_ratio : float
        On the frames: :func:`~openmm_bg.sampling.forward_effective_sample_size` and
        :func:`~openmm_bg.sampling.largest_log_ratio`.
    draws, held_out, unreachable : int
        How many of each, and of the frames those that lie outside the generator's support.
    basins : dict of str to Basin
    """

    ess: float
    ess_clipped: float
    acceptance: float
    forward: float
    largest_log_ratio: float
    draws: int
    held_out: int
    unreachable: int
    basins: dict[str, Basin]

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON, which knows no infinity: None."""
        plain = asdict(self)
        if not math.isfinite(self.largest_log_ratio):
            plain["largest_log_ratio"] = None
        return plain

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> Figures:
        """The inverse of :meth:`to_dict`."""
        basins = {name: Basin(**basin) for name, basin in plain["basins"].items()}
        largest = math.inf if plain["largest_log_ratio"] is None else plain["largest_log_ratio"]
        return cls(**{**plain, "basins": basins, "largest_log_ratio": largest})

    def __str__(self) -> str:
        return (
            f"ESS {100 * self.ess:.1f} % ({100 * self.ess_clipped:.1f} % clipped), forward figure "
            f"{100 * self.forward:.1f} %, largest log p/q {self.largest_log_ratio:.1f}, acceptance "
            f"{100 * self.acceptance:.1f} %"
        )


def measure(
    generator: BoltzmannGenerator, frames: NDArray[Any], regions: Regions | None, *, draws: int, seed: int
) -> Figures:
    """Figures of a generator, from fresh draws and from frames that it was not trained on.

    Parameters
    ----------
    generator : BoltzmannGenerator
    frames : (walkers, n, atoms, 3) array
        nm.
    regions : callable, optional
    draws, seed : int
    """
    walkers, atoms = len(frames), frames.shape[2:]
    flat = np.asarray(frames, dtype=np.float64).reshape(-1, *atoms)
    held_out = generator.log_weights(flat if generator.coordinates is not None else flat.reshape(len(flat), -1)).numpy()
    samples = generator.sample(draws, seed=seed)
    log_w = samples.log_weights.numpy()
    ess, unreachable = effective_sample_size(log_w), int(np.isposinf(held_out).sum())
    if ess.fraction == 0:
        return Figures(0.0, 0.0, 0.0, 0.0, math.inf, draws, len(flat), unreachable, {})
    log_z = log_normalizer(log_w).value
    basins = {}
    if regions is not None:
        drawn, seen = regions(samples.positions.numpy().reshape(-1, *atoms)), regions(flat)
        basins = {name: _basin(drawn[name], log_w, seen[name].reshape(walkers, -1)) for name in drawn}
    return Figures(
        ess.fraction, ess.clipped, independence_acceptance(log_w), forward_effective_sample_size(held_out, log_z),
        largest_log_ratio(held_out, log_z), draws, len(flat), unreachable, basins,
    )  # fmt: skip


def _basin(drawn: NDArray[np.bool_], log_w: NDArray[np.float64], seen: NDArray[np.bool_]) -> Basin:
    share, error = reweighted_mean(drawn.astype(np.float64), log_w)
    each = seen.mean(1)
    mean, n = float(each.mean()), len(each)
    # a basin that no walker, or every walker, is in has no spread, and is not known exactly for that
    even = (n * mean + 1) / (n + 2)
    spread = max(float(each.var(ddof=1)) if n > 1 else 0.0, even * (1 - even) / n)
    return Basin(float(share), float(error), mean, math.sqrt(spread / n))


@dataclass(frozen=True)
class Convergence:
    """What has to hold, in so many rounds in a row, before adaptation ends.

    Each round is judged before training sees its frames. The reverse figures alone would be blind to what the generator
    never makes, the forward ones see only what the walkers have found, and both together still do not say that the
    weights of basins stand still: so all three are asked for.

    Attributes
    ----------
    ess, forward : float
        Least effective sample size (clipped and unclipped) and least forward figure.
    largest_log_ratio : float
        Largest log p/q on the walkers' frames: on such a frame an independence chain stays for exp of it proposals.
    free_energy_error : float
        kT: basins must be known this well.
    sigma : float
        How many standard errors free energies of consecutive rounds, and the shares of walkers and of reweighted draws,
        may differ by. Several basins are looked at in several rounds, so three would be exceeded by chance.
    rare : float
        Basins with a smaller share are left out.
    rounds : int
        In a row.

    Raises
    ------
    InputError
        For a threshold that nothing could meet, or everything.
    """

    ess: float = 0.5
    forward: float = 0.5
    largest_log_ratio: float = 6.0
    free_energy_error: float = 0.25
    sigma: float = 4.0
    rare: float = 2e-3
    rounds: int = 2

    def __post_init__(self) -> None:
        for name in ("ess", "forward", "rare"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 0 and below 1, not {getattr(self, name)}.")
        for name in ("largest_log_ratio", "free_energy_error", "sigma"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} must be positive, not {getattr(self, name)}.")
        if not isinstance(self.rounds, int) or self.rounds < 1:
            raise InputError(f"rounds must be a whole number of at least 1, not {self.rounds}.")

    def failures(self, now: Figures, before: Figures | None) -> list[str]:
        """What does not hold in a round, in words; nothing where all does.

        Parameters
        ----------
        now, before : Figures
            Of this round and the one before it; None for the first.
        """
        failed = []
        for name, value in (("effective sample size", now.ess), ("clipped effective sample size", now.ess_clipped)):
            if not value >= self.ess:
                failed.append(f"the {name} is {100 * value:.1f} %, below {100 * self.ess:g} %")
        if now.unreachable:
            failed.append(f"{now.unreachable} of {now.held_out} frames lie outside the generator's support")
        elif not now.forward >= self.forward:
            failed.append(f"the forward figure is {100 * now.forward:.1f} %, below {100 * self.forward:g} %")
        if not now.unreachable and not now.largest_log_ratio <= self.largest_log_ratio:
            failed.append(f"the largest log p/q is {now.largest_log_ratio:.1f}, above {self.largest_log_ratio:g}")
        for name, basin in now.basins.items():
            past = None if before is None else before.basins.get(name)
            if max(basin.share, basin.walkers, 0.0 if past is None else past.share) >= self.rare:
                failed += self._basin(name, basin, past)
        return failed

    def _basin(self, name: str, now: Basin, before: Basin | None) -> list[str]:
        failed = []
        apart, error = abs(now.share - now.walkers), math.hypot(now.error, now.walkers_error)
        if apart > self.sigma * error:
            failed.append(
                f"{100 * now.walkers:.2g} % of the walkers' frames and {100 * now.share:.2g} % of the reweighted draws "
                f"lie in {name}"
            )
        if now.free_energy_error > self.free_energy_error:
            failed.append(
                f"the free energy of {name} is known to {now.free_energy_error:.2g} kT, not to "
                f"{self.free_energy_error:g}"
            )
        elif before is not None and before.share > 0:
            moved = now.free_energy - before.free_energy
            error = math.hypot(now.free_energy_error, before.free_energy_error)
            if abs(moved) > self.sigma * error:
                failed.append(
                    f"the free energy of {name} moved by {moved:+.2g} ± {error:.1g} kT since the round before"
                )
        return failed


def torsion_regions(generator: BoltzmannGenerator) -> Regions | None:
    """Thirds of the circle for each free torsion of a molecule but its rotors: gauche+, trans and gauche-.

    Returns
    -------
    callable or None
        None for a generator that is not one of a molecule.
    """
    flow, coordinates = generator.flow, generator.coordinates
    if coordinates is None or not isinstance(flow, MolecularFlow) or flow.torsions is None:
        return None
    free = flow.chart.free.tolist()
    columns = [i for i, m in zip(range(len(free)), flow.torsions.multiplicity.tolist(), strict=True) if m == 1]
    zmatrix = coordinates.zmatrix
    rows = coordinates.free.tolist()
    first = len(zmatrix.bonds) + len(zmatrix.angles)
    names = ["-".join(map(str, zmatrix.torsions[rows[free[i]] - first].tolist())) for i in columns]

    def regions(positions: NDArray[np.float64]) -> dict[str, NDArray[np.bool_]]:
        x = torch.as_tensor(np.asarray(positions, dtype=np.float64))
        t = torch.cat([flow.chart.split(coordinates(part)[0])[0] for part in x.split(_CHUNK)])[:, columns].numpy()
        third = np.floor(np.degrees(t) % 360 / 120)
        return {
            f"{120 * k}° to {120 * (k + 1)}° of torsion {name}": third[:, i] == k
            for i, name in enumerate(names)
            for k in range(3)
        }

    return regions
