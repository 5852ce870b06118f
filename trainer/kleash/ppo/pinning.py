"""The reward model of one step: chosen when the step begins, and named in each of its calls.

                        the newest that the service tells
    refuse  the run's   is another: a warning; the service may hold the run's for some time yet
    adopt   the run's   is another: the step is scored by that one

A call that meets a server without the step's model asks what is served. While replicas of two
models answer behind one address, several are asked, and the step keeps to its model as long as one
of them has it. When none has, the new one scores the whole step, or the run ends.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

from kleash.base.errors import KleashError
from kleash.ppo.services import Reward
from kleash.rpc.errors import NotFound

logger = logging.getLogger(__name__)

REVISION_NOT_SERVED = "REVISION_NOT_SERVED"
NUM_ASKED = 8
"""Answers that must all name another model before a step takes it, and calls that must all be
refused before it is asked: one of N replicas behind a round robin answers every Nth call."""


class RewardModelError(KleashError):
    """The service serves a reward model with which the run may not or cannot go on."""


class RewardPin:
    """The revision that scores a step. Its methods may be called from several threads."""

    def __init__(
        self,
        reward: Reward,
        revision: str,
        *,
        may_adopt: bool,
        told: set[str],
        describe_misfit: Callable[[Any], str] = lambda _: "",
    ) -> None:
        """Args:
        revision: of the step before.
        may_adopt: a new model is taken; False refuses it.
        told: revisions of which the log has said that they are refused; this one may add to them.
        describe_misfit: says why a model of this GetModelResponse cannot score the run; "" if it
            can.
        """
        self.revision = revision
        self._reward = reward
        self._may_adopt = may_adopt
        self._told = told
        self._describe_misfit = describe_misfit
        self._lock = threading.Lock()

    def begin_step(self) -> None:
        """Take the newest model, where the run may. Raises ServiceError, RewardModelError."""
        with self._lock:
            newest = self._ask()
            if newest is None:
                return
            if self._may_adopt:
                self._take(newest)
            elif newest.model.revision not in self._told:
                self._told.add(newest.model.revision)
                logger.warning(
                    "the reward service serves %s now; the run keeps to %s as long as the service "
                    "holds it, and ends then",
                    newest.model.revision,
                    self.revision,
                )

    def lost(self, revision: str, error: NotFound) -> None:
        """A server does not have the revision: is there another one that has, or a new model?

        Raises RewardModelError where the run may not go on with what is served; ServiceError when
        the service does not tell.
        """
        if not self._may_adopt:
            served = error.metadata.get("served", "another model")
            raise RewardModelError(
                f"the reward service serves {served} and no longer {revision}, with which the run "
                "began; serve that reward model again and resume, or resume with "
                "services.new_reward_model=adopt."
            )
        with self._lock:
            if self.revision == revision and (newest := self._ask()) is not None:
                logger.warning(
                    "the reward service no longer has %s; the step is scored by %s",
                    revision,
                    newest.model.revision,
                )
                self._take(newest)

    def _ask(self) -> Any:
        """What GetModel says of a newer model; None when a replica has none newer than this."""
        answer = None
        for _ in range(NUM_ASKED):
            answer = self._reward.get_model()
            if answer.model.revision == self.revision:
                return None
        return answer

    def _take(self, newest: Any) -> None:
        if why := self._describe_misfit(newest):
            raise RewardModelError(f"the reward service {why}.")
        self.revision = newest.model.revision
