"""The one training loop: stages of objectives, averaged weights, a log, checkpoints that resume exactly."""

from __future__ import annotations

import copy
import json
import math
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor
from tqdm.auto import tqdm

from openmm_bg.errors import InputError
from openmm_bg.files import write_atomically
from openmm_bg.generator import BoltzmannGenerator
from openmm_bg.sampling.metropolis import independence_acceptance
from openmm_bg.sampling.reweighting import effective_sample_size
from openmm_bg.sampling.target import Target
from openmm_bg.training.objectives import Objective, Step, check_needs


@dataclass(frozen=True)
class Stage:
    """Some steps under one weighted sum of objectives."""

    name: str
    steps: int
    terms: Sequence[tuple[float, Objective]]


@dataclass(frozen=True)
class Settings:
    """How the parameters move.

    Attributes
    ----------
    batch_size, learning_rate, betas
        Adam; the rate follows a cosine to zero over the whole run.
    warmup, ramp : float
        Shares of the run over which the rate rises at the start, and at the start of each later stage.
    clip : float
        Largest norm of the gradient.
    average : float
        Decay of the exponential average of the weights, which is what the generator gets.
    validate_every, validation_size : int
        Steps between validations, and samples in each. The best averaged weights of the last stage are kept.
    checkpoint_seconds : float
    dtype : torch.dtype
        Of the training arithmetic; the generator itself stays float64.
    """

    batch_size: int = 512
    learning_rate: float = 5e-3
    betas: tuple[float, float] = (0.9, 0.99)
    warmup: float = 0.03
    ramp: float = 0.01
    clip: float = 20.0
    average: float = 0.998
    validate_every: int = 500
    validation_size: int = 8192
    checkpoint_seconds: float = 60.0
    dtype: torch.dtype = torch.float32


@dataclass
class TrainingResult:
    """What training cost and where it ended.

    Attributes
    ----------
    history : list of dict
        The records of the log: step, seconds, stage, losses (None where not finite), and at validations ``ess``,
        ``ess_clipped``, ``acceptance``.
    steps, skipped, evaluations : int
        Steps taken, steps skipped because something was not finite, energy evaluations.
    seconds : float
    """

    history: list[dict[str, Any]] = field(default_factory=list)
    steps: int = 0
    skipped: int = 0
    evaluations: int = 0
    seconds: float = 0.0


class Trainer:
    """Train the flow of a generator.

    Parameters
    ----------
    generator : BoltzmannGenerator
        Its flow gets the averaged weights when :meth:`run` ends, also when it is interrupted.
    stages : sequence of Stage
    data : Tensor, (n, dimension), optional
        Training data in the coordinates of the flow.
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
        self.data = None if data is None else data.to(dtype)
        self.target = None if generator.energy is None else Target(generator, dtype)
        self.flow = copy.deepcopy(generator.flow).to(dtype).train()
        self.average = copy.deepcopy(self.flow).requires_grad_(False)
        self.best: dict[str, Tensor] | None = None
        self.best_score = -math.inf
        self.random = torch.Generator().manual_seed(seed)
        # validation draws its own numbers: how often one looks does not change what is learned
        self.validation_random = torch.Generator().manual_seed(seed + 1_000_003)
        self.optimizer = torch.optim.Adam(
            self.flow.parameters(), lr=self.settings.learning_rate, betas=self.settings.betas
        )
        self.total = sum(stage.steps for stage in self.stages)
        self.result = TrainingResult()
        self.log = None if log is None else Path(log)
        self.checkpoint = None if checkpoint is None else Path(checkpoint)
        self.identity = {
            "stages": [[stage.name, stage.steps] for stage in self.stages],
            "settings": {k: str(v) for k, v in asdict(self.settings).items() if k != "checkpoint_seconds"},
            "data": None if data is None else list(data.shape),
            "seed": seed,
        }
        if resume and self.checkpoint is not None and self.checkpoint.exists():
            self._load()
        elif self.log is not None:
            self.log.parent.mkdir(parents=True, exist_ok=True)
            self.log.write_text("")

    def run(self) -> TrainingResult:
        """Train to the end of the last stage, or go on from where a checkpoint left off."""
        started = time.perf_counter() - self.result.seconds
        saved = time.perf_counter()
        before = self._volatile()
        ends = _cumulative([stage.steps for stage in self.stages])
        bar = tqdm(
            total=self.total, initial=self.result.steps, desc="training", unit="step",
            disable=None if self.progress else True, dynamic_ncols=True, mininterval=1.0,
        )  # fmt: skip
        try:
            while self.result.steps < self.total:
                number = next(i for i, end in enumerate(ends) if self.result.steps < end)
                before = self._volatile()
                record, usable = self._gradient(self.stages[number], ends[number] - self.stages[number].steps)
                with _held_interrupts():
                    self._update(usable)
                    before = self._volatile()
                    self.result.seconds = time.perf_counter() - started
                    self.result.evaluations = self.target.evaluations if self.target else 0
                    bar.update()
                    last = self.result.steps == self.total
                    if self.target and (self.result.steps % self.settings.validate_every == 0 or last):
                        record |= self._validate(final=number == len(self.stages) - 1)
                        bar.set_postfix_str(f"{self.stages[number].name}, ESS {record['ess']:.3f}")
                    if self.result.steps % 50 == 0 or "ess" in record:
                        self._record(record)
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

    def _gradient(self, stage: Stage, start: int) -> tuple[dict[str, Any], bool]:
        """Loss and gradient of one step: a record for the log, and whether all of it is finite."""
        settings, done = self.settings, self.result.steps
        rate = 0.5 * (1 + math.cos(math.pi * done / self.total)) * settings.learning_rate
        rate *= min(1.0, (done + 1) / max(1.0, settings.warmup * self.total))
        if start > 0:
            rate *= min(1.0, (done - start + 1) / max(1.0, settings.ramp * self.total))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        step = Step(
            self.flow, self.target, self._draw if self.data is not None else None,
            settings.batch_size, done / self.total, self.random,
        )  # fmt: skip
        record: dict[str, Any] = {"step": done + 1, "stage": stage.name, "rate": rate}
        self.optimizer.zero_grad(set_to_none=True)
        loss = torch.zeros((), dtype=settings.dtype)
        for weight, objective in stage.terms:
            term, numbers = objective(step)
            loss = loss + weight * term
            record |= numbers
        finite = bool(torch.isfinite(loss))
        if finite and loss.requires_grad:
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(self.flow.parameters(), settings.clip)
            finite = bool(torch.isfinite(norm))
            record |= {"loss": float(loss.detach()), "gradient": float(norm)}
        return record, finite

    def _update(self, usable: bool) -> None:
        done = self.result.steps
        if usable:
            self.optimizer.step()
            # an average over fewer steps than its own memory would still hold the start
            decay = min(self.settings.average, (1 + done) / (10 + done))
            with torch.no_grad():
                for slow, fast in zip(self.average.parameters(), self.flow.parameters(), strict=True):
                    slow.lerp_(fast, 1 - decay)
        else:
            self.result.skipped += 1
        self.result.steps += 1

    def _draw(self, n: int) -> Tensor:
        return self.data[torch.randint(len(self.data), (n,), generator=self.random)]

    @torch.no_grad()
    def _validate(self, *, final: bool) -> dict[str, float]:
        q, log_q = self.average.sample(self.settings.validation_size, self.validation_random)
        before = self.target.evaluations
        log_w = -self.target.value(q) - log_q
        self.target.evaluations = before
        log_w = torch.where(torch.isfinite(log_w), log_w, -math.inf).double()
        ess = effective_sample_size(log_w)
        acceptance = independence_acceptance(log_w) if ess.fraction > 0 else 0.0
        if final and ess.clipped > self.best_score:
            self.best_score = ess.clipped
            self.best = {name: t.clone() for name, t in self.average.state_dict().items()}
        return {"ess": ess.fraction, "ess_clipped": ess.clipped, "acceptance": acceptance}

    def _record(self, record: dict[str, Any]) -> None:
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
        tensors: dict[str, Tensor] = {
            "random": self.random.get_state(),
            "validation_random": self.validation_random.get_state(),
        }
        for name, module in {"flow": self.flow, "average": self.average}.items():
            tensors |= {f"{name}.{key}": t for key, t in module.state_dict().items()}
        tensors |= {f"generator.{key}": t for key, t in self.generator.flow.state_dict().items()}
        if self.best is not None:
            tensors |= {f"best.{key}": t for key, t in self.best.items()}
        for number, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"adam.{number}.{key}": torch.as_tensor(value) for key, value in state.items()}
        for number, objective in enumerate(self.objectives):
            tensors |= {f"objective.{number}.{key}": t for key, t in objective.tensors.items()}
        header = {
            "identity": self.identity,
            "steps": self.result.steps,
            "skipped": self.result.skipped,
            "seconds": self.result.seconds,
            "evaluations": self.target.evaluations if self.target else 0,
            "best_score": None if math.isinf(self.best_score) else self.best_score,
            "objectives": [objective.state for objective in self.objectives],
            "history": self.result.history,
        }
        tensors = {name: t.detach().contiguous().clone() for name, t in tensors.items()}
        write_atomically(self.checkpoint, save(tensors, {"training": json.dumps(header)}))

    def _load(self) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            tensors = load_file(self.checkpoint)
            with safe_open(self.checkpoint, "pt") as file:
                header = json.loads(file.metadata()["training"])
            if header["identity"] != self.identity:
                other = [name for name, value in self.identity.items() if header["identity"].get(name) != value]
                raise InputError(
                    f"{self.checkpoint} belongs to a run with other {' and '.join(other)}; resume with the same, or "
                    "delete it to start anew."
                )
            parts: dict[str, dict[str, Tensor]] = {"flow": {}, "average": {}, "generator": {}, "best": {}}
            moments: dict[int, dict[str, Tensor]] = {}
            kept: list[dict[str, Tensor]] = [{} for _ in self.objectives]
            for name, tensor in tensors.items():
                head, _, rest = name.partition(".")
                if head in parts:
                    parts[head][rest] = tensor
                elif head == "adam":
                    number, _, key = rest.partition(".")
                    moments.setdefault(int(number), {})[key] = tensor
                elif head == "objective":
                    number, _, key = rest.partition(".")
                    kept[int(number)][key] = tensor
            self.flow.load_state_dict(parts["flow"])
            self.average.load_state_dict(parts["average"])
            self.generator.flow.load_state_dict(parts["generator"])
            state = self.optimizer.state_dict()
            self.optimizer.load_state_dict({**state, "state": moments})
            self._restore((tensors["random"], header["objectives"], kept, header["evaluations"]))
            self.validation_random.set_state(tensors["validation_random"])
            self.best = parts["best"] or None
            self.best_score = -math.inf if header["best_score"] is None else header["best_score"]
            self.result = TrainingResult(
                header["history"], header["steps"], header["skipped"], header["evaluations"], header["seconds"]
            )
        except (SafetensorError, LookupError, AttributeError, TypeError, ValueError, RuntimeError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(
                f"{self.checkpoint} is not a whole checkpoint of this training; delete it to start anew."
            ) from None
        if self.log is not None:
            self.log.parent.mkdir(parents=True, exist_ok=True)
            self.log.write_text("".join(json.dumps(r) + "\n" for r in header["history"]))


@contextmanager
def _held_interrupts() -> Iterator[None]:
    """Keep Ctrl-C waiting until the block is done, so that no step is taken by half."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals go to the main thread alone
        return
    waiting = []
    handler = signal.signal(signal.SIGINT, lambda *_: waiting.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if waiting:
        signal.raise_signal(signal.SIGINT)


def _cumulative(numbers: Sequence[int]) -> list[int]:
    total, out = 0, []
    for number in numbers:
        total += number
        out.append(total)
    return out
