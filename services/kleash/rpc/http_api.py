"""What a service offers over HTTP: paths, and the calls that they stand for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeGuard

from google.protobuf.message import Message


@dataclass(frozen=True)
class HttpRoute:
    """One path. Without ``read`` and ``write`` its bodies are the JSON mapping of the messages."""

    verb: Literal["GET", "POST"]
    path: str
    service: str
    """Full name of the gRPC service, "kleash.reward.v1.RewardService"."""
    method: str
    """Of that service; of one that streams both ways a line of the body is a message."""
    read: Callable[[Any, Mapping[str, str]], Message] | None = None
    """The request, of the body's JSON and the query of the address. Raises InvalidRequest."""
    write: Callable[[Any], Any] | None = None
    """The body's JSON, of the response. Raises ServiceError."""


@dataclass(frozen=True)
class HttpApi:
    """All paths of one service."""

    routes: tuple[HttpRoute, ...]
    openapi: Path
    """Their description, an OpenAPI document in JSON."""


class HasHttpApi(Protocol):
    """A service that the HTTP port serves, too."""

    http_api: HttpApi


def has_http_api(service: object) -> TypeGuard[HasHttpApi]:
    """Whether a service is one."""
    return hasattr(service, "http_api")
