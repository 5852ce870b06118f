"""Spans that a test records in this process, and reads back from the file that they went to."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kleash.base import tracing
from kleash.base.trace_setup import ServiceTracingConfig, TracingConfig, traced
from kleash.traces.read import RecordedSpan, read_spans


@dataclass
class Recording:
    """What was recorded, after the block."""

    path: Path

    @property
    def spans(self) -> list[RecordedSpan]:
        """In the order in which they ended."""
        return read_spans([self.path]) if self.path.exists() else []

    @property
    def text(self) -> str:
        """The file itself."""
        return self.path.read_text(encoding="utf-8") if self.path.exists() else ""

    def named(self, name: str) -> list[RecordedSpan]:
        return [span for span in self.spans if span.short_name == name]

    def one(self, name: str) -> RecordedSpan:
        (span,) = self.named(name)
        return span


@contextlib.contextmanager
def recorded(
    folder: Path, config: TracingConfig | None = None, *, service: str = "test"
) -> Iterator[Recording]:
    """Trace in the block into a file in ``folder``; by default what has no parent, too."""
    path = folder / "spans.jsonl"
    config = config or ServiceTracingConfig(exporter="file", file=path)
    assert not tracing.is_on(), "another test left tracing on"
    with traced(config, service, file=path):
        yield Recording(config.file or path)
