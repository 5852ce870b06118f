"""The reward service as the chassis hosts it."""

from __future__ import annotations

from concurrent.futures import Executor

import grpc

from kleash.lm.frozen import FrozenModel
from kleash.reward.config import RewardConfig
from kleash.reward.requests import RewardRequests
from kleash.reward.scorer import RawScore, RewardScorer, ScoreJob
from kleash.reward.servicer import RewardServicer
from kleash.reward.v1 import reward_pb2_grpc
from kleash.rpc.batcher import Batcher
from kleash.rpc.scoring import ScoringService


class RewardService(ScoringService[ScoreJob, RawScore]):
    """Loads the reward model and answers kleash.reward.v1.RewardService."""

    name = "reward"
    full_names = ("kleash.reward.v1.RewardService",)

    def __init__(self, config: RewardConfig) -> None:
        super().__init__(config.limits)
        self._config = config

    def load_model(self) -> FrozenModel:
        """Load, check and warm up the model. Raises ModelError."""
        self._scorer = RewardScorer.load(self._config, self._config.limits)
        return self._scorer.frozen

    def compute(self, jobs: list[ScoreJob]) -> list[RawScore]:
        """Score one batch."""
        return self._scorer.compute(jobs)

    def size(self, job: ScoreJob) -> int:
        """Tokens of one row."""
        return len(job.ids)

    def add_servicer(
        self, server: grpc.aio.Server, batcher: Batcher[ScoreJob, RawScore], threads: Executor
    ) -> None:
        """Register the servicer."""
        requests = RewardRequests(self._scorer, self._config.limits)
        servicer = RewardServicer(requests, batcher, threads)
        reward_pb2_grpc.add_RewardServiceServicer_to_server(servicer, server)
