"""Configuration of the reward service."""

from __future__ import annotations

from kleash.lm.config import FrozenModelConfig
from kleash.rpc.requests import Limits


class RewardConfig(FrozenModelConfig):
    """The reward model and what a request may ask of it."""

    limits: Limits = Limits()
    """Limits on requests, batches and the queue."""
