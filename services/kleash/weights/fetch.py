"""Fetching an object from several sources: resumed where it was torn, checked chunk by chunk."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import xxhash

from kleash.rpc.errors import (
    Cancelled,
    NotFound,
    Overloaded,
    PreconditionFailed,
    ServiceError,
    Unavailable,
)
from kleash.weights.spool import SpoolObject
from kleash.weights.v1 import weights_pb2

logger = logging.getLogger(__name__)

CHUNK_BYTES = 1 << 20
"""Larger chunks are slower in Python's gRPC: each is a fresh allocation."""

ATTEMPTS_WITHOUT_PROGRESS = 3
"""Attempts at one source that bring nothing, before the next source is asked."""


class Source(Protocol):
    """A store: the publisher's, a peer's, or one in this process."""

    @property
    def address(self) -> str: ...

    def fetch(self, object_id: bytes, offset: int) -> Iterator[weights_pb2.FetchResponse]: ...

    def plan_update(
        self, have_digest: str, schema_digest: str, want_digest: str = ""
    ) -> weights_pb2.PlanUpdateResponse: ...


def chunk(offset: int, data: bytes) -> weights_pb2.FetchResponse:
    """A chunk with its checksum."""
    return weights_pb2.FetchResponse(
        offset=offset, xxh3_64=xxhash.xxh3_64_intdigest(data), data=data
    )


def fetch_object(
    object_id: bytes,
    target: SpoolObject,
    sources: Sequence[Source],
    *,
    on_progress: Callable[[int], None] = lambda _: None,
    is_cancelled: Callable[[], bool] = lambda: False,
) -> None:
    """Fill ``target``, source after source; every byte that came and was sound is kept.

    ``on_progress`` gets the number of bytes of every chunk. Raises the last source's error,
    Overloaded (SPOOL_FULL), or Cancelled.
    """
    target.revive()
    failure: ServiceError = Unavailable("no source of weights was named.", reason="NO_SOURCE")
    try:
        for source in sources:
            attempts = 0
            while not target.is_complete and attempts < ATTEMPTS_WITHOUT_PROGRESS:
                before = target.available
                try:
                    for part in source.fetch(object_id, before):
                        _take(part, target, on_progress)
                        if is_cancelled():
                            raise Cancelled("the preparation was given up.")
                    if target.is_complete:
                        return
                    failure = Unavailable(
                        f"{source.address} ended its stream at byte {target.available} of "
                        f"{target.size}.",
                        reason="STREAM_TORN",
                    )
                except (Overloaded, Cancelled):
                    raise
                except NotFound as error:  # it will not come by asking again
                    failure = error
                    break
                except ServiceError as error:
                    failure = error
                attempts = 0 if target.available > before else attempts + 1
                logger.warning("fetch from %s: %s", source.address, failure)
            if target.is_complete:
                return
        raise failure
    except BaseException as error:
        is_known = isinstance(error, ServiceError)
        target.fail(error if is_known else Unavailable("the fetch has failed; see the log."))
        raise
    finally:
        target.release()


def _take(
    part: weights_pb2.FetchResponse, target: SpoolObject, on_progress: Callable[[int], None]
) -> None:
    """Append a chunk; a repeated one is ignored, a gap ends the stream."""
    end = part.offset + len(part.data)
    if xxhash.xxh3_64_intdigest(part.data) != part.xxh3_64:
        raise PreconditionFailed(
            f"bytes {part.offset} to {end} do not have the checksum that came with them.",
            reason="DIGEST_MISMATCH",
            metadata={"layer": "chunk", "offset": str(part.offset)},
        )
    if end <= target.available:
        return
    if part.offset > target.available or end > target.size:
        raise Unavailable(
            f"bytes {part.offset} to {end} came where byte {target.available} of {target.size} was "
            "expected.",
            reason="OUT_OF_ORDER",
        )
    fresh = memoryview(part.data)[target.available - part.offset :]
    target.append(fresh)
    on_progress(len(fresh))
