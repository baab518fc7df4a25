"""The whole job as a few readable steps: prepare, simulate, train, sample, compare, report."""

from openmm_bg.workflow.record import STEPS, versions
from openmm_bg.workflow.resources import Resources
from openmm_bg.workflow.run import Run, generator_for
from openmm_bg.workflow.settings import RunSettings
from openmm_bg.workflow.source import load_molecule

__all__ = ["STEPS", "Resources", "Run", "RunSettings", "generator_for", "load_molecule", "versions"]
