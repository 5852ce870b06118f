"""Client of the reward service: scores, comparisons and token counts, split to the server's limits.

with RewardClient("reward:50051") as reward:
    print(reward.score_texts(["..."])[0].score)

AsyncRewardClient, for asyncio, is in reward_aio.py; what both send is in reward_messages.py.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import Any, Self, TypeVar, Unpack

import grpc

from kleash.client.calls import Call, remote_call, run_calls
from kleash.client.reward_messages import (
    TOO_LARGE,
    Comparison,
    KnownLimits,
    ListKeywords,
    Messages,
    Plan,
    RewardPlans,
    Score,
    ScoreKeywords,
    Truncation,
    input_item,
    options,
    read_score,
    token_item,
)
from kleash.client.reward_settings import ClientOptions, OptionKeywords, settings_from_env
from kleash.client.types import Tokens
from kleash.common.v1 import common_pb2
from kleash.reward.v1 import reward_pb2, reward_pb2_grpc
from kleash.rpc.call_spans import client_call
from kleash.rpc.channel import connect
from kleash.rpc.credentials import Credentials
from kleash.rpc.errors import InvalidRequest, from_rpc_error

__all__ = ["Comparison", "RewardCalls", "RewardClient", "Score", "Truncation"]

SERVICE = "kleash.reward.v1.RewardService"
METHODS_TO_RETRY = ("Score", "Compare", "CountTokens", "GetModel", "ListModels")

R = TypeVar("R")


class RewardCalls:
    """The typed calls, over whatever carries them: gRPC here, a method call in LocalReward."""

    def __init__(
        self, call: Call, *, model: str = "", revision: str = "", parallel_calls: int = 1
    ) -> None:
        self._call = call
        self._plans = RewardPlans(model, revision)
        self._parallel_calls = parallel_calls
        self._limits = KnownLimits()

    def pinned(self, revision: str) -> Self:
        """The same with calls that this revision alone answers.

        They raise NotFound, REVISION_NOT_SERVED, where it is not served.
        """
        other = copy.copy(self)
        other._plans = RewardPlans(self._plans.model, revision)
        return other

    def get_model(self) -> reward_pb2.GetModelResponse:
        """Name, revision, digests, normalization, components and limits of the served model."""
        return self._call("GetModel", self._plans.get_model())

    def list_models(self) -> list[common_pb2.ServedModel]:
        """Name and newest revision of each served model, the default one first."""
        return list(self._call("ListModels", reward_pb2.ListModelsRequest()).models)

    def score_tokens(
        self,
        sequences: Sequence[Tokens],
        *,
        tokenizer_sha256: str,
        **keywords: Unpack[ListKeywords],
    ) -> list[Score]:
        """Score token ids, in order.

        ``tokenizer_sha256`` is the digest of the tokenizer that made the ids; another one than the
        server's raises PreconditionFailed. The other keywords are those of ListKeywords.
        """
        items = [token_item(sequence, tokenizer_sha256) for sequence in sequences]
        return self._run(self._plans.score(items, **keywords)) if items else []

    def score_texts(self, texts: Sequence[str], **keywords: Unpack[ListKeywords]) -> list[Score]:
        """Score texts as they stand, special tokens included, in order. Keywords: ListKeywords."""
        return self.score(texts, **keywords)

    def score_conversations(
        self, conversations: Sequence[Messages], **keywords: Unpack[ListKeywords]
    ) -> list[Score]:
        """Score conversations, which the model's chat template renders on the server, in order.

        Keywords: ListKeywords.
        """
        return self.score(conversations, **keywords)

    def score(
        self, inputs: Sequence[str | Messages], **keywords: Unpack[ListKeywords]
    ) -> list[Score]:
        """Score texts and conversations together, in order. Keywords: ListKeywords."""
        items = [input_item(each) for each in inputs]
        return self._run(self._plans.score(items, **keywords)) if items else []

    def compare(
        self, prompt: str | Messages, responses: Sequence[str], **keywords: Unpack[ScoreKeywords]
    ) -> Comparison:
        """Rank at least two responses to one prompt (a user's text, or messages).

        Keywords: ScoreKeywords.
        """
        return self._run(self._plans.compare(prompt, responses, **keywords))

    def count_tokens(self, inputs: Sequence[str | Messages]) -> list[int]:
        """Tokens of each text or conversation as the model would see it, before any truncation."""
        items = [input_item(each) for each in inputs]
        return self._run(self._plans.count_tokens(items)) if items else []

    def _run(self, plan: Plan[R]) -> R:
        limits = self._known_limits()
        try:
            return self._attempt(plan, limits)
        except InvalidRequest as error:
            # A server with smaller limits has taken the place of the one that told them.
            self._limits.value = None
            if error.reason != TOO_LARGE or (fresh := self._known_limits()) == limits:
                raise
        return self._attempt(plan, fresh)

    def _attempt(self, plan: Plan[R], limits: common_pb2.Limits) -> R:
        replies = run_calls(
            lambda request: self._call(plan.method, request),
            plan.requests(limits),
            parallel=self._parallel_calls,
        )
        return plan.result(replies, limits)

    def _known_limits(self) -> common_pb2.Limits:
        if (known := self._limits.value) is None:
            known = self._limits.value = self.get_model().limits
        return known


class RewardClient(RewardCalls):
    """A connection to a reward service. Safe to use from several threads."""

    def __init__(
        self,
        address: str,
        *,
        model: str = "",
        revision: str = "",
        timeout_s: float = 120.0,
        max_wait_s: float = 60.0,
        parallel_calls: int = 4,
        credentials: Credentials | None = None,
    ) -> None:
        """Args:
        address: "host:port", or a gRPC target such as "dns:///reward:50051".
        model: name of the model; empty means the service's default.
        revision: what must be served; another one raises NotFound. Empty means the newest.
        timeout_s: deadline of each call, waits included; long lists take several calls.
        max_wait_s: of that, how long a call may wait in all for a service that says it is busy
            and when to come back; 0 raises Overloaded as soon as gRPC's own five attempts are over.
        parallel_calls: calls of one list that are under way at a time.
        credentials: TLS and token; None takes those of the environment, KLEASH_TLS_* and
            KLEASH_TOKEN*.
        """
        self._channel = connect(
            address,
            service=SERVICE,
            methods_to_retry=METHODS_TO_RETRY,
            credentials=credentials,
        )
        self._stub = reward_pb2_grpc.RewardServiceStub(self._channel)
        self._address = address
        self._options = ClientOptions(model, revision, timeout_s, max_wait_s, parallel_calls)
        super().__init__(
            self._new_call(), model=model, revision=revision, parallel_calls=parallel_calls
        )

    def _new_call(self) -> Call:
        return remote_call(
            self._stub,
            service=SERVICE,
            address=self._address,
            timeout_s=self._options.timeout_s,
            max_wait_s=self._options.max_wait_s,
        )

    @classmethod
    def from_env(cls, **keywords: Any) -> RewardClient:
        """A client as KLEASH_REWARD_ADDRESS, KLEASH_REWARD_MODEL and KLEASH_REWARD_TIMEOUT_S say.

        ``keywords`` are the constructor's, and count more. Raises ConfigError without an address.
        """
        settings = settings_from_env(needs_address="address" not in keywords)
        return cls(**{**settings, **keywords})

    def with_options(self, **changes: Unpack[OptionKeywords]) -> Self:
        """A client of the same connection with other options; closing either closes both.

        >>> reward.with_options(timeout_s=0.5).score_texts(["..."])
        """
        other = copy.copy(self)
        chosen = other._options = dataclasses.replace(self._options, **changes)
        other._plans = RewardPlans(chosen.model, chosen.revision)
        other._parallel_calls = chosen.parallel_calls
        other._call = other._new_call()
        return other

    def pinned(self, revision: str) -> Self:
        """As ``with_options(revision=revision)``."""
        return self.with_options(revision=revision)

    def score_stream(
        self,
        inputs: Iterable[str | Messages],
        *,
        timeout_s: float | None = None,
        **keywords: Unpack[ScoreKeywords],
    ) -> Generator[Score, None, None]:
        """Score texts or conversations without end, as they are done: ``Score.index`` tells which.

        ``timeout_s`` bounds the whole stream; None leaves it to the server. Failed items come with
        their code; a stream is not retried. What ``inputs`` raises is raised here, after the
        scores of the inputs before it. Keywords: ScoreKeywords.
        """
        scoring, limits = options(**keywords), self._known_limits()
        failures: list[Exception] = []

        def requests() -> Iterator[reward_pb2.ScoreStreamRequest]:
            try:
                for index, each in enumerate(inputs):
                    yield self._plans.stream_request(index, input_item(each), scoring, limits)
            except Exception as error:  # a thread of gRPC runs this; its caller would not be told
                failures.append(error)

        with client_call(SERVICE, "ScoreStream", self._address) as trace:
            responses = self._stub.ScoreStream(requests(), timeout=timeout_s, metadata=trace)
            try:
                for response in responses:
                    yield read_score(int(response.result.item_id), response.result, response.model)
                if failures:
                    raise failures[0]
            except grpc.RpcError as error:
                raise from_rpc_error(error, address=self._address) from None
            finally:
                responses.cancel()  # a caller who stops early has ended the stream, too

    def close(self) -> None:
        """Close the connection; calls under way are cancelled."""
        self._channel.close()

    def __enter__(self) -> RewardClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
