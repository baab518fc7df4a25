"""Annealed importance sampling of a molecule: walkers cooled from a temperature at which they cross all barriers.

Between two temperatures the weight of a walker grows by ``-(beta' - beta) U(x)``, then dynamics at the new one
decorrelates it. Where the weights become uneven the walkers are resampled, which is called population annealing. The
result is a weighted ensemble of the last temperature, whose members are as good as independent, however rarely one of
them would have crossed there.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import openmm
import torch
from tqdm import tqdm

from openmm_bg.energies import ForceFieldEnergy
from openmm_bg.errors import InputError
from openmm_bg.sampling.batched import BatchedLangevin
from openmm_bg.sampling.dynamics import LangevinPropagator, check_system, whole_number
from openmm_bg.units import GAS_CONSTANT, kelvin

__all__ = ["CooledWalkers", "cool"]


@dataclass(frozen=True)
class CooledWalkers:
    """A weighted ensemble of the last temperature.

    Attributes
    ----------
    positions : ndarray (walkers, atoms, 3), float64
        nm.
    potential_energy : ndarray (walkers,)
        kJ/mol.
    log_weights : ndarray (walkers,)
        Since the last resampling.
    ancestors : ndarray of int (walkers,)
        From which walker of the first temperature each descends: the number of different ones bounds how much the
        ensemble knows.
    log_z_ratio : float
        Log of the ratio of configurational integrals, last temperature to first.
    temperature : float
        K, the last one.
    force_evaluations : int
    seed : int
    """

    positions: np.ndarray
    potential_energy: np.ndarray
    log_weights: np.ndarray
    ancestors: np.ndarray
    log_z_ratio: float
    temperature: float
    force_evaluations: int
    seed: int

    def __len__(self) -> int:
        return len(self.positions)


def cool(
    system: openmm.System,
    positions: Any,
    *,
    temperatures: Sequence[Any] | np.ndarray,
    n_walkers: int,
    equilibration_steps: int,
    steps_per_temperature: int,
    resample_below: float = 0.5,
    timestep: Any = 0.001,
    friction: Any = 1.0,
    seed: int,
    progress: bool = True,
) -> CooledWalkers:
    """Annealed importance sampling of many walkers in one batch.

    Parameters
    ----------
    system : openmm.System
        One that :class:`BatchedLangevin` can run.
    positions : (atoms, 3), nm
        Where all walkers start; relaxed first.
    temperatures : sequence
        Falling, K; the first is where all barriers are crossed within `equilibration_steps`.
    n_walkers, equilibration_steps, steps_per_temperature : int
        Steps at the first temperature, and at each later one.
    resample_below : float
        Resample where the effective share of the weights falls below this, 0 to 1; 0 never does.
    timestep, friction : Quantity or float
        ps, 1/ps. The dynamics keeps its time-step error, here as everywhere.
    seed : int
    progress : bool
        A bar with the remaining time on stderr, where that is a terminal.

    Raises
    ------
    InputError
        For input that does not fit, or an unstable dynamics.

    References
    ----------
    Neal, Stat. Comput. 11, 125 (2001); Hukushima & Iba, AIP Conf. Proc. 690, 200 (2003).

    Examples
    --------
    >>> import openmm_bg as bg
    >>> molecule = bg.systems.load("alanine_dipeptide")
    >>> walkers = cool(
    ...     molecule.system, molecule.positions, temperatures=[400, 300], n_walkers=4, equilibration_steps=5,
    ...     steps_per_temperature=5, seed=1,
    ... )
    >>> walkers.positions.shape
    (4, 22, 3)
    """
    start = check_system(system, positions)
    ladder = [kelvin(t) for t in temperatures]
    if len(ladder) < 2 or any(b >= a for a, b in itertools.pairwise(ladder)):
        raise InputError("Cooling needs at least two temperatures, each below the one before.")
    n = whole_number(n_walkers, "n_walkers", minimum=2)
    warm = whole_number(equilibration_steps, "equilibration_steps", minimum=1)
    steps = whole_number(steps_per_temperature, "steps_per_temperature", minimum=1)
    if not 0 <= resample_below <= 1:
        raise InputError(f"resample_below must lie between 0 and 1, not {resample_below}.")
    rng = np.random.default_rng(whole_number(seed, "seed", minimum=0))
    relaxer = LangevinPropagator(
        system, start, temperature=ladder[0], timestep=timestep, friction=friction, generator=rng
    )
    relaxer.minimize()
    walkers = BatchedLangevin(
        ForceFieldEnergy(system, ladder[0]), np.repeat(relaxer.positions[None], n, 0), temperature=ladder[0],
        timestep=timestep, friction=friction, generator=torch.Generator().manual_seed(int(rng.integers(2**31))),
    )  # fmt: skip
    log_w, log_z = np.zeros(n), 0.0
    ancestors = np.arange(n)
    with tqdm(
        total=warm + steps * (len(ladder) - 1), unit="step", unit_scale=True, disable=None if progress else True
    ) as bar:
        walkers.draw_velocities()
        _advance(walkers, warm, bar)
        for hot, cold in itertools.pairwise(ladder):
            energy = walkers.potential_energy().numpy(force=True)
            log_w = log_w - (1 / cold - 1 / hot) / GAS_CONSTANT * energy
            shifted = np.exp(log_w - log_w.max())
            if shifted.sum() ** 2 / (n * (shifted**2).sum()) < resample_below:
                log_z += log_w.max() + math.log(shifted.mean())
                # even steps through the weights: no walker of average weight is lost
                places = (np.arange(n) + rng.random()) / n
                chosen = np.searchsorted(np.cumsum(shifted) / shifted.sum(), places).clip(max=n - 1)
                walkers.permute(torch.as_tensor(chosen))
                ancestors, log_w = ancestors[chosen], np.zeros(n)
            walkers.velocities = walkers.velocities * math.sqrt(cold / hot)
            walkers.set_temperature(cold)
            _advance(walkers, steps, bar)
    energy = walkers.potential_energy().numpy(force=True)
    top = log_w.max()
    return CooledWalkers(
        walkers.positions.double().numpy(force=True), energy, log_w, ancestors,
        float(log_z + top + math.log(np.exp(log_w - top).mean())), ladder[-1],
        walkers.force_evaluations + relaxer.force_evaluations, seed,
    )  # fmt: skip


def _advance(walkers: BatchedLangevin, steps: int, bar: tqdm) -> None:
    # in pieces, so that the bar moves, Ctrl-C is heard and trouble is found early
    while steps > 0:
        piece = min(steps, 200)
        walkers.advance(piece)
        bar.update(piece)
        steps -= piece
