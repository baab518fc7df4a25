"""Fixtures that several rooms share."""

from __future__ import annotations

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def alanine():
    """ACE-ALA-NME, amber99sbildn + amber99_obc, NoCutoff, no constraints, 300 K."""
    import openmm_bg as bg

    return bg.systems.load("alanine_dipeptide")
