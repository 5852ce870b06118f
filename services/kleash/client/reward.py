"""Client of the reward service: scores, comparisons and token counts, split to the server's limits.

with RewardClient("reward:50051") as reward:
    print(reward.score_texts(["..."])[0].score)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import grpc
import numpy as np

from kleash.client.calls import (
    Call,
    Cost,
    ItemError,
    check_one_revision,
    item_code,
    remote_call,
    run_calls,
    split_calls,
    text_cost,
    token_cost,
)
from kleash.client.types import Tokens
from kleash.common.v1 import common_pb2
from kleash.reward.v1 import reward_pb2, reward_pb2_grpc
from kleash.rpc.channel import connect
from kleash.rpc.codec import decode_floats, encode_ids
from kleash.rpc.credentials import Credentials
from kleash.rpc.errors import InternalError, from_rpc_error

SERVICE = "kleash.reward.v1.RewardService"

Truncation = Literal["error", "left", "right"]
Messages = Sequence[Mapping[str, str]]
"""Turns, oldest first: [{"role": "user", "content": "..."}, ...]."""

_TRUNCATIONS = {
    "error": reward_pb2.TRUNCATION_ERROR,
    "left": reward_pb2.TRUNCATION_LEFT,
    "right": reward_pb2.TRUNCATION_RIGHT,
}


@dataclass(frozen=True, eq=False)
class Score:
    """The outcome of one item. Reading ``score`` of a failed one raises: never NaN or None."""

    index: int
    """Position of the item in the list that was given."""
    code: str
    """"OK", "INPUT_TOO_LONG", "INVALID_INPUT" or "NON_FINITE"."""
    error_message: str
    """Cause when the code is not OK."""
    token_count: int
    """Tokens that the model saw."""
    is_truncated: bool
    token_scores: np.ndarray | None
    """float32, one per token, when asked for."""
    revision: str
    """Digest of the weights that produced it."""
    value: float
    """The score of an OK item, 0 otherwise; read ``score``."""

    @property
    def is_ok(self) -> bool:
        return self.code == "OK"

    @property
    def score(self) -> float:
        """The score. Raises ItemError when the item failed."""
        self.check()
        return self.value

    def check(self) -> None:
        """Raise ItemError when the item failed."""
        if not self.is_ok:
            raise ItemError(self.index, self.code, self.error_message)


@dataclass(frozen=True)
class Comparison:
    """Candidates ranked by the reward model."""

    scores: list[Score]
    """In the order of the responses."""
    ranking: list[int]
    """Indices of the responses, best first; failed ones are missing."""
    preference: list[float]
    """Probability that the best beats each response, in their order; 0 for failed ones."""


class RewardCalls:
    """The typed calls, over whatever carries them: gRPC here, a method call in LocalReward."""

    def __init__(
        self, call: Call, *, model: str = "", revision: str = "", parallel_calls: int = 1
    ) -> None:
        self._call = call
        self._model = model
        self._revision = revision
        self._parallel_calls = parallel_calls

    def get_model(self) -> reward_pb2.GetModelResponse:
        """Name, revision, digests, normalization and limits of the served model."""
        return self._call("GetModel", reward_pb2.GetModelRequest())

    def score_tokens(
        self,
        sequences: Sequence[Tokens],
        *,
        tokenizer_sha256: str,
        normalize: bool = True,
        isolate: bool = False,
        truncation: Truncation = "error",
        return_token_scores: bool = False,
        raise_on_item_error: bool = True,
    ) -> list[Score]:
        """Score token ids, in order.

        Args:
            tokenizer_sha256: digest of the tokenizer that made the ids; another one than the
                server's raises PreconditionFailed.
            normalize: (score - mean) / std with the figures stored in the model's folder.
            isolate: compute apart from other callers' items, so that the same call gives the
                same bits.
            raise_on_item_error: raise ItemError for the first item without a score; False
                returns it with its code.
        """
        options = _options(normalize, isolate, truncation, return_token_scores)
        items = [_token_item(sequence, tokenizer_sha256) for sequence in sequences]
        costs = [token_cost(len(sequence.ids)) for sequence in sequences]
        return self._score(items, costs, options, raise_on_item_error)

    def score_texts(
        self,
        texts: Sequence[str],
        *,
        normalize: bool = True,
        isolate: bool = False,
        truncation: Truncation = "error",
        return_token_scores: bool = False,
        raise_on_item_error: bool = True,
    ) -> list[Score]:
        """Score texts as they stand, special tokens included, in order."""
        options = _options(normalize, isolate, truncation, return_token_scores)
        items = [reward_pb2.ScoreItem(text=text) for text in texts]
        return self._score(items, [text_cost(t) for t in texts], options, raise_on_item_error)

    def score_conversations(
        self,
        conversations: Sequence[Messages],
        *,
        normalize: bool = True,
        isolate: bool = False,
        truncation: Truncation = "error",
        return_token_scores: bool = False,
        raise_on_item_error: bool = True,
    ) -> list[Score]:
        """Score conversations, which the model's chat template renders on the server, in order."""
        options = _options(normalize, isolate, truncation, return_token_scores)
        items = [reward_pb2.ScoreItem(conversation=_conversation(c)) for c in conversations]
        costs = [_conversation_cost(c) for c in conversations]
        return self._score(items, costs, options, raise_on_item_error)

    def compare(
        self,
        prompt: str | Messages,
        responses: Sequence[str],
        *,
        normalize: bool = True,
        isolate: bool = False,
        truncation: Truncation = "error",
    ) -> Comparison:
        """Rank at least two responses to one prompt (a user's text, or messages)."""
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        response = self._call(
            "Compare",
            reward_pb2.CompareRequest(
                model=self._model,
                prompt=_conversation(messages),
                responses=responses,
                options=_options(normalize, isolate, truncation, return_token_scores=False),
            ),
        )
        served = response.served_model
        scores = [_score(i, result, served) for i, result in enumerate(response.results)]
        return Comparison(scores, list(response.ranking), list(response.preference))

    def count_tokens(self, inputs: Sequence[str | Messages]) -> list[int]:
        """Tokens of each text or conversation as the model would see it."""
        items = [
            reward_pb2.ScoreItem(text=each)
            if isinstance(each, str)
            else reward_pb2.ScoreItem(conversation=_conversation(each))
            for each in inputs
        ]
        costs = [
            text_cost(each) if isinstance(each, str) else _conversation_cost(each)
            for each in inputs
        ]
        responses = self._calls(
            "CountTokens", lambda part: reward_pb2.CountTokensRequest(items=items[part]), costs
        )
        return [count for response in responses for count in response.token_counts]

    @cached_property
    def _limits(self) -> common_pb2.Limits:
        return self.get_model().limits

    def _calls(self, method: str, request: Callable[[slice], Any], costs: list[Cost]) -> list[Any]:
        if not costs:
            return []
        requests = [request(part) for part in split_calls(costs, self._limits)]
        return run_calls(
            lambda each: self._call(method, each), requests, parallel=self._parallel_calls
        )

    def _score(
        self,
        items: list[reward_pb2.ScoreItem],
        costs: list[Cost],
        options: reward_pb2.ScoreOptions,
        raise_on_item_error: bool,
    ) -> list[Score]:
        responses = self._calls(
            "Score",
            lambda part: reward_pb2.ScoreRequest(
                model=self._model, revision=self._revision, items=items[part], options=options
            ),
            costs,
        )
        served = [response.model for response in responses for _ in response.results]
        results = [result for response in responses for result in response.results]
        if len(results) != len(items):
            raise InternalError(f"sent {len(items)} items and received {len(results)} results.")
        check_one_revision(served)
        scores = [
            _score(index, result, model)
            for index, (result, model) in enumerate(zip(results, served, strict=True))
        ]
        if raise_on_item_error:
            for score in scores:
                score.check()
        return scores


class RewardClient(RewardCalls):
    """A connection to a reward service. Safe to use from several threads."""

    def __init__(
        self,
        address: str,
        *,
        model: str = "",
        revision: str = "",
        timeout_s: float = 120.0,
        parallel_calls: int = 4,
        credentials: Credentials | None = None,
    ) -> None:
        """Args:
        address: "host:port", or a gRPC target such as "dns:///reward:50051".
        model, revision: what must be served; another one raises NotFound. Empty means any.
        timeout_s: deadline of each call; long lists take several calls.
        parallel_calls: calls of one list that are under way at a time.
        credentials: TLS and token; None takes those of the environment, KLEASH_TLS_* and
            KLEASH_TOKEN*.
        """
        self._channel = connect(
            address,
            service=SERVICE,
            methods_to_retry=("Score", "Compare", "CountTokens", "GetModel"),
            credentials=credentials,
        )
        self._stub = reward_pb2_grpc.RewardServiceStub(self._channel)
        self._address = address
        super().__init__(
            remote_call(self._stub, address=address, timeout_s=timeout_s),
            model=model,
            revision=revision,
            parallel_calls=parallel_calls,
        )

    def score_stream(
        self,
        inputs: Iterable[str | Messages],
        *,
        normalize: bool = True,
        truncation: Truncation = "error",
        timeout_s: float | None = None,
    ) -> Generator[Score, None, None]:
        """Score texts or conversations without end, as they are done: ``Score.index`` tells which.

        ``timeout_s`` bounds the whole stream; None leaves it to the server. Failed items come with
        their code; a stream is not retried. What ``inputs`` raises is raised here, after the
        scores of the inputs before it.
        """
        options = _options(normalize, False, truncation, return_token_scores=False)
        failures: list[Exception] = []

        def requests() -> Iterator[reward_pb2.ScoreStreamRequest]:
            try:
                for index, each in enumerate(inputs):
                    yield _stream_request(index, each, options)
            except Exception as error:  # a thread of gRPC runs this; its caller would not be told
                failures.append(error)

        responses = self._stub.ScoreStream(requests(), timeout=timeout_s)
        try:
            for response in responses:
                index = int(response.result.item_id)
                yield _score(index, response.result, response.model)
            if failures:
                raise failures[0]
        except grpc.RpcError as error:
            raise from_rpc_error(error, address=self._address) from None
        finally:
            responses.cancel()  # a caller who stops early has ended the stream, too

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()

    def __enter__(self) -> RewardClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _options(
    normalize: bool, isolate: bool, truncation: Truncation, return_token_scores: bool
) -> reward_pb2.ScoreOptions:
    return reward_pb2.ScoreOptions(
        truncation=_TRUNCATIONS[truncation],
        return_token_scores=return_token_scores,
        normalize=normalize,
        isolate=isolate,
    )


def _token_item(sequence: Tokens, tokenizer_sha256: str) -> reward_pb2.ScoreItem:
    return reward_pb2.ScoreItem(
        tokens=common_pb2.TokenSequence(
            tokens=encode_ids(sequence.ids),
            response_start=sequence.response_start,
            tokenizer_sha256=tokenizer_sha256,
        )
    )


def _conversation(messages: Messages) -> common_pb2.Conversation:
    return common_pb2.Conversation(
        messages=[common_pb2.Message(role=m["role"], content=m["content"]) for m in messages]
    )


def _conversation_cost(messages: Messages) -> Cost:
    # A turn's marks are a handful of tokens; 64 bytes stand for them.
    costs = [text_cost(m["role"] + m["content"] + " " * 64) for m in messages]
    return Cost(sum(c.num_bytes for c in costs), sum(c.num_tokens for c in costs))


def _stream_request(
    index: int, each: str | Messages, options: reward_pb2.ScoreOptions
) -> reward_pb2.ScoreStreamRequest:
    item = (
        reward_pb2.ScoreItem(item_id=str(index), text=each)
        if isinstance(each, str)
        else reward_pb2.ScoreItem(item_id=str(index), conversation=_conversation(each))
    )
    return reward_pb2.ScoreStreamRequest(item=item, options=options)


def _score(index: int, result: reward_pb2.ScoreResult, served: common_pb2.ServedModel) -> Score:
    code = item_code(result.code)
    if code == "OK" and not math.isfinite(result.score):
        raise InternalError(f"the service sent the score {result.score} for item {index} as OK.")
    has_token_scores = result.HasField("token_scores")
    return Score(
        index=index,
        code=code,
        error_message=result.error_message,
        token_count=result.token_count,
        is_truncated=result.truncated,
        token_scores=decode_floats(result.token_scores, field=f"results[{index}].token_scores")
        if has_token_scores
        else None,
        revision=served.revision,
        value=result.score,
    )
