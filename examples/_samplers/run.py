"""Run experiments, one row per seed, resumable; print the table and draw the figure."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from openmm_bg.flows import ContinuousFlow

from .clusters import Cluster, assess_cluster
from .experiments import Experiment
from .figure import draw
from .measure import assess, assess_annealed, read_rows, table, train, write_row
from .molecule import MoleculePath, assess_molecule
from .walkers import FromWalkers


def parser_of(description: str, groups: dict[str, list[Experiment]]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="a minute, to see that it works: nothing is trained well")
    parser.add_argument("--only", choices=sorted(groups), action="append", help="some of the groups of experiments")
    schemes = sorted({experiment.scheme for group in groups.values() for experiment in group})
    parser.add_argument("--scheme", choices=schemes, action="append", help="some of the schemes")
    parser.add_argument("--seed", type=int, action="append", help="may be given again; default 1, 2, 3")
    parser.add_argument("--samples", type=_at_least(100), default=100_000, help="draws that judge a flow")
    parser.add_argument("--threads", type=_at_least(1), default=1)
    parser.add_argument("--output", type=Path, required=True, help="folder for rows, table and figure")
    return parser


def _at_least(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, not {value}")
        return value

    number.__name__ = "whole number"
    return number


def run(groups: dict[str, list[Experiment]], options: argparse.Namespace, name: str) -> list[dict[str, Any]]:
    """Every chosen experiment that has no row yet."""
    torch.set_num_threads(options.threads)
    chosen = options.only or list(groups)
    if options.scheme and not any(e.scheme in options.scheme for group in chosen for e in groups[group]):
        sys.exit(f"No experiment of {', '.join(chosen)} has the scheme {' or '.join(options.scheme)}.")
    if options.output.exists() and not options.output.is_dir():
        sys.exit(f"{options.output} is a file; --output needs a folder.")
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / f"{name}.jsonl"
    rows = read_rows(path)
    seeds = options.seed or ([1] if options.short else [1, 2, 3])
    panels = []
    for group in chosen:
        first = groups[group][0].name
        for experiment in groups[group]:
            if options.short and experiment.name != first:
                continue
            if options.scheme and experiment.scheme not in options.scheme:
                continue
            for seed in seeds:
                key = {"target": experiment.name, "scheme": experiment.scheme_name, "seed": seed}
                if any(all(row[k] == v for k, v in key.items()) for row in rows):
                    continue
                row, panel = one(experiment, seed, options)
                rows.append(key | row)
                write_row(path, rows[-1])
                print(table([rows[-1]]).splitlines()[-1], flush=True)
                if seed == seeds[0] and panel is not None:
                    panels.append(panel)
    text = table(rows)
    (options.output / f"{name}.md").write_text(text + "\n")
    print(text)
    if panels:
        draw(panels, rows, options.output / name)
    return rows


def one(experiment: Experiment, seed: int, options: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Train and measure one experiment."""
    n = options.samples
    if options.short:
        experiment = dataclasses.replace(
            experiment,
            steps=4,
            hidden=min(16, experiment.hidden),
            batch=64,
            solver_steps=min(8, experiment.solver_steps),
            annealed={"steps": 10, "moves": 1},
        )
        if isinstance(experiment, FromWalkers):
            experiment = dataclasses.replace(experiment, walkers=300, temperatures=10, likelihood_steps=4)
        n = min(n, 160)
    target, flow, objective = experiment.build(seed)
    if options.short:
        objective = _shortened(objective)
    settings = {"steps": experiment.steps, "batch": experiment.batch, "rate": experiment.rate, "seed": seed}
    known: dict[str, Any] = {}
    if isinstance(experiment, FromWalkers):
        settings["data"], known = experiment.data(target, seed)
        settings["likelihood_steps"] = experiment.likelihood_steps
    generator, row = train(target, flow, objective, **settings)
    row |= known
    started = time.perf_counter()
    if isinstance(experiment, Cluster):
        size = 50 if options.short else 2000
        row |= assess_cluster(experiment, generator, size, seed + 50, options.output, options.short)
        return row | {"seconds_measuring": round(time.perf_counter() - started, 1)}, None
    if isinstance(experiment, MoleculePath):
        row |= assess_molecule(experiment, generator, min(n, 10_000), seed + 50)
        return row | {"seconds_measuring": round(time.perf_counter() - started, 1)}, None
    measured, samples = assess(generator, n, seed + 50)
    row |= measured
    if isinstance(flow, ContinuousFlow) and experiment.scheme != "reverse KL":
        annealed = min(n, 20_000)
        row |= assess_annealed(generator, annealed, seed + 60, rate=experiment.schedule, **experiment.annealed)
    row["seconds_measuring"] = round(time.perf_counter() - started, 1)
    panel = None
    if hasattr(target, "sample"):
        exact = target.sample(min(n, 20_000), torch.Generator().manual_seed(seed + 70)).numpy()
        panel = {
            "title": f"{experiment.name}\n{experiment.scheme_name}",
            "exact": exact,
            "samples": samples.positions[:20_000].numpy(),
        }
    return row, panel


def _shortened(objective: Any) -> Any:
    """The same objective with fewer walkers or labels."""
    small = {"walkers": 32, "times": 8, "groups": 4, "points": 500, "draws": 32}
    return dataclasses.replace(objective, **{k: v for k, v in small.items() if hasattr(objective, k)})
