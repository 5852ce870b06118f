"""Configuration of the reward service."""

from __future__ import annotations

import pydantic

from kleash.lm.frozen import FrozenModelConfig
from kleash.rpc.requests import Limits


class RewardConfig(FrozenModelConfig):
    """The reward model and what a request may ask of it."""

    limits: Limits = pydantic.Field(default_factory=Limits)
    """Limits on requests, batches and the queue."""
