"""Client of a policy's weights: what is served, and publishing a version."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import grpc

from kleash.rpc.channel import connect
from kleash.rpc.errors import from_rpc_error
from kleash.weights.v1 import weights_pb2, weights_pb2_grpc

SERVICE = "kleash.weights.v1.WeightsService"


class WeightsClient:
    """A connection to one policy replica's weights. Safe to use from several threads."""

    def __init__(self, address: str, *, timeout_s: float = 600.0) -> None:
        """Args:
        address: "host:port" of one replica: a balanced address would reach any one of them.
        timeout_s: deadline of a call, the whole stream of a Publish included.
        """
        self._address = address
        self._timeout_s = timeout_s
        self._channel = connect(address, service=SERVICE, methods_to_retry=("GetWeights",))
        self._stub = weights_pb2_grpc.WeightsServiceStub(self._channel)

    def get_weights(self) -> weights_pb2.GetWeightsResponse:
        """What is served now, and the schema it follows."""
        try:
            return self._stub.GetWeights(weights_pb2.GetWeightsRequest(), timeout=self._timeout_s)
        except grpc.RpcError as error:
            raise from_rpc_error(error, address=self._address) from None

    def publish(
        self, manifest: weights_pb2.Manifest, chunks: Iterable[weights_pb2.Chunk]
    ) -> weights_pb2.PublishResponse:
        """Publish a version; returns once it is served. Repeating a committed publish is harmless.

        Raises PermissionDenied (STALE_FENCE) when another trainer has taken over,
        PreconditionFailed for weights that do not fit or do not match their checksums, Overloaded
        (PUBLISH_IN_PROGRESS) while another publish is under way.
        """

        def frames() -> Iterator[weights_pb2.PublishRequest]:
            yield weights_pb2.PublishRequest(manifest=manifest)
            for chunk in chunks:
                yield weights_pb2.PublishRequest(chunk=chunk)

        try:
            return self._stub.Publish(frames(), timeout=self._timeout_s)
        except grpc.RpcError as error:
            raise from_rpc_error(error, address=self._address) from None

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()

    def __enter__(self) -> WeightsClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
