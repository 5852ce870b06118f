"""The reference service as the chassis hosts it."""

from __future__ import annotations

from concurrent.futures import Executor

import grpc
import numpy as np

from kleash.lm.frozen import FrozenModel
from kleash.reference.config import ReferenceConfig
from kleash.reference.requests import ReferenceRequests
from kleash.reference.scorer import LogProbsJob, ReferenceScorer
from kleash.reference.servicer import ReferenceServicer
from kleash.reference.v1 import reference_pb2_grpc
from kleash.rpc.batcher import Batcher
from kleash.rpc.scoring import ScoringService


class ReferenceService(ScoringService[LogProbsJob, np.ndarray]):
    """Loads the reference model and answers kleash.reference.v1.ReferenceService."""

    name = "reference"
    full_names = ("kleash.reference.v1.ReferenceService",)

    def __init__(self, config: ReferenceConfig) -> None:
        super().__init__(config.limits)
        self._config = config

    def load_model(self) -> FrozenModel:
        """Load and warm up the model. Raises ModelError."""
        self._scorer = ReferenceScorer.load(self._config, self._config.limits)
        return self._scorer.frozen

    def compute(self, jobs: list[LogProbsJob]) -> list[np.ndarray]:
        """Log-probabilities of one batch."""
        return self._scorer.compute(jobs)

    def size(self, job: LogProbsJob) -> int:
        """Tokens of one row."""
        return len(job.sequence.ids)

    def add_servicer(
        self, server: grpc.aio.Server, batcher: Batcher[LogProbsJob, np.ndarray], threads: Executor
    ) -> None:
        """Register the servicer."""
        requests = ReferenceRequests(self._scorer, self._config.limits)
        servicer = ReferenceServicer(requests, batcher, threads)
        reference_pb2_grpc.add_ReferenceServiceServicer_to_server(servicer, server)
