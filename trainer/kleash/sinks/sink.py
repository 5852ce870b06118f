"""What a sink is, and what it is told about a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

End = Literal["completed", "stopped", "failed"]

SAMPLE_COLUMNS = (
    "prompt_id", "prompt", "response", "score", "reward", "kl", "length", "finish_reason",
    "weights_version",
)  # fmt: skip
"""Of the table of samples: reward and kl are sums over the response."""


@dataclass(frozen=True)
class RunDescription:
    """A run as a trainer starts on it."""

    run_id: str
    stage: str
    out: Path
    total_steps: int
    config: Mapping[str, Any] = field(default_factory=dict)
    """As in config.json."""
    environment: Mapping[str, Any] = field(default_factory=dict)
    """As the newest entry of environment.json."""
    from_step: int = 0
    """Steps that are done and stay so; later ones are done (again)."""
    seen_step: int = 0
    """The highest step of an earlier start, which a sink may have seen; at least from_step."""

    @property
    def is_resumed(self) -> bool:
        """Whether a trainer was here before."""
        return self.seen_step > 0


class Sink(Protocol):
    """Takes figures. Called from one thread; whatever it raises is logged and ends it alone."""

    def begin(self, run: RunDescription) -> None:
        """A trainer starts on a new run, or goes on with one that the sink may know."""
        ...

    def metrics(self, step: int, figures: Mapping[str, float]) -> None:
        """Figures of a step or of an evaluation after it, without ``step`` itself."""
        ...

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Lines of samples.jsonl of one step."""
        ...

    def end(self, state: End) -> None:
        """The trainer ends; a stopped or failed run may go on later."""
        ...


def sample_table(rows: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
    """Lines of samples.jsonl as rows of SAMPLE_COLUMNS."""
    return [
        [
            row["prompt_id"],
            row["prompt"],
            row["response"],
            row["score"],
            sum(row["rewards"]),
            sum(row["kl"]),
            len(row["response_token_ids"]),
            row["finish_reason"],
            row["weights_versions"][-1][-1],
        ]
        for row in rows
    ]


def flattened(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(key, value) of every leaf, keys joined by dots."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flattened(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
