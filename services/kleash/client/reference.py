"""Client of the reference service: log-probabilities of responses, split to the server's limits."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np

from kleash.client.calls import (
    Call,
    ItemError,
    check_one_revision,
    item_code,
    remote_call,
    run_calls,
    split_calls,
    token_cost,
)
from kleash.client.types import Tokens
from kleash.common.v1 import common_pb2
from kleash.reference.v1 import reference_pb2, reference_pb2_grpc
from kleash.rpc.channel import connect
from kleash.rpc.codec import decode_floats, encode_ids
from kleash.rpc.credentials import Credentials
from kleash.rpc.errors import InternalError

SERVICE = "kleash.reference.v1.ReferenceService"


class ReferenceCalls:
    """The typed calls, over whatever carries them: gRPC here, a method call in LocalReference."""

    def __init__(self, call: Call, *, parallel_calls: int = 1) -> None:
        self._call = call
        self._parallel_calls = parallel_calls

    def get_model(self) -> reference_pb2.GetModelResponse:
        """Name, revision, digests and limits of the served model."""
        return self._call("GetModel", reference_pb2.GetModelRequest())

    def log_probs(
        self,
        sequences: Sequence[Tokens],
        *,
        temperature: float,
        tokenizer_sha256: str,
        isolate: bool = False,
    ) -> list[np.ndarray]:
        """Log-probability of each response token in nats: one float32 array a sequence, in order.

        Raises ItemError for the first sequence without a result; no value is ever NaN.

        Args:
            temperature: the sampler's; log-probs are those of softmax(logits / temperature).
            tokenizer_sha256: digest of the tokenizer that made the ids; another one than the
                server's raises PreconditionFailed.
            isolate: compute apart from other callers' items, so that the same call gives the
                same bits.
        """
        if not sequences:
            return []
        costs = [token_cost(len(sequence.ids)) for sequence in sequences]
        requests = [
            reference_pb2.LogProbsRequest(
                items=[_item(sequence, tokenizer_sha256) for sequence in sequences[part]],
                temperature=temperature,
                isolate=isolate,
            )
            for part in split_calls(costs, self._limits)
        ]
        responses: list[reference_pb2.LogProbsResponse] = run_calls(
            lambda request: self._call("LogProbs", request),
            requests,
            parallel=self._parallel_calls,
        )
        check_one_revision([response.model for response in responses])
        results = [result for response in responses for result in response.results]
        if len(results) != len(sequences):
            raise InternalError(f"sent {len(sequences)} items and received {len(results)} results.")
        return [
            _log_probs(index, result, len(sequence.ids) - sequence.response_start)
            for index, (result, sequence) in enumerate(zip(results, sequences, strict=True))
        ]

    @cached_property
    def _limits(self) -> common_pb2.Limits:
        return self.get_model().limits


class ReferenceClient(ReferenceCalls):
    """A connection to a reference service. Safe to use from several threads."""

    def __init__(
        self,
        address: str,
        *,
        timeout_s: float = 120.0,
        parallel_calls: int = 4,
        credentials: Credentials | None = None,
    ) -> None:
        """Args:
        address: "host:port", or a gRPC target such as "dns:///reference:50051".
        timeout_s: deadline of each call; long lists take several calls.
        parallel_calls: calls of one list that are under way at a time.
        credentials: TLS and token; None takes those of the environment, KLEASH_TLS_* and
            KLEASH_TOKEN*.
        """
        self._channel = connect(
            address,
            service=SERVICE,
            methods_to_retry=("LogProbs", "GetModel"),
            credentials=credentials,
        )
        stub = reference_pb2_grpc.ReferenceServiceStub(self._channel)
        super().__init__(
            remote_call(stub, service=SERVICE, address=address, timeout_s=timeout_s),
            parallel_calls=parallel_calls,
        )

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()

    def __enter__(self) -> ReferenceClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _item(sequence: Tokens, tokenizer_sha256: str) -> reference_pb2.LogProbsItem:
    return reference_pb2.LogProbsItem(
        tokens=common_pb2.TokenSequence(
            tokens=encode_ids(sequence.ids),
            response_start=sequence.response_start,
            tokenizer_sha256=tokenizer_sha256,
        )
    )


def _log_probs(index: int, result: reference_pb2.LogProbsResult, length: int) -> np.ndarray:
    code = item_code(result.code)
    if code != "OK":
        raise ItemError(index, code, result.error_message)
    values = decode_floats(result.log_probs, field=f"results[{index}].log_probs")
    if len(values) != length or not np.isfinite(values).all():
        raise InternalError(
            f"the service sent {len(values)} log-probabilities for item {index}, "
            f"which has {length} response tokens, or one that is not finite."
        )
    return values
