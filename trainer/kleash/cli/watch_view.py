"""The terminal's picture of a run."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from kleash.cli.watch_state import RunView, duration, sparkline

STYLES = {
    "starting": ("◌", "cyan"),
    "running": ("●", "green"),
    "paused": ("‖", "yellow"),
    "stopping": ("■", "yellow"),
    "stopped": ("■", "yellow"),
    "complete": ("✓", "blue"),
    "failed": ("✗", "red"),
    "not reached": ("○", "red"),
}
"""A sign and a colour: states differ where there are no colours, too."""

FIGURES = (
    ("score", "score_mean", "normalised"),
    ("KL from the reference", "kl_per_sequence", "nats a response"),
    ("reward", "reward_mean", "score - β·KL"),
    ("entropy", "entropy", "nats a token"),
    ("clip fraction", "clip_fraction", "of tokens"),
    ("response length", "response_length_mean", "tokens"),
)
PHASES = (
    ("generate", "blue"),
    ("score", "yellow"),
    ("old_log_probs", "magenta"),
    ("update", "green"),
    ("publish", "cyan"),
)
KEYS = (("p", "pause"), ("r", "resume"), ("c", "checkpoint"), ("s", "stop"), ("q", "leave"))
SIDE = 54
"""Columns beside a sparkline or a bar, with margins."""


def render(view: RunView, *, width: int, place: str, notice: str, has_keys: bool) -> RenderableType:
    """All of it. ``place`` is the trainer's, ``notice`` a sentence for the reader."""
    parts: list[RenderableType] = [_progress(view, width), _facts(view), Text()]
    parts += [_figures(view, width), Text(), _times(view, width)]
    if notice:
        parts += [Text(), Text(notice, style="bold")]
    if has_keys:
        parts += [Text(), _keys()]
    sign, colour = STYLES[view.state]
    title = Text.assemble(
        (f" {view.run.run_id or 'loading'} ", "bold"), (f"{sign} {view.state} ", f"bold {colour}")
    )
    return Panel(
        Group(*parts),
        title=title,
        title_align="left",
        subtitle=Text(f" {place} ", style="dim"),
        subtitle_align="right",
        border_style=colour,
        padding=(1, 2),
        width=width,
    )


def _progress(view: RunView, width: int) -> RenderableType:
    run = view.run
    table = Table.grid(padding=(0, 2))
    table.add_row(
        ProgressBar(
            total=max(run.total_steps, 1),
            completed=run.step,
            width=max(10, width - SIDE),
            style="bright_black",
            complete_style="green",
            finished_style="green",
        ),
        Text(f"step {run.step} of {run.total_steps}" if run.total_steps else "loading", "bold"),
        Text(f"{duration(view.step_s)} a step"),
        Text("" if view.left_s is None else f"{duration(view.left_s)} left"),
    )
    return table


def _facts(view: RunView) -> RenderableType:
    checkpoint = f"step {view.run.checkpoint_step}" if view.run.checkpoint_step else "none yet"
    return Text.assemble(
        ("weights version ", "dim"),
        str(view.run.weights_version),
        ("    newest checkpoint ", "dim"),
        checkpoint,
    )


def _figures(view: RunView, width: int) -> RenderableType:
    table = Table.grid(padding=(0, 2))
    table.add_column(width=21)
    table.add_column(justify="right", width=8)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(style="dim", no_wrap=True)
    for title, name, unit in FIGURES:
        values = view.series(name)
        shown = f"{values[-1]:.3g}" if values else "?"
        line = sparkline(values, max(10, width - SIDE - 2))
        table.add_row(title, Text(shown, style="bold"), line, unit)
    return table


def _times(view: RunView, width: int) -> RenderableType:
    """The newest step's phases, as one bar and in words."""
    latest = view.steps[-1].values if view.steps else {}
    seconds = [(name, colour, latest.get(f"time_{name}_s", 0.0)) for name, colour in PHASES]
    total = sum(each for _, _, each in seconds)
    bar, words = Text(), Text()
    room = max(10, width - 8)
    for name, colour, each in seconds:
        bar.append("█" * round(room * each / total if total else 0), style=colour)
        words.append("■ ", style=colour)
        words.append(f"{name.replace('_', ' ')} ", style="dim")
        # Glued together: a line breaks between phases.
        words.append(duration(each if latest else None).replace(" ", "\N{NO-BREAK SPACE}") + "  ")
    bar.truncate(room)
    words.no_wrap = False
    return Group(bar, words)


def _keys() -> Text:
    text = Text()
    for key, what in KEYS:
        text.append(f" {key} ", style="reverse")
        text.append(f" {what}   ", style="dim")
    return text
