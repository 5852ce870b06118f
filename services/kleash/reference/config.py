"""Configuration of the reference service."""

from __future__ import annotations

import pydantic

from kleash.lm.config import FrozenModelConfig
from kleash.rpc.requests import Limits


class ReferenceLimits(Limits):
    """Limits of the reference service."""

    max_batch_tokens: int = pydantic.Field(default=8192, ge=1, lt=2**32)
    """Padded tokens in one forward pass, which holds a logit per token and vocabulary entry."""


class ReferenceConfig(FrozenModelConfig):
    """The frozen reference model, the checkpoint that PPO starts from."""

    limits: ReferenceLimits = ReferenceLimits()
    """Limits on requests, batches and the queue."""
