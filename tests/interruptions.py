"""Ctrl-C at a chosen moment, for tests of what is resumed."""

from __future__ import annotations


def interrupt_at(monkeypatch, owner: type, method: str, call: int) -> None:
    """KeyboardInterrupt at the so-many-th call of a method, counted from zero."""
    original, count = getattr(owner, method), iter(range(call + 1))

    def interrupted(self, *args, **kwargs):
        if next(count) == call:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    monkeypatch.setattr(owner, method, interrupted)
