"""Scoring of finished responses: groups go to the reward and the reference service and come back.

Nothing here generates. A call that finds a service away is repeated. Every call names the reward
model of the step (pinning.py); a step is scored by one alone.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from kleash.base import tracing
from kleash.base.errors import KleashError
from kleash.base.tracing import Span
from kleash.client.calls import ItemError
from kleash.client.types import GeneratedSequence
from kleash.lm.sequences import TokenSequence
from kleash.ppo.calibration import Probe, RewardState
from kleash.ppo.config import PPOConfig
from kleash.ppo.patience import Patience, is_curable
from kleash.ppo.pinning import NUM_ASKED, REVISION_NOT_SERVED, RewardPin
from kleash.ppo.rows import Row
from kleash.ppo.services import Services
from kleash.rpc.errors import NotFound, PreconditionFailed, ServiceError

logger = logging.getLogger(__name__)

A = TypeVar("A", "Scored", list[np.ndarray])

Finished = tuple[Row, GeneratedSequence, TokenSequence]
Input = tuple[str, TokenSequence]
"""Id of the prompt; prompt and response."""

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
class ScoredGroup:
    """Responses that the reward model scores together."""

    inputs: list[Input]
    scores: Future[Scored]


@dataclass(eq=False)
class Group(ScoredGroup):
    """Responses of a rollout that are scored together, by the reference too."""

    rows: list[Finished]
    log_probs: Future[list[np.ndarray]]


@dataclass(frozen=True, eq=False)
class Scoring:
    """The scoring of one rollout; ``pool`` holds its threads."""

    services: Services
    config: PPOConfig
    tokenizer_sha256: str
    pin: RewardPin
    reference_revision: str
    pool: ThreadPoolExecutor
    is_over: threading.Event
    parent: Span | None = field(default_factory=tracing.current)
    """What its spans are part of: not of the generation that they overlap."""
    refused: list[str] = field(default_factory=list)
    """Revisions that no server had, once for each time."""

    def begin_step(self) -> None:
        """Choose the step's reward model. Blocks until the service tells which one it serves."""
        patience = Patience(self.config.services.wait_s, self.is_over.is_set)
        patience.until_answered(self.pin.begin_step)

    def submit(self, rows: list[Finished]) -> Group:
        """Send a group to both services."""
        inputs = [(row.record.prompt_id, sequence) for row, _, sequence in rows]
        return Group(
            inputs,
            scores=self._submit_score(inputs),
            rows=rows,
            log_probs=self.pool.submit(self._retry, self._reference_log_probs, inputs, "reference"),
        )

    def check_reference(self) -> None:
        """Log-probs do not name the model they come from; a replaced service tells here."""
        patience = Patience(self.config.services.wait_s, self.is_over.is_set)
        revision = patience.until_answered(self.services.reference.get_model).model.revision
        if revision != self.reference_revision:
            raise RolloutError(
                f"the reference service serves {revision}, and the run began with "
                f"{self.reference_revision}; serve that reference again and resume."
            )

    def settle(self, groups: Sequence[Group], state: RewardState) -> RewardState:
        """Until the model of the step has scored all groups; blocks.

        What another one scored before the step had to change its model is scored again. ``state``
        is that of the step before; a new model scores its probes too, and is calibrated on them.
        """
        patience = Patience(self.config.services.wait_s, self.is_over.is_set)
        probes: list[ScoredGroup] = []
        num_left = len(groups)
        while True:
            wanted = self.pin.revision
            if wanted != state.revision and not probes:
                probes = self._submit_probes(state.probes)
            parts = [*groups, *(probes if wanted != state.revision else ())]
            others = [part for part in parts if part.scores.result().revision != wanted]
            if self.pin.revision != wanted:
                continue  # a call that was waited for has met a service without it
            if not others:
                break
            if len(others) < num_left:
                num_left = len(others)
                patience.start_again()
            patience.wait_after(
                PreconditionFailed(
                    f"the reward model of this step became {wanted} while it was scored: a part is "
                    "scored again; see kubectl rollout status if that goes on.",
                    reason=REVISION_CHANGED,
                )
            )
            for part in others:
                part.scores = self._submit_score(part.inputs)
        if wanted == state.revision:
            return state
        if self.config.services.calibration == "none":
            return RewardState(wanted)
        return state.followed_by(
            wanted, [score for part in probes for score in part.scores.result().scores]
        )

    def _submit_probes(self, probes: Sequence[Probe]) -> list[ScoredGroup]:
        if self.config.services.calibration == "none":
            return []
        inputs = [(probe.prompt_id, probe.sequence) for probe in probes]
        size = self.config.services.group_size
        parts = [inputs[start : start + size] for start in range(0, len(inputs), size)]
        return [ScoredGroup(part, self._submit_score(part)) for part in parts]

    def _submit_score(self, inputs: list[Input]) -> Future[Scored]:
        return self.pool.submit(self._retry, self._score, inputs, "score")

    def _score(self, sequences: list[TokenSequence]) -> Scored:
        """By the model of the step. Where a server is without it, the next one of a round robin may
        have it: calls in a row meet all, more of them each time that none had it.
        """
        revision = self.pin.revision
        refusal: NotFound | None = None
        for _ in range(NUM_ASKED + len(self.refused)):
            try:
                return self._score_by(revision, sequences)
            except NotFound as error:
                if error.reason != REVISION_NOT_SERVED:
                    raise
                refusal = error
        assert refusal is not None
        self.refused.append(revision)
        self.pin.lost(revision, refusal)
        raise NotFound(
            f"{refusal.message.rstrip('.')}; the call is repeated, see kubectl rollout status if "
            "that goes on.",
            reason=REVISION_NOT_SERVED,
        )

    def _score_by(self, revision: str, sequences: list[TokenSequence]) -> Scored:
        scores = self.services.reward.pinned(revision).score_tokens(
            sequences,
            tokenizer_sha256=self.tokenizer_sha256,
            normalize=True,
            isolate=self.config.isolate_scoring,
        )
        if others := {score.revision for score in scores} - {revision}:
            raise RolloutError(
                f"the reward service was asked for the scores of {revision} and sent those of "
                f"{', '.join(sorted(others))}; serve it with the trainer's version of kleash, then "
                "resume."
            )
        return Scored([score.score for score in scores], revision)

    def _reference_log_probs(self, sequences: list[TokenSequence]) -> list[np.ndarray]:
        return self.services.reference.log_probs(
            sequences,
            temperature=self.config.sampling.temperature,
            tokenizer_sha256=self.tokenizer_sha256,
            isolate=self.config.isolate_scoring,
        )

    def _retry(
        self, function: Callable[[list[TokenSequence]], A], inputs: list[Input], what: str
    ) -> A:
        """Call until the service is there; a response that it cannot score is named."""
        patience = Patience(self.config.services.wait_s, self.is_over.is_set)
        while True:
            try:
                with tracing.span(what, parent=self.parent, responses=len(inputs)):
                    answers = function([sequence for _, sequence in inputs])
            except ItemError as error:
                prompt_id, _ = inputs[error.index]
                raise RolloutError(
                    f"the response to prompt {prompt_id!r} was not scored ({error.code}): "
                    f"{str(error.cause).rstrip('.')}; take that prompt out of --prompts, or raise "
                    "the limit that it names, and resume."
                ) from None
            except ServiceError as error:
                # Another replica has the revision still, or the step has another one now.
                if error.reason != REVISION_NOT_SERVED and not is_curable(error):
                    raise
                patience.wait_after(error)
                continue
            if len(answers) != len(inputs):
                raise RolloutError(
                    f"{len(inputs)} sequences were sent to be scored, {len(answers)} came back; "
                    "serve reward model and reference with the trainer's version of kleash, then "
                    "resume."
                )
            return answers
