"""Replicas of a reward service behind a round robin, in this process: which revisions each holds is
what a test says, and a model other than the first is a function of the first one's scores.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from kleash.client.reward import Score
from kleash.reward.local import LocalReward
from kleash.rpc.errors import NotFound


@dataclass(eq=False)
class Fleet:
    """RewardCalls over ``replicas``: of each one the revisions that it holds, newest first."""

    model: LocalReward
    replicas: list[list[str]]
    functions: dict[str, Callable[[float], float]] = field(default_factory=dict)
    """Scores by revision; a revision that is not here scores as the model does."""
    scored: list[str] = field(default_factory=list)
    """Revision of each call that was answered."""
    num_refused: int = 0
    before_score: Callable[[], None] = lambda: None
    tokenizer_sha256: str = ""
    """Of the newest models; empty for the model's own."""
    _turn: int = 0
    _lock: Any = field(default_factory=threading.RLock)

    def _next(self) -> list[str]:
        with self._lock:
            self._turn += 1
            return self.replicas[self._turn % len(self.replicas)]

    def pinned(self, revision: str) -> Pinned:
        return Pinned(self, revision)

    def get_model(self) -> Any:
        return self.describe("")

    def describe(self, revision: str) -> Any:
        answer = self.model.get_model()
        answer.model.revision = self._served(self._next(), revision)
        if self.tokenizer_sha256:
            answer.tokenizer_sha256 = self.tokenizer_sha256
        return answer

    def score(self, revision: str, sequences: Sequence[Any], **options: Any) -> list[Score]:
        with self._lock:
            self.before_score()
            try:
                served = self._served(self._next(), revision)
            except NotFound:
                self.num_refused += 1
                raise
            self.scored.append(served)
            function = self.functions.get(served, lambda score: score)
            return [
                replace(its, value=function(its.value), revision=served)
                for its in self.model.score_tokens(sequences, **options)
            ]

    def _served(self, held: list[str], revision: str) -> str:
        if revision and revision not in held:
            raise NotFound(
                f"revision '{revision}' is not served here; this server has {', '.join(held)}.",
                reason="REVISION_NOT_SERVED",
                metadata={"requested": revision, "served": held[0]},
            )
        return revision or held[0]


@dataclass(frozen=True)
class Pinned:
    """The fleet's answers to calls that name a revision."""

    fleet: Fleet
    revision: str

    def pinned(self, revision: str) -> Pinned:
        return Pinned(self.fleet, revision)

    def get_model(self) -> Any:
        return self.fleet.describe(self.revision)

    def score_tokens(self, sequences: Sequence[Any], **options: Any) -> list[Score]:
        return self.fleet.score(self.revision, sequences, **options)
