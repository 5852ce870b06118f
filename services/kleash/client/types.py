"""What callers hand to the clients and get back: plain data, numpy arrays, no protobuf."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

FinishReason = Literal["stop", "length", "aborted"]
"""A stop token was drawn; the response is as long as it may be; new weights were committed."""


@dataclass(frozen=True, eq=False)
class Prompt:
    """A prompt and the samples wanted from it."""

    prompt_id: str
    """Unique within a call; part of the sampling counter."""
    ids: np.ndarray
    """Token ids, int32, at least one."""
    num_samples: int = 1
    first_sample_index: int = 0
    """Index of the first sample, to repeat only part of a prompt's samples."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn."""

    seed: int
    """Of the sampling counter; not negative."""
    max_new_tokens: int
    """Most tokens of one response, the stop token included."""
    temperature: float = 1.0
    """0 takes the most probable token."""
    top_k: int = 0
    """Keep the k most probable tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of tokens with at least this probability; 1 keeps all."""
    stop_token_ids: tuple[int, ...] = ()
    """Ids that end a response and stay its last token; empty means the model's own."""


@dataclass(frozen=True)
class VersionSpan:
    """The weights that produced tokens [start, end) of a response."""

    start: int
    end: int
    weights_version: int


@dataclass(frozen=True, eq=False)
class GeneratedSequence:
    """One finished response."""

    prompt_id: str
    sample_index: int
    ids: np.ndarray
    """Response token ids, int32, the stop token included."""
    log_probs: np.ndarray
    """Log-probability of each token under the distribution it was drawn from, float32, nats."""
    finish_reason: FinishReason
    version_spans: tuple[VersionSpan, ...]
    """Weights versions of the tokens, in order, without gaps."""


class Tokens(Protocol):
    """A tokenized prompt and response, as the scoring clients take it."""

    @property
    def ids(self) -> np.ndarray:
        """Prompt tokens, then response tokens, int32."""
        ...

    @property
    def response_start(self) -> int:
        """Index of the first response token."""
        ...
