"""How long work reports where it is; the command line draws it, libraries stay silent."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """One task at a time: start, advance, finish."""

    def start(self, total: int, description: str) -> None:
        """Begin a task of ``total`` units."""

    def advance(self, count: int = 1, **figures: float) -> None:
        """``count`` more units are done; ``figures`` are shown beside the bar (loss, KL)."""

    def finish(self) -> None:
        """The task is over."""


class NullProgress:
    """Reports nothing."""

    def start(self, total: int, description: str) -> None:
        """Ignore."""

    def advance(self, count: int = 1, **figures: float) -> None:
        """Ignore."""

    def finish(self) -> None:
        """Ignore."""
