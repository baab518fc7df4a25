"""One row per trained sampler: effective sample sizes both ways, log Z, modes, distances with their floors."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import ot
import torch
from torch import Tensor

import openmm_bg as bg
from openmm_bg.sampling import effective_sample_size, forward_effective_sample_size, log_normalizer
from openmm_bg.training import Objective, Settings


def train(
    target: bg.Energy,
    flow: bg.flows.Flow,
    objective: Objective,
    *,
    steps: int,
    batch: int,
    rate: float,
    seed: int,
    data: Any = None,
    likelihood_steps: int | None = None,
    progress: bool = True,
) -> tuple[bg.BoltzmannGenerator, dict[str, Any]]:
    """A trained generator, and what it cost."""
    generator = bg.BoltzmannGenerator(target, flow, defensive=0.0)
    settings = Settings(
        batch_size=batch,
        learning_rate=rate,
        validate_every=max(1, steps // 4),
        validation_size=min(1024, batch),
        average=0.995,
    )
    started = time.perf_counter()
    result = generator.fit(
        data, steps=steps, likelihood_steps=likelihood_steps, objective=objective, settings=settings, seed=seed,
        progress=progress,
    )  # fmt: skip
    return generator, {
        "seconds": round(time.perf_counter() - started, 1),
        "evaluations": result.evaluations,
        "skipped": result.skipped,
    }


def assess(generator: bg.BoltzmannGenerator, n: int, seed: int) -> tuple[dict[str, Any], bg.Samples]:
    """The flow by itself: its own draws, and exact draws where the target has them."""
    target = generator.energy
    samples = generator.sample(n, seed=seed)
    ess = effective_sample_size(samples.log_weights)
    z = log_normalizer(samples.log_weights)
    row: dict[str, Any] = {
        "n": n, "ess": ess.fraction, "ess_clipped": ess.clipped, "log_z": z.value, "log_z_se": z.error,
    }  # fmt: skip
    exact_log_z = getattr(target, "log_z", None)
    if exact_log_z is not None:
        row["log_z_error"] = z.value - exact_log_z
    if hasattr(target, "sample"):
        exact = target.sample(n, torch.Generator().manual_seed(seed + 1))
        log_weights = generator.log_weights(exact)
        row["forward_ess"] = forward_effective_sample_size(log_weights, exact_log_z)
        log_q = -target(exact) - log_weights
        row["nll"] = -float(log_q.mean())
        row |= distances(exact, samples.positions, target, seed + 2)
    row |= modes(target, samples.positions, samples.log_weights)
    return row, samples


def assess_annealed(generator: bg.BoltzmannGenerator, n: int, seed: int, **settings: Any) -> dict[str, Any]:
    """Annealed Langevin walkers on top of the field, weighted by Jarzynski's equality."""
    samples = bg.annealed_transport(generator, n, seed=seed, **settings)
    ess = effective_sample_size(samples.log_weights)
    z = log_normalizer(samples.log_weights)
    row = {"annealed_n": n, "annealed_ess": ess.fraction, "annealed_log_z_se": z.error}
    exact = getattr(generator.energy, "log_z", None)
    row["annealed_log_z_error" if exact is not None else "annealed_log_z"] = z.value - (exact or 0.0)
    return row


def modes(target: bg.Energy, x: Tensor, log_weights: Tensor) -> dict[str, Any]:
    """Weights of modes against the exact ones: the largest error in standard errors, with and without reweighting."""
    if isinstance(target, bg.systems.GaussianMixture):
        indicator = torch.nn.functional.one_hot(target.nearest_mode(x), len(target.means)).double()
        # the nearest mode is not quite the mode that made a point where modes overlap, so the truth is sampled too
        truth = target.sample(400_000, torch.Generator().manual_seed(7))
        exact = torch.nn.functional.one_hot(target.nearest_mode(truth), len(target.means)).double().mean(0)
    elif isinstance(target, (bg.systems.ManyWell, bg.systems.ManyWellDelta)):
        indicator, exact = target.modes(x).double(), target.mode_weights
    elif isinstance(target, bg.systems.LatticeDoubleWell):
        indicator, exact = (x.mean(1, keepdim=True) > 0).double(), torch.tensor([0.5], dtype=torch.float64)
    else:
        return {}
    w = torch.softmax(log_weights, 0)
    mean = w @ indicator
    error = torch.sqrt((w.square()[:, None] * (indicator - mean).square()).sum(0) + exact * (1 - exact) / 400_000)
    plain = indicator.mean(0)
    return {
        "modes": len(exact),
        "modes_found": int((plain > 0).sum()),
        "mode_error_max_se": float(((mean - exact).abs() / error).max()),
        "mode_error_max": float((mean - exact).abs().max()),
        "mode_error_unweighted": float((plain - exact).abs().max()),
    }


def distances(exact: Tensor, x: Tensor, target: bg.Energy, seed: int, most: int = 2000) -> dict[str, float]:
    """W2 and energy distance between n exact and n generated points, each with the floor of two exact sets."""
    random = torch.Generator().manual_seed(seed)
    n = min(most, len(x))
    a, b = (target.sample(n, random).numpy() for _ in range(2))
    y = x[torch.randperm(len(x), generator=random)[:n]].numpy()
    value, floor = w2(a, y), w2(a, b)
    energy, energy_se = energy_distance(a, y)
    excess = value**2 - floor**2
    return {
        "w2": value, "w2_floor": floor, "w2_debiased": math.copysign(math.sqrt(abs(excess)), excess),
        "energy_distance": energy, "energy_distance_se": energy_se, "energy_distance_floor": energy_distance(a, b)[0],
        "distance_n": n,
    }  # fmt: skip


def w2(a: np.ndarray, b: np.ndarray) -> float:
    """Exact Wasserstein-2 distance of two point sets of equal weight."""
    cost = ot.dist(a, b)
    weights = [np.full(len(c), 1 / len(c)) for c in (a, b)]
    return math.sqrt(max(0.0, float(ot.emd2(*weights, cost, numItermax=2_000_000))))


def energy_distance(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """E|X-Y| - E|X-X'|/2 - E|Y-Y'|/2 without the pairs of a point with itself, and its standard error over blocks."""
    values = []
    for left, right in zip(np.array_split(a, 8), np.array_split(b, 8), strict=True):
        cross = ot.dist(left, right, metric="euclidean").mean()
        own = [ot.dist(s, s, metric="euclidean").sum() / (len(s) * (len(s) - 1)) for s in (left, right)]
        values.append(cross - 0.5 * sum(own))
    return float(np.mean(values)), float(np.std(values, ddof=1) / math.sqrt(len(values)))


def write_row(path: Path, row: dict[str, Any]) -> None:
    """Add a row to a JSON Lines file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as stream:
        stream.write(json.dumps(row) + "\n")


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


COLUMNS = [
    ("ess", "ESS"), ("forward_ess", "forward"), ("annealed_ess", "annealed"), ("log_z_error", "log Z error"),
    ("mode_error_max_se", "worst mode, s.e."), ("w2", "W2"), ("w2_floor", "floor"),
    ("energy_distance", "energy dist."), ("energy_distance_se", "s.e."),
    ("evaluations", "evaluations"), ("seconds", "s"),
]  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """Mean and spread over seeds of every experiment and scheme."""
    lines = ["| target | scheme | seeds | " + " | ".join(title for _, title in COLUMNS) + " |"]
    lines.append("|---" * (len(COLUMNS) + 3) + "|")
    keys = list(dict.fromkeys((row["target"], row["scheme"]) for row in rows))
    for target, scheme in keys:
        group = [row for row in rows if (row["target"], row["scheme"]) == (target, scheme)]
        cells = []
        for name, _ in COLUMNS:
            values = np.array([row[name] for row in group if row.get(name) is not None], dtype=float)
            if not len(values):
                cells.append("")
            elif name in ("evaluations", "seconds"):
                cells.append(f"{values.mean():.3g}")
            else:
                spread = f" ± {values.std(ddof=1):.2g}" if len(values) > 1 else ""
                cells.append(f"{values.mean():.4g}{spread}")
        lines.append(f"| {target} | {scheme} | {len(group)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
