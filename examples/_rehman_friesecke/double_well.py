"""The double well of section 6.1: RealNVP against exact samples, and the published protocol beside it."""

import math
from dataclasses import dataclass, field

import numpy as np
import torch

import openmm_bg as bg
from _rehman_friesecke.metrics import PLANE, plane_w2
from _rehman_friesecke.tables import Row, distance_row
from openmm_bg.analysis import energy_w2, measure
from openmm_bg.flows import RealNVP
from openmm_bg.sampling import effective_sample_size, forward_effective_sample_size
from openmm_bg.training import ForwardPath, MaximumLikelihood, Settings, Stage, Trainer

FORMS = {"masked": (128,), "split": (64,)}
FRAMES = 600
"""Of the published trajectory."""
TIMESTEP = 0.05
"""Not published; at beta = 1 this one gives the published number of transitions, about forty."""


@dataclass(frozen=True)
class Effort:
    """How much is trained and measured.

    Attributes
    ----------
    data, test, draws : int
        Exact samples for training, others for testing, and samples of the flow.
    likelihood, published : int
        Steps by maximum likelihood, and those of the published protocol.
    energy : dict
        Steps by path gradients, by inverse temperature: separate wells take longer.
    few, many : int
        Points on either side of a W2 in the plane: in every row, and once more with ``largest``.
    """

    data: int = 200_000
    test: int = 400_000
    draws: int = 100_000
    likelihood: int = 300
    energy: dict[float, int] = field(default_factory=lambda: {1.0: 2500, 5.0: 20_000})
    published: int = 1500
    few: int = 2500
    many: int = 10_000


def architecture(form: str, seed: int) -> RealNVP:
    """The flows of the paper: 7704 parameters masked, 2316 split."""
    return RealNVP(2, layers=6, hidden=FORMS[form], networks=form, seed=seed)


def parameters(flow: torch.nn.Module) -> int:
    return sum(p.numel() for p in flow.parameters())


def sign_changes(x: np.ndarray) -> int:
    """How often x1 changes its sign from one row to the next."""
    return int((np.diff(np.sign(x[:, 0])) != 0).sum())


def langevin(beta: float, frames: int, timestep: float, rng: np.random.Generator) -> np.ndarray:
    """Overdamped Langevin dynamics by Euler and Maruyama, every step kept: (frames, 2)."""
    x, path = np.array([1.0, 0.0]), np.empty((frames, 2))
    for k in range(frames):
        force = np.array([-x[0] * (x[0] ** 2 - 1), -x[1]])
        x = x + timestep * force + math.sqrt(2 * timestep / beta) * rng.standard_normal(2)
        path[k] = x
    return path


def study(beta: float, form: str, seed: int, effort: Effort, *, largest: bool) -> tuple[list[Row], np.ndarray]:
    """Train one flow and measure it against exact samples it has not seen.

    Maximum likelihood on exact samples brings the flow near; path gradients of the same divergence, whose variance
    vanishes at the target, go on from there.

    Returns
    -------
    rows : list of dict
        One ``fit`` row, and one ``w2`` row for each distance.
    samples : ndarray
        Of the flow.
    """
    well = bg.systems.load("double_well", beta=beta)
    train, test = (
        well.sample(n, torch.Generator().manual_seed(10 * seed + k))
        for k, n in enumerate((effort.data, effort.test), start=1)
    )
    # the density measured is the flow's own, without a defensive share
    generator = bg.BoltzmannGenerator(well, architecture(form, seed), defensive=0.0)
    stages = [
        Stage("likelihood", effort.likelihood, [(1.0, MaximumLikelihood())]),
        Stage("energy", effort.energy[beta], [(1.0, ForwardPath())]),
    ]
    # path gradients have little variance left near the target: small batches, long steps, many of them
    settings = Settings(batch_size=256, learning_rate=2e-2)
    result = Trainer(generator, stages, train, settings=settings, seed=seed, progress=False).run()
    log_ratio = (-well(test) - well.log_z - generator.log_prob(test)).numpy()
    draws = generator.sample(effort.draws, seed=seed)
    samples = draws.positions.numpy()
    same = {"part": "double well", "beta": beta, "form": form, "parameters": parameters(generator.flow), "seed": seed}
    rows = [
        same
        | {
            "table": "fit",
            "kl": float(log_ratio.mean()),
            "kl_error": float(log_ratio.std() / math.sqrt(len(log_ratio))),
            "test_samples": len(log_ratio),
            "ess_reverse": effective_sample_size(draws.log_weights).fraction,
            "ess_forward": forward_effective_sample_size(log_ratio + well.log_z, well.log_z),
            "largest_log_ratio": float(log_ratio.max()),
            "seconds": round(result.seconds, 1),
        }
    ]
    exact = test.numpy()
    plan = [("plane", PLANE, effort.few, 4), ("x1", energy_w2, effort.many, 8), ("x2", energy_w2, effort.many, 8)]
    if largest:
        plan.insert(1, ("plane", PLANE, effort.many, 2))
    for name, metric, n, repeats in plan:
        # equal numbers for both forms, which then share their floor
        rng = np.random.default_rng([seed, n])
        p, q = (exact, samples) if name == "plane" else (exact[:, int(name[1]) - 1], samples[:, int(name[1]) - 1])
        distance = measure(name, metric, p, q, rng, n=n, repeats=repeats)
        rows.append(same | {"table": "w2", "distance": name} | distance_row(distance))
    return rows, samples


def published_protocol(beta: float, seed: int, effort: Effort) -> Row:
    """Train and test on the same 600 frames, as published.

    Returns
    -------
    dict
        ``w2`` of the flow to the frames it has seen, ``w2_exact`` of the flow to exact samples, and the ``floor`` of
        two independent exact sets, all at 600 points; sign changes of the trajectory, of the trajectory encoded and
        decoded by the flow, and of independent draws.
    """
    well = bg.systems.load("double_well", beta=beta)
    rng = np.random.default_rng(seed)
    frames = langevin(beta, FRAMES, TIMESTEP, rng)
    data = torch.as_tensor(frames)
    generator = bg.BoltzmannGenerator(None, architecture("masked", seed), defensive=0.0)
    stages = [Stage("likelihood", effort.published, [(1.0, MaximumLikelihood())])]
    Trainer(generator, stages, data, settings=Settings(batch_size=256), seed=seed, progress=False).run()
    random = torch.Generator().manual_seed(seed)
    repeats = 4
    values, to_exact, floors = np.empty(repeats), np.empty(repeats), np.empty(repeats)
    for k in range(repeats):
        drawn = generator.flow.sample(FRAMES, random)[0].numpy()
        one, other = well.sample(FRAMES, random).numpy(), well.sample(FRAMES, random).numpy()
        values[k], to_exact[k], floors[k] = plane_w2(frames, drawn), plane_w2(one, drawn), plane_w2(one, other)
    with torch.no_grad():
        latent, _ = generator.flow.transform.inverse(data)
        decoded, _ = generator.flow.transform(latent)
    return {
        "part": "double well",
        "table": "published protocol",
        "beta": beta,
        "seed": seed,
        "n": FRAMES,
        "w2": float(values.mean()),
        "w2_exact": float(to_exact.mean()),
        "floor": float(floors.mean()),
        "changes_trajectory": sign_changes(frames),
        "changes_decoded": sign_changes(decoded.numpy()),
        "changes_independent": sign_changes(drawn),
        "changes_exact": sign_changes(one),
    }
