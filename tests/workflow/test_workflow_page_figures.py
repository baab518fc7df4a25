"""The molecules on a run's page are those of its exact simulation."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

import openmm_bg as bg
from openmm_bg.analysis import BASINS, Conformation
from openmm_bg.workflow import page_figures


def test_rare_basins_that_are_not_drawn_are_counted(alanine, monkeypatch):
    shown = (
        Conformation("sheet", alanine.positions, "90 ± 1 %", 0.9),
        Conformation("left", alanine.positions, "", 0.07),
    )
    monkeypatch.setattr(page_figures, "representatives", lambda positions, topology: shown)
    view = page_figures._molecules(SimpleNamespace(material=SimpleNamespace(chain=None, topology=alanine.topology)))
    assert view.conformations == shown and "Rarer basins hold another 3 %." in view.caption


@pytest.mark.parametrize("name", ["alanine_dipeptide", "alanine_tetrapeptide"])
def test_a_molecule_that_never_left_its_basin_is_shown_once(name):
    molecule = bg.systems.load(name)
    material = SimpleNamespace(chain=np.tile(molecule.positions, (4, 1, 1)), topology=molecule.topology)
    view = page_figures._molecules(SimpleNamespace(material=material))
    (only,) = view.conformations
    assert view.title == "What it looks like" and "Rarer" not in view.caption
    assert only.note == "100 ± ? %"
    assert any(word in only.name for word in (basin.name.split()[0] for basin in BASINS))
