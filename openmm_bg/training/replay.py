"""Training steps on a CUDA device, recorded as graphs: a step is hundreds of small kernels, and launches would rule."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from openmm_bg.sampling.target import Target
from openmm_bg.training.objectives import Objective

# Steps of each kind that run before it is recorded, as torch.cuda.graph asks.
_WARM = 3
# Recording waits for the whole device: trainings in other threads record before or after.
_RECORDING = threading.Lock()

Program = Callable[[Tensor], tuple[dict[str, Any], Tensor]]


def advance(terms: Sequence[tuple[float, Objective]]) -> None:
    """Let the objectives that count steps count one."""
    for _, objective in terms:
        if hasattr(objective, "advance"):
            objective.advance()


class Replay:
    """Whole steps, gradient and update, as CUDA graphs; one for every stage and phase of its objectives.

    An objective can be recorded if it defines ``phase()``, which says what of its program depends on its state, and
    looks at no number of the device; its ``tensors`` keep their shapes. A step that is not finite changes no weights.

    Parameters
    ----------
    flow, average : Module
    groups : sequence of dict
        The flow's parameters in the groups of the optimiser, which have rates of their own.
    betas : (float, float)
    generator : torch.Generator
        On the device; its state goes on from graph to graph.
    target : Target, optional
        Whose evaluations are counted.
    """

    def __init__(
        self,
        flow: nn.Module,
        average: nn.Module,
        groups: Sequence[dict[str, Any]],
        betas: tuple[float, float],
        generator: torch.Generator,
        target: Target | None,
    ):
        device = generator.device
        self.parameters, self.averaged = list(flow.parameters()), list(average.parameters())
        self.generator, self.target = generator, target
        self.progress, self.share = (torch.zeros((), device=device) for _ in range(2))
        self.rates = [torch.zeros((), device=device) for _ in groups]
        self.bad, self.skipped = (torch.zeros((), dtype=torch.long, device=device) for _ in range(2))
        groups = [{**group, "lr": rate} for group, rate in zip(groups, self.rates, strict=True)]
        self.optimizer = torch.optim.Adam(groups, betas=betas, fused=True, capturable=True)
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()
        self.forget()

    def forget(self, skipped: int = 0) -> None:
        """Record anew: tensors that the graphs write into have been replaced."""
        self.bad.zero_()
        self.skipped.fill_(skipped)
        self.graphs: dict[Hashable, tuple[torch.cuda.CUDAGraph, dict[str, Any], int]] = {}
        self.warm: dict[Hashable, int] = {}
        self.fixed: dict[int, dict[str, Tensor]] = {}
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate

    def between(self, rates: Sequence[float]) -> None:
        """Before a step that is not recorded."""
        self._set_rates(rates)
        self.optimizer.found_inf = None

    def _set_rates(self, rates: Sequence[float]) -> None:
        for rate, now in zip(self.rates, rates, strict=True):
            rate.fill_(now)

    @staticmethod
    def can(terms: Sequence[tuple[float, Objective]]) -> bool:
        """Whether steps under these terms can be recorded."""
        return all(hasattr(objective, "phase") for _, objective in terms)

    def counts(self) -> tuple[int, int]:
        """Steps in a row, and steps in all, that were not finite; waits for the device."""
        return int(self.bad), int(self.skipped)

    def step(
        self, stage: int, terms: Sequence[tuple[float, Objective]], program: Program, rates: Sequence[float],
        progress: float, share: float,
    ) -> dict[str, Any]:  # fmt: skip
        """One step; the numbers of the log, on the device.

        Parameters
        ----------
        stage : int
            Tells programs apart, with the phases of their objectives.
        terms : sequence of (float, Objective)
        program : callable
            Takes the progress, sets the gradients, and returns numbers and whether the step is usable.
        rates : sequence of float
            Learning rates of the groups.
        progress, share : float
            Progress of the run, and how far the average follows.
        """
        self._set_rates(rates)
        self.progress.fill_(progress)
        self.share.fill_(share)
        key = (stage, *(objective.phase() for _, objective in terms))
        if key not in self.graphs and self.warm.get(key, 0) < _WARM:
            self.warm[key] = self.warm.get(key, 0) + 1
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                numbers = self._whole(program)
            torch.cuda.current_stream().wait_stream(self.stream)
        else:
            self._hold(terms)
            if key not in self.graphs:
                self.graphs[key] = self._record(terms, program)
            graph, numbers, evaluations = self.graphs[key]
            graph.replay()
            if self.target is not None:
                self.target.evaluations += evaluations
        advance(terms)
        return numbers

    def _whole(self, program: Program) -> dict[str, Any]:
        numbers, usable = program(self.progress)
        # the fused optimiser leaves weights and moments alone where this is one
        self.optimizer.found_inf = 1 - usable.to(self.progress.dtype)
        self.optimizer.step()
        with torch.no_grad():
            apart = torch._foreach_sub(self.parameters, self.averaged)
            torch._foreach_mul_(apart, self.share)
            torch._foreach_add_(self.averaged, apart)
            self.bad.copy_(torch.where(usable, 0, self.bad + 1))
            self.skipped.add_(~usable)
        return numbers

    def _record(self, terms: Sequence[tuple[float, Objective]], program: Program) -> tuple[Any, dict[str, Any], int]:
        before = 0 if self.target is None else self.target.evaluations
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self.generator)
        with _RECORDING, torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode="thread_local"):
            numbers = self._whole(program)
            for _, objective in terms:
                fixed = self.fixed[id(objective)]
                for name, tensor in objective.tensors.items():
                    if tensor is not fixed[name]:
                        fixed[name].copy_(tensor)
        self._hold(terms, copy=False)
        evaluations = 0
        if self.target is not None:  # recording evaluates nothing
            evaluations, self.target.evaluations = self.target.evaluations - before, before
        return graph, numbers, evaluations

    def _hold(self, terms: Sequence[tuple[float, Objective]], copy: bool = True) -> None:
        """Give every objective's tensors the fixed places that the graphs read and write."""
        for _, objective in terms:
            fixed = self.fixed.setdefault(id(objective), {})
            for name, tensor in objective.tensors.items():
                if name not in fixed:
                    fixed[name] = tensor.clone()
                elif copy and tensor is not fixed[name]:
                    fixed[name].copy_(tensor)
            objective.tensors = dict(fixed)
