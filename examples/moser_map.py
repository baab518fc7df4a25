"""The theorems of Rehman & Friesecke (2026) in numbers: the Moser map, RealNVP fitted to it, and what that certifies.

    python moser_map.py --output moser                 three runs of everything, some ten minutes on one core
    python moser_map.py --short --output moser         one run, coarse, half a minute

Theorem 2: between two positive densities on a box there is a Moser map T, invertible and Lipschitz both ways, and
RealNVP maps F come as near to it as one likes. Theorems 3 and 4: then F carries the reference to nearly the target. The
target here is the double well in the plane, cut at a box; the reference is a standard normal, cut at the same box.

W2(F#rho0, rho1) <= |F - T| in L2(rho0): pushing the same points through both maps is one way to transport. Unlike a W2
between samples, this bound has no floor. T itself is known as T_h, up to the error of its grid.
"""

import argparse
import itertools
import json
import math
import time
from pathlib import Path

import matplotlib
import numpy as np
import ot
import torch

import openmm_bg as bg
from openmm_bg.flows import AffineCoupling, Base, Composition, Flow, MoserFlow

matplotlib.use("Agg")
import matplotlib.pyplot as plt

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--output", type=Path, default=Path("moser_map"))
parser.add_argument("--short", action="store_true", help="one run of a few small flows, barely trained")
parser.add_argument(
    "--beta", type=float, choices=(1.0, 5.0), default=1.0, help="of the target that RealNVP is fitted to"
)
parser.add_argument("--runs", type=int, default=3, help="repetitions with seeds of their own")
parser.add_argument("--seed", type=int, default=1, help="of the first run; the others follow")
options = parser.parse_args()
if options.runs < 1:
    parser.error("--runs must be 1 or more")
output, short = options.output, options.short
output.mkdir(parents=True, exist_ok=True)
torch.set_num_threads(1)

seeds = [options.seed + k for k in range(1 if short else options.runs)]
grids = (16, 32) if short else (16, 32, 64, 128)
finest = 4 * grids[-1]
widths, depths = ((4, 32), (2, 4)) if short else ((4, 16, 64, 256), (2, 4, 8, 16))
width, depth = (32, 4) if short else (64, 8)  # where the two scans cross
train_steps, batch, pool = (50, 256, 2048) if short else (1500, 512, 16384)
test, points = (1000, 200) if short else (10000, 1000)  # points on either side of an empirical W2

# rho1 falls to 1e-6 in the corners of these boxes. A larger box would hold more of the double well, which has
# 0.3 percent of its mass outside, and would have points on its walls that no ODE solver carries well.
BOXES = {1.0: [(-2.5, 2.5), (-3.0, 3.0)], 5.0: [(-1.9, 1.9), (-1.5, 1.5)]}
GRID = 32 if short else 64  # of the T_h that RealNVP is fitted to

lines, rows = [], []


def say(text=""):
    print(text, flush=True)
    lines.append(text)


def table(title, results):
    """Print one row for every case, mean and spread over the runs, and keep the rows of the single runs."""
    say(f"\n{title}")
    cases = {}
    for result in results:
        rows.append({"table": title.split(":")[0], **result})
        cases.setdefault(result["case"], []).append(result)
    columns = [c for c in results[0] if c not in ("case", "seed")]
    say(f"{'':>26} " + " ".join(f"{c:>21}" for c in columns))
    for case, found in cases.items():
        cells = []
        for column in columns:
            values = np.array([f[column] for f in found], dtype=float)
            spread = f" +- {values.std(ddof=1):.1g}" if len(values) > 1 and values.std() > 0 else ""
            cells.append(f"{values.mean():.4g}{spread}")
        say(f"{case:>26} " + " ".join(f"{c:>21}" for c in cells))


def rng(seed, purpose):
    return torch.Generator().manual_seed(1000 * seed + purpose)


def well_and_moser(beta, grid):
    well = bg.systems.load("double_well", beta=beta)
    return well, MoserFlow(lambda x: -well(x), BOXES[beta], std=1.0, grid=grid)


def draw_target(well, moser, n, generator):
    """Exact draws of the double well inside the box."""
    y = well.sample(2 * n, generator)
    return y[moser.base.contains(y)][:n]


def ess(log_weights):
    w = (log_weights - log_weights.max()).exp()
    return (w.sum().square() / (len(w) * w.square().sum())).item()


def rms(difference):
    return difference.square().sum(-1).mean().sqrt().item()


def w2(a, b):
    return math.sqrt(ot.emd2([], [], ot.dist(a.numpy(), b.numpy()), numItermax=10_000_000))


# --- a. The Moser map on finer and finer grids -----------------------------------------------------------------------
# coupled error: |T_n - T_finest| in L2(rho0), same points through both. The error is of second order, so it is to fall
# fourfold from row to row (a little more in the last, where the finest grid is not far).

start = time.process_time()
results, grid_error = [], {}
for beta in BOXES:
    well, finest_map = well_and_moser(beta, finest)
    for grid in grids:
        _, moser = well_and_moser(beta, grid)
        for seed in seeds:
            z = moser.base.sample(test // 5, rng(seed, 1))
            y, log_det = moser.transform(z)
            log_weights = -well(y) - moser.transform.log_masses[1] - (moser.base.log_prob(z) - log_det)
            back = moser.transform.inverse(y)[0]
            error = rms(y - finest_map.transform(z)[0])
            grid_error[beta, grid, seed] = error
            results.append(
                {
                    "case": f"beta {beta:g}, grid {grid}",
                    "seed": seed,
                    "coupled error": error,
                    "1 - ESS": 1 - ess(log_weights),
                    "KL(T#rho0 | rho1)": (log_weights.exp() - 1 - log_weights).mean().item(),
                    "round trip": (back - z).abs().max().item(),
                    "smallest det": log_det.exp().min().item(),
                    "largest det": log_det.exp().max().item(),
                }
            )
table(f"a: the Moser map, {test // 5} points, against a grid of {finest}", results)
say(f"{time.process_time() - start:.0f} s of one core")

# --- b. RealNVP fitted to the Moser map ------------------------------------------------------------------------------
# Regression on pairs (z, T_h(z)), z from rho0; "W1p" adds the difference of the Jacobians, as Theorem 2 measures it.
# The likelihood-trained flow has the same architecture and sees draws of rho1 instead. Its latents are normal: what the
# box cuts off the normal is the difference between its base and rho0. Nothing draws it towards T, so the bound says
# little about it: there are many maps from rho0 to rho1.

beta = options.beta
well, moser = well_and_moser(beta, GRID)
_, reference_map = well_and_moser(beta, 4 * GRID)


def jacobian(transform, z, graph=False):
    """(batch, 2, 2) derivative of a transform, by autograd, and its value."""
    z = z.detach().requires_grad_()
    y = transform(z)[0]
    parts = [torch.autograd.grad(y[:, i].sum(), z, create_graph=graph, retain_graph=True)[0] for i in range(2)]
    return y, torch.stack(parts, 1)


def realnvp(layers, units, seed):
    """Affine couplings that move the coordinates in turn, over a standard normal; the identity to begin with."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        masks = [torch.tensor([k % 2 == 0, k % 2 == 1]) for k in range(layers)]
        couplings = [AffineCoupling(mask, hidden=(units, units)) for mask in masks]
    return Flow(Base([False, False]), Composition(couplings))


def train(loss, layers, units, seed, stir=0.0):
    """A RealNVP after Adam, its learning rate warmed up and taken back to zero; loss(flow, generator).

    Wide networks need smaller steps: without that and the warm-up the widest ones end up worse than the narrow ones.
    The likelihood needs a start that is a little off: for a symmetric product of densities, as here, the identity is a
    saddle on which training can stay for thousands of steps. Regression has no such saddle.
    """
    flow, generator = realnvp(layers, units, seed), rng(seed, 2)
    for coupling in flow.transform.transforms:
        last = coupling.network[-1].weight.data
        last += stir * torch.randn(last.shape, generator=generator)
    rate = min(1e-2, 5e-3 * math.sqrt(64 / units))
    optimizer = torch.optim.Adam(flow.parameters(), rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, train_steps, pct_start=0.1)
    for _ in range(train_steps):
        optimizer.zero_grad()
        loss(flow, generator).backward()
        torch.nn.utils.clip_grad_norm_(flow.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return flow.double().requires_grad_(False)


def evaluate(case, flow, seed, data):
    """The certified bound, the W2 between samples with its floor, and the ESS of a flow's transform over rho0."""
    z, target = data["z"], data["T(z)"]
    y, log_det = flow.transform(z)
    distance = rms(y - target)
    inside = moser.base.contains(y)
    log_weights = torch.where(inside, -well(y) - moser.base.log_prob(z) + log_det, -math.inf)
    value, floor = w2(y[:points], data["y"][:points]), w2(data["y"][points : 2 * points], data["y"][:points])
    return {
        "case": case,
        "seed": seed,
        "parameters": sum(p.numel() for p in flow.parameters()),
        "|F - T_h|": distance,
        "bound on W2": distance + data["|T_h - T|"],
        "W2 of samples": value,
        "its floor": floor,
        "ESS": ess(log_weights),
        "outside box": 1 - inside.double().mean().item(),
    }


def regression(z, y, derivative=None):
    def loss(flow, generator):
        index = torch.randint(len(z), (batch,), generator=generator)
        if derivative is None:
            return (flow.transform(z[index])[0] - y[index]).square().sum(-1).mean()
        reached, slope = jacobian(flow.transform, z[index], graph=True)
        misfit = (slope - derivative[index]).square().sum((1, 2)).mean()
        return (reached - y[index]).square().sum(-1).mean() + 0.1 * misfit

    return loss


def likelihood(y):
    def loss(flow, generator):
        return -flow.log_prob(y[torch.randint(len(y), (batch,), generator=generator)]).mean()

    return loss


start = time.process_time()
results, flows, everything = [], {}, {}
for seed in seeds:
    z = moser.base.sample(pool, rng(seed, 3))
    with torch.no_grad():
        y, derivative = moser.transform.jacobian(z)
        held_out = moser.base.sample(test, rng(seed, 4))
        image = moser.transform(held_out)[0]
        # the finer map has a sixteenth of the error left, if the error is of second order
        gap = 16 / 15 * rms(image - reference_map.transform(held_out)[0])
    exact = draw_target(well, moser, test, rng(seed, 5))
    everything[seed] = data = {"z": held_out, "T(z)": image, "y": exact, "|T_h - T|": gap}
    z, y, derivative = z.float(), y.float(), derivative.float()
    scan = [(depth, units) for units in widths] + [(layers, width) for layers in depths]
    for layers, units in dict.fromkeys(scan):
        flow = train(regression(z, y), layers, units, seed)
        results.append(evaluate(f"{layers} layers of {units}", flow, seed, data))
        if (layers, units) == (depth, width):
            flows["RealNVP on T_h", seed] = flow
    for name, loss, stir in (
        ("RealNVP on T_h, W1p", regression(z, y, derivative), 0.0),
        ("RealNVP by likelihood", likelihood(draw_target(well, moser, pool, rng(seed, 6)).float()), 0.1),
    ):
        flow = flows[name, seed] = train(loss, depth, width, seed, stir)
        results.append(evaluate(name.removeprefix("RealNVP "), flow, seed, data))

results.sort(key=lambda r: "layers" not in r["case"])  # the two scans first, in their order
table(f"b: RealNVP on the Moser map of beta {beta:g}, grid {GRID}, {train_steps} steps of {batch}", results)
say(f"|T_h - T| is {np.mean([d['|T_h - T|'] for d in everything.values()]):.2g}; {time.process_time() - start:.0f} s")


scans = {
    "width": [[r for r in results if r["case"] == f"{depth} layers of {w}"] for w in widths],
    "depth": [[r for r in results if r["case"] == f"{d} layers of {width}"] for d in depths],
}
floor = np.mean([r["its floor"] for r in results])
for name, sizes in (("width", widths), ("depth", depths)):
    for (before, small), (after, large) in itertools.pairwise(zip(scans[name], sizes, strict=True)):
        change = np.array([y["bound on W2"] - x["bound on W2"] for x, y in zip(before, after, strict=True)])
        error = f" +- {change.std(ddof=1) / math.sqrt(len(change)):.1g}" if len(change) > 1 else ""
        say(f"{name} {small} to {large}: with the same seeds the bound changes by {change.mean():+.2g}{error}")

# --- c. How much the maps stretch ------------------------------------------------------------------------------------
# Largest singular values of DF at draws of rho0 and of D(F^-1) at draws of rho1: a sampled Lipschitz constant, from
# below. The densities are products, so the optimal (Brenier) map is known as well: the monotone rearrangement of each
# coordinate.


def brenier(beta):
    """Per coordinate: a table of z, T(z) and T'(z)."""
    out = []
    for k, (low, high) in enumerate(BOXES[beta]):
        x = np.linspace(low, high, 200001)
        p0 = np.exp(-(x**2) / 2)
        p1 = np.exp(-beta * ((x**2 - 1) ** 2 / 4 if k == 0 else x**2 / 2))
        c0, c1 = ((np.cumsum(p) - p / 2) / p.sum() for p in (p0, p1))
        image = np.interp(c0, c1, x)
        slope = p0 / p0.sum() / (np.interp(image, x, p1) / p1.sum())
        out.append((x, image, slope))
    return out


def apply_brenier(tables, z, what):
    return torch.from_numpy(np.stack([np.interp(z[:, k].numpy(), t[0], t[what]) for k, t in enumerate(tables)], -1))


def backwards(tables, y):
    return torch.from_numpy(np.stack([np.interp(y[:, k].numpy(), t[1], t[0]) for k, t in enumerate(tables)], -1))


def stretches(case, seed, forward, inverse):
    """From Jacobians at z ~ rho0 and at F^-1(y), y ~ rho1, both (n, 2, 2)."""
    there, back = torch.linalg.svdvals(forward)[:, 0], 1 / torch.linalg.svdvals(inverse)[:, 1]
    return {
        "case": case,
        "seed": seed,
        "F mean": there.mean().item(),
        "F max": there.max().item(),
        "F^-1 mean": back.mean().item(),
        "F^-1 99.9 %": back.quantile(0.999).item(),
        "F^-1 max": back.max().item(),
    }, back


start = time.process_time()
tables, results, inverse_stretch = brenier(beta), [], {}
for seed in seeds:
    z, y = everything[seed]["z"], everything[seed]["y"]
    with torch.no_grad():
        latent = moser.transform.inverse(y)[0]
        pair = moser.transform.jacobian(z)[1], moser.transform.jacobian(latent)[1]
    cases = {"Moser T_h": pair}
    slopes = apply_brenier(tables, z, 2), apply_brenier(tables, backwards(tables, y), 2)
    cases["Brenier, exact"] = tuple(torch.diag_embed(s) for s in slopes)
    for name in ("RealNVP on T_h", "RealNVP on T_h, W1p", "RealNVP by likelihood"):
        transform = flows[name, seed].transform
        cases[name] = tuple(jacobian(transform, p)[1] for p in (z, transform.inverse(y)[0]))
    for name, (forward, inverse) in cases.items():
        row, values = stretches(name, seed, forward, inverse)
        results.append(row)
        inverse_stretch.setdefault(name, []).append(values)
table(f"c: singular values at {test} points, beta {beta:g}, {depth} layers of {width}", results)
say(f"{time.process_time() - start:.0f} s")

# --- d. The optimal map beside it ------------------------------------------------------------------------------------
# POT's exact plan between n draws of rho0 and 4 n of rho1, averaged over the targets of each point (the barycentric
# map), its cost, and the cost of Moser's map. "same points": the cheapest way to match z with T_h(z), beside what
# z -> T_h(z) costs itself.

start = time.process_time()
results = []
for seed in seeds:
    z, image, y = (everything[seed][k] for k in ("z", "T(z)", "y"))
    few, many = z[:points], draw_target(well, moser, 4 * points, rng(seed, 7))
    plan, log = ot.emd([], [], ot.dist(few.numpy(), many.numpy()), numItermax=10_000_000, log=True)
    barycentric = torch.from_numpy(plan) @ many * points
    best = apply_brenier(tables, z, 1)
    results.append(
        {
            "case": f"beta {beta:g}",
            "seed": seed,
            "Moser": rms(image - z) ** 2,
            "Brenier, exact": rms(best - z) ** 2,
            "Brenier, POT plan": log["cost"],
            "Moser, same points": rms(image[:points] - few) ** 2,
            "optimal, same points": w2(few, image[:points]) ** 2,
            "|POT - Brenier|": rms(barycentric - best[:points]),
            "|Moser - Brenier|": rms(image - best),
        }
    )
table(f"d: transport costs E|T(z) - z|^2, POT with {points} and {4 * points} points", results)
say(f"{time.process_time() - start:.0f} s")

# --- files -----------------------------------------------------------------------------------------------------------

(output / "moser_map.txt").write_text("\n".join(lines) + "\n")
with open(output / "moser_map.jsonl", "w") as file:
    for row in rows:
        file.write(json.dumps(row) + "\n")

figure, axes = plt.subplots(2, 2, figsize=(9.6, 7.6), layout="constrained")
(mesh, error_axes), (bound_axes, stretch_axes) = axes

x_lines, y_lines = (torch.linspace(*wall, 25, dtype=torch.float64) for wall in BOXES[beta])
fine = [torch.linspace(*wall, 201, dtype=torch.float64) for wall in BOXES[beta]]
upright = torch.stack([torch.stack([value.expand(len(fine[1])), fine[1]], -1) for value in x_lines])
level = torch.stack([torch.stack([fine[0], value.expand(len(fine[0]))], -1) for value in y_lines])
straight = torch.cat([upright, level])
for line in moser.transform(straight.flatten(0, 1))[0].unflatten(0, straight.shape[:2]):
    mesh.plot(*line.T.numpy(), color="#35618f", lw=0.6)
mesh.set(title=f"A square mesh under the Moser map, β = {beta:g}", xlabel="$x_1$", ylabel="$x_2$", aspect="equal")

for b, color in zip(BOXES, ("#35618f", "#c2571a"), strict=True):
    means = [np.mean([grid_error[b, n, s] for s in seeds]) for n in grids]
    error_axes.loglog(grids, means, "o-", color=color, label=f"β = {b:g}")
error_axes.loglog(grids, [means[0] * (grids[0] / n) ** 2 for n in grids], "k:", lw=1, label="slope -2")
error_axes.set_xticks(grids, [str(n) for n in grids])
error_axes.minorticks_off()
error_axes.set(title="Coupled error of the Moser map", xlabel="grid cells per axis", ylabel=r"$L_2(\rho_0)$")
error_axes.legend(frameon=False)

labels = {
    "width": f"bound, {depth} layers, width {widths[0]} to {widths[-1]}",
    "depth": f"bound, width {width}, {depths[0]} to {depths[-1]} layers",
}
for (name, cases), style in zip(scans.items(), ("o-", "s--"), strict=True):
    values = np.array([[r["bound on W2"] for r in runs] for runs in cases])
    count = [runs[0]["parameters"] for runs in cases]
    spread = values.std(1, ddof=1) if values.shape[1] > 1 else None
    bound_axes.errorbar(count, values.mean(1), yerr=spread, fmt=style, capsize=2, label=labels[name])
    samples = [np.mean([r["W2 of samples"] for r in runs]) for runs in cases]
    label = f"W2 of {points} samples" if name == "depth" else None
    bound_axes.plot(count, samples, "^", color="0.5", ms=4, label=label)
bound_axes.axhline(floor, color="0.5", lw=1, ls=":", label="floor of that W2")
bound_axes.set(title="What RealNVP on the Moser map certifies", xlabel="parameters", ylabel="$W_2$")
bound_axes.set_xscale("log")
bound_axes.tick_params(axis="x", which="minor", labelbottom=False)
bound_axes.set_ylim(0, 1.5 * bound_axes.get_ylim()[1])  # room for the legend
bound_axes.legend(frameon=False, fontsize=8)

for (name, values), color in zip(
    inverse_stretch.items(), ("#35618f", "0.55", "#2f8f5b", "#8b5fbf", "#c2571a"), strict=True
):
    ordered = np.sort(torch.cat(values).numpy())
    stretch_axes.loglog(ordered, 1 - (np.arange(len(ordered)) + 0.5) / len(ordered), color=color, lw=1.2, label=name)
stretch_axes.set(
    title=r"How much the inverse stretches, over $\rho_1$",
    xlabel=r"$\sigma_\max$ of $DF^{-1}$",
    ylabel="share of points above",
)
stretch_axes.legend(frameon=False, fontsize=8)

for ax in axes.flat:
    ax.spines[["top", "right"]].set_visible(False)
for suffix in ("svg", "png"):
    figure.savefig(output / f"moser_map.{suffix}", dpi=120)
print(f"\nRead {output / 'moser_map.txt'} and look at {output / 'moser_map.svg'}")
