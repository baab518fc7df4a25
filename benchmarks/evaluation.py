"""Figures of a trained generator, held against frames of an independent reference."""

from __future__ import annotations

import time

import numpy as np
import torch
from reference_statistics import LEAST_POPULATION, Backbone, indicators, measure

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
        Which independent ladder each frame comes from, equally many from each: errors are the spread of ladders.
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
    torsions = {"draws": draws.positions[inside].numpy(), "frames": frames[np.argsort(ladder, kind="stable")]}
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
        "basins": _basins(torsions, weights, backbone, len(np.unique(ladder))),
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


def _basins(torsions: dict, weights: np.ndarray, backbone: Backbone, ladders: int) -> dict:
    """Populations of every basin above half a percent; how far apart they are in standard errors."""
    kept = len(torsions["frames"]) // ladders * ladders
    reference = indicators(torsions["frames"][:kept].reshape(ladders, -1, torsions["frames"].shape[-1]), backbone)
    drawn = indicators(torsions["draws"][None], backbone)
    found = {}
    for name, series in reference.items():
        expected = measure(series)
        if expected["value"] < LEAST_POPULATION:
            continue
        x = drawn[name][0] if name in drawn else np.zeros(len(weights), dtype=bool)
        value = float(weights @ x / weights.sum())
        error = float(np.sqrt((weights**2 * (x - value) ** 2).sum()) / weights.sum())
        found[name] = {
            "reference": [expected["value"], expected["error"]],
            "reweighted": [value, error],
            "plain": float(x.mean()),
            "apart": float((value - expected["value"]) / np.hypot(error, expected["error"])),
        }
    return found
