"""A long replica exchange of a small peptide: the independent reference that generators are compared with.

    python benchmarks/reference.py alanine_dipeptide --minutes 60 --seed 2027 --output aldp.npz \
        --summary benchmarks/references/alanine_dipeptide.npz
    python benchmarks/reference.py elil --minutes 9 --seed 2027 --output elil.npz --device cuda --ladders 3000 \
        --temperatures 9 --highest 1200 --every 8

Many ladders of temperatures run in one torch batch. Every ladder first spends `--hot` picoseconds with all its walkers
at the highest temperature, where peptide bonds turn too, so that ladders start from conformations of their own; then
`--equilibration` picoseconds are discarded, and halves of what follows are compared. Ladders are independent: errors
are the spread of their means. A conformation that turned a centre inside out, as hot walkers may, is sent back.

The output is rewritten about every minute, complete, and the same command continues a run that was stopped. It holds
frames of the lowest temperature, drawn at random from all of them (`positions`, float32, nm; `ladder` and `row` say
which), and energies of all temperatures in kJ/mol (`potential_energy`); the summary holds backbone torsions in radians
(`dihedrals`, named by `names`) and energies of the lowest temperature alone (`energy`). `provenance`, a JSON string in
both, holds how they were made, and populations with errors from all iterations. **Never train on either.**
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import math
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import openmm
import torch
from reference_ladders import FRICTION, HYDROGEN_MASS, TIMESTEP, Ladders
from reference_statistics import Backbone, describe, effective_samples, slowest

import openmm_bg as bg
from openmm_bg.coordinates import dihedral
from openmm_bg.errors import InputError
from openmm_bg.files import write_atomically
from openmm_bg.sampling import geometric_temperatures
from openmm_bg.sampling.archive import load_arrays, save_arrays

SECONDS_BETWEEN_WRITES = 60.0
SUMMARY_BYTES = 900_000


class Reservoir:
    """A random subset of all frames that were offered, of bounded size (Vitter, ACM TOMS 11, 37 (1985))."""

    def __init__(self, size: int, atoms: int, temperatures: int, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.offered = 0
        self.frames = np.zeros((size, atoms, 3), np.float32)
        self.energy = np.zeros((size, temperatures), np.float32)
        self.origin = np.zeros((size, 2), np.int32)  # ladder, iteration

    def offer(self, iteration: int, frames: torch.Tensor, energy: np.ndarray) -> None:
        """One frame of each ladder, with the energies of all its temperatures."""
        n, size = len(frames), len(self.frames)
        number = self.offered + np.arange(n)
        slot = np.where(number < size, number, self.random.integers(0, number + 1))
        chosen = np.flatnonzero(slot < size)
        slot = slot[chosen]
        self.frames[slot] = frames[torch.as_tensor(chosen, device=frames.device)].numpy(force=True)
        self.energy[slot] = energy[chosen]
        self.origin[slot] = np.stack([chosen, np.full_like(chosen, iteration)], 1)
        self.offered += n

    def sorted(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Frames, energies and origins, ladder by ladder in time."""
        n = min(self.offered, len(self.frames))
        order = np.lexsort((self.origin[:n, 1], self.origin[:n, 0]))
        return self.frames[order], self.energy[order], self.origin[order]


class Reference:
    """The run: hot start, equilibration, production; what is recorded, and its files."""

    def __init__(self, options: argparse.Namespace) -> None:
        if options.ladders < 8:
            raise InputError(f"Errors are the spread between ladders; use 8 ladders or more, not {options.ladders}.")
        molecule = bg.systems.load(options.molecule)
        self.options = options
        temperatures = geometric_temperatures(molecule.temperature, options.highest, options.temperatures)
        self.settings = {
            "molecule": molecule.name,
            "forcefield": list(molecule.forcefield),
            "system_sha256": hashlib.sha256(openmm.XmlSerializer.serialize(molecule.system).encode()).hexdigest(),
            "temperatures": temperatures.tolist(),
            "ladders": options.ladders,
            "steps_between_exchanges": options.steps,
            "exchanges_between_frames": options.every,
            "timestep": TIMESTEP,
            "friction": FRICTION,
            "hydrogen_mass": HYDROGEN_MASS,
            "hot_picoseconds": options.hot,
            "equilibration_picoseconds": options.equilibration,
            "seed": options.seed,
            "frames": options.frames,
            "device": options.device,
        }
        self.ladders = Ladders(molecule, temperatures, options.ladders, options.seed, options.device)
        self.backbone = Backbone.of(molecule.topology)
        self.reservoir = Reservoir(options.frames, molecule.num_atoms, len(temperatures), options.seed)
        self.hot, self.cold = (round(t / (TIMESTEP * options.steps)) for t in (options.hot, options.equilibration))
        self.iteration, self.seconds = 0, 0.0
        self.started = datetime.now(UTC).isoformat(timespec="seconds")
        self.series: list[np.ndarray] = []  # per iteration (ladders, 1 + torsions): energy, torsions

    def iterate(self) -> None:
        self.ladders.advance(self.options.steps)
        self.iteration += 1
        if self.iteration < self.hot:
            return
        if self.iteration == self.hot:
            self.ladders.cool()
            return
        energy = self.ladders.exchange()
        past = self.iteration - self.hot - self.cold
        if past <= 0 or past % self.options.every:
            return
        energy = energy.numpy(force=True)
        x = self.ladders.walkers.positions[:: self.ladders.shape[1]]
        torsions = dihedral(x, torch.as_tensor(self.backbone.atoms, device=x.device)).numpy(force=True)
        self.series.append(np.concatenate([energy[:, :1], torsions], 1).astype(np.float32))
        self.reservoir.offer(len(self.series) - 1, x, energy)

    def run(self) -> bool:
        """Until the minutes are over, or all is known well enough; whether the halves of the production agree."""
        checkpoint = self.options.output.with_suffix(".checkpoint.npz")
        if checkpoint.exists():
            self.restore(checkpoint)
        begun, before = time.monotonic(), self.seconds
        found, written, pause = self.write(), begun, SECONDS_BETWEEN_WRITES
        while self.seconds < 60 * self.options.minutes and effective_samples(found) < self.options.effective:
            self.iterate()
            self.seconds = before + time.monotonic() - begun
            now = time.monotonic()
            if now - written > pause or self.seconds >= 60 * self.options.minutes:
                self.save(checkpoint)
                found = self.write()
                written = time.monotonic()
                # thousands of ladders take a while to analyse
                pause = max(SECONDS_BETWEEN_WRITES, 10 * (written - now))
        return found.get("halves_agree", False)

    def write(self) -> dict:
        """Frames, summary and a line of progress; what was found, if anything yet."""
        left = max(0.0, self.options.minutes - self.seconds / 60)
        line = (
            f"{self.seconds / 60:.1f} min, {left:.1f} to go; {self.ladders.walkers.force_evaluations:.3g} evaluations; "
        )
        if len(self.series) < 4:
            print(line + ("hot start" if self.iteration < self.hot else "equilibration"), flush=True)
            return {}
        series = np.stack(self.series, 1)
        found = describe(series[..., 0], series[..., 1:], self.backbone)
        tried = self.ladders.tried.numpy()
        provenance = json.dumps(
            {
                "use": "for comparison alone, never for training",
                **self.settings,
                "versions": {m.__name__: m.__version__ for m in (bg, torch, np)} | {"openmm": openmm.__version__},
                "hardware": torch.cuda.get_device_name() if self.options.device.startswith("cuda") else "cpu",
                "started": self.started,
                "written": datetime.now(UTC).isoformat(timespec="seconds"),
                "minutes": self.seconds / 60,
                "evaluations": self.ladders.walkers.force_evaluations,
                "frames_of_each_ladder": len(self.series),
                "exchange_acceptance": (self.ladders.accepted.numpy() / np.maximum(tried, 1)).tolist(),
                "turned_back": self.ladders.turned,
                **found,
            },
            ensure_ascii=False,
        )
        frames, energy, origin = self.reservoir.sorted()
        save(
            self.options.output, positions=frames, potential_energy=energy, temperatures=self.ladders.temperatures,
            ladder=origin[:, 0], row=origin[:, 1], provenance=provenance,
        )  # fmt: skip
        if self.options.summary:
            rows = min(len(frames), SUMMARY_BYTES // (2 * len(self.backbone.names) + 4))
            rows = np.linspace(0, len(frames) - 1, rows).astype(int)
            picked = series[origin[rows, 0], origin[rows, 1]]
            save(
                self.options.summary, dihedrals=picked[:, 1:].astype(np.float16), energy=picked[:, 0],
                names=np.array(self.backbone.names), provenance=provenance,
            )  # fmt: skip
        print(line + slowest(found), flush=True)
        return found

    def save(self, path: Path) -> None:
        header, arrays = self.ladders.save()
        header |= {
            "settings": self.settings, "iteration": self.iteration, "seconds": self.seconds, "started": self.started,
            "offered": self.reservoir.offered, "reservoir": self.reservoir.random.bit_generator.state,
        }  # fmt: skip
        series = np.stack(self.series) if self.series else np.zeros((0,), np.float32)
        r = self.reservoir
        save_arrays(path, header, **arrays, series=series, frames=r.frames, energy=r.energy, origin=r.origin)

    def restore(self, path: Path) -> None:
        own, r = tuple(self.ladders.save()[1]), self.reservoir
        header, arrays = load_arrays(path, (*own, "series", "frames", "energy", "origin"))
        other = [name for name, value in self.settings.items() if header["settings"].get(name) != value]
        if other:
            raise InputError(f"{path} belongs to another run (it differs in {', '.join(other)}); remove or rename it.")
        self.ladders.restore(header, arrays)
        if header["iteration"] >= self.hot:
            self.ladders.walkers.set_temperature(np.tile(self.ladders.temperatures, self.ladders.shape[0]))
        self.iteration, self.seconds, self.started = header["iteration"], header["seconds"], header["started"]
        self.series = list(arrays["series"])
        r.offered, r.random.bit_generator.state = header["offered"], header["reservoir"]
        r.frames, r.energy, r.origin = arrays["frames"], arrays["energy"], arrays["origin"]


def save(path: Path, **arrays: np.ndarray | str) -> None:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    write_atomically(path, buffer.getvalue())


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("molecule", help="a name that openmm-bg systems lists")
    parser.add_argument("--minutes", type=float, required=True, help="wall time, that of stopped runs included")
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--output", type=Path, required=True, help="the .npz file of frames to write")
    parser.add_argument("--summary", type=Path, help="the .npz file of torsions to write")
    parser.add_argument("--ladders", type=int, default=48)
    parser.add_argument("--temperatures", type=int, default=6, help="of each ladder")
    parser.add_argument("--highest", type=float, default=1300.0, help="highest temperature, K")
    parser.add_argument("--steps", type=int, default=20, help="steps of 2 fs between exchanges")
    parser.add_argument("--every", type=int, default=3, help="exchanges between frames")
    parser.add_argument("--hot", type=float, default=20.0, help="ps of all walkers at the highest temperature")
    parser.add_argument("--equilibration", type=float, default=60.0, help="ps that are discarded")
    parser.add_argument("--effective", type=float, default=math.inf, help="stop when all basins have so many samples")
    parser.add_argument("--frames", type=int, default=40_000, help="how many are kept at most")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    try:
        agree = Reference(options).run()
    except InputError as error:
        sys.exit(str(error))
    if not agree:
        sys.exit("The halves of the production disagree: run longer, or discard more.")


if __name__ == "__main__":
    main()
