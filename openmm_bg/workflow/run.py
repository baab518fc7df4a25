"""The whole job, from a molecule to an exact ensemble and a page about it, as six steps in one folder.

    prepare -> simulate -> train -> sample -> compare -> report

Every step leaves its product in the folder and is recorded in ``run.json`` once it is whole, so a run that was
killed goes on where it was.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import openmm
from openmm import app, unit
from tqdm.auto import tqdm

from openmm_bg.app import BoltzmannGeneratorSampler
from openmm_bg.errors import InputError
from openmm_bg.files import write_atomically
from openmm_bg.generator import BoltzmannGenerator, Samples
from openmm_bg.generator_file import refuse_code
from openmm_bg.sampling import Trajectory, bursts, simulate
from openmm_bg.systems import Molecule
from openmm_bg.training import Figures, Settings
from openmm_bg.units import nanometers
from openmm_bg.version import __version__
from openmm_bg.workflow import page
from openmm_bg.workflow.data import (
    LOOK,
    TIMESTEP,
    adaptation,
    check_budget,
    exchange,
    held_out_frames,
    save_held_out,
    settle,
)
from openmm_bg.workflow.diagnosis import diagnose_generator
from openmm_bg.workflow.material import Material
from openmm_bg.workflow.record import LOCK, STEPS, locked, new_record, read_record, write_record
from openmm_bg.workflow.resources import Resources
from openmm_bg.workflow.results import Results, headline, measure
from openmm_bg.workflow.settings import RunSettings
from openmm_bg.workflow.source import canonical, is_file, is_sequence, load_molecule


class Run:
    """One run in one folder.

    Parameters
    ----------
    folder : path-like
    record : dict
        What run.json holds.
    say : callable
        Takes the lines a person reads.
    progress : bool
        Bars with the remaining time on stderr, where that is a terminal.
    resources : Resources, optional
        Where the work is done; by default on this machine's CPU.

    Use :meth:`start` or :meth:`open`.

    Examples
    --------
    >>> with Run.start("alanine_dipeptide", "results/ala2", RunSettings.rehearsal()) as run:    # doctest: +SKIP
    ...     run.run()
    """

    def __init__(
        self,
        folder: Path,
        record: dict[str, Any],
        *,
        say: Callable[[str], None],
        progress: bool,
        resources: Resources | None = None,
    ):
        self.folder = folder
        self.record = record
        self.say = say
        self.progress = progress
        self.resources = resources or Resources()
        self.executor: Executor | None = None
        self.settings = RunSettings(**record["settings"])
        self._built: Molecule | None = None

    @classmethod
    @contextlib.contextmanager
    def start(
        cls,
        source: str,
        folder: Any,
        settings: RunSettings | None = None,
        *,
        forcefield: tuple[str, ...] | None = None,
        resume: bool = False,
        command: str = "",
        say: Callable[[str], None] = print,
        progress: bool = True,
        resources: Resources | None = None,
    ) -> Iterator[Run]:
        """Begin a run in a new or empty folder; with ``resume``, go on with the run the folder holds already.

        Everything that can be refused is refused before the folder is touched.

        Parameters
        ----------
        source : str
            The name of a molecule, a sequence of residues, or a PDB file.
        folder : path-like
        settings : RunSettings, optional
            None for the usual ones, or for those of the run that is resumed; others than that run's are refused.
        forcefield : tuple of str, optional
            For a sequence or a PDB file.
        resume : bool
        command : str
            Kept in run.json.
        say, progress, resources
            See :class:`Run`.
        """
        folder = Path(folder)
        if resume and (folder / "run.json").exists():
            with cls.open(folder, say=say, progress=progress, resources=resources) as run:
                run._check_same(source, settings, forcefield)
                yield run
            return
        settings = settings or RunSettings()
        molecule = load_molecule(source, forcefield, settings.temperature)
        settings = settle(settings, molecule, generator_for(molecule, settings))
        if folder.exists() and not folder.is_dir():
            raise InputError(f"{folder} is a file; name a folder for the run.")
        if folder.exists() and any(entry.name != LOCK for entry in folder.iterdir()):
            hint = "continue the run it holds with --resume" if (folder / "run.json").exists() else "empty it"
            raise InputError(f"{folder} is not empty; choose another folder, or {hint}. Nothing was changed.")
        record = new_record(source, molecule, settings, command)
        run = cls(folder, record, say=say, progress=progress, resources=resources)
        run.resources.check_scheduler()  # missed before the folder is touched
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder):
            run._built = molecule
            run._write()
            yield run

    @classmethod
    @contextlib.contextmanager
    def open(
        cls,
        folder: Any,
        *,
        say: Callable[[str], None] = print,
        progress: bool = True,
        resources: Resources | None = None,
    ) -> Iterator[Run]:
        """Open the folder of a run that was begun before."""
        folder = Path(folder)
        run = cls(folder, read_record(folder), say=say, progress=progress, resources=resources)
        with locked(folder):
            yield run

    def _check_same(self, source: str, settings: RunSettings | None, forcefield: tuple[str, ...] | None) -> None:
        if canonical(source) != self.record["source"]:
            theirs = self.record["source"]
            raise InputError(f"{self.folder} holds a run of {theirs}, not of {source}; choose another folder.")
        other = [] if settings is None else self.settings.differences(settings)
        if forcefield is not None and list(forcefield) != self.record["forcefield"]:
            other.append(f"force field {' '.join(self.record['forcefield'])}, not {' '.join(forcefield)}")
        if other:
            raise InputError(
                f"{self.folder} holds a run with {'; '.join(other)}: leave these options out to go on with it, or "
                "choose another folder."
            )

    def set_budget(self, budget: str) -> None:
        """Train for what may be spent ("10min", "1e7") in place of a number of steps.

        Raises
        ------
        InputError
            For a text that is no budget, and where training was begun with another one.
        """
        settings = dataclasses.replace(self.settings, budget=budget)
        if "train" in self.record["begun"] and budget != self.settings.budget:
            theirs = self.settings.budget or f"{self.settings.training_steps} steps"
            raise InputError(
                f"{self.folder} began its training for {theirs}, not {budget}: leave --budget out to go on with that, "
                "or choose another folder."
            )
        check_budget(settings)
        self.settings = settings
        self.record["settings"] = dataclasses.asdict(settings)
        self._write()

    # -- the folder

    def path(self, name: str) -> Path:
        """A file of the run, such as "generator.bg"; it need not be there yet."""
        return self.folder / name

    def done(self, step: str) -> bool:
        """Whether one of ``workflow.STEPS`` is whole and recorded."""
        return step in self.record["steps"]

    def _write(self) -> None:
        write_record(self.folder, self.record)

    def _finish(self, step: str, started: float, numbers: dict[str, Any]) -> None:
        seconds = round(time.perf_counter() - started, 1)
        self.record["steps"][step] = {"seconds": seconds, **numbers}
        self._write()
        self.say(f"      done in {_duration(seconds)}")

    def molecule(self) -> Molecule:
        """The molecule of this run, as it was prepared."""
        if not self.done("prepare"):
            raise InputError(f"{self.folder} is not prepared yet; take the step simulate first.")
        xml = self.path("system.xml").read_text()
        refuse_code(xml, str(self.path("system.xml")))
        if hashlib.sha256(xml.encode()).hexdigest() != self.record["system_sha256"]:
            raise InputError(f"{self.path('system.xml')} was altered since the run was prepared; begin another run.")
        pdb = app.PDBFile(str(self.path("molecule.pdb")))
        return Molecule(
            name=self.record["name"],
            topology=pdb.topology,
            system=openmm.XmlSerializer.deserialize(xml),
            positions=nanometers(pdb.getPositions(asNumpy=True)),
            temperature=self.record["temperature"],
            description=self.record["description"],
            forcefield=tuple(self.record["forcefield"]),
        )

    def _require(self, step: str, before: str) -> None:
        if not self.done(before):
            raise InputError(
                f"{step} needs what {before} makes, and that is not done in {self.folder}; take the step {before} "
                "first, or all that are left with `openmm-bg run ... --resume`."
            )

    # -- the steps

    def run(self, last: str = "report", first: str = "prepare") -> None:
        """All steps that are not done yet, from ``first`` to ``last``."""
        wanted = STEPS[STEPS.index(first) : STEPS.index(last) + 1]
        walks = self.settings.data == "adaptive" and "train" in wanted and not self.done("train")
        # a scheduler that is not there is missed at once, not after an hour of dynamics
        with self.resources.executor() if walks else contextlib.nullcontext() as self.executor:
            for step in wanted:
                self._take(step)

    def _take(self, step: str) -> None:
        heading = f"[{STEPS.index(step) + 1}/{len(STEPS)}] {step}: "
        if self.done(step):
            self.say(f"{heading}done before")
            return
        again = step in self.record["begun"]
        purpose = _PURPOSE.get((step, self.settings.data)) or _PURPOSE[step]
        self.say(f"{heading}{purpose}{', going on' if again else ''}")
        if not again:
            self.record["begun"].append(step)
            self._write()
        getattr(self, step)()
        if again:
            # the seconds are those of the last leg alone
            self.record["steps"][step]["resumed"] = True
            self._write()

    def prepare(self) -> None:
        """Molecule and System, written down."""
        started = time.perf_counter()
        source = self.record["source"]
        forcefield = tuple(self.record["forcefield"]) if is_file(source) or is_sequence(source) else None
        molecule = self._built or load_molecule(source, forcefield, self.settings.temperature)
        pdb = io.StringIO()
        app.PDBFile.writeFile(molecule.topology, molecule.positions * unit.nanometer, pdb, keepIds=True)
        write_atomically(self.path("molecule.pdb"), pdb.getvalue().encode())
        xml = openmm.XmlSerializer.serialize(molecule.system)
        write_atomically(self.path("system.xml"), xml.encode())
        self.record["system_sha256"] = hashlib.sha256(xml.encode()).hexdigest()
        self._finish("prepare", started, {})

    def simulate(self) -> None:
        """Plain MD for comparison; and replica exchange with bursts, where data come from there."""
        self._require("simulate", "prepare")
        started, s, molecule = time.perf_counter(), self.settings, self.molecule()
        numbers = self._exchange(molecule) if s.data == "exchange" else {}
        md = simulate(
            molecule.system, molecule.positions, temperature=molecule.temperature,
            n_frames=max(1, s.md_steps // s.steps_per_iteration), steps_per_frame=s.steps_per_iteration,
            timestep=TIMESTEP, seed=s.seed + 2, platform=self.resources.platform, progress=self.progress,
        )  # fmt: skip
        md.save(self.path("md.npz"))
        self._finish("simulate", started, {**numbers, "md_evaluations": md.force_evaluations})

    def _exchange(self, molecule: Molecule) -> dict[str, Any]:
        s = self.settings
        exchanged = exchange(
            molecule, s, self.path("exchange.npz"), device=self.resources.device, progress=self.progress
        )
        frames = exchanged.trajectory(0)
        training, held_out = s.split(frames.positions)
        burst = bursts(
            molecule.system, training, temperature=molecule.temperature, n_bursts=s.bursts, seed=s.seed + 1,
            timestep=TIMESTEP, device=self.resources.device, progress=self.progress,
        )  # fmt: skip
        burst.save(self.path("training.npz"))
        frames.save(self.path("exchange_frames.npz"))
        return {
            "exchange_evaluations": exchanged.force_evaluations,
            "exchange_acceptance": [round(float(a), 3) for a in np.nan_to_num(exchanged.acceptance)],
            "round_trips": int(exchanged.round_trips.sum()),
            "burst_evaluations": burst.force_evaluations,
            "training_frames": len(training),
            "held_out_frames": len(held_out),
        }

    def train(self) -> None:
        """A generator, from data and energy."""
        self._require("train", "simulate")
        started, s, molecule = time.perf_counter(), self.settings, self.molecule()
        generator = generator_for(molecule, s)
        adaptive = s.data == "adaptive"
        numbers = self._adapt(generator, molecule) if adaptive else self._fit(generator)
        generator.provenance |= {
            "openmm_bg": __version__,
            "molecule": molecule.name,
            "forcefield": list(molecule.forcefield),
            "data": {"walkers": s.walkers} if adaptive else self.record["steps"]["simulate"],
        }
        fingerprint = generator.save(self.path("generator.bg"))
        self.say(f"      {numbers['steps']:,} steps and {numbers['evaluations']:,} energy evaluations")
        draws = generator.sample(min(s.samples, LOOK), seed=s.seed + 7)
        diagnosis, spent = self._diagnose(generator, draws)
        self._finish("train", started, {
            **numbers,
            "diagnosis": diagnosis,
            "diagnosis_evaluations": len(draws) + spent,
            "sha256": fingerprint,
        })  # fmt: skip

    def _fit(self, generator: BoltzmannGenerator) -> dict[str, Any]:
        s, checkpoint = self.settings, self.path("training.checkpoint")
        result = generator.fit(
            Trajectory.load(self.path("training.npz")).positions, steps=s.training_steps,
            likelihood_steps=s.likelihood_steps, budget=s.budget, seed=s.seed, log=self.path("training.jsonl"),
            settings=Settings(device=self.resources.device), checkpoint=checkpoint, resume=checkpoint.exists(),
            progress=self.progress,
        )  # fmt: skip
        return {name: getattr(result, name) for name in ("evaluations", "steps", "skipped", "rollbacks")}

    def _adapt(self, generator: BoltzmannGenerator, molecule: Molecule) -> dict[str, Any]:
        result = adaptation(
            generator, molecule, self.settings, self.path("training.checkpoint"), executor=self.executor,
            training=Settings(device=self.resources.device), log=self.path("training.jsonl"), progress=self.progress,
            callback=self._tell,
        ).run()  # fmt: skip
        save_held_out(self.path("walkers.npz"), result.held_out)
        spent = dict(result.evaluations)
        return {
            "evaluations": spent.pop("training"),
            "walker_evaluations": sum(spent.values()),
            **{name: getattr(result, name) for name in ("steps", "skipped", "rollbacks", "converged", "verdict")},
        }

    def _tell(self, record: dict[str, Any]) -> None:
        """A round of adaptation, in a line."""
        what = "afterwards" if record.get("closed") else f"round {record['round']}"
        moves = record["moves"]
        moved = f"; {100 * moves['accepted'] / moves['tried']:.0f} % of the walkers' moves accepted" if moves else ""
        if "figures" in record:
            self.say(f"      {what}: {Figures.from_dict(record['figures'])}{moved}")
        if record.get("closed"):
            self.say(f"      {record['verdict']}")

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
        diagnosis, spent = self._diagnose(generator, draws)
        integrator = openmm.LangevinMiddleIntegrator(molecule.temperature, 1.0, TIMESTEP)
        integrator.setRandomNumberSeed(s.seed + 4)
        platform, properties = self.resources.platform_for(molecule.system)
        simulation = app.Simulation(molecule.topology, molecule.system, integrator, platform, properties)
        # an equilibrated start: nothing has to be discarded
        simulation.context.setPositions(Trajectory.load(self.path("md.npz")).positions[-1])
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
            disable=None if self.progress else True, dynamic_ncols=True,
        )  # fmt: skip
        with bar:
            while sampler.currentIteration < iterations:
                simulation.step(s.steps_per_iteration)
                bar.update()
                bar.set_postfix_str(f"acceptance {sampler.acceptanceRate:.3f}")
        self._finish("sample", started, {
            "platform": platform.getName(),
            "proposed": sampler.numProposed,
            "accepted": sampler.numAccepted,
            "refused": sampler.numRefused,
            "md_steps": simulation.currentStep,
            "diagnosis": diagnosis,
            "draw_evaluations": len(draws),
            "diagnosis_evaluations": spent,
        })  # fmt: skip

    def _diagnose(self, generator: BoltzmannGenerator, draws: Samples) -> tuple[dict[str, Any], int]:
        """Say, and return for run.json, where a generator loses its effective samples; and the evaluations it took."""
        held_out = held_out_frames(self.folder, self.settings)
        diagnosis = diagnose_generator(
            generator, draws.positions, draws.log_weights.numpy(), held_out, generator.log_weights(held_out).numpy(),
            self.settings.chains,
        )  # fmt: skip
        for finding in diagnosis.findings.values():
            self.say(f"      {finding}")
        return diagnosis.to_dict(), len(held_out)

    def compare(self) -> None:
        """Everything that is claimed, in summary.json."""
        self._require("compare", "sample")
        started = time.perf_counter()
        summary = json.dumps(self.results.summary, indent=2, allow_nan=False)
        write_atomically(self.path("summary.json"), summary.encode())
        self._finish("compare", started, {})

    def report(self) -> None:
        """The page, and the headline on the terminal."""
        self._require("report", "compare")
        started = time.perf_counter()
        page.write(self.path("report.html"), self.results)
        self._finish("report", started, {})
        self.say(headline(self.results))
        self.say(f"Read {self.path('report.html')}")

    @cached_property
    def results(self) -> Results:
        """Everything measured, once for compare and report."""
        return measure(Material.load(self.folder, self.record, self.molecule().topology))


_PURPOSE: dict[Any, str] = {
    "prepare": "molecule, force field and coordinates",
    "simulate": "plain MD for comparison",
    ("simulate", "exchange"): "replica exchange for training data, plain MD for comparison",
    "train": "walkers of MD and the generator, in turn",
    ("train", "exchange"): "the generator, first on the data, then on the energy",
    "sample": "independent draws, and MD with generator moves",
    "compare": "of MD with moves, against everything else",
    "report": "the page",
}


def generator_for(molecule: Molecule, settings: RunSettings) -> BoltzmannGenerator:
    """The untrained generator of a run.

    Parameters
    ----------
    molecule : Molecule
    settings : RunSettings
        Its ``flow`` and ``seed`` are used.

    Raises
    ------
    InputError
        Where :meth:`~openmm_bg.BoltzmannGenerator.for_molecule` refuses the molecule.

    Examples
    --------
    >>> from openmm_bg import systems
    >>> generator_for(systems.load("alanine_dipeptide"), RunSettings(flow="realnvp")).flow.dimension
    60
    """
    return BoltzmannGenerator.for_molecule(
        molecule.topology, molecule.system, molecule.temperature, positions=molecule.positions, flow=settings.flow,
        seed=settings.seed,
    )  # fmt: skip


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min"
