"""The reference model in this process: the methods of ReferenceClient without gRPC.

Requests meet the same checks, and their rows are split into batches as one isolated call of the
service is, so that results are bit-identical to ReferenceClient's with ``isolate=True``.
"""

from __future__ import annotations

import threading
from typing import Any

from kleash.client.reference import ReferenceCalls
from kleash.reference.config import ReferenceConfig
from kleash.reference.requests import ReferenceRequests
from kleash.reference.scorer import ReferenceScorer
from kleash.rpc.requests import Limits
from kleash.rpc.work import answer_in_process


class LocalReference(ReferenceCalls):
    """A reference model behind the client's methods. Safe to use from several threads."""

    def __init__(self, scorer: ReferenceScorer, limits: Limits) -> None:
        super().__init__(self._answer)
        self._scorer = scorer
        self._max_batch_tokens = limits.max_batch_tokens
        self._requests = ReferenceRequests(scorer, limits)
        self._model_is_free = threading.Lock()

    @staticmethod
    def load(config: ReferenceConfig) -> LocalReference:
        """Load the model that a service with this configuration would serve."""
        return LocalReference(ReferenceScorer.load(config, config.limits), config.limits)

    def close(self) -> None:
        """Nothing to close; clients have this."""

    def _answer(self, method: str, request: Any) -> Any:
        if method == "GetModel":
            return self._requests.get_model()
        with self._model_is_free:
            return answer_in_process(
                lambda: self._requests.log_probs(request),
                self._scorer.compute,
                max_batch_tokens=self._max_batch_tokens,
            )
