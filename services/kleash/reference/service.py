"""The reference service as the chassis hosts it."""

from __future__ import annotations

import grpc
import numpy as np

from kleash.base import metrics
from kleash.reference.config import ReferenceConfig
from kleash.reference.requests import ReferenceRequests
from kleash.reference.scorer import LogProbsJob, ReferenceScorer
from kleash.reference.servicer import ReferenceServicer
from kleash.reference.v1 import reference_pb2_grpc
from kleash.rpc.batcher import Batcher
from kleash.rpc.work import request_threads

SERVICE = "reference"
"""Label of the metrics."""


class ReferenceService:
    """Loads the reference model and answers kleash.reference.v1.ReferenceService."""

    full_names = ("kleash.reference.v1.ReferenceService",)

    def __init__(self, config: ReferenceConfig) -> None:
        self._config = config
        self._threads = request_threads(SERVICE)
        self._scorer: ReferenceScorer | None = None
        self._batcher: Batcher[LogProbsJob, np.ndarray] | None = None
        self._is_started = False

    def load(self) -> None:
        """Load the model and warm it up. Blocks. Raises ModelError."""
        self._scorer = ReferenceScorer.load(self._config, self._config.limits)
        facts = self._scorer.frozen
        metrics.MODEL_INFO.labels(
            SERVICE, facts.name, facts.revision, facts.dtype, facts.tokenizer_sha256
        ).set(1)

    def register(self, server: grpc.aio.Server) -> None:
        """Add the servicer to ``server``; after load."""
        assert self._scorer is not None, "register() before load()"
        limits = self._config.limits
        self._batcher = Batcher(
            self._scorer.compute,
            size=lambda job: len(job.sequence.ids),
            max_batch_tokens=limits.max_batch_tokens,
            max_queued_tokens=limits.max_queued_tokens,
            service=SERVICE,
            model_name=self._scorer.frozen.name,
        )
        requests = ReferenceRequests(self._scorer, limits)
        servicer = ReferenceServicer(requests, self._batcher, self._threads)
        reference_pb2_grpc.add_ReferenceServiceServicer_to_server(servicer, server)

    async def start(self) -> None:
        """Start the batcher; after register."""
        assert self._batcher is not None, "start() before register()"
        await self._batcher.start()
        self._is_started = True

    def is_ready(self, full_name: str) -> bool:  # noqa: ARG002
        """Whether the model is loaded and the batcher runs."""
        return self._is_started

    def heartbeat_age_s(self) -> float:
        """Age of the model thread's last sign of life; 0 when it is idle."""
        return self._batcher.heartbeat_age_s() if self._batcher is not None else 0.0

    async def stop(self) -> None:
        """Finish running work and refuse new work."""
        self._is_started = False
        if self._batcher is not None:
            await self._batcher.stop()
        self._threads.shutdown(wait=False)
