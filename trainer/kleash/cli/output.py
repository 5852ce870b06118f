"""What the command line prints on standard output; messages and progress go to standard error."""

from __future__ import annotations

import os
import sys


def show(text: str) -> None:
    """Print ``text``; a reader that has left, as ``head`` does, is not an error."""
    try:
        print(text, flush=True)  # noqa: T201
    except BrokenPipeError:
        forget_reader()


def forget_reader() -> None:
    """After a BrokenPipeError: Python flushes standard output once more when it ends, and would
    complain then."""
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())
