"""The reward model in this process: the methods of RewardClient without gRPC.

Requests meet the same checks, and their rows are split into batches as one isolated call of the
service is, so that results are bit-identical to RewardClient's with ``isolate=True``.
"""

from __future__ import annotations

import threading
from typing import Any

from kleash.client.reward import RewardCalls
from kleash.reward.config import RewardConfig
from kleash.reward.requests import RewardRequests
from kleash.reward.scorer import RewardScorer
from kleash.rpc.requests import Limits
from kleash.rpc.work import answer_in_process


class LocalReward(RewardCalls):
    """A reward model behind the client's methods. Safe to use from several threads."""

    def __init__(self, scorer: RewardScorer, limits: Limits) -> None:
        super().__init__(self._answer)
        self._scorer = scorer
        self._max_batch_tokens = limits.max_batch_tokens
        self._requests = RewardRequests(scorer, limits)
        self._model_is_free = threading.Lock()

    @staticmethod
    def load(config: RewardConfig) -> LocalReward:
        """Load the model that a service with this configuration would serve."""
        return LocalReward(RewardScorer.load(config, config.limits), config.limits)

    def close(self) -> None:
        """Nothing to close; clients have this."""

    def _answer(self, method: str, request: Any) -> Any:
        if method == "GetModel":
            return self._requests.get_model()
        if method == "CountTokens":
            return self._requests.count_tokens(request)
        begin = {"Score": self._requests.score, "Compare": self._requests.compare}[method]
        with self._model_is_free:
            return answer_in_process(
                lambda: begin(request),
                self._scorer.compute,
                max_batch_tokens=self._max_batch_tokens,
            )
