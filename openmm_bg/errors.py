"""The one exception a person is meant to read."""

from __future__ import annotations


class InputError(ValueError):
    """What was given cannot be used; the message says what was wrong and what to do, in one sentence.

    The command line prints it and exits with code 2.
    """
