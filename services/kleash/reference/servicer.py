"""The gRPC surface of the reference service. What a call means is in requests.py."""

# gRPC names the methods and fixes their arguments.
# ruff: noqa: N802, ARG002

from __future__ import annotations

from concurrent.futures import Executor

import grpc
import numpy as np

from kleash.base import metrics
from kleash.client.calls import item_code
from kleash.reference.requests import ReferenceRequests
from kleash.reference.scorer import LogProbsJob
from kleash.reference.v1 import reference_pb2, reference_pb2_grpc
from kleash.rpc import audit
from kleash.rpc.batcher import Batcher
from kleash.rpc.work import answer


class ReferenceServicer(reference_pb2_grpc.ReferenceServiceServicer):
    """Answers the two calls of kleash.reference.v1.ReferenceService."""

    def __init__(
        self,
        requests: ReferenceRequests,
        batcher: Batcher[LogProbsJob, np.ndarray],
        threads: Executor,
    ) -> None:
        """Args:
        threads: where requests are decoded and responses encoded, off the event loop.
        """
        self._requests = requests
        self._batcher = batcher
        self._threads = threads

    async def LogProbs(
        self, request: reference_pb2.LogProbsRequest, context: grpc.aio.ServicerContext
    ) -> reference_pb2.LogProbsResponse:
        """Log-probabilities of a batch of responses."""
        self._note(num_items=len(request.items))
        response = await answer(
            lambda: self._requests.log_probs(request),
            self._batcher,
            self._threads,
            service="reference",
            model_name=self._requests.served.name,
            num_bytes=request.ByteSize(),
        )
        for result in response.results:
            metrics.ITEMS.labels("reference", item_code(result.code)).inc()
        return response

    async def GetModel(
        self, request: reference_pb2.GetModelRequest, context: grpc.aio.ServicerContext
    ) -> reference_pb2.GetModelResponse:
        """Describe the model."""
        self._note()
        return self._requests.get_model()

    def _note(self, *, num_items: int | None = None) -> None:
        served = self._requests.served
        audit.note(model=served.name, revision=served.revision, num_items=num_items)
