"""The errors that services answer with and clients raise: the same classes on both sides.

A handler raises one; the chassis turns it into a gRPC status with google.rpc details; the client
turns that back into the same class with ``from_rpc_error``.

RemoteError
└── ServiceError             gRPC status          google.rpc detail
    ├── InvalidRequest       INVALID_ARGUMENT     BadRequest: the field's path, "items[3].tokens"
    ├── PreconditionFailed   FAILED_PRECONDITION  ErrorInfo: reason, such as TOKENIZER_MISMATCH
    │   └── Unimplemented    UNIMPLEMENTED        ErrorInfo
    ├── NotFound             NOT_FOUND            ErrorInfo
    ├── Overloaded           RESOURCE_EXHAUSTED   RetryInfo; trailer grpc-retry-pushback-ms
    ├── Unavailable          UNAVAILABLE          ErrorInfo: LOADING, DRAINING, AUTH_UNAVAILABLE;
    │                                             made here: UNREACHABLE, TLS
    ├── DeadlineExceeded     DEADLINE_EXCEEDED    ErrorInfo
    ├── Cancelled            CANCELLED            ErrorInfo
    ├── Unauthenticated      UNAUTHENTICATED      ErrorInfo: MISSING_CREDENTIALS, BAD_CREDENTIALS,
    │                                             EXPIRED
    ├── PermissionDenied     PERMISSION_DENIED    ErrorInfo: CALLER_NOT_ALLOWED, STALE_FENCE
    └── InternalError        INTERNAL             ErrorInfo: correlation_id of the server's log line
"""

# The classes are named as the statuses are, without an "Error" suffix on each.
# ruff: noqa: N818

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, ClassVar

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from kleash.base.errors import RemoteError

DOMAIN = "kleash.dev"
STATUS_KEY = "grpc-status-details-bin"
PUSHBACK_KEY = "grpc-retry-pushback-ms"


class ServiceError(RemoteError):
    """A service refused or failed a call; ``message`` is a sentence with values and the remedy."""

    code: ClassVar[grpc.StatusCode] = grpc.StatusCode.UNKNOWN

    def __init__(
        self,
        message: str,
        *,
        reason: str = "",
        field: str = "",
        retry_after_s: float | None = None,
        metadata: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason
        self.field = field
        self.retry_after_s = retry_after_s
        self.metadata = dict(metadata or {})


class InvalidRequest(ServiceError):
    """The request cannot be used; ``field`` is the path of the culprit."""

    code = grpc.StatusCode.INVALID_ARGUMENT


class PreconditionFailed(ServiceError):
    """The request does not fit the server's state; ``reason`` names the mismatch."""

    code = grpc.StatusCode.FAILED_PRECONDITION


class Unimplemented(PreconditionFailed):
    """The server does not offer the method."""

    code = grpc.StatusCode.UNIMPLEMENTED


class NotFound(ServiceError):
    """What the request names does not exist here."""

    code = grpc.StatusCode.NOT_FOUND


class Overloaded(ServiceError):
    """No room; try again after ``retry_after_s``. Without it, trying again will not help."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED


class Unavailable(ServiceError):
    """The service cannot be reached, is loading, or is draining."""

    code = grpc.StatusCode.UNAVAILABLE


class DeadlineExceeded(ServiceError):
    """The call took longer than the caller or the server allows."""

    code = grpc.StatusCode.DEADLINE_EXCEEDED


class Cancelled(ServiceError):
    """The call was cancelled."""

    code = grpc.StatusCode.CANCELLED


class Unauthenticated(ServiceError):
    """The server does not know who calls: no credentials, wrong ones, or expired ones."""

    code = grpc.StatusCode.UNAUTHENTICATED


class PermissionDenied(ServiceError):
    """The caller may not do this."""

    code = grpc.StatusCode.PERMISSION_DENIED


class InternalError(ServiceError):
    """The server failed; its log holds the trace under ``metadata["correlation_id"]``."""

    code = grpc.StatusCode.INTERNAL


_NAMED: tuple[type[ServiceError], ...] = (
    InvalidRequest,
    PreconditionFailed,
    Unimplemented,
    NotFound,
    Overloaded,
    Unavailable,
    DeadlineExceeded,
    Cancelled,
    Unauthenticated,
    PermissionDenied,
    InternalError,
)
_CLASSES: dict[grpc.StatusCode, type[ServiceError]] = {
    **{error_class.code: error_class for error_class in _NAMED},
    grpc.StatusCode.OUT_OF_RANGE: InvalidRequest,
    grpc.StatusCode.ABORTED: PreconditionFailed,
    grpc.StatusCode.ALREADY_EXISTS: PreconditionFailed,
}


def trailing_metadata(error: ServiceError) -> tuple[tuple[str, str | bytes], ...]:
    """The trailers of ``error``: a google.rpc.Status, and the retry pushback of an overload."""
    info = error_details_pb2.ErrorInfo(
        reason=error.reason or error.code.name, domain=DOMAIN, metadata=error.metadata
    )
    details: list[Any] = [info]
    if error.field:
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=error.field, description=error.message
        )
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    pushback_ms = None
    if error.retry_after_s is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromNanoseconds(int(error.retry_after_s * 1e9))
        details.append(retry)
        pushback_ms = str(round(error.retry_after_s * 1e3))
    elif isinstance(error, Overloaded):
        pushback_ms = "-1"  # gRPC clients give up at a negative pushback

    packed = []
    for detail in details:
        packed.append(AnyMessage())
        packed[-1].Pack(detail)
    status = status_pb2.Status(code=error.code.value[0], message=error.message, details=packed)
    trailers: tuple[tuple[str, str | bytes], ...] = ((STATUS_KEY, status.SerializeToString()),)
    return trailers if pushback_ms is None else (*trailers, (PUSHBACK_KEY, pushback_ms))


def from_rpc_error(error: grpc.RpcError, *, address: str = "") -> ServiceError:
    """The ServiceError that a failed call stands for.

    ``address`` is the server's, for the sentence about a server that does not answer; without it
    the sentence holds the address that gRPC reports.
    """
    call: Any = error
    code: grpc.StatusCode = call.code()
    text: str = call.details() or ""
    status = _status(call.trailing_metadata() or ())
    if status is None:
        return _without_details(code, text, address)
    reason, field, retry_after_s, metadata = "", "", None, {}
    for detail in status.details:
        match detail.TypeName():
            case "google.rpc.ErrorInfo":
                info = error_details_pb2.ErrorInfo.FromString(detail.value)
                reason, metadata = info.reason, dict(info.metadata)
            case "google.rpc.BadRequest":
                violations = error_details_pb2.BadRequest.FromString(detail.value).field_violations
                field = violations[0].field if violations else ""
            case "google.rpc.RetryInfo":
                delay = error_details_pb2.RetryInfo.FromString(detail.value).retry_delay
                retry_after_s = delay.ToNanoseconds() / 1e9
    error_class = _CLASSES.get(code, InternalError)
    return error_class(
        status.message, reason=reason, field=field, retry_after_s=retry_after_s, metadata=metadata
    )


def _status(metadata: Iterable[tuple[str, str | bytes]]) -> status_pb2.Status | None:
    for key, value in metadata:
        if key == STATUS_KEY and isinstance(value, bytes):
            try:
                return status_pb2.Status.FromString(value)
            except DecodeError:
                return None
    return None


_TLS_CAUSES = {
    "WRONG_VERSION_NUMBER": "it uses no TLS; unset KLEASH_TLS_CA, or give the server a certificate",
    "Hostname Verification": (
        "its certificate is for another name; connect by a name that it holds, or set "
        "KLEASH_TLS_SERVER_NAME to one"
    ),
    "certificate has expired": "its certificate has expired; renew it",
    "CERTIFICATE_VERIFY_FAILED": (
        "its certificate is not by an authority that KLEASH_TLS_CA holds; set that to the right one"
    ),
}
"""What a failed handshake says, most telling first, and the cause with its remedy."""


def _without_details(code: grpc.StatusCode, text: str, address: str) -> ServiceError:
    """An error that gRPC itself, or a proxy, made: no Kleash server wrote it."""
    if code is grpc.StatusCode.UNAVAILABLE:
        return _unreachable(text, address)
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in text:
        return InvalidRequest(
            f"the message is too large ({text.rstrip('.')}); send fewer items in one request.",
            reason="MESSAGE_TOO_LARGE",
        )
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        where = f" by the service at {address}" if address else ""
        return DeadlineExceeded(
            f"the call was not answered in time{where}; allow more time or send less."
        )
    error_class = _CLASSES.get(code, InternalError)
    if error_class.code is code:
        return error_class(text or code.name)
    return error_class(f"{code.name}: {text}" if text else code.name)


def _unreachable(text: str, address: str) -> Unavailable:
    named = re.search(r"ipv[46]:(\S+?):? |resolution failed for ([^\s:]+:\d+)", text + " ")
    place = address or (next(filter(None, named.groups()), "") if named else "")
    at_place = f" at {place}" if place else ""
    for words, cause in _TLS_CAUSES.items():
        if words in text:
            return Unavailable(
                f"cannot speak TLS with the service{at_place}: {cause}.", reason="TLS"
            )
    remedy = "check the address and that the service is running and ready"
    if "Socket closed" in text:  # what a client sees when only the server wants TLS
        remedy = (
            "check that the service is running and ready, and that both sides use TLS or neither "
            "(KLEASH_TLS_CA; KLEASH_TLS_CERT where callers need a certificate)"
        )
    return Unavailable(
        f"cannot reach the service{at_place}: {text.strip().rstrip('.')}; {remedy}.",
        reason="UNREACHABLE",
    )
