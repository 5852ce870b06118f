"""What the calls of the reward clients send, and what the replies come to. No I/O: reward.py and
reward_aio.py carry the messages.

A call is a Plan. The server's limits say how many requests it takes; their replies, in order, make
the result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypedDict, TypeVar, Unpack, cast

import numpy as np

from kleash.client.calls import (
    Cost,
    ItemError,
    check_one_revision,
    item_code,
    split_calls,
    text_cost,
    token_cost,
)
from kleash.client.types import Tokens
from kleash.common.v1 import common_pb2
from kleash.reward.v1 import reward_pb2
from kleash.rpc.codec import decode_floats, encode_ids
from kleash.rpc.errors import InternalError, InvalidRequest

Truncation = Literal["error", "left", "right"]
Messages = Sequence[Mapping[str, str]]
"""Turns, oldest first: [{"role": "user", "content": "..."}, ...]."""

R = TypeVar("R")

TOO_LARGE = "TOO_LARGE"
"""Reason of a request that does not fit the server's limits."""
FRAME_BYTES = 1024
"""At most what a request holds besides its items: names, options, lengths."""

_TRUNCATIONS = {
    "error": reward_pb2.TRUNCATION_ERROR,
    "left": reward_pb2.TRUNCATION_LEFT,
    "right": reward_pb2.TRUNCATION_RIGHT,
}


class ScoreKeywords(TypedDict, total=False):
    """How inputs are scored; every key may be left out."""

    normalize: bool
    """(score - mean) / std with the figures in the model's metadata; True when left out. False
    gives the raw score."""
    isolate: bool
    """Compute apart from other callers' items, so that the same call gives the same bits; False
    when left out."""
    truncation: Truncation
    """What happens to an input longer than the model accepts: "error" (when left out) fails it
    with INPUT_TOO_LONG, "left" and "right" drop tokens from that side."""
    return_token_scores: bool
    """Also one score per token, where the model has them; False when left out."""


class ListKeywords(ScoreKeywords, total=False):
    """How a list of inputs is scored; every key may be left out."""

    raise_on_item_error: bool
    """True when left out: raise ItemError for the first input without a score. False returns it
    with its code."""


@dataclass(frozen=True, eq=False)
class Score:
    """The outcome of one item. Reading ``score`` of a failed one raises: never NaN or None."""

    index: int
    """Position of the item in the list that was given."""
    code: str
    """"OK", "INPUT_TOO_LONG", "INVALID_INPUT", "NON_FINITE" or "FAILED"."""
    error_message: str
    """Cause when the code is not OK."""
    token_count: int
    """Tokens that the model saw."""
    is_truncated: bool
    token_scores: np.ndarray | None
    """float32, one per token, when asked for."""
    revision: str
    """Digest of the weights that produced it; empty for an item that was too large to send."""
    value: float
    """The score of an OK item, 0 otherwise; read ``score``."""
    components: Mapping[str, float] = field(default_factory=dict)
    """Raw score of each head, or of each member of an ensemble, by name; empty for other models."""
    uncertainty: float = 0.0
    """Standard deviation of an ensemble's members, in units of the score; 0 for other models."""
    model: str = ""
    """Name of the model."""

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


@dataclass
class KnownLimits:
    """What a server told of its limits; shared by the clients of one connection."""

    value: common_pb2.Limits | None = None


@dataclass(frozen=True)
class Plan(Generic[R]):
    """One call of a client."""

    method: str
    requests: Callable[[common_pb2.Limits], list[Any]]
    """What is sent to a server with these limits. Raises InvalidRequest for what no request of
    that size holds."""
    result: Callable[[list[Any], common_pb2.Limits], R]
    """What the replies to those requests, in order, come to."""


@dataclass(frozen=True)
class Item:
    """One input and what it takes of a server's limits."""

    message: reward_pb2.ScoreItem
    cost: Cost


@dataclass(frozen=True)
class RewardPlans:
    """Plans for one model and revision; empty means the default model, the newest revision."""

    model: str = ""
    revision: str = ""

    def score(self, items: Sequence[Item], **keywords: Unpack[ListKeywords]) -> Plan[list[Score]]:
        """Score a list."""
        raises = keywords.pop("raise_on_item_error", True)
        scoring = options(**cast(ScoreKeywords, keywords))
        empty = reward_pb2.ScoreRequest(model=self.model, revision=self.revision, options=scoring)

        def sent(limits: common_pb2.Limits) -> list[Item]:
            return [item for item in items if not oversize(item, limits)]

        def requests(limits: common_pb2.Limits) -> list[Any]:
            fitting = sent(limits)
            made = []
            for part in split_calls([item.cost for item in fitting], limits):
                request = reward_pb2.ScoreRequest(items=[item.message for item in fitting[part]])
                request.MergeFrom(empty)
                made.append(request)
            return made

        def result(replies: list[Any], limits: common_pb2.Limits) -> list[Score]:
            check_one_revision([reply.model for reply in replies])
            answers = [(each, reply.model) for reply in replies for each in reply.results]
            if len(answers) != len(sent(limits)):
                raise InternalError(
                    f"sent {len(sent(limits))} items and received {len(answers)} results."
                )
            in_order = iter(answers)
            scores = []
            for index, item in enumerate(items):
                sentence = oversize(item, limits)
                scores.append(
                    _unsent(index, sentence) if sentence else read_score(index, *next(in_order))
                )
            for score in scores if raises else ():
                score.check()
            return scores

        return Plan("Score", requests, result)

    def compare(
        self, prompt: str | Messages, responses: Sequence[str], **keywords: Unpack[ScoreKeywords]
    ) -> Plan[Comparison]:
        """Rank responses to one prompt."""
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        request = reward_pb2.CompareRequest(
            model=self.model,
            revision=self.revision,
            prompt=_conversation(messages),
            responses=responses,
            options=options(**keywords),
        )

        def requests(limits: common_pb2.Limits) -> list[Any]:
            if (num_bytes := request.ByteSize()) > limits.max_message_bytes:
                raise InvalidRequest(
                    f"the comparison has {num_bytes} bytes and the service takes at most "
                    f"{limits.max_message_bytes}; shorten it or compare fewer responses.",
                    reason=TOO_LARGE,
                    field="responses",
                )
            return [request]

        return Plan("Compare", requests, lambda replies, _: _comparison(replies[0]))

    def count_tokens(self, items: Sequence[Item]) -> Plan[list[int]]:
        """Tokens of each item."""

        def requests(limits: common_pb2.Limits) -> list[Any]:
            for index, item in enumerate(items):
                if sentence := oversize(item, limits):
                    place = f"items[{index}]"
                    raise InvalidRequest(f"{place}: {sentence}", reason=TOO_LARGE, field=place)
            return [
                reward_pb2.CountTokensRequest(
                    model=self.model,
                    revision=self.revision,
                    items=[item.message for item in items[part]],
                )
                for part in split_calls([item.cost for item in items], limits)
            ]

        def result(replies: list[Any], _: common_pb2.Limits) -> list[int]:
            check_one_revision([reply.model for reply in replies])
            return [count for reply in replies for count in reply.token_counts]

        return Plan("CountTokens", requests, result)

    def get_model(self) -> reward_pb2.GetModelRequest:
        """Ask for the description of the model."""
        return reward_pb2.GetModelRequest(model=self.model, revision=self.revision)

    def stream_request(
        self, index: int, item: Item, scoring: reward_pb2.ScoreOptions, limits: common_pb2.Limits
    ) -> reward_pb2.ScoreStreamRequest:
        """One item of a stream, whose id is its index. Raises InvalidRequest for one too large."""
        if sentence := oversize(item, limits):
            raise InvalidRequest(f"input {index}: {sentence}", reason=TOO_LARGE, field="item")
        item.message.item_id = str(index)
        is_first = index == 0
        return reward_pb2.ScoreStreamRequest(
            item=item.message,
            options=scoring if is_first else None,
            model=self.model if is_first else "",
            revision=self.revision if is_first else "",
        )


def options(
    *,
    normalize: bool = True,
    isolate: bool = False,
    truncation: Truncation = "error",
    return_token_scores: bool = False,
) -> reward_pb2.ScoreOptions:
    """ScoreKeywords as the service takes them, with the clients' defaults."""
    return reward_pb2.ScoreOptions(
        truncation=_TRUNCATIONS[truncation],
        return_token_scores=return_token_scores,
        normalize=normalize,
        isolate=isolate,
    )


def input_item(given: str | Messages) -> Item:
    """Text as it stands, or a conversation."""
    if isinstance(given, str):
        return Item(reward_pb2.ScoreItem(text=given), text_cost(given))
    # A turn's marks are a handful of tokens; 64 bytes stand for them.
    costs = [text_cost(m["role"] + m["content"] + " " * 64) for m in given]
    cost = Cost(sum(c.num_bytes for c in costs), sum(c.num_tokens for c in costs))
    return Item(reward_pb2.ScoreItem(conversation=_conversation(given)), cost)


def token_item(sequence: Tokens, tokenizer_sha256: str) -> Item:
    """Token ids, which that tokenizer made."""
    message = reward_pb2.ScoreItem(
        tokens=common_pb2.TokenSequence(
            tokens=encode_ids(sequence.ids),
            response_start=sequence.response_start,
            tokenizer_sha256=tokenizer_sha256,
        )
    )
    return Item(message, token_cost(len(sequence.ids)))


def oversize(item: Item, limits: common_pb2.Limits) -> str:
    """A sentence about an item that no request holds; empty for any other."""
    room, num_bytes = limits.max_message_bytes - FRAME_BYTES, item.message.ByteSize()
    if num_bytes <= room:
        return ""
    return f"the input has {num_bytes} bytes and the service takes at most {room} of one."


def read_score(index: int, result: reward_pb2.ScoreResult, served: common_pb2.ServedModel) -> Score:
    """The result of item ``index``. Raises InternalError for a score that is not finite."""
    code = item_code(result.code)
    components = {each.name: each.score for each in result.components}
    numbers = (result.score, result.uncertainty, *components.values())
    if code == "OK" and not all(map(math.isfinite, numbers)):
        raise InternalError(f"the service sent the scores {numbers} for item {index} as OK.")
    token_scores = None
    if result.HasField("token_scores"):
        token_scores = decode_floats(result.token_scores, field=f"results[{index}].token_scores")
    return Score(
        index=index,
        code=code,
        error_message=result.error_message,
        token_count=result.token_count,
        is_truncated=result.truncated,
        token_scores=token_scores,
        revision=served.revision,
        value=result.score,
        components=components,
        uncertainty=result.uncertainty,
        model=served.name,
    )


def _unsent(index: int, sentence: str) -> Score:
    return Score(
        index=index,
        code="INPUT_TOO_LONG",
        error_message=sentence,
        token_count=0,
        is_truncated=False,
        token_scores=None,
        revision="",
        value=0.0,
    )


def _comparison(reply: reward_pb2.CompareResponse) -> Comparison:
    scores = [
        read_score(index, result, reply.served_model) for index, result in enumerate(reply.results)
    ]
    return Comparison(scores, list(reply.ranking), list(reply.preference))


def _conversation(messages: Messages) -> common_pb2.Conversation:
    return common_pb2.Conversation(
        messages=[common_pb2.Message(role=m["role"], content=m["content"]) for m in messages]
    )
