"""The calls of the reward service without gRPC: a request in, a response out.

Score, Compare and the items of a stream go through the model between begin and finish, see
kleash.rpc.work.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from kleash.base.version import software_version
from kleash.common.v1 import common_pb2
from kleash.reward.items import ITEM_PLACE, complete, encode_items, prepare
from kleash.reward.scorer import RawScore, RewardScorer, ScoreJob
from kleash.reward.v1 import reward_pb2
from kleash.rpc.errors import InvalidRequest
from kleash.rpc.requests import Limits, check_model, check_size
from kleash.rpc.work import Work

A = TypeVar("A")

Results = list[reward_pb2.ScoreResult]


class RewardRequests:
    """Checks requests, makes rows of them, and makes responses of the scores. Thread-safe."""

    def __init__(self, scorer: RewardScorer, limits: Limits) -> None:
        self._scorer = scorer
        self._limits = limits
        self.served = common_pb2.ServedModel(
            name=scorer.frozen.name, revision=scorer.frozen.revision
        )

    def score(
        self, request: reward_pb2.ScoreRequest
    ) -> Work[ScoreJob, RawScore, reward_pb2.ScoreResponse]:
        """Begin a Score."""
        check_model(request.model, request.revision, served=self.served)
        check_size(request, len(request.items), self._limits, field="items")

        def respond(
            results: Results, _: Mapping[int, RawScore], usage: common_pb2.Usage
        ) -> reward_pb2.ScoreResponse:
            return reward_pb2.ScoreResponse(results=results, model=self.served, usage=usage)

        return self._begin(request.items, request.options, respond)

    def stream_item(
        self, item: reward_pb2.ScoreItem, options: reward_pb2.ScoreOptions
    ) -> Work[ScoreJob, RawScore, reward_pb2.ScoreStreamResponse]:
        """Begin one item of a ScoreStream."""

        def respond(
            results: Results, _: Mapping[int, RawScore], __: common_pb2.Usage
        ) -> reward_pb2.ScoreStreamResponse:
            return reward_pb2.ScoreStreamResponse(result=results[0], model=self.served)

        return self._begin([item], options, respond, place="item")

    def compare(
        self, request: reward_pb2.CompareRequest
    ) -> Work[ScoreJob, RawScore, reward_pb2.CompareResponse]:
        """Begin a Compare."""
        check_model(request.model, "", served=self.served)
        check_size(request, len(request.responses), self._limits, field="responses")
        if len(request.responses) < 2:
            raise InvalidRequest(
                f"responses has {len(request.responses)} entries; a comparison needs at least two.",
                field="responses",
            )
        if not request.prompt.messages:
            raise InvalidRequest("prompt has no messages.", field="prompt.messages")

        def respond(
            results: Results, raw_scores: Mapping[int, RawScore], _: common_pb2.Usage
        ) -> reward_pb2.CompareResponse:
            ranking, preference = rank(results, raw_scores)
            return reward_pb2.CompareResponse(
                results=results,
                ranking=ranking,
                preference=preference,
                served_model=self.served,
            )

        return self._begin(_candidates(request), request.options, respond, place="responses[{}]")

    def count_tokens(
        self, request: reward_pb2.CountTokensRequest
    ) -> reward_pb2.CountTokensResponse:
        """Token count of each item, before truncation.

        Raises InvalidRequest for an item that has no tokens: a count has no status of its own.
        """
        check_size(request, len(request.items), self._limits, field="items")
        counts = []
        for index, ids in enumerate(encode_items(self._scorer, request.items)):
            if isinstance(ids, tuple):
                place = ITEM_PLACE.format(index)
                raise InvalidRequest(f"{place}: {ids[1]}", field=place)
            counts.append(len(ids))
        return reward_pb2.CountTokensResponse(token_counts=counts)

    def get_model(self) -> reward_pb2.GetModelResponse:
        """Describe the model."""
        frozen, normalization = self._scorer.frozen, self._scorer.normalization
        return reward_pb2.GetModelResponse(
            model=self.served,
            tokenizer_sha256=frozen.tokenizer_sha256,
            chat_template_sha256=frozen.chat_template_sha256,
            dtype=frozen.dtype,
            normalization_mean=normalization.mean,
            normalization_std=normalization.std,
            supports_token_scores=True,
            limits=self._limits.to_message(frozen.max_item_tokens),
            server_version=software_version(),
        )

    def _begin(
        self,
        items: Sequence[reward_pb2.ScoreItem],
        options: reward_pb2.ScoreOptions,
        respond: Callable[[Results, Mapping[int, RawScore], common_pb2.Usage], A],
        *,
        place: str = ITEM_PLACE,
    ) -> Work[ScoreJob, RawScore, A]:
        prepared = prepare(self._scorer, items, options, place)
        lengths = [len(job.ids) for job in prepared.jobs]

        def finish(raw_scores: list[RawScore], usage: common_pb2.Usage) -> A:
            results = complete(prepared, raw_scores, self._scorer.normalization)
            return respond(results, dict(zip(prepared.job_items, raw_scores, strict=True)), usage)

        return Work(prepared.jobs, lengths, options.isolate, finish)


def rank(results: Results, raw_scores: Mapping[int, RawScore]) -> tuple[list[int], list[float]]:
    """Ranking of candidates, best first, and the probability that the best beats each.

    The Bradley-Terry probability is sigmoid(best - each) of raw scores: the model was trained on
    their differences, and a normalization would change the odds. A candidate without a score is
    not ranked, and its probability is 0.
    """
    scored = {
        index: raw_scores[index].score
        for index, result in enumerate(results)
        if result.code == common_pb2.ITEM_STATUS_CODE_OK
    }
    ranking = sorted(scored, key=lambda index: (-scored[index], index))
    preference = [0.0] * len(results)
    for index, score in scored.items():
        preference[index] = 1 / (1 + math.exp(score - scored[ranking[0]]))
    return ranking, preference


def _candidates(request: reward_pb2.CompareRequest) -> list[reward_pb2.ScoreItem]:
    """The prompt continued by each response."""
    items = []
    for response in request.responses:
        answer = common_pb2.Message(role="assistant", content=response)
        conversation = common_pb2.Conversation(messages=[*request.prompt.messages, answer])
        items.append(reward_pb2.ScoreItem(conversation=conversation))
    return items
