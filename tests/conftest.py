"""Fixtures that several rooms share."""

from __future__ import annotations

import signal
import threading

import pytest
import torch

torch.set_num_threads(1)

# a shell starts what it puts in the background deaf to Ctrl-C; the tests of interrupts need to hear it
if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config: pytest.Config) -> None:
    """Known outside the checkout as well, where no pyproject.toml tells."""
    config.addinivalue_line("markers", "slow: takes more than a minute; run with -m slow")


@pytest.fixture(scope="session")
def alanine():
    """ACE-ALA-NME, amber99sbildn + amber99_obc, NoCutoff, no constraints, 300 K."""
    import openmm_bg as bg

    return bg.systems.load("alanine_dipeptide")
