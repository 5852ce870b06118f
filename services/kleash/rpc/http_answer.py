"""Errors over HTTP: the status of google.rpc.Code, and a JSON body.

    {"error": {"code": "INVALID_ARGUMENT", "message": "items[3] has no input; ...",
               "field": "items[3].input", "reason": "INVALID_ARGUMENT"}}

``retry_after_s`` and ``metadata`` are there when the error has them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import grpc
from aiohttp import web

from kleash.rpc.errors import ServiceError
from kleash.rpc.http_json import dump_json

MESSAGE_TOO_LARGE = "MESSAGE_TOO_LARGE"
UNSUPPORTED_MEDIA_TYPE = "UNSUPPORTED_MEDIA_TYPE"
METHOD_NOT_ALLOWED = "METHOD_NOT_ALLOWED"
LENGTH_HEADERS = ("content-length", "transfer-encoding")

_STATUSES = {
    grpc.StatusCode.OK: 200,
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.FAILED_PRECONDITION: 400,
    grpc.StatusCode.OUT_OF_RANGE: 400,
    grpc.StatusCode.UNAUTHENTICATED: 401,
    grpc.StatusCode.PERMISSION_DENIED: 403,
    grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.ABORTED: 409,
    grpc.StatusCode.ALREADY_EXISTS: 409,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 429,
    grpc.StatusCode.CANCELLED: 499,
    grpc.StatusCode.DATA_LOSS: 500,
    grpc.StatusCode.UNKNOWN: 500,
    grpc.StatusCode.INTERNAL: 500,
    grpc.StatusCode.UNIMPLEMENTED: 501,
    grpc.StatusCode.UNAVAILABLE: 503,
    grpc.StatusCode.DEADLINE_EXCEEDED: 504,
}
"""As https://github.com/googleapis/googleapis/blob/master/google/rpc/code.proto says."""
_FINER = {MESSAGE_TOO_LARGE: 413, UNSUPPORTED_MEDIA_TYPE: 415, METHOD_NOT_ALLOWED: 405}
"""Where HTTP has a word of its own, by reason."""


def status_of(error: ServiceError) -> int:
    """The HTTP status."""
    return _FINER.get(error.reason) or _STATUSES[error.code]


def error_json(error: ServiceError) -> dict[str, Any]:
    """The body."""
    told: dict[str, Any] = {
        "code": error.code.name,
        "message": error.message,
        "field": error.field,
        "reason": error.reason or error.code.name,
    }
    if error.retry_after_s is not None:
        told["retry_after_s"] = error.retry_after_s
    if error.metadata:
        told["metadata"] = error.metadata
    return {"error": told}


def answer_error(error: ServiceError, headers: Mapping[str, str]) -> web.Response:
    """The whole response."""
    response = answer_json(dump_json(error_json(error)), headers, status=status_of(error))
    if error.retry_after_s is not None:
        response.headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
    if error.code is grpc.StatusCode.UNAUTHENTICATED:
        response.headers["WWW-Authenticate"] = "Bearer"
    return response


def answer_json(body: bytes, headers: Mapping[str, str], *, status: int = 200) -> web.Response:
    """A response with a JSON body."""
    return web.Response(body=body, status=status, headers=headers, content_type="application/json")
