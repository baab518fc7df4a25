"""Alanine dipeptide whose law is known: an autoregressive chain through three basins, all else Gaussian."""

from __future__ import annotations

import numpy as np
import torch
from scipy.signal import lfilter
from scipy.special import ndtr

from openmm_bg.coordinates import InternalCoordinates, ZMatrix

PHI, PSI = frozenset((4, 6, 8, 14)), frozenset((6, 8, 14, 16))
HELIX, SHEET, LEFT = np.array([[-1.2, -0.5], [-1.4, 2.6], [1.0, 0.6]])
SHARES = (0.40, 0.55, 0.05)


def autoregressive(n: int, memory: float, rng: np.random.Generator) -> np.ndarray:
    """A stationary Gaussian chain of unit variance whose autocorrelation falls as exp(-lag / memory)."""
    keep = np.exp(-1 / memory) if memory > 0 else 0.0
    noise = rng.normal(size=n) * np.sqrt(1 - keep**2)
    noise[0] /= np.sqrt(1 - keep**2)
    return lfilter([1.0], [1.0, -keep], noise)


def chain(
    molecule,
    n: int,
    seed: int,
    *,
    shares: tuple[float, float, float] = SHARES,
    memory: float = 0.0,
    heat: float = 1.0,
    longer: float = 0.0,
) -> tuple[np.ndarray, np.ndarray]:
    """Positions in nm, and reduced energies: harmonic in bonds and angles, so that heat scales their squares.

    `shares` of helix, sheet and left; `heat` is the temperature ratio; `longer`, nm, stretches CA-CB.
    """
    rng = np.random.default_rng(seed)
    zmatrix = ZMatrix.from_topology(molecule.topology)
    coordinates = InternalCoordinates(zmatrix)
    start = coordinates(torch.as_tensor(molecule.positions)[None])[0][0].numpy()
    bonds, angles = len(zmatrix.bonds), len(zmatrix.angles)
    width = np.concatenate([np.full(bonds, 0.003), np.full(angles, 0.06), np.full(len(start) - bonds - angles, 0.12)])
    noise = rng.normal(size=(n, len(start))) * np.sqrt(heat)
    q = start + width * noise
    place = ndtr(autoregressive(n, memory, rng))
    basin = np.searchsorted(np.cumsum(shares)[:2], place)
    torsions = [frozenset(row) for row in zmatrix.torsions.tolist()]
    centre = np.stack([HELIX, SHEET, LEFT])[basin] + 0.25 * rng.normal(size=(n, 2))
    for k, atoms in enumerate((PHI, PSI)):
        q[:, bonds + angles + torsions.index(atoms)] = centre[:, k]
    pairs = [frozenset(row) for row in zmatrix.bonds.tolist()]
    q[:, pairs.index(frozenset((8, 10)))] += longer
    energy = 0.5 * (noise[:, : bonds + angles] ** 2).sum(1)
    return coordinates.inverse(torch.as_tensor(q))[0].numpy(), energy
