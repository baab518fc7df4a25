"""Ctrl-C between steps, never inside one."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def held_interrupts() -> Iterator[None]:
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
