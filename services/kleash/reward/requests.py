"""The calls of the reward service for one model, without gRPC: a request in, a response out.

Score, Compare and the items of a stream go through the model between begin and finish, see
kleash.rpc.work.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from kleash.base.version import software_version
from kleash.common.v1 import common_pb2
from kleash.reward.items import ITEM_PLACE, complete, prepare
from kleash.reward.model import RawScore, RewardModel, ScoreJob
from kleash.reward.v1 import reward_pb2
from kleash.rpc.errors import InvalidRequest
from kleash.rpc.requests import Limits, check_size
from kleash.rpc.work import Work

A = TypeVar("A")

Results = list[reward_pb2.ScoreResult]


class RewardRequests:
    """Checks requests, makes rows of them, and makes responses of the scores. Thread-safe."""

    def __init__(self, model: RewardModel, limits: Limits) -> None:
        self._model = model
        self._limits = limits
        self.served = model.served

    def score(
        self, request: reward_pb2.ScoreRequest
    ) -> Work[ScoreJob, RawScore, reward_pb2.ScoreResponse]:
        """Begin a Score."""
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
        for index, count in enumerate(self._model.count_tokens(request.items, ITEM_PLACE)):
            if isinstance(count, tuple):
                place = ITEM_PLACE.format(index)
                raise InvalidRequest(f"{place}: {count[1]}", field=place)
            counts.append(count)
        return reward_pb2.CountTokensResponse(token_counts=counts, model=self.served)

    def get_model(self) -> reward_pb2.GetModelResponse:
        """Describe the model."""
        facts = self._model.facts
        return reward_pb2.GetModelResponse(
            model=self.served,
            tokenizer_sha256=facts.tokenizer_sha256,
            chat_template_sha256=facts.chat_template_sha256,
            dtype=facts.dtype,
            normalization_mean=facts.normalization.mean,
            normalization_std=facts.normalization.std,
            supports_token_scores=facts.supports_token_scores,
            limits=self._limits.to_message(facts.max_item_tokens),
            server_version=software_version(),
            kind=facts.kind,
            components=[
                reward_pb2.Component(name=each.name, weight=each.weight, revision=each.revision)
                for each in facts.components
            ],
            batch_tolerance=facts.batch_tolerance,
        )

    def _begin(
        self,
        items: Sequence[reward_pb2.ScoreItem],
        options: reward_pb2.ScoreOptions,
        respond: Callable[[Results, Mapping[int, RawScore], common_pb2.Usage], A],
        *,
        place: str = ITEM_PLACE,
    ) -> Work[ScoreJob, RawScore, A]:
        prepared = prepare(self._model, items, options, place)
        lengths = [job.num_tokens for job in prepared.jobs]

        def finish(raw_scores: list[RawScore], usage: common_pb2.Usage) -> A:
            results = complete(prepared, raw_scores, self._model)
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
