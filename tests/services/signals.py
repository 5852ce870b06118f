"""Signals of processes that tests start."""

from __future__ import annotations

import signal


def hears_ctrl_c() -> None:
    """Tests that a shell runs in the background ignore it, and what they start does, too."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
