"""The HTTP port: the same calls as on the gRPC port, as JSON, for whoever has no gRPC.

    aiohttp ─► path ─► token ─► Guard (as gRPC's) ─► body ─► message ─► handler ─► message ─► body
                    └► /healthz /readyz /openapi.json /docs, for everybody

A handler is the one that the service registered with gRPC; what a path stands for is in the
service's HttpApi. Compressed bodies are refused, so that a small one cannot become a large one.
"""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import ssl
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aiohttp import web

from kleash.base import metrics
from kleash.base.errors import UserError
from kleash.rpc.auth import is_loopback
from kleash.rpc.errors import InvalidRequest, NotFound, ServiceError, Unavailable
from kleash.rpc.guard import OTHER, UNKNOWN, Guard, Guards, as_service_error, kind_of
from kleash.rpc.http_answer import METHOD_NOT_ALLOWED, answer_error, answer_json
from kleash.rpc.http_api import HttpApi, HttpPage, HttpRoute, has_http_api
from kleash.rpc.http_calls import (
    TIMEOUT_HEADERS,
    HttpCall,
    HttpContext,
    expects_to_be_asked,
    peer_of,
)
from kleash.rpc.http_connection import IS_SPOKEN, Connection, ConnectionServer, bad_http
from kleash.rpc.http_host import check_host
from kleash.rpc.http_json import dump_json
from kleash.rpc.http_tls import server_context
from kleash.rpc.late_handlers import LateHandlers
from kleash.rpc.ports import listen

if TYPE_CHECKING:
    from kleash.rpc.server import ServerConfig

logger = logging.getLogger(__name__)

PAGE = Path(__file__).with_name("docs.html")
PAGE_POLICY = (
    "default-src 'none'; connect-src 'self'; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
# For connections to close behind the answers of calls that were cancelled.
CLOSE_S = 1.0
SECURITY = {
    "none": [],
    "token": [{"bearer": []}],
    "service_account": [{"bearer": []}],
    "mtls": [{"certificate": []}],
}
"""What the document says of each mode of authentication."""


def open_gateway(
    services: Sequence[object],
    config: ServerConfig,
    guards: Guards,
    handlers: LateHandlers,
    is_serving: Callable[[str], bool],
) -> Gateway:
    """A gateway that has its port and does not listen yet.

    ``is_serving`` tells the health of a name: "liveness", or "" for readiness. Raises UserError
    for a port that cannot be used, certificates that cannot, and services without HTTP.
    """
    apis = [service.http_api for service in services if has_http_api(service)]
    if not apis:
        raise UserError(
            f"{', '.join(sorted(guards.services))} is not served over HTTP; leave "
            "--server.http_port out."
        )
    tls = server_context(config.tls)
    sockets = listen(config.host, config.http_port, key="server.http_port")
    return Gateway(apis, config, guards, handlers, is_serving=is_serving, sockets=sockets, tls=tls)


class Gateway:
    """One server's HTTP port."""

    def __init__(
        self,
        apis: Sequence[HttpApi],
        config: ServerConfig,
        guards: Guards,
        handlers: LateHandlers,
        *,
        is_serving: Callable[[str], bool],
        sockets: Sequence[socket.socket],
        tls: ssl.SSLContext | None,
    ) -> None:
        self._guards = guards
        self._handlers = handlers
        self._is_serving = is_serving
        self._sockets = sockets
        self._tls = tls
        self._config = config
        self._knows_hosts = config.auth.mode == "none" and is_loopback(config.host)
        self._routes = {(route.verb, route.path): route for api in apis for route in api.routes}
        self._open = self._open_paths(apis)
        self._known = {path for _, path in self._routes} | set(self._open)
        self._kept: dict[HttpRoute, Guard] = {}
        self._running: set[asyncio.Task[Any]] = set()
        self._sites: list[web.SockSite] = []
        self._is_draining = self._is_ending = False

    async def start(self) -> None:
        """Listen."""
        self._server = ConnectionServer(
            self._handle,
            handler_cancellation=True,
            access_log=None,
            auto_decompress=False,
            logger=logging.getLogger(f"{__name__}.http"),
            # Also for the head of a request to be there.
            keepalive_timeout=self._config.max_connection_age_s,
            send_s=self._config.max_request_s,
        )
        self._runner = web.ServerRunner(self._server, shutdown_timeout=CLOSE_S)
        await self._runner.setup()
        for each in self._sockets:
            site = web.SockSite(self._runner, each, ssl_context=self._tls)
            self._sites.append(site)
            await site.start()

    def drain(self) -> None:
        """From now on each answer ends its connection, so that callers find another server."""
        self._is_draining = True

    def close(self) -> None:
        """Give back the port, where it has never been listened to."""
        for each in self._sockets:
            each.close()

    async def stop(self, grace_s: float) -> None:
        """Refuse new calls; running ones have ``grace_s`` to end."""
        self._is_draining = self._is_ending = True
        if not self._sites:
            return
        for site in self._sites:
            await site.stop()
        await asyncio.sleep(0)  # what has been read by now has a task
        # A new connection, whose request is still on its way, is left to be answered.
        for connection in self._server.connections:
            if isinstance(connection, Connection) and connection.is_idle:
                connection.force_close()
        if self._running:
            await asyncio.wait(self._running, timeout=grace_s)
        for task in self._running:
            task.cancel()
        await self._runner.cleanup()

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """In a task of its own: names of callers must not outlive a call on their connection."""
        connection = request.protocol
        assert isinstance(connection, Connection)
        connection.is_idle = False
        whole = asyncio.current_task()  # ends when the answer has been sent
        assert whole is not None
        self._running.add(whole)
        whole.add_done_callback(self._running.discard)
        task = asyncio.ensure_future(self._answer(request))
        try:
            response = await task
        except asyncio.CancelledError:
            if not (task.cancelled() and self._is_ending):
                raise  # the caller has left
            whole.uncancel()
            response = answer_error(_stopping(), self._headers(request))
        if _waits_to_send(request):
            response.force_close()  # or what comes next would be taken for the body
        age_s = time.monotonic() - connection.born
        if self._is_draining or age_s > self._config.max_connection_age_s:
            response.force_close()
        metrics.HTTP_REQUESTS.labels(self._label(request), str(response.status)).inc()
        return response

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        headers = self._headers(request)
        try:
            return await self._dispatch(request, headers)
        except ServiceError as error:
            return answer_error(error, headers)
        except Exception as error:
            return answer_error(as_service_error(error, self._label(request)), headers)

    async def _dispatch(
        self, request: web.BaseRequest, headers: dict[str, str]
    ) -> web.StreamResponse:
        if not request[IS_SPOKEN]:
            raise bad_http()
        verb = "GET" if request.method == "HEAD" else request.method
        path = request.path
        if path not in self._known:
            where = "GET /docs tells" if "/docs" in self._known else "the documentation tells"
            raise NotFound(
                f"there is nothing at {path[:64]!r}; {where} what there is.",
                reason="NO_SUCH_PATH",
            )
        if verb == "OPTIONS" and "Access-Control-Request-Method" in request.headers:
            return web.Response(status=204, headers=headers)
        route = self._routes.get((verb, path))
        if route is not None:
            return await self._call(route, request, headers)
        answer = self._open.get(path)
        if answer is None or verb != "GET":
            verbs = "GET" if answer is not None else self._verbs(path)
            headers["Allow"] = verbs
            raise InvalidRequest(
                f"{path} takes {verbs}, and not {request.method[:16]}.", reason=METHOD_NOT_ALLOWED
            )
        return answer(headers)

    async def _call(
        self, route: HttpRoute, request: web.BaseRequest, headers: dict[str, str]
    ) -> web.StreamResponse:
        handler = self._handlers.find(route.service, route.method)
        try:
            if self._knows_hosts:
                check_host(request.headers.get("Host", ""), self._config.http_allowed_hosts)
            context = HttpContext(request)
            await self._guards.check_token(route.service, context.invocation_metadata())
        except ServiceError as error:
            known = (kind_of(handler), route.service, route.method) if handler else UNKNOWN
            self._guards.record_refusal(error, known, peer_of(request))
            raise
        self._guards.check_loaded(route.service)
        if self._is_ending:
            raise _stopping()
        assert handler is not None, f"{route.service} has no method {route.method}"
        guard = self._kept.get(route)
        if guard is None:
            guard = self._guards.guard(handler, route.service, route.method, parse=bytes)
            self._kept[route] = guard
        call = HttpCall(
            route, handler, guard, request, context, headers, self._config.max_message_bytes
        )
        return await call.answer()

    def _headers(self, request: web.BaseRequest) -> dict[str, str]:
        """Of every answer."""
        headers = {
            "Server": "kleash",
            "Cache-Control": "no-store",
            "X-Content-Type-Options": "nosniff",
        }
        origins = self._config.http_allowed_origins
        if origins:
            headers["Vary"] = "Origin"
        origin = request.headers.get("Origin", "")
        if origin and (origin in origins or "*" in origins):
            names = ", ".join(("Authorization", "Content-Type", *TIMEOUT_HEADERS))
            headers |= {
                "Access-Control-Allow-Origin": origin,
                "Access-Control-Allow-Methods": "GET, POST",
                "Access-Control-Allow-Headers": names,
                "Access-Control-Expose-Headers": "Retry-After",
                "Access-Control-Max-Age": "600",
            }
        return headers

    def _open_paths(
        self, apis: Sequence[HttpApi]
    ) -> dict[str, Callable[[dict[str, str]], web.Response]]:
        """Answers that ask nobody who calls, by path."""
        found = {
            "/healthz": lambda headers: self._health("liveness", headers),
            "/readyz": lambda headers: self._health("", headers),
        }
        for api in apis:
            found |= {path: _giving(page) for path, page in api.pages.items()}
        described = [api.openapi for api in apis if api.openapi is not None]
        if self._config.reflection and described:
            document = _document(described, self._config.auth.mode)
            page = PAGE.read_bytes()
            found["/openapi.json"] = lambda headers: answer_json(document, headers)
            found["/docs"] = lambda headers: web.Response(
                body=page,
                content_type="text/html",
                charset="utf-8",
                headers={**headers, "Content-Security-Policy": PAGE_POLICY},
            )
        return found

    def _health(self, name: str, headers: dict[str, str]) -> web.Response:
        is_serving = self._is_serving(name)
        body = dump_json({"status": "SERVING" if is_serving else "NOT_SERVING"})
        return answer_json(body, headers, status=200 if is_serving else 503)

    def _verbs(self, path: str) -> str:
        return ", ".join(sorted({verb for verb, known in self._routes if known == path}))

    def _label(self, request: web.BaseRequest) -> str:
        return request.path if request.path in self._known else OTHER


def _waits_to_send(request: web.BaseRequest) -> bool:
    """Whether the caller may keep the body to itself, as it was not asked for it."""
    return expects_to_be_asked(request) and not request.content.is_eof()


def _stopping() -> Unavailable:
    return Unavailable("the server is stopping; call another one.", reason="DRAINING")


def _giving(page: HttpPage) -> Callable[[dict[str, str]], web.Response]:
    body = page.file.read_bytes()
    return lambda headers: web.Response(
        body=body,
        content_type=page.content_type,
        charset="utf-8",
        headers={**headers, "Content-Security-Policy": page.policy},
    )


def _document(paths: Sequence[Path], auth_mode: str) -> bytes:
    """The services' documents as one, which says how this server knows its callers."""
    whole: dict[str, Any] = {}
    for path in paths:
        document = json.loads(path.read_text(encoding="utf-8"))
        whole = whole or document
        whole["paths"] |= document["paths"]
        whole["components"]["schemas"] |= document["components"]["schemas"]
    for operations in whole["paths"].values():
        for operation in operations.values():
            if "security" not in operation:
                operation["security"] = SECURITY[auth_mode]
    return dump_json(whole)
