"""Clients of a replica's weights and of a store of versions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import grpc

from kleash.base.tracing import Pairs
from kleash.rpc.call_spans import client_call
from kleash.rpc.channel import connect
from kleash.rpc.credentials import Credentials
from kleash.rpc.errors import from_rpc_error
from kleash.weights.v1 import weights_pb2, weights_pb2_grpc

REPLICA_SERVICE = "kleash.weights.v1.WeightsService"
STORE_SERVICE = "kleash.weights.v1.WeightsStoreService"

X = TypeVar("X")


class _Client:
    """A connection with a deadline on every call and errors as kleash.rpc.errors."""

    def __init__(
        self,
        address: str,
        service: str,
        methods_to_retry: tuple[str, ...],
        timeout_s: float,
        credentials: Credentials | None,
    ) -> None:
        self.address = address
        self._service = service
        self._timeout_s = timeout_s
        self._channel = connect(
            address, service=service, methods_to_retry=methods_to_retry, credentials=credentials
        )

    def _call(self, method: Callable[..., X], request: Any, timeout_s: float | None = None) -> X:
        try:
            with self._traced(request) as trace:
                return method(request, timeout=timeout_s or self._timeout_s, metadata=trace)
        except grpc.RpcError as error:
            raise from_rpc_error(error, address=self.address) from None

    def _stream(
        self, method: Callable[..., Any], request: Any, timeout_s: float | None
    ) -> Iterator[Any]:
        with self._traced(request) as trace:
            call = method(request, timeout=timeout_s, metadata=trace)
            try:
                yield from call
            except grpc.RpcError as error:
                raise from_rpc_error(error, address=self.address) from None
            finally:
                call.cancel()

    def _traced(self, request: Any) -> AbstractContextManager[Pairs]:
        method = type(request).__name__.removesuffix("Request")
        return client_call(self._service, method, self.address)

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class WeightsClient(_Client):
    """A connection to one policy replica's weights. Safe to use from several threads."""

    def __init__(
        self, address: str, *, timeout_s: float = 600.0, credentials: Credentials | None = None
    ) -> None:
        """Args:
        address: "host:port" of one replica: a balanced address would reach any one of them.
        timeout_s: deadline of a call, the whole stream of a Prepare included.
        credentials: TLS and token; None takes those of the environment, KLEASH_TLS_* and
            KLEASH_TOKEN*.
        """
        methods_to_retry = ("GetWeights", "CheckCanary")
        super().__init__(address, REPLICA_SERVICE, methods_to_retry, timeout_s, credentials)
        self._stub = weights_pb2_grpc.WeightsServiceStub(self._channel)

    def get_weights(self, *, audit: bool = False) -> weights_pb2.GetWeightsResponse:
        """What is served now, and the schema it follows.

        ``audit`` computes the digest of all weights again; raises InternalError
        (DIGEST_MISMATCH) when it is not the one that is served.
        """
        return self._call(self._stub.GetWeights, weights_pb2.GetWeightsRequest(audit=audit))

    def prepare(
        self,
        request: weights_pb2.PrepareRequest,
        store: object = None,  # noqa: ARG002  a replica in this process reads from it
        *,
        timeout_s: float | None = None,
    ) -> weights_pb2.PrepareResponse:
        """Fetch and check a version; returns the last state: STAGED, or SERVING if it is served.

        Raises PermissionDenied (STALE_FENCE) when another trainer has taken over,
        PreconditionFailed for weights that do not fit or do not match their digests, Overloaded
        (SPOOL_FULL) when the replica's disk has no room.
        """
        stream = self._stream(self._stub.Prepare, request, timeout_s or self._timeout_s)
        *_, last = stream
        return last

    def commit(
        self,
        key: weights_pb2.VersionKey,
        in_flight: weights_pb2.InFlight = weights_pb2.IN_FLIGHT_KEEP,
        *,
        timeout_s: float | None = None,
    ) -> weights_pb2.CommitResponse:
        """Put a staged version in place. Repeating a commit is harmless.

        Raises PreconditionFailed (NOT_STAGED, DIGEST_MISMATCH), DeadlineExceeded when running
        responses did not end in time; the old version goes on serving.
        """
        request = weights_pb2.CommitRequest(key=key, in_flight=in_flight)
        return self._call(self._stub.Commit, request, timeout_s)

    def abort(self, key: weights_pb2.VersionKey) -> weights_pb2.AbortResponse:
        """Forget a staged version."""
        return self._call(self._stub.Abort, weights_pb2.AbortRequest(key=key))

    def rollback(self, key: weights_pb2.VersionKey) -> weights_pb2.RollbackResponse:
        """Go back to the version before ``key``, which must be the served one."""
        return self._call(self._stub.Rollback, weights_pb2.RollbackRequest(key=key))

    def check_canary(self, token_ids: bytes) -> weights_pb2.CheckCanaryResponse:
        """Log-probabilities of a sequence of little-endian int32 ids with the served weights."""
        request = weights_pb2.CheckCanaryRequest(token_ids=token_ids)
        return self._call(self._stub.CheckCanary, request)


class WeightsStoreClient(_Client):
    """A connection to a publisher, or to a replica that passes objects on."""

    def __init__(
        self, address: str, *, timeout_s: float = 600.0, credentials: Credentials | None = None
    ) -> None:
        """Args:
        address: "host:port" of the publisher or of a replica.
        timeout_s: deadline of a call, the whole stream of a Fetch included.
        credentials: TLS and token; None takes those of the environment, KLEASH_TLS_* and
            KLEASH_TOKEN*.
        """
        methods_to_retry = ("GetHead", "PlanUpdate", "ListVersions")
        super().__init__(address, STORE_SERVICE, methods_to_retry, timeout_s, credentials)
        self._stub = weights_pb2_grpc.WeightsStoreServiceStub(self._channel)

    def get_head(self) -> weights_pb2.VersionKey | None:
        """The newest committed version, None before the first."""
        response = self._call(self._stub.GetHead, weights_pb2.GetHeadRequest())
        return response.head if response.HasField("head") else None

    def plan_update(
        self, have_digest: str, schema_digest: str, want_digest: str = ""
    ) -> weights_pb2.PlanUpdateResponse:
        """The cheapest way from one digest to another, by default to the head's."""
        request = weights_pb2.PlanUpdateRequest(
            have_digest=have_digest, schema_digest=schema_digest, want_digest=want_digest
        )
        return self._call(self._stub.PlanUpdate, request)

    def fetch(self, object_id: bytes, offset: int) -> Iterator[weights_pb2.FetchResponse]:
        """Chunks of an object from ``offset`` on. Raises NotFound."""
        request = weights_pb2.FetchRequest(object_id=object_id, offset=offset)
        return self._stream(self._stub.Fetch, request, self._timeout_s)

    def watch_head(self) -> Iterator[weights_pb2.VersionKey | None]:
        """The newest committed version now and whenever it changes, without end."""
        request = weights_pb2.WatchHeadRequest()
        for response in self._stream(self._stub.WatchHead, request, None):
            yield response.head if response.HasField("head") else None

    def list_versions(self) -> list[weights_pb2.VersionInfo]:
        """What the store holds, oldest first."""
        response = self._call(self._stub.ListVersions, weights_pb2.ListVersionsRequest())
        return list(response.versions)
