"""The whole job, from a molecule to an exact ensemble and a page about it, as six steps in one folder.

    prepare -> simulate -> train -> sample -> compare -> report

Every step leaves its product in the folder and is recorded in ``run.json`` once it is whole, so a run that was killed goes on where it was.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mdtraj
import numpy as np
import openmm
import torch
from openmm import app, unit
from tqdm.auto import tqdm

from openmm_bg import run_report, systems
from openmm_bg.app import BoltzmannGeneratorSampler
from openmm_bg.errors import InputError
from openmm_bg.generator import BoltzmannGenerator
from openmm_bg.generator_file import write_atomically
from openmm_bg.sampling import (
    ReplicaExchangeResult,
    Trajectory,
    bursts,
    effective_sample_size,
    fastest_platform,
    forward_effective_sample_size,
    geometric_temperatures,
    independence_acceptance,
    largest_log_ratio,
    log_normalizer,
    replica_exchange,
    simulate,
)
from openmm_bg.systems import Molecule
from openmm_bg.version import __version__

STEPS = ("prepare", "simulate", "train", "sample", "compare", "report")
_TIMESTEP = 0.001


@dataclass(frozen=True)
class RunSettings:
    """How much of everything a run does.

    Attributes
    ----------
    temperature : float or None
        K; None for the molecule's own.
    flow : str
        "spline" or "realnvp".
    exchange_iterations, replicas, highest_temperature
        Replica exchange for the training data: iterations of 500 steps, each a frame, on a ladder of temperatures.
    held_out : float
        Share of the exchange's frames, the last ones, that training never sees.
    bursts : int
        Short runs from every training frame.
    likelihood_steps, training_steps : int
        On the data, then on the energy.
    md_steps : int
        Plain MD to compare with, 1 fs each.
    production_steps, steps_per_iteration, proposals_per_iteration
        MD with moves.
    samples : int
        Independent draws of the generator.
    seed : int
    """

    temperature: float | None = None
    flow: str = "spline"
    exchange_iterations: int = 2400
    replicas: int = 6
    highest_temperature: float = 1000.0
    held_out: float = 0.2
    bursts: int = 16
    likelihood_steps: int = 400
    training_steps: int = 8000
    md_steps: int = 2_000_000
    production_steps: int = 1_000_000
    steps_per_iteration: int = 500
    proposals_per_iteration: int = 10
    samples: int = 100_000
    seed: int = 2026

    @classmethod
    def rehearsal(cls) -> RunSettings:
        """Every step in about a minute: to see that all works. Its numbers mean little."""
        return cls(
            exchange_iterations=40, replicas=4, bursts=4, likelihood_steps=60, training_steps=60, md_steps=20_000,
            production_steps=5_000, steps_per_iteration=100, proposals_per_iteration=5, samples=2_000,
        )  # fmt: skip

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type == "int" and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                if field.name in ("seed", "likelihood_steps") and value == 0:
                    continue
                raise InputError(f"{field.name} must be a positive whole number, not {value!r}.")
        if not 0 < self.held_out < 1:
            raise InputError(f"held_out must lie between 0 and 1, not {self.held_out}.")
        if self.flow not in ("spline", "realnvp"):
            raise InputError(f"flow must be 'spline' or 'realnvp', not {self.flow!r}.")


class Run:
    """One run in one folder.

    Parameters
    ----------
    folder : path-like
    say : callable
        Takes the lines a person reads.
    progress : bool
        Bars with the remaining time on stderr.

    Use :meth:`start` or :meth:`open`.
    """

    def __init__(self, folder: Path, record: dict[str, Any], *, say: Callable[[str], None], progress: bool):
        self.folder = folder
        self.record = record
        self.say = say
        self.progress = progress
        self.settings = RunSettings(**record["settings"])

    @classmethod
    @contextlib.contextmanager
    def start(
        cls,
        source: str,
        folder: Any,
        settings: RunSettings,
        *,
        forcefield: tuple[str, ...] = systems.IMPLICIT_FORCE_FIELD,
        resume: bool = False,
        command: str = "",
        say: Callable[[str], None] = print,
        progress: bool = True,
    ) -> Iterator[Run]:
        """Begin a run of a named molecule or a PDB file in a new or empty folder, or resume it."""
        folder = Path(folder)
        if (folder / "run.json").exists() and resume:
            with cls.open(folder, say=say, progress=progress) as run:
                if run.record["source"] != source:
                    raise InputError(
                        f"{folder} holds a run of {run.record['source']}, not of {source}; choose another folder."
                    )
                yield run
            return
        molecule = load_molecule(source, forcefield, settings.temperature)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise InputError(
                f"{folder} is not empty; choose another folder, or continue the run it holds with --resume. Nothing was changed."
            )
        record = {
            "openmm_bg": __version__,
            "source": source,
            "forcefield": list(molecule.forcefield),
            "settings": dataclasses.asdict(settings),
            "command": command,
            "versions": versions(),
            "steps": {},
        }
        # everything that can be refused is refused before the folder is touched
        generator_for(molecule, settings)
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder):
            run = cls(folder, record, say=say, progress=progress)
            run._write()
            yield run

    @classmethod
    @contextlib.contextmanager
    def open(cls, folder: Any, *, say: Callable[[str], None] = print, progress: bool = True) -> Iterator[Run]:
        """Open the folder of a run that was begun before."""
        folder = Path(folder)
        try:
            record = json.loads((folder / "run.json").read_text())
            run = cls(folder, record, say=say, progress=progress)
        except FileNotFoundError:
            raise InputError(f"{folder} holds no run; begin one with `openmm-bg run`.") from None
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise InputError(f"{folder / 'run.json'} is not the record of a run: {error}.") from None
        with _locked(folder):
            yield run

    # -- the folder

    def path(self, name: str) -> Path:
        return self.folder / name

    def done(self, step: str) -> bool:
        return step in self.record["steps"]

    def _write(self) -> None:
        write_atomically(self.path("run.json"), json.dumps(self.record, indent=2).encode())

    def _finish(self, step: str, started: float, numbers: dict[str, Any]) -> None:
        seconds = round(time.perf_counter() - started, 1)
        self.record["steps"][step] = {"seconds": seconds, **numbers}
        self._write()
        self.say(f"      done in {_duration(seconds)}")

    def molecule(self) -> Molecule:
        """The molecule of this run, as it was prepared."""
        if not self.done("prepare"):
            raise InputError(f"{self.folder} is not prepared yet; run `openmm-bg simulate` first.")
        pdb = systems.from_pdb(
            self.path("molecule.pdb"), forcefield=self.record["forcefield"], temperature=self.record["temperature"]
        )
        system = openmm.XmlSerializer.deserialize(self.path("system.xml").read_text())
        return dataclasses.replace(pdb, system=system, name=self.record["name"], description=self.record["description"])

    def _require(self, step: str, before: str) -> None:
        if not self.done(before):
            raise InputError(f"{step} needs what {before} makes; run `openmm-bg {before}` on this folder first.")

    # -- the steps

    def run(self, last: str = "report") -> None:
        """All steps that are not done yet, up to ``last``."""
        for number, step in enumerate(STEPS[: STEPS.index(last) + 1], 1):
            if self.done(step):
                self.say(f"[{number}/{len(STEPS)}] {step}: done before")
                continue
            self.say(f"[{number}/{len(STEPS)}] {step}: {_PURPOSE[step]}")
            getattr(self, step)()

    def prepare(self) -> None:
        """Molecule and System, written down."""
        started = time.perf_counter()
        molecule = load_molecule(self.record["source"], tuple(self.record["forcefield"]), self.settings.temperature)
        with self.path("molecule.pdb").open("w") as file:
            app.PDBFile.writeFile(molecule.topology, molecule.positions * unit.nanometer, file, keepIds=True)
        xml = openmm.XmlSerializer.serialize(molecule.system)
        write_atomically(self.path("system.xml"), xml.encode())
        self.record |= {
            "name": molecule.name,
            "description": molecule.description,
            "temperature": molecule.temperature,
            "atoms": molecule.num_atoms,
            "system_sha256": hashlib.sha256(xml.encode()).hexdigest(),
        }
        self._finish("prepare", started, {})

    def simulate(self) -> None:
        """Replica exchange and bursts for training, plain MD for comparison."""
        self._require("simulate", "prepare")
        started, s, molecule = time.perf_counter(), self.settings, self.molecule()
        exchange = replica_exchange(
            molecule.system, molecule.positions,
            temperatures=geometric_temperatures(molecule.temperature, s.highest_temperature, s.replicas),
            n_iterations=s.exchange_iterations, equilibration_iterations=max(2, s.exchange_iterations // 50),
            steps_per_iteration=500, timestep=_TIMESTEP, seed=s.seed, checkpoint=self.path("exchange.npz"), resume=True,
            progress=self.progress,
        )  # fmt: skip
        frames = exchange.trajectory(0)
        training, held_out = split_frames(frames.positions, s.held_out)
        burst = bursts(
            molecule.system, training, temperature=molecule.temperature, n_bursts=s.bursts, seed=s.seed + 1,
            timestep=_TIMESTEP, progress=self.progress,
        )  # fmt: skip
        burst.save(self.path("training.npz"))
        md = simulate(
            molecule.system, molecule.positions, temperature=molecule.temperature,
            n_frames=max(1, s.md_steps // s.steps_per_iteration), steps_per_frame=s.steps_per_iteration,
            timestep=_TIMESTEP, seed=s.seed + 2, progress=self.progress,
        )  # fmt: skip
        md.save(self.path("md.npz"))
        frames.save(self.path("exchange_frames.npz"))
        self._finish("simulate", started, {
            "exchange_evaluations": exchange.force_evaluations,
            "exchange_acceptance": [round(float(a), 3) for a in np.nan_to_num(exchange.acceptance)],
            "round_trips": int(_round_trips(exchange)),
            "burst_evaluations": burst.force_evaluations,
            "training_frames": len(training),
            "held_out_frames": len(held_out),
            "md_evaluations": md.force_evaluations,
        })  # fmt: skip

    def train(self) -> None:
        """A generator, from data and energy."""
        self._require("train", "simulate")
        started, s, molecule = time.perf_counter(), self.settings, self.molecule()
        generator = generator_for(molecule, s, compile=s.training_steps >= 1000)
        data = Trajectory.load(self.path("training.npz"))
        result = generator.fit(
            data.positions, steps=s.training_steps, likelihood_steps=s.likelihood_steps, seed=s.seed,
            log=self.path("training.jsonl"), checkpoint=self.path("training.checkpoint"), resume=True,
            progress=self.progress,
        )  # fmt: skip
        generator.provenance |= {
            "openmm_bg": __version__,
            "molecule": molecule.name,
            "forcefield": list(molecule.forcefield),
            "data": self.record["steps"]["simulate"],
        }
        fingerprint = generator.save(self.path("generator.bg"))
        self._finish("train", started, {
            "evaluations": result.evaluations, "steps": result.steps, "skipped": result.skipped, "sha256": fingerprint,
        })  # fmt: skip

    def sample(self) -> None:
        """Independent draws with weights, and MD with moves."""
        self._require("sample", "train")
        started, s, molecule = time.perf_counter(), self.settings, self.molecule()
        generator = BoltzmannGenerator.load(self.path("generator.bg"))
        draws = generator.sample(s.samples, seed=s.seed + 3)
        np.savez(
            self.path("samples.npz"), positions=draws.positions.numpy().astype(np.float32),
            reduced_energy=draws.reduced_energy.numpy(), log_prob=draws.log_prob.numpy(),
        )  # fmt: skip
        integrator = openmm.LangevinMiddleIntegrator(molecule.temperature, 1.0, _TIMESTEP)
        integrator.setRandomNumberSeed(s.seed + 4)
        where = fastest_platform(molecule.system)
        properties = {"Threads": "1"} if where == "CPU" else {}
        simulation = app.Simulation(
            molecule.topology, molecule.system, integrator, openmm.Platform.getPlatform(where), properties
        )
        simulation.context.setPositions(molecule.positions)
        simulation.context.setVelocitiesToTemperature(molecule.temperature, s.seed + 5)
        checkpoint = self.path("moves.checkpoint")
        resume = checkpoint.exists()
        if not resume:
            # what a killed run wrote before its first checkpoint
            for name in ("moves.csv", "trajectory.dcd"):
                self.path(name).unlink(missing_ok=True)
        sampler = BoltzmannGeneratorSampler(
            generator, simulation, stepsPerIteration=s.steps_per_iteration,
            proposalsPerIteration=s.proposals_per_iteration, seed=s.seed + 6, logFile=self.path("moves.csv"),
            trajectoryFile=self.path("trajectory.dcd"), checkpointFile=checkpoint,
            checkpointInterval=20 * s.steps_per_iteration, resume=resume,
        )  # fmt: skip
        iterations = s.production_steps // s.steps_per_iteration
        bar = tqdm(
            total=iterations, initial=sampler.currentIteration, desc="MD with moves", unit="iteration",
            disable=not self.progress, dynamic_ncols=True,
        )  # fmt: skip
        with bar:
            while sampler.currentIteration < iterations:
                simulation.step(s.steps_per_iteration)
                bar.update()
                bar.set_postfix_str(f"acceptance {sampler.acceptanceRate:.3f}")
        self._finish("sample", started, {
            "platform": where,
            "proposed": sampler.numProposed,
            "accepted": sampler.numAccepted,
            "refused": sampler.numRefused,
            "md_steps": simulation.currentStep,
        })  # fmt: skip

    def compare(self) -> None:
        """Everything that is claimed, in summary.json."""
        self._require("compare", "sample")
        started = time.perf_counter()
        results = run_report.measure(self.load())
        write_atomically(self.path("summary.json"), json.dumps(results.summary, indent=2).encode())
        self._finish("compare", started, {})

    def report(self) -> None:
        """The page, and the headline on the terminal."""
        self._require("report", "compare")
        started = time.perf_counter()
        results = run_report.measure(self.load())
        run_report.write(self.path("report.html"), results)
        self._finish("report", started, {})
        self.say(run_report.headline(results))
        self.say(f"Read {self.path('report.html')}")

    def load(self) -> run_report.Material:
        """The products of all steps, for comparison."""
        s, molecule = self.settings, self.molecule()
        generator = BoltzmannGenerator.load(self.path("generator.bg"))
        with np.load(self.path("samples.npz"), allow_pickle=False) as draws:
            sample_positions = draws["positions"]
            energy, log_prob = draws["reduced_energy"], draws["log_prob"]
        log_weights = np.where(np.isfinite(log_prob) & np.isfinite(energy), -energy - log_prob, -np.inf)
        exchange = Trajectory.load(self.path("exchange_frames.npz"))
        _, held_out = split_frames(exchange.positions, s.held_out)
        trajectory = mdtraj.load(str(self.path("trajectory.dcd")), top=str(self.path("molecule.pdb")))
        chain = trajectory.xyz.astype(np.float64)
        kt = generator.energy.thermal_energy
        with torch.no_grad():
            chain_energy = generator.energy(torch.as_tensor(chain)).numpy()
        held_out_weights = generator.log_weights(held_out).numpy()
        log_z = log_normalizer(log_weights)
        ess = effective_sample_size(log_weights)
        md = Trajectory.load(self.path("md.npz"))
        return run_report.Material(
            record=self.record,
            topology=molecule.topology,
            md=md.positions,
            md_energy=md.potential_energy / kt,
            exchange=exchange.positions,
            exchange_energy=exchange.potential_energy / kt,
            samples=sample_positions,
            sample_energy=energy,
            log_weights=log_weights,
            held_out_log_weights=held_out_weights,
            chain=chain,
            chain_energy=chain_energy,
            accepted=np.loadtxt(self.path("moves.csv"), delimiter=",", skiprows=1, dtype=str, ndmin=2),
            training=[json.loads(line) for line in self.path("training.jsonl").read_text().splitlines()],
            quality={
                "ess": ess.fraction,
                "ess_clipped": ess.clipped,
                "n": ess.n,
                "acceptance": independence_acceptance(log_weights),
                "forward": forward_effective_sample_size(held_out_weights, log_z.value),
                "largest_log_ratio": largest_log_ratio(held_out_weights, log_z.value),
                "held_out_frames": len(held_out),
                "log_z": log_z.value,
                "log_z_error": log_z.error,
            },
        )


_PURPOSE = {
    "prepare": "molecule, force field and coordinates",
    "simulate": "replica exchange for training data, plain MD for comparison",
    "train": "the generator, first on the data, then on the energy",
    "sample": "independent draws, and MD with generator moves",
    "compare": "against plain MD and replica exchange",
    "report": "the page",
}


def load_molecule(source: str, forcefield: tuple[str, ...], temperature: float | None) -> Molecule:
    """A molecule by name, or from a PDB file."""
    options = {} if temperature is None else {"temperature": temperature}
    if source.lower().endswith(".pdb") or os.sep in source or Path(source).is_file():
        return systems.from_pdb(source, forcefield=forcefield, **options)
    molecule = systems.load(source)
    if not isinstance(molecule, Molecule):
        raise InputError(f"{source} is an analytic density, not a molecule; openmm-bg runs molecules.")
    return systems.load(source, **options)


def generator_for(molecule: Molecule, settings: RunSettings, *, compile: bool = False) -> BoltzmannGenerator:
    """The untrained generator of a run."""
    return BoltzmannGenerator.for_molecule(
        molecule.topology, molecule.system, molecule.temperature, positions=molecule.positions, flow=settings.flow,
        seed=settings.seed, compile=compile,
    )  # fmt: skip


def split_frames(frames: np.ndarray, held_out: float) -> tuple[np.ndarray, np.ndarray]:
    """Training frames and, from the end of the trajectory, held-out ones, with a gap of two percent between them."""
    cut = max(1, int(len(frames) * (1 - held_out)))
    gap = len(frames) // 50
    if cut + gap >= len(frames):
        raise InputError(f"{len(frames)} frames are too few to hold any out; simulate longer.")
    return frames[:cut], frames[cut + gap :]


def versions() -> dict[str, str]:
    """What a reader needs to know to repeat a run."""
    return {
        "openmm_bg": __version__,
        "openmm": openmm.Platform.getOpenMMVersion(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "mdtraj": mdtraj.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }


def _round_trips(exchange: ReplicaExchangeResult) -> int:
    return int(np.sum(exchange.round_trips))


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min"


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep a second process out of the folder."""
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(f"{folder} is in use by another run; wait for it, or choose another folder.") from None
        yield
