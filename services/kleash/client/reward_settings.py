"""What a reward client is set to, and what of it the environment says.

KLEASH_REWARD_ADDRESS     "host:port" of the service, or a gRPC target
KLEASH_REWARD_MODEL       name of the model; the service's default without it
KLEASH_REWARD_TIMEOUT_S   seconds that a call may take; the client's default without it

TLS and tokens have variables of their own: kleash.rpc.credentials.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import TypedDict

from kleash.base.errors import ConfigError


@dataclass(frozen=True)
class ClientOptions:
    """Of the calls of one client."""

    model: str
    """Name of the model; empty for the service's default."""
    revision: str
    """What must be served; empty for the newest."""
    timeout_s: float
    """Deadline of each call, waits included."""
    max_wait_s: float
    """Of that, for a service that is busy."""
    parallel_calls: int
    """Calls of one list that are under way at a time."""


class OptionKeywords(TypedDict, total=False):
    """ClientOptions that change; the others stay as they are."""

    model: str
    revision: str
    timeout_s: float
    max_wait_s: float
    parallel_calls: int


class EnvironmentKeywords(TypedDict, total=False):
    """Keywords of a reward client that the environment sets."""

    address: str
    model: str
    timeout_s: float


def settings_from_env(*, needs_address: bool = True) -> EnvironmentKeywords:
    """As the environment says; empty variables count as missing.

    Raises ConfigError without an address that is needed, or for a time that is none.
    """
    address = os.environ.get("KLEASH_REWARD_ADDRESS", "").strip()
    if not address and needs_address:
        raise ConfigError(
            "KLEASH_REWARD_ADDRESS is not set; set it to the address of a reward service, such as "
            "reward:50051."
        )
    settings = EnvironmentKeywords(address=address) if address else EnvironmentKeywords()
    if model := os.environ.get("KLEASH_REWARD_MODEL", "").strip():
        settings["model"] = model
    if text := os.environ.get("KLEASH_REWARD_TIMEOUT_S", "").strip():
        settings["timeout_s"] = _seconds(text)
    return settings


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise ConfigError(f"KLEASH_REWARD_TIMEOUT_S={text} is not a number of seconds above 0.")
    return seconds
