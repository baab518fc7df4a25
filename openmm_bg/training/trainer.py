"""The one training loop: stages of objectives, averaged weights, a log, checkpoints that resume exactly."""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from openmm_bg.device import find_device
from openmm_bg.errors import InputError
from openmm_bg.flows import Flow
from openmm_bg.generator import BoltzmannGenerator
from openmm_bg.sampling.metropolis import independence_acceptance
from openmm_bg.sampling.reweighting import effective_sample_size
from openmm_bg.sampling.target import Target
from openmm_bg.training.budget import Budget
from openmm_bg.training.checkpoint import read_checkpoint, whole, write_checkpoint
from openmm_bg.training.interrupts import held_interrupts
from openmm_bg.training.labels import Labels
from openmm_bg.training.objectives import Step, check_needs
from openmm_bg.training.replay import Replay, advance
from openmm_bg.training.settings import WITHOUT_END, Settings, Stage, TrainingResult
from openmm_bg.training.watch import Watch

# Steps that warm-up and ramps are shares of where a budget leaves the number of steps open.
_USUAL = 8000
# Steps without an evaluation after which a budget of evaluations is a mistake.
_IDLE = 5000


class Trainer:
    """Train the flow of a generator.

    Parameters
    ----------
    generator : BoltzmannGenerator
        Its flow gets the averaged weights when :meth:`run` ends, also when it is interrupted.
    stages : sequence of Stage
    data : Tensor, (n, dimension), optional
        Training data in the coordinates of the flow.
    energies : Tensor, (n,), optional
        What is known of their reduced energies u(x) already; objectives that need more evaluate it, once.
    budget : Budget, optional
        Stop where it is spent, with the best weights so far; the learning rate follows what is left of it.
    settings : Settings
    seed : int
    log : path-like, optional
        JSON Lines, one record per 50 steps and per validation.
    checkpoint : path-like, optional
        Written every minute and on Ctrl-C.
    resume : bool
        Go on from the checkpoint, if there is one; a resumed run gives the numbers of an uninterrupted one.
    progress : bool
        A bar with the remaining time on stderr.

    Raises
    ------
    InputError
        If data, energy or steps are missing, or if the checkpoint is broken or belongs to another run.
    """

    def __init__(
        self,
        generator: BoltzmannGenerator,
        stages: Sequence[Stage],
        data: Tensor | None = None,
        *,
        energies: Tensor | None = None,
        budget: Budget | None = None,
        settings: Settings | None = None,
        seed: int = 0,
        log: Any = None,
        checkpoint: Any = None,
        resume: bool = False,
        progress: bool = True,
    ):
        self.generator = generator
        self.stages = [stage for stage in stages if stage.steps > 0]
        self.settings = settings or Settings()
        self.progress = progress
        self.objectives = [objective for stage in self.stages for _, objective in stage.terms]
        check_needs(self.objectives, data=data is not None, energy=generator.energy is not None)
        if not self.stages:
            raise InputError("There is nothing to train: every stage has zero steps.")
        dtype = self.settings.dtype
        self.device = find_device(self.settings.device)
        self.budget = budget
        self.target = None if generator.energy is None else Target(generator, dtype, self.device)
        self.data = None if data is None else data.to(self.device, dtype)
        self.labels = Labels(self.data, energies, self.target)
        self.flow = copy.deepcopy(generator.flow).to(self.device, dtype).train()
        self.average = copy.deepcopy(self.flow).requires_grad_(False)
        self.best: dict[str, Tensor] | None = None
        self.best_score = -math.inf
        self.random = torch.Generator(self.device).manual_seed(seed)
        # validation draws its own numbers: how often one looks does not change what is learned
        self.validation_random = torch.Generator(self.device).manual_seed(seed + 1_000_003)
        groups = _parameter_groups(self.flow)
        self.optimizer = torch.optim.Adam(groups, lr=self.settings.learning_rate, betas=self.settings.betas, fused=True)
        self.replay: Replay | None = None
        if self.device.type == "cuda":
            self.replay = Replay(self.flow, self.average, groups, self.settings.betas, self.random, self.target)
            self.optimizer = self.replay.optimizer
        self.planned = [stage.steps for stage in self.stages]
        self._last_evaluations = (0, 0)
        for objective in self.objectives:  # what it kept of another run is not of this one
            objective.state.clear()
            objective.tensors.clear()
        self.watch = Watch(self._weights())
        self.result = TrainingResult()
        self.log = None if log is None else Path(log)
        self.checkpoint = None if checkpoint is None else Path(checkpoint)
        self.identity = {
            "stages": [[stage.name, stage.steps, stage.torsion_rate] for stage in self.stages],
            "settings": {k: str(v) for k, v in asdict(self.settings).items() if k != "checkpoint_seconds"},
            "data": None if data is None else list(data.shape),
            "budget": None if budget is None else [budget.seconds, budget.evaluations],
            "seed": seed,
        }
        if resume and self.checkpoint is not None and self.checkpoint.exists():
            self._load()
        elif self.log is not None:
            self.log.parent.mkdir(parents=True, exist_ok=True)
            self.log.write_text("")

    def run(self) -> TrainingResult:
        """Train to the end of the last stage or of the time, or go on from where a checkpoint left off."""
        started = time.perf_counter() - self.result.seconds
        saved = time.perf_counter()
        before = self._volatile()
        bar = tqdm(
            total=self.total, initial=self.result.steps, desc="training", unit="step",
            disable=None if self.progress else True, dynamic_ncols=True, mininterval=1.0,
        )  # fmt: skip
        try:
            while self.result.steps < self.total and self._spent() < 1:
                number = self._stage()
                before = self._volatile()
                recorded = self.replay is not None and self.replay.can(self.stages[number].terms)
                if not recorded:
                    record, numbers, usable = self._gradient(number)
                with held_interrupts():
                    if recorded:
                        record, numbers, usable = self._replayed(number)
                    else:
                        self._update(bool(usable))
                    self._close_finished(number, bar)
                    before = self._volatile()
                    self.result.seconds = time.perf_counter() - started
                    self.result.evaluations = self.target.evaluations if self.target else 0
                    bar.update()
                    over = self._spent() >= 1 or self.result.steps >= self.total
                    self._look(number, record | numbers, over, bar)
                self._check_spending()
                if self.checkpoint and time.perf_counter() - saved > self.settings.checkpoint_seconds:
                    self._save()
                    saved = time.perf_counter()
        except KeyboardInterrupt:
            # the step that was cut short has not happened
            self._restore(before)
            if self.checkpoint:
                self._save()
            raise
        finally:
            bar.close()
            self._install()
        if self.checkpoint:
            self._save()
        return self.result

    @property
    def total(self) -> int:
        """Steps of all stages, as far as is known by now."""
        return sum(self.planned)

    def _spent(self) -> float:
        """The share of the budget that is spent; 0 without one."""
        if self.budget is None:
            return 0.0
        return self.budget.spent(self.result.seconds, self.result.evaluations)

    def _check_spending(self) -> None:
        """Refuse to run for ever on a budget of evaluations that nothing spends."""
        evaluations = self.result.evaluations
        ending = self.result.steps < self.total and self.planned[self._stage()] < WITHOUT_END
        if ending or evaluations != self._last_evaluations[1]:
            self._last_evaluations = self.result.steps, evaluations
        idle = self.result.steps - self._last_evaluations[0]
        if self.budget is not None and self.budget.seconds is None and idle > _IDLE:
            raise InputError(
                "These objectives evaluate no new energies, so a budget of evaluations is never spent; give a time "
                "such as '10min', or a number of steps."
            )

    def _stage(self) -> int:
        """Which stage the next step belongs to."""
        return next(i for i, end in enumerate(_cumulative(self.planned)) if self.result.steps < end)

    def _close_finished(self, number: int, bar: tqdm) -> None:
        """End a stage whose objective says that it has nothing left to do."""
        if any(objective.state.get("finished") for _, objective in self.stages[number].terms):
            self.planned[number] = self.result.steps - sum(self.planned[:number])
            bar.total = self.total

    def _look(self, number: int, record: dict[str, Any], last: bool, bar: tqdm) -> None:
        """Validate, log, and go back where training has diverged."""
        stage = self.stages[number]
        due = last or self.result.steps % self.settings.validate_every == 0
        score = None
        if self.target and due:
            record |= self._validate(final=number == len(self.stages) - 1)
            bar.set_postfix_str(f"{stage.name}, ESS {record['ess']:.3f}")
            if any(objective.needs_energy for _, objective in stage.terms):
                score = record["ess_clipped"]
        if self.watch.lost(number, score):
            self._roll_back(record)
        elif due:
            self.watch.keep(number, score, self._weights())
        if self.result.steps % 50 == 0 or "ess" in record or "rolled_back" in record:
            self._record(record)

    def _weights(self) -> dict[str, Tensor]:
        """Everything that a step of the optimiser changes."""
        tensors: dict[str, Tensor] = {}
        for name, module in {"flow": self.flow, "average": self.average}.items():
            tensors |= {f"{name}.{key}": t.detach().clone() for key, t in module.state_dict().items()}
        for number, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"adam.{number}.{key}": torch.as_tensor(value).clone() for key, value in state.items()}
        return tensors

    def _set_weights(self, tensors: dict[str, Tensor]) -> None:
        parts: dict[str, dict[str, Tensor]] = {"flow": {}, "average": {}}
        moments: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            head, _, rest = name.partition(".")
            if head == "adam":
                number, _, key = rest.partition(".")
                moments.setdefault(int(number), {})[key] = tensor.clone()
            else:
                parts[head][rest] = tensor
        self.flow.load_state_dict(parts["flow"])
        self.average.load_state_dict(parts["average"])
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})
        if self.replay is not None:
            self.replay.forget(self.result.skipped)

    def _roll_back(self, record: dict[str, Any]) -> None:
        self._set_weights(self.watch.good)
        self.watch.rolled_back()
        self.result.rollbacks += 1
        record |= {"rolled_back": self.result.rollbacks, "rate_factor": self.watch.factor}

    def _volatile(self) -> tuple[Tensor, list[dict[str, float]], list[dict[str, Tensor]], int]:
        """What computing a gradient changes."""
        evaluations = self.target.evaluations if self.target else 0
        states = [dict(objective.state) for objective in self.objectives]
        return self.random.get_state(), states, [dict(objective.tensors) for objective in self.objectives], evaluations

    def _restore(self, volatile: tuple[Tensor, list[dict[str, float]], list[dict[str, Tensor]], int]) -> None:
        random, states, tensors, evaluations = volatile
        self.random.set_state(random)
        for objective, state, kept in zip(self.objectives, states, tensors, strict=True):
            objective.state.clear()
            objective.state.update(state)
            objective.tensors.clear()
            objective.tensors.update(kept)
        if self.target:
            self.target.evaluations = evaluations

    def _pace(self, number: int) -> tuple[float, float]:
        """Learning rate and progress of the next step."""
        settings, stage, done = self.settings, self.stages[number], self.result.steps
        start = sum(self.planned[:number])
        if stage.rate is not None:
            rate, progress = stage.rate, (done - start) / self.planned[number]
        else:
            shared = [n if s.rate is None else 0 for s, n in zip(self.stages, self.planned, strict=True)]
            progress = max((sum(shared[:number]) + done - start) / sum(shared), self._spent())
            rate = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))) * settings.learning_rate
        # a budget does not say how many steps it will be
        whole = self.total if self.budget is None else _USUAL
        warm = max((done + 1) / max(1.0, settings.warmup * whole), self._spent() / max(settings.warmup, 1e-9))
        rate *= min(1.0, warm)
        if start > 0:
            rate *= min(1.0, (done - start + 1) / max(1.0, settings.ramp * whole))
        return rate * self.watch.factor, progress

    def _gradient(self, number: int) -> tuple[dict[str, Any], dict[str, Any], Tensor]:
        """Set the gradient of one step: heading and numbers of its record, and whether all is finite."""
        rate, progress = self._pace(number)
        rates = rate, rate * self.stages[number].torsion_rate
        if self.replay is not None:
            self.replay.between(rates)
        else:
            for group, its_rate in zip(self.optimizer.param_groups, rates, strict=True):
                group["lr"] = its_rate
        numbers, usable = self._program(number, progress)
        advance(self.stages[number].terms)
        return self._heading(number, rate), numbers, usable

    def _heading(self, number: int, rate: float) -> dict[str, Any]:
        return {"step": self.result.steps + 1, "stage": self.stages[number].name, "rate": rate}

    def _program(self, number: int, progress: float | Tensor) -> tuple[dict[str, Any], Tensor]:
        """Loss and gradient, without a look at any number of theirs."""
        data = (None, None) if self.data is None else (self._draw, self._draw_labelled)
        step = Step(self.flow, self.target, data[0], self.settings.batch_size, progress, self.random, data[1])
        self.optimizer.zero_grad(set_to_none=True)
        loss = torch.zeros((), dtype=self.settings.dtype, device=self.device)
        numbers: dict[str, Any] = {}
        for weight, objective in self.stages[number].terms:
            term, seen = objective(step)
            loss = loss + weight * term
            numbers |= seen
        usable = torch.isfinite(loss.detach())
        if loss.requires_grad:
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(self.flow.parameters(), self.settings.clip)
            usable = usable & torch.isfinite(norm)
            numbers |= {"loss": loss.detach(), "gradient": norm}
        return numbers, usable

    def _update(self, usable: bool) -> None:
        if usable:
            self.optimizer.step()
            with torch.no_grad():
                torch._foreach_lerp_(list(self.average.parameters()), list(self.flow.parameters()), 1 - self._decay())
        else:
            self.result.skipped += 1
        self.watch.step(usable)
        self.result.steps += 1

    def _decay(self) -> float:
        # an average over fewer steps than its own memory would still hold the start
        return min(self.settings.average, (1 + self.result.steps) / (10 + self.result.steps))

    def _replayed(self, number: int) -> tuple[dict[str, Any], dict[str, Any], None]:
        """A whole step on a CUDA device, recorded once for every kind of step."""
        rate, progress = self._pace(number)
        stage, rates = self.stages[number], (rate, rate * self.stages[number].torsion_rate)
        numbers = self.replay.step(
            number, stage.terms, lambda p: self._program(number, p), rates, progress, 1 - self._decay()
        )
        self.result.steps += 1
        if self.result.steps % 50 == 0 or self.result.steps >= self.total:
            self.watch.bad, self.result.skipped = self.replay.counts()
        return self._heading(number, rate), numbers, None

    def _rows(self, n: int) -> Tensor:
        return torch.randint(len(self.data), (n,), generator=self.random, device=self.device)

    def _draw(self, n: int) -> Tensor:
        return self.data[self._rows(n)]

    def _draw_labelled(self, n: int, gradient: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        rows = self._rows(n)
        u, slope = self.labels(gradient)
        return self.data[rows], u[rows], slope[rows] if gradient else None

    @torch.no_grad()
    def _validate(self, *, final: bool) -> dict[str, float]:
        q, log_q = self.average.sample(self.settings.validation_size, self.validation_random)
        before = self.target.evaluations
        log_w = -self.target.value(q) - log_q
        self.target.evaluations = before
        log_w = torch.where(torch.isfinite(log_w), log_w, -math.inf).double().cpu()
        ess = effective_sample_size(log_w)
        acceptance = independence_acceptance(log_w) if ess.fraction > 0 else 0.0
        if final and ess.clipped > self.best_score:
            self.best_score = ess.clipped
            self.best = {name: t.clone() for name, t in self.average.state_dict().items()}
        return {"ess": ess.fraction, "ess_clipped": ess.clipped, "acceptance": acceptance}

    def _record(self, record: dict[str, Any]) -> None:
        record = {k: float(v) if isinstance(v, Tensor) else v for k, v in record.items()}
        # JSON knows neither NaN nor infinity
        record = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        record |= {
            "seconds": round(self.result.seconds, 3),
            "evaluations": self.result.evaluations,
            "skipped": self.result.skipped,
        }
        self.result.history.append(record)
        if self.log is not None:
            with self.log.open("a") as stream:
                stream.write(json.dumps(record) + "\n")

    def _install(self) -> None:
        """Give the generator the trained weights; its buffers keep their double precision, which training lacks."""
        weights = self.best or self.average.state_dict()
        with torch.no_grad():
            for name, parameter in self.generator.flow.named_parameters():
                parameter.copy_(weights[name])

    def _save(self) -> None:
        tensors = {
            "weights": self._weights(),
            "random": {"steps": self.random.get_state(), "validation": self.validation_random.get_state()},
            "generator": self.generator.flow.state_dict(),
            "best": self.best or {},
            "good": self.watch.good,
            "labels": self.labels.found(),
        }
        tensors |= {f"objective{number}": objective.tensors for number, objective in enumerate(self.objectives)}
        header = {
            "identity": self.identity,
            "planned": self.planned,
            "steps": self.result.steps,
            "skipped": self.result.skipped,
            "rollbacks": self.result.rollbacks,
            "seconds": self.result.seconds,
            "evaluations": self.target.evaluations if self.target else 0,
            "best_score": None if math.isinf(self.best_score) else self.best_score,
            "watch": self.watch.numbers(),
            "objectives": [objective.state for objective in self.objectives],
            "history": self.result.history,
        }
        write_checkpoint(self.checkpoint, header, tensors)

    def _load(self) -> None:
        header, tensors = read_checkpoint(self.checkpoint, self.identity)
        with whole(self.checkpoint):
            self._set_weights(tensors["weights"])
            self.generator.flow.load_state_dict(tensors["generator"])
            kept = [
                {name: t.to(self.device) for name, t in tensors[f"objective{number}"].items()}
                for number in range(len(self.objectives))
            ]
            self._restore((tensors["random"]["steps"], header["objectives"], kept, header["evaluations"]))
            self.validation_random.set_state(tensors["random"]["validation"])
            for name, tensor in tensors["labels"].items():
                setattr(self.labels, name, tensor.to(self.device))
            self.best = tensors["best"] or None
            self.best_score = -math.inf if header["best_score"] is None else header["best_score"]
            self.watch = Watch(tensors["good"], **header["watch"])
            self.planned = list(header["planned"])
            self.result = TrainingResult(
                header["history"], header["steps"], header["skipped"], header["evaluations"], header["seconds"],
                header["rollbacks"],
            )  # fmt: skip
        if self.log is not None:
            self.log.parent.mkdir(parents=True, exist_ok=True)
            self.log.write_text("".join(json.dumps(r) + "\n" for r in header["history"]))


def _parameter_groups(flow: Flow) -> list[dict[str, Any]]:
    """Parameters of the torsions' density apart from all others; either may be empty."""
    torsions = getattr(flow, "torsions", None)
    apart = [] if torsions is None else list(torsions.parameters())
    known = set(map(id, apart))
    return [{"params": [p for p in flow.parameters() if id(p) not in known]}, {"params": apart}]


def _cumulative(numbers: Sequence[int]) -> list[int]:
    total, out = 0, []
    for number in numbers:
        total += number
        out.append(total)
    return out
