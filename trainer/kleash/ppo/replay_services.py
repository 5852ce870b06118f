"""Services that answer as they did in a recorded step. Any other question is an error."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Generator, Iterable, Sequence
from typing import Any, Self

import numpy as np

from kleash.base.errors import ConfigError
from kleash.client.reward import Score
from kleash.client.types import GeneratedSequence, Prompt, Sampling, Tokens
from kleash.policy.v1 import policy_pb2
from kleash.ppo import recorded_calls as calls
from kleash.ppo.pinning import REVISION_NOT_SERVED
from kleash.ppo.recorded_calls import Call, key_of
from kleash.ppo.services import Services
from kleash.reference.v1 import reference_pb2
from kleash.reward.v1 import reward_pb2
from kleash.rpc.errors import NotFound


class ReplayError(ConfigError):
    """The recording does not hold what the step asks for."""


class Replies:
    """Of one method: by request, in the order in which they came; the last one stays."""

    def __init__(self, recorded: Iterable[Call], service: str, method: str) -> None:
        self._name = f"{service} {method}"
        self._lock = threading.Lock()
        self._replies: dict[str, list[Any]] = defaultdict(list)
        self._not_served: dict[str, str] = {}
        for call in recorded:
            if (call.service, call.method) != (service, method):
                continue
            if call.error is None:
                self._replies[key_of(call.request)].append(call.reply)
            elif call.error["reason"] == REVISION_NOT_SERVED:
                self._not_served[call.request["revision"]] = call.error["message"]

    def to(self, request: dict[str, Any]) -> Any:
        """The next reply to an equal request.

        Raises NotFound where the request names a revision that servers did not have any more: the
        step then went on with another one, and which groups still met that is a matter of time.
        Raises ReplayError for any other request that was not made.
        """
        with self._lock:
            replies = self._replies.get(key_of(request))
            refusal = self._not_served.get(request.get("revision", ""))
            if not replies and refusal is not None:
                raise NotFound(refusal, reason=REVISION_NOT_SERVED)
            if not replies:
                raise ReplayError(
                    f"the recording has no reply to a {self._name} that the step asks for now: it "
                    "was recorded with another configuration or version of kleash; replay it with "
                    "the one that it was recorded with."
                )
            return replies.pop(0) if len(replies) > 1 else replies[0]


def replay_services(recorded: Sequence[Call]) -> Services:
    """Services that know no more than these calls; nothing can be published to them."""
    policy = ReplayPolicy(recorded)
    return Services(
        policies=dict.fromkeys(range(_num_shares(recorded)), policy),
        weights={},
        reward=ReplayReward(
            Replies(recorded, "reward", "GetModel"), Replies(recorded, "reward", "Score")
        ),
        reference=ReplayReference(recorded),
    )


def _num_shares(recorded: Iterable[Call]) -> int:
    """Into which the batch was split. Who was asked for a share does not tell: a replica may have
    left before, and another one have taken it over. What is asked for again is part of a share.
    """
    asked = {
        frozenset(prompt["prompt_id"] for prompt in call.request["prompts"])
        for call in recorded
        if call.method == "Generate"
    }
    return sum(not any(each < other for other in asked) for each in asked)


class ReplayPolicy:
    """Every replica: responses in the order in which they came to the trainer, whoever sent them.

    A share that another replica took over is found this way, too.
    """

    def __init__(self, recorded: Sequence[Call]) -> None:
        self._samplings = {
            key_of(call.request["sampling"]) for call in recorded if call.method == "Generate"
        }
        self._rows: dict[tuple[str, int], dict[str, Any]] = {}
        rows = [row for call in recorded if call.method == "Generate" for row in call.reply or ()]
        for row in sorted(rows, key=lambda row: row["at_s"]):
            if row["finish_reason"] != "aborted":
                self._rows.setdefault((row["prompt_id"], row["sample_index"]), row)

    def get_policy(self) -> policy_pb2.GetPolicyResponse:
        """Not part of a step. Raises ReplayError."""
        raise ReplayError("a recording does not say what GetPolicy answers.")

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        *,
        min_weights_version: int = 0,
        tokenizer_sha256: str = "",
    ) -> Generator[GeneratedSequence, None, None]:
        """Those of the recorded responses that are asked for."""
        request = calls.generate_request(
            prompts,
            sampling,
            min_weights_version=min_weights_version,
            tokenizer_sha256=tokenizer_sha256,
        )
        if key_of(request["sampling"]) not in self._samplings:
            raise ReplayError(
                f"the recording's responses were not drawn as the step asks for now ({sampling}); "
                "replay it with the configuration that it was recorded with."
            )
        wanted = {
            (prompt.prompt_id, prompt.first_sample_index + index)
            for prompt in prompts
            for index in range(prompt.num_samples)
        }
        if missing := wanted - self._rows.keys():
            prompt_id, sample = min(missing)
            raise ReplayError(
                f"the recording lacks {len(missing)} responses that the step asks for, such as "
                f"{sample} of prompt {prompt_id!r}; its calls.jsonl is not what was written."
            )
        for key, row in self._rows.items():
            if key in wanted:
                yield calls.generated_from_json(row)


class ReplayReward:
    """The reward service."""

    def __init__(self, models: Replies, scores: Replies, revision: str = "") -> None:
        self._models = models
        self._scores = scores
        self._revision = revision

    def pinned(self, revision: str) -> Self:
        """One that asks for this revision."""
        return type(self)(self._models, self._scores, revision)

    def get_model(self) -> reward_pb2.GetModelResponse:
        """What was served."""
        reply = self._models.to({"revision": self._revision})
        return calls.message_from_json(reply, reward_pb2.GetModelResponse())

    def score_tokens(
        self,
        sequences: Sequence[Tokens],
        *,
        tokenizer_sha256: str,
        normalize: bool = True,
        isolate: bool = False,
    ) -> list[Score]:
        """The scores of this very group."""
        request = calls.score_request(
            sequences,
            revision=self._revision,
            tokenizer_sha256=tokenizer_sha256,
            normalize=normalize,
            isolate=isolate,
        )
        return calls.scores_from_json(self._scores.to(request))


class ReplayReference:
    """The reference service."""

    def __init__(self, recorded: Sequence[Call]) -> None:
        self._models = Replies(recorded, "reference", "GetModel")
        self._log_probs = Replies(recorded, "reference", "LogProbs")

    def get_model(self) -> reference_pb2.GetModelResponse:
        """What was served."""
        return calls.message_from_json(self._models.to({}), reference_pb2.GetModelResponse())

    def log_probs(
        self,
        sequences: Sequence[Tokens],
        *,
        temperature: float,
        tokenizer_sha256: str,
        isolate: bool = False,
    ) -> list[np.ndarray]:
        """The log-probs of this very group."""
        request = calls.log_probs_request(
            sequences,
            temperature=temperature,
            tokenizer_sha256=tokenizer_sha256,
            isolate=isolate,
        )
        return calls.log_probs_from_json(self._log_probs.to(request))
