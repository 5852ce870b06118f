"""Requests to the HTTP port, as a client without any library of ours makes them."""

from __future__ import annotations

import http.client
import json
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.services.doubler import WAIT_S, free_port

from kleash.reward.config import RewardConfig
from kleash.reward.service import RewardService
from kleash.rpc.requests import Limits
from kleash.rpc.server import BackgroundServer, ServerConfig

JSON = {"Content-Type": "application/json"}
LINES = {"Content-Type": "application/x-ndjson"}


@dataclass(frozen=True)
class Reply:
    """What came back."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """The body, in which NaN and infinity are no JSON."""
        return json.loads(self.body, parse_constant=_refuse)

    @property
    def error(self) -> dict[str, Any]:
        """What an error tells."""
        assert self.status >= 400, self.body
        assert self.headers["content-type"].startswith("application/json")
        assert b"Traceback" not in self.body
        return self.json["error"]


def _refuse(name: str) -> None:
    raise AssertionError(f"the body holds {name}")


@dataclass(frozen=True)
class HttpPort:
    """A port to ask."""

    port: int
    tls: ssl.SSLContext | None = None

    def connection(self) -> http.client.HTTPConnection:
        if self.tls is None:
            return http.client.HTTPConnection("127.0.0.1", self.port, timeout=WAIT_S)
        return http.client.HTTPSConnection("127.0.0.1", self.port, timeout=WAIT_S, context=self.tls)

    def ask(
        self, verb: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> Reply:
        """One request on a connection of its own; ``body`` is bytes, or becomes JSON."""
        connection = self.connection()
        try:
            return ask(connection, verb, path, body, headers)
        finally:
            connection.close()

    def post(self, path: str, body: Any, headers: dict[str, str] | None = None) -> Reply:
        return self.ask("POST", path, body, {**JSON, **(headers or {})})

    def get(self, path: str, headers: dict[str, str] | None = None) -> Reply:
        return self.ask("GET", path, headers=headers)


def ask(
    connection: http.client.HTTPConnection,
    verb: str,
    path: str,
    body: Any = None,
    headers: dict[str, str] | None = None,
) -> Reply:
    """One request on an open connection."""
    raw = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    connection.request(verb, path, raw, headers or {})
    response = connection.getresponse()
    names = {name.lower(): value for name, value in response.getheaders()}
    return Reply(response.status, names, response.read())


@contextmanager
def serving_http(service: Any, **options: Any) -> Iterator[tuple[BackgroundServer, HttpPort]]:
    """A server with an HTTP port, and that."""
    port = free_port()
    with BackgroundServer([service], ServerConfig(http_port=port, **options)) as server:
        yield server, HttpPort(port)


@contextmanager
def serving_reward(
    folder: Path, *, limits: Limits | None = None, **options: Any
) -> Iterator[tuple[BackgroundServer, HttpPort]]:
    """The reward service with an HTTP port."""
    config = RewardConfig(model=folder, limits=limits or Limits())
    with serving_http(RewardService(config), **options) as both:
        yield both
