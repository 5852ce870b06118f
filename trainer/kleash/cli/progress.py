"""Progress on a terminal: a bar with figures and the time left; plain lines elsewhere."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichBar


class TerminalProgress:
    """Implements kleash.base.progress.Progress with rich.

    Without a terminal (a log file, a pod) it prints a line at most every ``interval_s`` seconds.
    """

    def __init__(self, console: Console | None = None, *, interval_s: float = 15.0) -> None:
        self._console = console or Console(stderr=True)
        self._interval_s = interval_s
        self._bar: RichBar | None = None
        self._description, self._total, self._done = "", 0, 0
        self._started = self._printed = 0.0

    def start(self, total: int, description: str) -> None:
        """Begin a task."""
        self.finish()
        self._description, self._total, self._done = description, total, 0
        self._started = self._printed = time.monotonic()
        if self._console.is_terminal:
            self._bar = RichBar(
                TextColumn("{task.description:<24}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("[dim]{task.fields[figures]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._bar.start()
            self._bar.add_task(description, total=total, figures="")
        else:
            self._console.print(f"{description}: 0/{total}", highlight=False)

    def advance(self, count: int = 1, **figures: float) -> None:
        """Move on and show the figures."""
        self._done += count
        shown = "  ".join(f"{name} {value:.4g}" for name, value in figures.items())
        if self._bar:
            task = self._bar.tasks[0]
            self._bar.update(task.id, advance=count, figures=shown or task.fields["figures"])
        elif time.monotonic() - self._printed >= self._interval_s or self._done == self._total:
            self._printed = time.monotonic()
            elapsed = self._printed - self._started
            left = elapsed / max(self._done, 1) * (self._total - self._done)
            self._console.print(
                f"{self._description}: {self._done}/{self._total}  {shown}  "
                f"{elapsed:.0f} s, {left:.0f} s left",
                highlight=False,
                soft_wrap=True,
            )

    def finish(self) -> None:
        """End the task and leave its last line on the screen."""
        if self._bar:
            self._bar.stop()
            self._bar = None
