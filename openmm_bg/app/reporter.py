"""Acceptance on the console, beside what a StateDataReporter writes."""

from __future__ import annotations

import os
from typing import Any, TextIO

import openmm
from openmm import app

from openmm_bg.app.sampler import BoltzmannGeneratorSampler


class BoltzmannGeneratorReporter(app.StateDataReporter):
    """A StateDataReporter with the acceptance of each kind of move in the columns at the end.

    Acceptances are percentages of all attempts since the sampler was made (or since the run that it resumed began):
    "--" before the first. With two stages there is one more column for the share of the proposals that was accepted on
    the cheap energy. Speed and remaining time count the moves in, since they take time and no steps.

    Parameters
    ----------
    file : path or file-like
    reportInterval : int
        Time steps between two lines.
    sampler : BoltzmannGeneratorSampler
    **columns
        Arguments of openmm.app.StateDataReporter: step=True, speed=True, remainingTime=True with totalSteps, and so on.

    Examples
    --------
    >>> import sys
    >>> reporter = BoltzmannGeneratorReporter(
    ...     sys.stdout, 10000, sampler, step=True, speed=True, remainingTime=True, totalSteps=1000000
    ... )  # doctest: +SKIP
    >>> simulation.reporters.append(reporter)  # doctest: +SKIP
    """

    def __init__(
        self,
        file: str | os.PathLike[str] | TextIO,
        reportInterval: int,
        sampler: BoltzmannGeneratorSampler,
        **columns: Any,
    ):
        super().__init__(os.fspath(file) if isinstance(file, os.PathLike) else file, reportInterval, **columns)
        self._sampler = sampler

    def _constructHeaders(self) -> list[str]:
        headers = []
        for kind in self._sampler.statistics:
            headers.append(f"Accepted, {kind} (%)")
            if self._sampler.twoStage:
                headers.append(f"Moved, {kind} (%)")
        return super()._constructHeaders() + headers

    def _constructReportValues(self, simulation: app.Simulation, state: openmm.State) -> list[Any]:
        values = []
        for counts in self._sampler.statistics.values():
            values.append(_percent(counts.accepted, counts.attempts))
            if self._sampler.twoStage:
                values.append(_percent(counts.moved, counts.tried))
        return super()._constructReportValues(simulation, state) + values


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f}" if whole else "--"
