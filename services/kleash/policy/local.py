"""The policy in this process: the methods of PolicyClient and WeightsClient without gRPC.

Requests meet the same checks and the same decoding thread, so that a run in one process gives the
bits of a run over gRPC.
"""

from __future__ import annotations

import queue
from collections.abc import Iterable, Iterator

from kleash.client.policy import PolicyCalls
from kleash.lm.decode import Decoded
from kleash.policy.config import PolicyConfig
from kleash.policy.decode_loop import finished_or_error
from kleash.policy.engine import Engine
from kleash.policy.requests import encode
from kleash.policy.v1 import policy_pb2
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
        self.engine.loop.stop()

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
    """A policy's weights behind the client's methods."""

    def __init__(self, engine: Engine) -> None:
        self._receiver = engine.weights

    def get_weights(self) -> weights_pb2.GetWeightsResponse:
        """What is served now, and the schema it follows."""
        return self._receiver.get_weights()

    def publish(
        self, manifest: weights_pb2.Manifest, chunks: Iterable[weights_pb2.Chunk]
    ) -> weights_pb2.PublishResponse:
        """Publish a version. Raises what WeightsClient raises."""
        return self._receiver.publish(manifest, chunks)

    def close(self) -> None:
        """Nothing to close; clients have this."""
