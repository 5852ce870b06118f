"""The clients that other applications import: gRPC and numpy, never torch.

>>> from kleash.client import RewardClient
>>> with RewardClient("reward:50051") as reward:
...     scores = reward.score_texts(["How do I boil an egg? Eight minutes in boiling water."])

TLS and tokens come from the environment, or as ``credentials=Credentials(...)``: docs/security.md.
"""

from __future__ import annotations

from kleash.client.calls import ItemError
from kleash.client.policy import PolicyClient
from kleash.client.reference import ReferenceClient
from kleash.client.reward import Comparison, RewardClient, Score
from kleash.client.reward_aio import AsyncRewardClient
from kleash.client.trainer import TrainerClient
from kleash.client.types import GeneratedSequence, Prompt, Sampling, Tokens, VersionSpan
from kleash.client.weights import WeightsClient
from kleash.rpc.credentials import Credentials
from kleash.rpc.errors import (
    Cancelled,
    DeadlineExceeded,
    InternalError,
    InvalidRequest,
    NotFound,
    Overloaded,
    PermissionDenied,
    PreconditionFailed,
    ServiceError,
    Unauthenticated,
    Unavailable,
)

__all__ = [
    "AsyncRewardClient",
    "Cancelled",
    "Comparison",
    "Credentials",
    "DeadlineExceeded",
    "GeneratedSequence",
    "InternalError",
    "InvalidRequest",
    "ItemError",
    "NotFound",
    "Overloaded",
    "PermissionDenied",
    "PolicyClient",
    "PreconditionFailed",
    "Prompt",
    "ReferenceClient",
    "RewardClient",
    "Sampling",
    "Score",
    "ServiceError",
    "Tokens",
    "TrainerClient",
    "Unauthenticated",
    "Unavailable",
    "VersionSpan",
    "WeightsClient",
]
