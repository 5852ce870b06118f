"""The reward model in this process: the methods of RewardClient without gRPC.

Requests meet the same checks, and their rows are split into batches as one isolated call of the
service is, so that results are bit-identical to RewardClient's with ``isolate=True``.
"""

from __future__ import annotations

import threading
from typing import Any

from kleash.client.reward import RewardCalls
from kleash.reward.config import RewardConfig
from kleash.reward.load import load_models
from kleash.reward.model import RewardModel
from kleash.reward.requests import RewardRequests
from kleash.reward.v1 import reward_pb2
from kleash.rpc.errors import NotFound
from kleash.rpc.requests import Limits
from kleash.rpc.work import answer_in_process


class LocalReward(RewardCalls):
    """A reward model behind the client's methods. Safe to use from several threads."""

    def __init__(self, model: RewardModel, limits: Limits) -> None:
        super().__init__(self._answer)
        self.model = model
        self._loaded = [model]
        self._max_batch_tokens = limits.max_batch_tokens
        self._requests = RewardRequests(model, limits)
        self._model_is_free = threading.Lock()

    @staticmethod
    def load(config: RewardConfig) -> LocalReward:
        """Load the default model of a service with this configuration."""
        models = load_models(config)
        local = LocalReward(models[config.default_name], config.limits)
        local._loaded = list(models.values())
        return local

    def close(self) -> None:
        """Give back what the model holds, and what the members of an ensemble hold."""
        for model in self._loaded:
            model.close()

    def _answer(self, method: str, request: Any) -> Any:
        if method == "ListModels":
            return reward_pb2.ListModelsResponse(models=[self._requests.served])
        self._check_revision(request.revision)
        if method == "GetModel":
            return self._requests.get_model()
        if method == "CountTokens":
            return self._requests.count_tokens(request)
        begin = {"Score": self._requests.score, "Compare": self._requests.compare}[method]
        with self._model_is_free:
            return answer_in_process(
                lambda: begin(request),
                self.model.compute,
                max_batch_tokens=self._max_batch_tokens,
            )

    def _check_revision(self, wanted: str) -> None:
        served = self.model.facts.revision
        if wanted not in ("", served):
            raise NotFound(
                f"revision '{wanted}' is not served here; this process has {served}.",
                reason="REVISION_NOT_SERVED",
                field="revision",
                metadata={"requested": wanted, "served": served},
            )
