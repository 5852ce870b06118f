"""Scoring of finished responses: groups go to the reward and the reference service and come back.

Nothing here generates. A call that finds a service away is repeated; answers of a model that is not
the run's are refused, or where the run may adopt a new reward model, a step is scored by one alone.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from kleash.base.errors import KleashError
from kleash.client.calls import ItemError
from kleash.client.types import GeneratedSequence
from kleash.lm.sequences import TokenSequence
from kleash.ppo.config import PPOConfig
from kleash.ppo.patience import Patience, is_curable
from kleash.ppo.rows import Row
from kleash.ppo.services import Services
from kleash.rpc.errors import PreconditionFailed, ServiceError

logger = logging.getLogger(__name__)

A = TypeVar("A", "Scored", list[np.ndarray])

Finished = tuple[Row, GeneratedSequence, TokenSequence]

REVISION_CHANGED = "REVISION_CHANGED"


class RolloutError(KleashError):
    """A service answered with something that cannot be trained on."""


@dataclass(frozen=True)
class Scored:
    """Scores of a group and the model that gave them."""

    scores: list[float]
    revision: str

    def __len__(self) -> int:
        return len(self.scores)


@dataclass(eq=False)
class Group:
    """Responses that are scored together."""

    rows: list[Finished]
    scores: Future[Scored]
    log_probs: Future[list[np.ndarray]]


@dataclass(frozen=True, eq=False)
class Scoring:
    """The scoring of one rollout; ``pool`` holds its threads."""

    services: Services
    config: PPOConfig
    tokenizer_sha256: str
    reward_revision: str
    reference_revision: str
    pool: ThreadPoolExecutor
    is_over: threading.Event

    def submit(self, rows: list[Finished]) -> Group:
        """Send a group to both services."""
        return Group(
            rows,
            scores=self.pool.submit(self._retry, self._score, rows),
            log_probs=self.pool.submit(self._retry, self._reference_log_probs, rows),
        )

    def check_reference(self) -> None:
        """Log-probs do not name the model they come from; a replaced service tells here."""
        patience = Patience(self.config.services.wait_s, self.is_over.is_set)
        while True:
            try:
                revision = self.services.reference.get_model().model.revision
                break
            except ServiceError as error:
                if not is_curable(error):
                    raise
                patience.wait_after(error)
        if revision != self.reference_revision:
            raise RolloutError(
                f"the reference service serves {revision}, and the run began with "
                f"{self.reference_revision}; serve that reference again and resume."
            )

    def settle(self, groups: Sequence[Group]) -> str:
        """Until one reward model has scored all groups: score those again that another one did.

        Blocks. Returns the revision. Replicas of two models answer while one is rolled out.
        """
        patience = Patience(self.config.services.wait_s, self.is_over.is_set)
        num_left = len(groups)
        while len(revisions := {group.scores.result().revision for group in groups}) > 1:
            # The new one: replicas of the old one are on their way out.
            wanted = max(revisions - {self.reward_revision})
            others = [group for group in groups if group.scores.result().revision != wanted]
            if len(others) < num_left:
                num_left = len(others)
                patience.start_again()
            patience.wait_after(
                PreconditionFailed(
                    f"{len(revisions)} reward models scored this step ({', '.join(revisions)}); "
                    "is the roll-out stuck?",
                    reason=REVISION_CHANGED,
                )
            )
            for group in others:
                group.scores = self.pool.submit(self._retry, self._score, group.rows)
        return revisions.pop() if revisions else self.reward_revision

    def _score(self, sequences: list[TokenSequence]) -> Scored:
        scores = self.services.reward.score_tokens(
            sequences,
            tokenizer_sha256=self.tokenizer_sha256,
            normalize=True,
            isolate=self.config.isolate_scoring,
        )
        revisions = {score.revision for score in scores} or {self.reward_revision}
        if self.config.services.new_reward_model == "refuse":
            for revision in revisions - {self.reward_revision}:
                raise RolloutError(
                    f"the reward service scored with {revision}, and the run began with "
                    f"{self.reward_revision}; serve that reward model again and resume, or resume "
                    "with services.new_reward_model=adopt."
                )
        elif len(revisions) > 1:
            raise PreconditionFailed(
                "two reward models scored one group of responses.", reason=REVISION_CHANGED
            )
        return Scored([score.score for score in scores], min(revisions))

    def _reference_log_probs(self, sequences: list[TokenSequence]) -> list[np.ndarray]:
        return self.services.reference.log_probs(
            sequences,
            temperature=self.config.sampling.temperature,
            tokenizer_sha256=self.tokenizer_sha256,
            isolate=self.config.isolate_scoring,
        )

    def _retry(self, function: Callable[[list[TokenSequence]], A], rows: list[Finished]) -> A:
        """Call until the service is there; a response that it cannot score is named."""
        patience = Patience(self.config.services.wait_s, self.is_over.is_set)
        while True:
            try:
                answers = function([sequence for _, _, sequence in rows])
            except ItemError as error:
                prompt_id = rows[error.index][0].record.prompt_id
                raise RolloutError(
                    f"the response to prompt {prompt_id!r} was not scored ({error.code}): "
                    f"{error.cause}"
                ) from None
            except ServiceError as error:
                may_adopt = self.config.services.new_reward_model == "adopt"
                is_mixed = error.reason == REVISION_CHANGED and may_adopt
                if not is_mixed and not is_curable(error):
                    raise
                patience.wait_after(error)
                continue
            if len(answers) != len(rows):
                raise RolloutError(
                    f"{len(rows)} sequences were sent to be scored, {len(answers)} came back."
                )
            return answers
