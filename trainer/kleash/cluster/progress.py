"""A run's stages on a terminal: a table that moves; lines, where there is no terminal."""

from __future__ import annotations

import time
from collections.abc import Sequence

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from kleash.cluster.run_record import StageState
from kleash.cluster.stage_view import StageView
from kleash.cluster.stages import Stage

LINE_EVERY_S = 15.0
"""Without a terminal: how often progress gets a line when nothing else changes."""

_COLOURS = {
    StageState.COMPLETE: "green",
    StageState.FAILED: "red",
    StageState.PAUSED: "yellow",
    StageState.STOPPED: "yellow",
    StageState.RUNNING: "cyan",
    StageState.WAITING: "dim",
}


class RunDisplay:
    """Implements kleash.cluster.pipeline.Display; use it as a context manager."""

    def __init__(
        self, stages: Sequence[Stage], console: Console, *, line_every_s: float = LINE_EVERY_S
    ) -> None:
        self._console = console
        self._line_every_s = line_every_s
        self._views = {stage: StageView(stage) for stage in stages if stage is not Stage.SETUP}
        self._entered: dict[Stage, float] = {}
        self._told: dict[Stage, tuple[object, ...]] = {}
        self._printed = 0.0
        self._live: Live | None = None
        if console.is_terminal:
            self._live = Live(console=console, auto_refresh=False, transient=False)

    def __enter__(self) -> RunDisplay:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        if self._live:
            self._live.stop()

    def note(self, text: str) -> None:
        """One thing that happened."""
        clock = time.strftime("%H:%M:%S")
        self._print(f"{clock} {text}")

    def log(self, title: str, text: str) -> None:
        """The end of a log, between rules."""
        self._print(f"--- {title}")
        for line in text.splitlines():
            self._print(f"  | {line}")
        self._print("---")

    def show(self, view: StageView) -> None:
        """A stage as it is now."""
        now = time.monotonic()
        self._entered.setdefault(view.stage, now)
        self._views[view.stage] = view
        if self._live:
            self._live.update(self._table(now), refresh=True)
            return
        # What is worth a line at once, and what only now and then.
        news = (view.state, view.pods_ready, view.pods_wanted, view.reasons)
        is_news = self._told.get(view.stage) != news
        if is_news or (view.progress and now - self._printed >= self._line_every_s):
            self._told[view.stage], self._printed = news, now
            seconds = f"{now - self._entered[view.stage]:.0f} s"
            facts = [f"{view.stage}: {view.state.lower()}", describe(view), seconds]
            self._print("  ".join(filter(None, facts)))

    def _table(self, now: float) -> Table:
        table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
        for stage, view in self._views.items():
            colour = _COLOURS[view.state]
            entered = self._entered.get(stage)
            seconds = "" if entered is None else f"{now - entered:.0f} s"
            table.add_row(
                str(stage),
                f"[{colour}]{view.state.lower()}[/{colour}]",
                escape(describe(view)),
                f"[dim]{seconds}[/dim]",
            )
        return table

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


def describe(view: StageView) -> str:
    """Pods, progress, and why it waits, in one line."""
    parts = []
    if view.state is StageState.STOPPED and view.progress:
        return f"stopped at step {view.progress.done} of {view.progress.total}"
    if view.pods_wanted and view.state is not StageState.COMPLETE:
        parts.append(f"pods {view.pods_ready}/{view.pods_wanted}")
    if view.progress:
        parts.append(view.progress.text)
    if view.state is StageState.PAUSED:
        parts.append("kleash k8s resume goes on")
    parts.extend(reason.text for reason in view.reasons[:2])
    if len(view.reasons) > 2:
        parts.append(f"and {len(view.reasons) - 2} reasons more")
    return "  ".join(parts)
