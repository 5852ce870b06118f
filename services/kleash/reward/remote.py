"""A model of another reward service, behind this one.

Its facts are read when it is loaded, and every call names the revision that was found then: a reply
of ours never carries another one. When that service has it no longer, calls are refused with
REVISION_CHANGED and ``is_outdated`` is set until the model is loaded again.

Errors of that service are passed on as they are, but those about our credentials there, which
would tell a caller that its own are wrong. A call there ends with the latest deadline of those
whose items it holds.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kleash.base.errors import ConfigError
from kleash.client.calls import Cost, remote_call, run_calls, split_calls, token_cost
from kleash.client.reward import METHODS_TO_RETRY, SERVICE
from kleash.common.v1 import common_pb2
from kleash.lm.heads import Normalization
from kleash.reward.config import RewardModelConfig
from kleash.reward.inputs import input_kind
from kleash.reward.model import (
    BYTES_PER_TOKEN,
    Component,
    Fault,
    ModelFacts,
    RawScore,
    RewardModel,
    ScoreJob,
)
from kleash.reward.v1 import reward_pb2, reward_pb2_grpc
from kleash.rpc.channel import connect
from kleash.rpc.codec import decode_floats
from kleash.rpc.deadline import deadline
from kleash.rpc.errors import (
    InternalError,
    InvalidRequest,
    NotFound,
    PermissionDenied,
    PreconditionFailed,
    ServiceError,
    Unauthenticated,
    Unavailable,
)
from kleash.rpc.requests import TOO_LARGE, Limits, decode_sequence

PARALLEL_CALLS = 4
"""Of one batch, under way at a time."""
FRAME_BYTES = 1024
"""Room in a message for what it holds beside its items."""
PAUSE_S = 0.5
"""Between two looks for a service that does not answer yet."""


@dataclass(frozen=True, eq=False)
class _Sent:
    """One item as it goes to the other service."""

    item: reward_pb2.ScoreItem
    options: reward_pb2.ScoreOptions
    cost: Cost
    deadline: float | None


class RemoteModel(RewardModel):
    """A model of another service, of which the facts are known."""

    uses_model_thread = False

    def __init__(
        self,
        name: str,
        config: RewardModelConfig,
        limits: Limits,
        channel: Any,
        told: reward_pb2.GetModelResponse,
    ) -> None:
        self._config = config
        self._max_batch_tokens = limits.max_batch_tokens
        self._channel = channel
        self._stub = reward_pb2_grpc.RewardServiceStub(channel)
        self._there = told.model
        self._limits = told.limits
        super().__init__(
            ModelFacts(
                name=name,
                revision=told.model.revision,
                kind=reward_pb2.MODEL_KIND_REMOTE,
                dtype=told.dtype,
                tokenizer_sha256=told.tokenizer_sha256,
                chat_template_sha256=told.chat_template_sha256,
                max_item_tokens=told.limits.max_item_tokens,
                # A service that normalizes nothing may leave the figures out.
                normalization=Normalization(told.normalization_mean, told.normalization_std or 1.0),
                supports_token_scores=told.supports_token_scores,
                components=tuple(
                    Component(each.name, each.weight, each.revision) for each in told.components
                ),
                batch_tolerance=told.batch_tolerance,
            )
        )

    @staticmethod
    def load(name: str, config: RewardModelConfig, limits: Limits) -> RemoteModel:
        """Wait up to ``remote_timeout_s`` for the service, read its facts. Raises UserError."""
        channel = connect(config.remote, service=SERVICE, methods_to_retry=METHODS_TO_RETRY)
        try:
            return RemoteModel(name, config, limits, channel, _ask_for_model(channel, config))
        except ServiceError as error:
            channel.close()
            raise ConfigError(f"model '{name}', a remote one: {error.message}") from None
        except BaseException:
            channel.close()
            raise

    def prepare(
        self,
        items: Sequence[reward_pb2.ScoreItem],
        options: reward_pb2.ScoreOptions,
        place: str,
    ) -> list[ScoreJob | Fault]:
        """The items as they go to the other service, which tokenizes and truncates them."""
        raw = reward_pb2.ScoreOptions()
        raw.CopyFrom(options)
        raw.normalize = False
        ends = deadline()
        jobs: list[ScoreJob | Fault] = []
        for index, item in enumerate(items):
            cost = self._cost(item, place.format(index))
            room = self._limits.max_message_bytes - FRAME_BYTES
            if (num_bytes := item.ByteSize()) > room:
                cause = f"the input has {num_bytes} bytes and at most {room} are taken of one."
                jobs.append((common_pb2.ITEM_STATUS_CODE_INPUT_TOO_LONG, cause))
                continue
            # The other service has a limit of its own, and answers with a status per item.
            size = min(max(cost.num_tokens, 1), self._max_batch_tokens)
            jobs.append(ScoreJob(_Sent(item, raw, cost, ends), size, options.return_token_scores))
        return jobs

    def count_tokens(self, items: Sequence[reward_pb2.ScoreItem], place: str) -> list[int | Fault]:
        """What the other service counts."""
        costs = [self._cost(item, place.format(index)) for index, item in enumerate(items)]
        counts: list[int | Fault] = []
        for part in split_calls(costs, self._limits):
            request = reward_pb2.CountTokensRequest(
                items=items[part], model=self._there.name, revision=self._there.revision
            )
            counts += self._call("CountTokens", request, self._config.remote_timeout_s).token_counts
        return counts

    def compute(self, jobs: list[ScoreJob]) -> list[RawScore]:
        """Ask the other service. Raises ServiceError."""
        groups: dict[bytes, list[int]] = {}
        for index, job in enumerate(jobs):
            key = job.content.options.SerializeToString(deterministic=True)
            groups.setdefault(key, []).append(index)
        scores: dict[int, RawScore] = {}
        for indices in groups.values():
            found = self._score([jobs[index].content for index in indices])
            scores.update(zip(indices, found, strict=True))
        return [scores[index] for index in range(len(jobs))]

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()

    def _score(self, sent: list[_Sent]) -> list[RawScore]:
        """Scores of items with the same options.

        An item that the other service calls invalid fails alone, not with those of other callers.
        """
        try:
            return self._score_parts(sent)
        except InvalidRequest as error:
            if error.reason == TOO_LARGE:
                self._limits = self._get_model().limits
                return self._score_parts(sent)
            if len(sent) > 1:
                return [self._score([each])[0] for each in sent]
            return [RawScore(fault=(common_pb2.ITEM_STATUS_CODE_INVALID_INPUT, error.message))]

    def _score_parts(self, sent: list[_Sent]) -> list[RawScore]:
        timeout_s = self._time_left_s(sent)
        requests = [
            reward_pb2.ScoreRequest(
                items=[each.item for each in sent[part]],
                options=sent[0].options,
                model=self._there.name,
                revision=self._there.revision,
            )
            for part in split_calls([each.cost for each in sent], self._limits)
        ]
        replies = run_calls(
            lambda request: self._call("Score", request, timeout_s),
            requests,
            parallel=PARALLEL_CALLS,
        )
        for request, reply in zip(requests, replies, strict=True):
            if reply.model.revision != self._there.revision:
                raise self._changed(f"it answered with {reply.model.revision}")
            if len(reply.results) != len(request.items):
                raise InternalError(
                    f"the reward service at {self._config.remote} sent {len(reply.results)} "
                    f"results for {len(request.items)} items."
                )
        return [self._raw(result) for reply in replies for result in reply.results]

    def _raw(self, result: reward_pb2.ScoreResult) -> RawScore:
        if result.code != common_pb2.ITEM_STATUS_CODE_OK:
            return RawScore(fault=(result.code, result.error_message))
        parts = {each.name: each.score for each in result.components}
        if parts.keys() != {each.name for each in self.facts.components}:
            raise InternalError(
                f"the reward service at {self._config.remote} sent the components "
                f"{', '.join(parts) or 'none'}, which its GetModel does not tell."
            )
        token_scores = None
        if result.HasField("token_scores"):
            token_scores = decode_floats(result.token_scores, field="token_scores")
        return RawScore(
            result.score,
            token_scores,
            components=tuple(parts[each.name] for each in self.facts.components),
            uncertainty=result.uncertainty,
            num_tokens=result.token_count,
            is_truncated=result.truncated,
        )

    def _call(self, method: str, request: Any, timeout_s: float) -> Any:
        call = remote_call(
            self._stub, service=SERVICE, address=self._config.remote, timeout_s=timeout_s
        )
        try:
            return call(method, request)
        except NotFound as error:
            raise self._changed(error.message.rstrip(".")) from error
        except (Unauthenticated, PermissionDenied) as error:
            raise PreconditionFailed(
                f"the reward service at {self._config.remote} refuses this server: {error.message}",
                reason="REMOTE_REFUSED",
            ) from error

    def _changed(self, cause: str) -> PreconditionFailed:
        self.is_outdated = True
        return PreconditionFailed(
            f"the reward service behind '{self.facts.name}' does not serve revision "
            f"{self._there.revision} any more ({cause}); its operator has to load it again.",
            reason="REVISION_CHANGED",
            metadata={"served": self._there.revision},
        )

    def _get_model(self) -> reward_pb2.GetModelResponse:
        request = reward_pb2.GetModelRequest(model=self._there.name, revision=self._there.revision)
        return self._call("GetModel", request, self._config.remote_timeout_s)

    def _time_left_s(self, sent: Sequence[_Sent]) -> float:
        most_s = self._config.remote_timeout_s
        ends = [each.deadline for each in sent]
        if None in ends:
            return most_s
        left_s = max(each for each in ends if each is not None) - time.monotonic()
        return min(max(left_s, 0.001), most_s)

    def _cost(self, item: reward_pb2.ScoreItem, place: str) -> Cost:
        """What an item takes of the other service's limits; of text the tokens are estimated."""
        if input_kind(item, place) == "tokens":
            ids, _ = decode_sequence(
                item.tokens, tokenizer_sha256=self.facts.tokenizer_sha256, field=f"{place}.tokens"
            )
            return token_cost(len(ids))
        num_bytes = item.ByteSize()
        return Cost(4 * num_bytes + 256, -(-num_bytes // BYTES_PER_TOKEN))


def _ask_for_model(channel: Any, config: RewardModelConfig) -> reward_pb2.GetModelResponse:
    """GetModel of a service that may start later than this one. Raises ServiceError."""
    stub = reward_pb2_grpc.RewardServiceStub(channel)
    ends = time.monotonic() + config.remote_timeout_s
    request = reward_pb2.GetModelRequest(model=config.remote_model, revision=config.remote_revision)
    while True:
        left_s = max(ends - time.monotonic(), 0.001)
        try:
            call = remote_call(stub, service=SERVICE, address=config.remote, timeout_s=left_s)
            told = call("GetModel", request)
        except Unavailable:
            if time.monotonic() + PAUSE_S >= ends:
                raise
            time.sleep(PAUSE_S)
            continue
        return told
