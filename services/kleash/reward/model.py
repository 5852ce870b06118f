"""What a reward model is to the service: inputs to jobs, jobs to raw scores. No gRPC, no queue.

    ClassifierModel   a Hugging Face sequence classifier: classifier.py
    FunctionModel     a Python function in a process of its own: function.py
    RemoteModel       a model of another reward service: remote.py
    Ensemble          several of these, whose scores are combined: ensemble.py

Each kind is one module; load.py makes the one that a configuration asks for.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kleash.common.v1 import common_pb2
from kleash.lm.heads import Normalization
from kleash.reward.v1 import reward_pb2

BYTES_PER_TOKEN = 4
"""Of text, where no tokenizer counts: about what English takes."""

Fault = tuple[common_pb2.ItemStatusCode, str]
"""Status of an item that has no score, and the cause."""


@dataclass(frozen=True)
class Component:
    """A head of a model with several, or a member of an ensemble."""

    name: str
    weight: float
    revision: str = ""
    """Of a member; empty for a head."""


@dataclass(frozen=True)
class ModelFacts:
    """What identifies a loaded reward model, and what GetModel tells of it."""

    name: str
    revision: str
    """Digest of whatever computes the score."""
    kind: reward_pb2.ModelKind
    dtype: str = ""
    """Data type of the weights; empty where there are none."""
    tokenizer_sha256: str = ""
    """Empty for a model that takes no token ids."""
    chat_template_sha256: str = ""
    max_item_tokens: int = 0
    """Longest input, in tokens."""
    normalization: Normalization = field(default_factory=Normalization)
    supports_token_scores: bool = False
    components: tuple[Component, ...] = ()
    batch_tolerance: float = 0.0
    """How far the raw score of an item may be from its score in another batch."""


@dataclass(frozen=True, eq=False)
class ScoreJob:
    """One item, ready for the model that prepared it."""

    content: Any
    """What the model's ``compute`` takes; int32 token ids for a classifier."""
    num_tokens: int
    """Its size in a batch, at least 1. A model without a tokenizer estimates it."""
    wants_token_scores: bool = False
    is_truncated: bool = False


@dataclass(frozen=True, eq=False)
class RawScore:
    """What the model answered for one item, before normalization."""

    score: float = math.nan
    """May be NaN, which the caller must not pass on."""
    token_scores: np.ndarray | None = None
    """float32, one per token, when asked for."""
    components: tuple[float, ...] = ()
    """One raw score per component of the model."""
    uncertainty: float = 0.0
    """Standard deviation of an ensemble's members."""
    fault: Fault | None = None
    """Why this item has no score, where only computing it could tell."""
    num_tokens: int | None = None
    """Tokens that the model saw, where the job's size is an estimate; 0 for none known."""
    is_truncated: bool = False
    """What only the model could tell; a job tells it otherwise."""


def estimated_tokens(text: str) -> int:
    """Size of a text in a batch where no tokenizer counts: its UTF-8 bytes by 4, at least 1."""
    return max(1, -(-len(text.encode()) // BYTES_PER_TOKEN))


class RewardModel(ABC):
    """A loaded and warm reward model. ``prepare`` and ``count_tokens`` are thread-safe."""

    uses_model_thread = True
    """Whether ``compute`` keeps the processor or the GPU busy, so that one model computes at a
    time; False for one that waits for others."""

    is_outdated = False
    """Whether what it was loaded from is another revision by now, so that it refuses calls until
    it is loaded again."""

    def __init__(self, facts: ModelFacts) -> None:
        self.facts = facts

    @property
    def served(self) -> common_pb2.ServedModel:
        """Name and revision as every reply tells them."""
        return common_pb2.ServedModel(name=self.facts.name, revision=self.facts.revision)

    @abstractmethod
    def prepare(
        self,
        items: Sequence[reward_pb2.ScoreItem],
        options: reward_pb2.ScoreOptions,
        place: str,
    ) -> list[ScoreJob | Fault]:
        """A job for each item, after tokenization and truncation, or why there is none.

        Slow for text: runs off the event loop. Raises ServiceError for an item that is malformed
        as a message; ``place`` with the item's index filled in is its path in the request.
        """

    @abstractmethod
    def count_tokens(self, items: Sequence[reward_pb2.ScoreItem], place: str) -> list[int | Fault]:
        """Tokens of each item before truncation. Raises ServiceError as ``prepare`` does."""

    @abstractmethod
    def compute(self, jobs: list[ScoreJob]) -> list[RawScore]:
        """Score one batch; one call at a time."""

    def close(self) -> None:  # noqa: B027 - most have nothing
        """Give back what the model holds beside memory; nothing computes any more."""
