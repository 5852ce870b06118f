"""The policy in this process: the methods of PolicyClient and WeightsClient without gRPC.

Requests meet the same checks and the same decoding thread, so that a run in one process gives the
bits of a run over gRPC.
"""

from __future__ import annotations

import queue
from collections.abc import Iterator

from kleash.client.policy import PolicyCalls
from kleash.lm.decode import Decoded
from kleash.policy.config import PolicyConfig
from kleash.policy.decode_loop import finished_or_error
from kleash.policy.engine import Engine
from kleash.policy.replica import wait_for_commit
from kleash.policy.requests import encode
from kleash.policy.v1 import policy_pb2
from kleash.policy.weights_servicer import MODES, check_canary, rolled_back
from kleash.weights.fetch import Source
from kleash.weights.v1 import weights_pb2


class LocalPolicy(PolicyCalls):
    """A policy behind the client's methods. Safe to use from several threads."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(self._get_policy, self._generate)
        self.engine = engine

    @staticmethod
    def load(config: PolicyConfig) -> LocalPolicy:
        """Load the model that a service with this configuration would serve."""
        return LocalPolicy(Engine.load(config))

    def close(self) -> None:
        """Finish what runs and end the decoding thread."""
        self.engine.close()

    def _get_policy(self, _: policy_pb2.GetPolicyRequest) -> policy_pb2.GetPolicyResponse:
        return self.engine.requests.get_policy()

    def _generate(
        self, request: policy_pb2.GenerateRequest
    ) -> Iterator[policy_pb2.GenerateResponse]:
        requests = self.engine.requests.generate(request)
        events: queue.SimpleQueue[list[Decoded] | Exception] = queue.SimpleQueue()
        generation = self.engine.loop.submit(requests, events.put)
        try:
            num_missing = len(requests)
            while num_missing:
                finished = finished_or_error(events.get())
                num_missing -= len(finished)
                yield from encode(finished)
        finally:
            self.engine.loop.cancel(generation)


class LocalWeights:
    """A policy's weights behind the methods of WeightsClient."""

    address = ""
    """Nobody fetches from here."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._replica = engine.weights

    def get_weights(self, *, audit: bool = False) -> weights_pb2.GetWeightsResponse:
        """What is served now, and the schema it follows."""
        if audit:
            self._replica.audit()
        return self._replica.get_weights()

    def prepare(
        self,
        request: weights_pb2.PrepareRequest,
        store: Source,
        *,
        timeout_s: float | None = None,  # noqa: ARG002  there is nothing to wait for
    ) -> weights_pb2.PrepareResponse:
        """Take a version from ``store``, which is in this process."""
        return self._replica.prepare(request, [store])

    def commit(
        self,
        key: weights_pb2.VersionKey,
        in_flight: weights_pb2.InFlight = weights_pb2.IN_FLIGHT_KEEP,
        *,
        timeout_s: float | None = None,
    ) -> weights_pb2.CommitResponse:
        """Put a staged version in place."""
        commit = self._replica.begin_commit(key, MODES[in_flight], timeout_s)
        done = wait_for_commit(commit, key) if commit is not None else None
        return self._replica.commit_response(key, done)

    def abort(self, key: weights_pb2.VersionKey) -> weights_pb2.AbortResponse:
        """Forget a staged version."""
        return self._replica.abort(key)

    def rollback(self, key: weights_pb2.VersionKey) -> weights_pb2.RollbackResponse:
        """Go back to the version before ``key``."""
        wait_for_commit(self._replica.begin_rollback(key), key)
        return rolled_back(self._replica)

    def check_canary(self, token_ids: bytes) -> weights_pb2.CheckCanaryResponse:
        """Log-probabilities of a sequence with the served weights."""
        engine = self._engine
        return check_canary(engine.loop, engine.frozen, self._replica, token_ids)

    def close(self) -> None:
        """Nothing to close; clients have this."""
