"""What a run keeps beside its figures: responses, checkpoints, recordings."""

from __future__ import annotations

from typing import Any, Self

import pydantic

from kleash.base.config import Config


class SamplesConfig(Config):
    """Responses of training that are kept to be read, in samples.jsonl."""

    per_step: int = pydantic.Field(default=8, ge=0)
    """The first so many responses of a step; 0 keeps none. A response of 100 tokens takes 4 kB."""
    every: int = pydantic.Field(default=1, ge=1)
    """Steps between those of which responses are kept."""


class CheckpointConfig(Config):
    """Complete checkpoints from which a run goes on bit for bit."""

    every: int = pydantic.Field(default=10, ge=1)
    """Steps between checkpoints; there is one at the end in any case."""
    keep: int = pydantic.Field(default=2, ge=1)
    """Newest checkpoints that are kept."""


class RecordConfig(Config):
    """Steps that are recorded, to be done again by ``kleash replay``.

    A recording takes the room of a checkpoint, and its step the time of one.
    """

    steps: tuple[int, ...] = ()
    """These steps; a single one as a number, too."""
    every: int | None = pydantic.Field(default=None, ge=1)
    """And each step that is a multiple of it."""
    keep: int = pydantic.Field(default=4, ge=1)
    """Newest recordings that are kept."""

    @property
    def is_on(self) -> bool:
        """Whether any step is to be recorded."""
        return bool(self.steps) or self.every is not None

    def chooses(self, step: int) -> bool:
        """Whether ``step`` is to be recorded."""
        return step in self.steps or (self.every is not None and step % self.every == 0)

    @pydantic.field_validator("steps", mode="before")
    @classmethod
    def _one_step(cls, value: Any) -> Any:
        return (value,) if isinstance(value, int) else value

    @pydantic.model_validator(mode="after")
    def _check_steps(self) -> Self:
        if wrong := [step for step in self.steps if step < 1]:
            raise ValueError(f"steps names {wrong[0]}; the first step is 1")
        if (num_steps := len(set(self.steps))) > self.keep:
            raise ValueError(
                f"steps names {num_steps} steps, and of them the newest {self.keep} are kept; "
                "raise keep"
            )
        return self
