"""Figures of a trained generator, held against frames of an independent reference."""

from __future__ import annotations

import time

import numpy as np
import torch
from reference_statistics import LEAST_POPULATION, Backbone, indicators

import openmm_bg as bg
from openmm_bg.analysis import measure as with_floor
from openmm_bg.analysis import total_variation
from openmm_bg.coordinates import dihedral
from openmm_bg.sampling import (
    effective_sample_size,
    forward_effective_sample_size,
    independence_acceptance,
    largest_log_ratio,
    log_normalizer,
)

TORSIONS_AT_ONCE = 20_000


def evaluate(generator: bg.BoltzmannGenerator, frames: np.ndarray, ladder: np.ndarray, samples: int, seed: int) -> dict:
    """ESS and all that belongs to it.

    Parameters
    ----------
    generator : BoltzmannGenerator
    frames : (n, atoms, 3)
        nm, of an equilibrium simulation that training never saw.
    ladder : (n,) int
        Which independent ladder each frame comes from: errors are the spread of the ladders' means.
    samples, seed : int
        Draws of the generator.
    """
    started = time.perf_counter()
    draws = generator.sample(samples, seed=seed)
    seconds = time.perf_counter() - started
    log_w = draws.log_weights
    log_z, ess = log_normalizer(log_w), effective_sample_size(log_w)
    held = generator.log_weights(frames).numpy()
    log_prob = generator.log_prob(frames)
    inside = torch.isfinite(log_w)
    supported = np.isfinite(held)
    weights = (log_w[inside] - log_w[inside].max()).exp().numpy()
    order = np.argsort(ladder, kind="stable")
    torsions = {"draws": draws.positions[inside].numpy(), "frames": frames[order]}
    backbone = Backbone.of(generator.topology)
    torsions = {name: _torsions(x, backbone) for name, x in torsions.items()}
    return {
        "n": samples,
        "ess": ess.fraction,
        "ess_clipped": ess.clipped,
        "acceptance": independence_acceptance(log_w),
        "forward": forward_effective_sample_size(held, log_z.value),
        "largest_log_ratio": largest_log_ratio(held, log_z.value),
        "worst_log_ratios": [round(float(w), 2) for w in np.sort(held)[-5:] - log_z.value],
        "frames": len(frames),
        "frames_outside_support": int((~supported).sum()),
        "log_z": list(log_z),
        "elbo": float(log_w[inside].mean()),
        "eubo": float(held[supported].mean()),
        "nll": float(-log_prob[torch.as_tensor(supported)].mean()),
        "outside_support": float((~inside).double().mean()),
        "ramachandran": _ramachandran(torsions, weights, backbone, seed),
        "basins": _basins(torsions, weights, backbone, ladder[order]),
        "sampling_seconds": round(seconds, 1),
    }


def _torsions(x: np.ndarray, backbone: Backbone) -> np.ndarray:
    atoms = torch.as_tensor(backbone.atoms)
    parts = torch.as_tensor(np.asarray(x, dtype=np.float64)).split(TORSIONS_AT_ONCE)
    return torch.cat([dihedral(part, atoms) for part in parts]).numpy()


def _ramachandran(torsions: dict, weights: np.ndarray, backbone: Backbone, seed: int) -> dict:
    """Total variation of phi and psi, of the draws as they are and reweighted, with its floor at the same n."""
    phi, psi = backbone.columns("phi"), backbone.columns("psi")
    found = {}
    for residue in phi.keys() & psi.keys():
        frames, draws = (torsions[name][:, [phi[residue], psi[residue]]] for name in ("frames", "draws"))
        found[residue] = {}
        for name, w in (("plain", None), ("reweighted", weights)):
            one = with_floor("TV", total_variation, frames, draws, np.random.default_rng(seed), weights=w, n=10_000)
            found[residue] |= {name: [one.value, one.error], "floor": [one.floor, one.floor_error], "n": one.n}
    return found


def _basins(torsions: dict, weights: np.ndarray, backbone: Backbone, ladder: np.ndarray) -> dict:
    """Populations of every basin above half a percent; how far apart they are in standard errors."""
    both = np.concatenate([torsions["frames"], torsions["draws"]])[None]
    _, ladder, counts = np.unique(ladder, return_inverse=True, return_counts=True)
    found = {}
    for name, series in indicators(both, backbone, LEAST_POPULATION / 50).items():
        here, drawn = np.split(series[0].astype(float), [len(ladder)])
        expected = here.mean()
        if expected < LEAST_POPULATION:
            continue
        # ladders of n frames each weigh n in the mean, and so do their deviations
        deviations = np.bincount(ladder, here - expected) / len(ladder)
        spread = np.sqrt((deviations**2).sum() * len(counts) / (len(counts) - 1)) if len(counts) > 1 else np.nan
        value = float(weights @ drawn / weights.sum())
        error = float(np.sqrt((weights**2 * (drawn - value) ** 2).sum()) / weights.sum())
        found[name] = {
            "reference": [float(expected), float(spread)],
            "reweighted": [value, error],
            "plain": float(drawn.mean()),
            "apart": float((value - expected) / np.hypot(error, spread)),
        }
    return found
