"""Configuration of the policy service."""

from __future__ import annotations

from pathlib import Path

import pydantic

from kleash.base.config import Config
from kleash.lm.config import FrozenModelConfig
from kleash.rpc.requests import Limits

DEFAULT_SEQUENCE_TOKENS = 2048
"""Room for a sequence where the configuration names none: a model's whole context may be 131072."""


class PolicyLimits(Limits):
    """Limits that the policy service enforces and advertises."""

    max_items: int = pydantic.Field(default=8192, ge=1, lt=2**32)
    """Responses in one request: prompts times samples."""
    max_item_tokens: int = pydantic.Field(default=0, ge=0, lt=2**32)
    """Tokens of one sequence, prompt and response; 0 means the model's context, at most 2048.
    Keys and values of max_running_sequences such sequences are kept in memory."""
    max_queued_tokens: int = pydantic.Field(default=4_194_304, ge=1)
    """Tokens of waiting responses, prompt plus max_new_tokens each; past it a call is refused with
    a time to retry."""
    max_batch_tokens: int = pydantic.Field(default=16_384, ge=1, lt=2**32)
    """Padded tokens of prompts in one forward pass; a longer prompt gets a pass of its own."""


class WeightsConfig(Config):
    """How new weights reach this replica."""

    publisher: str | None = None
    """Address of the trainer's weights store, host:port. With it the replica catches up by itself
    after a start or a failure, and is ready only at the version that the trainer requires; null
    waits for the trainer to come."""
    spool: Path | None = None
    """Folder on the disk of this machine for versions on their way in, of this replica alone; null
    makes a temporary one. Room for the model, and once more for what a full version overwrites."""


class PolicyConfig(FrozenModelConfig):
    """The model that generates at start, and what a request may ask of it."""

    max_running_sequences: int = pydantic.Field(default=64, ge=1, lt=2**32)
    """Sequences decoded side by side."""
    weights: WeightsConfig = WeightsConfig()
    """How new weights reach this replica."""
    limits: PolicyLimits = pydantic.Field(default_factory=PolicyLimits)
    """Limits on requests, batches and the queue."""
