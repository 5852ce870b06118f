"""What a service offers over HTTP: paths, and the calls and files that they stand for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, TypeGuard

from google.protobuf.message import Message


@dataclass(frozen=True)
class Event:
    """What a server-sent event tells."""

    name: str
    data: Any
    """A JSON value."""
    event_id: str = ""
    """A reader that comes back shows that of the last event which had one, as Last-Event-ID."""


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
    """The request, of the body's JSON and the query of the address; of a GET that has no body, of
    None; of one with events, of its Last-Event-ID or None. Raises InvalidRequest."""
    write: Callable[[Any], Any] | None = None
    """The body's JSON, of the response. Raises ServiceError."""
    event: Callable[[Any], Event] | None = None
    """Of a method that answers with a stream: each response as a server-sent event."""


@dataclass(frozen=True)
class HttpPage:
    """A file that holds nothing that not everybody may know, such as a page without its data."""

    file: Path
    content_type: str
    policy: str
    """Its Content-Security-Policy."""


@dataclass(frozen=True)
class HttpApi:
    """All paths of one service."""

    routes: tuple[HttpRoute, ...]
    openapi: Path | None = None
    """Their description, an OpenAPI document in JSON."""
    pages: Mapping[str, HttpPage] = field(default_factory=dict)
    """By path; they are given to everybody."""


class HasHttpApi(Protocol):
    """A service that the HTTP port serves, too."""

    http_api: HttpApi


def has_http_api(service: object) -> TypeGuard[HasHttpApi]:
    """Whether a service is one."""
    return hasattr(service, "http_api")
