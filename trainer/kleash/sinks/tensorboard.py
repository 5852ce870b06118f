"""TensorBoard: event files in the run folder.

A resumed run writes a new event file that begins by purging every step after its checkpoint:
TensorBoard then shows each step once, as metrics.jsonl does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from kleash.sinks.config import TensorBoardConfig
from kleash.sinks.sink import SAMPLE_COLUMNS, End, RunDescription, sample_table


class TensorBoardSink:
    """Scalars by the keys of metrics.jsonl, texts for configuration, environment and samples."""

    def __init__(self, config: TensorBoardConfig) -> None:
        self._config = config
        self._writer: Any = None

    def begin(self, run: RunDescription) -> None:
        """Open a new event file."""
        from torch.utils.tensorboard.writer import SummaryWriter

        folder = self._config.folder or run.out / "tensorboard"
        # Without a checkpoint the evaluation before the first step is done again, too.
        first = run.from_step + 1 if run.from_step else 0
        purge_step = first if run.is_resumed else None
        self._writer = SummaryWriter(str(folder), purge_step=purge_step)
        for name, content in (("config", run.config), ("environment", run.environment)):
            text = json.dumps(content, indent=2, ensure_ascii=False)
            self._writer.add_text(name, f"```json\n{text}\n```", run.from_step)

    def metrics(self, step: int, figures: Mapping[str, float]) -> None:
        """One scalar a figure, on disk at once: somebody is watching."""
        for key, value in figures.items():
            self._writer.add_scalar(key, value, step)
        self._writer.flush()

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """A table in Markdown."""
        lines = ["| " + " | ".join(SAMPLE_COLUMNS) + " |", "|" + " --- |" * len(SAMPLE_COLUMNS)]
        lines += ["| " + " | ".join(map(_cell, row)) + " |" for row in sample_table(rows)]
        self._writer.add_text("samples", "\n".join(lines), step)

    def end(self, state: End) -> None:
        """Close the event file."""
        self._writer.add_text("state", state)
        self._writer.close()


def _cell(value: Any) -> str:
    """Text of a table's cell that Markdown leaves as it is."""
    if isinstance(value, float):
        return f"{value:.4g}"
    text = str(value).replace("&", "&amp;").replace("<", "&lt;").replace("|", "&#124;")
    for mark in "\\`*_[]":
        text = text.replace(mark, f"&#{ord(mark)};")
    return text.replace("\n", "<br>")
