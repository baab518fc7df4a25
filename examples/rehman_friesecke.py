"""The numerical experiments of Rehman & Friesecke (2026), with what they need to be judged.

    python rehman_friesecke.py --output results/rehman_friesecke    all of it, three seeds, about an hour on one core
    python rehman_friesecke.py --output results/short --short       under a minute, to see that it works

"Sampling Boltzmann distributions via normalizing flow approximation of transport maps" trains RealNVP on a double well
and on the torsions of alanine dipeptide, and regularises the energy (Theorem 1). This script repeats the three with an
independent test set, the sampling floor beside every Wasserstein distance, and errors on both sides. What is finished
is kept in the output folder: an interrupted run goes on when it is started again.
"""

import argparse
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from _rehman_friesecke import dihedrals, double_well, regularised
from _rehman_friesecke.figure import draw
from _rehman_friesecke.keeping import digest, once
from _rehman_friesecke.molecule import Recipe, reference
from _rehman_friesecke.tables import over_seeds, show, write_json

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--output", type=Path, default=Path("rehman_friesecke"), help="a folder for what is made")
parser.add_argument(
    "--seeds", type=int, nargs="+", help="of the flows and their data; default 1 2 3, or 1 with --short"
)
parser.add_argument("--short", action="store_true", help="a few steps of everything, to see that it works")
options = parser.parse_args()
output, short = options.output, options.short
seeds = options.seeds or ([1] if short else [1, 2, 3])
output.mkdir(parents=True, exist_ok=True)
torch.set_num_threads(1)
started = time.perf_counter()
rows = []


def keep(new):
    """Add rows, and write what there is: an interrupted run keeps its numbers."""
    rows.extend(new)
    write_json(output / "rows.json", rows)


def table(name):
    return [row for row in rows if row["table"] == name]


# 1. The double well. 7704 and 2316 are the numbers of parameters of the paper's two flows. The exact density is known,
#    so Kullback-Leibler divergence and effective sample sizes need no reference but exact samples. W2 between two
#    finite sets is never zero: the floor is that of two exact sets of the same size, and "debiased" what is left.

effort = (
    double_well.Effort(
        data=10_000,
        test=20_000,
        draws=3000,
        likelihood=40,
        energy={1.0: 40, 5.0: 40},
        published=100,
        few=200,
        many=300,
    )
    if short
    else double_well.Effort()
)
wells = {}
for seed in seeds:
    for beta in (1.0, 5.0):
        for form in double_well.FORMS:
            first = seed == seeds[0] and form == "masked"
            chosen = {"beta": beta, "form": form, "seed": seed, "largest": first}
            new, samples = once(
                output,
                f"double_well_{beta:g}_{form}_{seed}",
                chosen | asdict(effort) | {"energy": effort.energy[beta]},
                partial(double_well.study, **chosen, effort=effort),
            )
            keep(new)
            if first:
                wells[beta] = samples
            print(f"double well, beta {beta:g}, {form}, seed {seed}: KL(p||q) {new[0]['kl']:.1e}", flush=True)
        keep([double_well.published_protocol(beta, seed, effort)])

show(
    f"Double well: divergence from the exact density, {effort.test} exact test samples, mean ± sd over seeds",
    over_seeds(
        [row for row in table("fit") if row["part"] == "double well"],
        ("beta", "form", "parameters"),
        ("kl", "kl_error", "ess_reverse", "ess_forward", "seconds"),
    ),
    {
        "beta": ("beta", "g"),
        "form": ("RealNVP", ""),
        "parameters": ("parameters", "d"),
        "kl": ("KL(p||q)", ".1e"),
        "kl_error": ("its error", ".0e"),
        "ess_reverse": ("ESS reverse", ".4f"),
        "ess_forward": ("ESS forward", ".4f"),
        "seconds": ("seconds", ".0f"),
        "seeds": ("seeds", "d"),
    },
)
show(
    "Double well: W2 to exact samples, its floor (exact against exact, same n), and what is left",
    over_seeds(
        [row for row in table("w2") if row["part"] == "double well"],
        ("beta", "form", "distance", "n"),
        ("value", "floor", "floor_error", "debiased", "within_floor"),
    ),
    {
        "beta": ("beta", "g"),
        "form": ("RealNVP", ""),
        "distance": ("W2 in", ""),
        "n": ("n", "d"),
        "value": ("W2", ".4f"),
        "floor": ("floor", ".4f"),
        "floor_error": ("one floor's sd", ".4f"),
        "debiased": ("debiased", "+.4f"),
        "within_floor": ("within floor", ""),
    },
)
show(
    "Double well, the published protocol: 600 Langevin frames, trained and tested on the same (published W2: 0.0993)",
    over_seeds(
        table("published protocol"),
        ("beta", "n"),
        ("w2", "w2_exact", "floor", "changes_trajectory", "changes_decoded", "changes_independent", "changes_exact"),
    ),
    {
        "beta": ("beta", "g"),
        "n": ("n", "d"),
        "w2": ("W2 to its own frames", ".3f"),
        "w2_exact": ("W2 to exact samples", ".3f"),
        "floor": ("floor", ".3f"),
        "changes_trajectory": ("sign changes: trajectory", ".0f"),
        "changes_decoded": ("encoded, decoded", ".0f"),
        "changes_independent": ("independent draws", ".0f"),
        "changes_exact": ("exact draws", ".0f"),
    },
)
print(
    "  W2 to the frames a flow has learned from lies below the floor of independent data: it measures memory.\n"
    "  That a generated trajectory has the transitions of the real one (published: 41) is a property of encoding and\n"
    "  decoding a trajectory, F(F^-1(x)) = x. Independent draws have no dynamics: they change sign as often as chance\n"
    "  has it, every second time where both wells are equally likely, never where the trajectory knew one well alone."
)

# 2. Alanine dipeptide. The first replica exchange trains, the second tests. Errors of populations come from the
#    statistical inefficiency; the row of the two runs against each other says what this reference can resolve.

recipe = Recipe(frames=400, equilibration=20, steps=25) if short else Recipe(frames=22_000, equilibration=500)
train, test, positions = reference(output, recipe)
effort = dihedrals.Effort(steps=60, draws=3000, few=100, many=200) if short else dihedrals.Effort()
keep(dihedrals.resolution(train, test, effort))
angles = {"MD, second run": test}
for seed in seeds:
    for kind in dihedrals.KINDS:
        first = seed == seeds[0]
        chosen = {"kind": kind, "seed": seed, "largest": first or kind == "circular spline"}
        new, samples = once(
            output,
            f"dihedrals_{kind.replace(' ', '_')}_{seed}",
            chosen | asdict(effort) | {"data": [digest(train), digest(test)]},
            partial(dihedrals.study, **chosen, train=train, test=test, effort=effort),
        )
        keep(new)
        if first:
            angles[kind] = samples
        print(f"alanine dipeptide, {kind}, seed {seed}: {new[0]['nll_test']:.3f} nats a frame", flush=True)

torsions = [row for row in rows if row["part"] == "dihedrals"]
show(
    f"Alanine dipeptide: phi and psi, maximum likelihood on {len(train)} frames, tested on {len(test)} others",
    over_seeds(
        [row for row in torsions if row["table"] == "fit"],
        ("flow", "parameters"),
        ("nll_train", "nll_test", "outside", "tv", "tv_floor", "tv_within_floor", "seconds"),
    ),
    {
        "flow": ("flow", ""),
        "parameters": ("parameters", "d"),
        "nll_train": ("nats, trained on", ".4f"),
        "nll_test": ("nats, tested on", ".4f"),
        "outside": ("outside [-pi, pi)", ".2%"),
        "tv": ("total variation", ".3f"),
        "tv_floor": ("floor", ".3f"),
        "tv_within_floor": ("within floor", ""),
        "seconds": ("seconds", ".0f"),
    },
)
show(
    f"Alanine dipeptide: W2 on the torus in degrees (published: {dihedrals.PUBLISHED_W2} at {dihedrals.PUBLISHED_N})",
    over_seeds(
        [row for row in torsions if row["table"] == "w2"],
        ("flow", "against", "n"),
        ("value", "value_error", "floor", "floor_error", "debiased", "within_floor"),
    ),
    {
        "flow": ("flow", ""),
        "against": ("against", ""),
        "n": ("n", "d"),
        "value": ("W2", ".2f"),
        "value_error": ("one W2's sd", ".2f"),
        "floor": ("floor", ".2f"),
        "floor_error": ("one floor's sd", ".2f"),
        "debiased": ("debiased", "+.2f"),
        "within_floor": ("within floor", ""),
    },
)
show(
    "Alanine dipeptide: populations in per cent, with one standard error (MD 1 trained, MD 2 tests)",
    over_seeds(
        [row for row in torsions if row["table"] == "population"],
        ("flow", "basin"),
        ("train", "train_error", "test", "test_error", "drawn", "drawn_error", "sigmas"),
    ),
    {
        "flow": ("flow", ""),
        "basin": ("basin", ""),
        "train": ("MD 1", ".2f"),
        "train_error": ("error", ".2f"),
        "test": ("MD 2", ".2f"),
        "test_error": ("error", ".2f"),
        "drawn": ("flow", ".2f"),
        "drawn_error": ("error", ".2f"),
        "sigmas": ("flow - MD 2, sigmas", "+.2f"),
    },
)

# 3. Regularised densities. Where the energy stays below the threshold nothing changes, so the error falls with the
#    threshold; the bounds follow from the two densities agreeing there.

pair, curves = regularised.pair_rows(points=20_001 if short else 200_001)
keep(pair)
keep(regularised.molecule_rows(positions))
columns = {
    "kind": ("construction", ""),
    "threshold": ("1/eps, kT", "g"),
    "eps": ("eps", ".4f"),
    "l1": ("L1", ".2e"),
    "l1_bound": ("L1 bound", ".2e"),
    "w2": ("W2", ".2e"),
    "w2_bound": ("diam (L1/2)^0.5", ".2e"),
}
show(
    "Ion pair in a ball of 1 nm, by quadrature: L1 <= 2 |Omega| exp(-1/eps) / Z, W2 in nm",
    table("ion pair"),
    columns | {"w2_bound_a_priori": ("W2 bound from L1's", ".2e"), "largest_change_below": ("|du| below 1/eps", ".0e")},
)
show(
    f"Alanine dipeptide, {len(positions)} frames reweighted: L1 <= 2 E|1 - w|, W2 of phi and psi in degrees",
    table("alanine dipeptide"),
    columns
    | {
        "above": ("frames above 1/eps", ".1%"),
        "effective": ("effective share", ".3f"),
        "largest_log_weight": ("largest |log w|", ".1e"),
    },
)
print(
    "  Frames of the true density cannot show the mass that the regularised one has where the true one has none; the\n"
    "  bound for a bounded domain is that of the ion pair, whose volume and normalisation are known."
)
draw(output / "figure", rows=rows, wells=wells, angles=angles, curves=curves)
print(f"\nNumbers are in {output / 'rows.json'}, the figure in {output / 'figure.svg'} and figure.png.")
print(f"{time.perf_counter() - started:.0f} seconds with one thread")
