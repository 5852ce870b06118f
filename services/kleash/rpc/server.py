"""The process around services: ports, loading, health, metrics, drain.

bind ports ─► NOT_SERVING ─► load ─► register ─► start ─► SERVING ... SIGTERM or SIGINT
                                                                         │ wait (announce)
   exit ◄─ stop services ◄─ running calls end (grace) ◄─ wait (delay) ◄─ NOT_SERVING
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
import signal
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Self

import grpc
import pydantic
from grpc_reflection.v1alpha import reflection

from kleash.base import metrics
from kleash.base.config import Config
from kleash.base.ending import end_at_once
from kleash.rpc.audit import AuditMode, Audits
from kleash.rpc.auth import AuthConfig, Gate, warn_about_plain_tokens
from kleash.rpc.background import background_loop, in_thread
from kleash.rpc.guard import Guards
from kleash.rpc.health import HEALTH_SERVICE, HealthBoard
from kleash.rpc.interceptors import CallInterceptor
from kleash.rpc.late_handlers import LateHandlers
from kleash.rpc.ports import bind, join, serve_metrics
from kleash.rpc.quota import DEFAULT_QUOTAS, QuotaConfig, Quotas
from kleash.rpc.service import Service
from kleash.rpc.tls import TlsConfig, server_credentials

if TYPE_CHECKING:
    from kleash.rpc.gateway import Gateway

logger = logging.getLogger(__name__)

REFRESH_S = 0.25

STOP_S, SHORTEST_STOP_S = 1.0, 0.1
"""For all services to stop, and for each, when running calls have used up drain_grace_s."""


class ServerConfig(Config):
    """Where a server listens, what it accepts and how it stops."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 or :: for every interface."""
    port: int = pydantic.Field(default=0, ge=0, lt=65536)
    """Port for gRPC; 0 takes any free one."""
    health_port: int = pydantic.Field(default=0, ge=0, lt=65536)
    """Second port with the health service alone, always without TLS; 0 for none, as the gRPC port
    serves health in any case."""
    metrics_port: int = pydantic.Field(default=0, ge=0, lt=65536)
    """Port of the Prometheus page /metrics; 0 for none."""
    drain_announce_s: float = pydantic.Field(default=0.0, ge=0)
    """Seconds between the signal and NOT_SERVING, in which the address of the next server becomes
    known; 15 behind Kubernetes DNS."""
    drain_delay_s: float = pydantic.Field(default=0.0, ge=0)
    """Seconds between NOT_SERVING and refusing new calls, so that balancers notice. gRPC looks up
    addresses when a connection closes, and not when a server is NOT_SERVING: a client that knows no
    other server fails meanwhile."""
    drain_grace_s: float = pydantic.Field(default=30.0, ge=0)
    """Seconds that running calls have to end after that."""
    http_port: int = pydantic.Field(default=0, ge=0, lt=65536)
    """Port for HTTP with JSON, with the rules of the gRPC port; 0 for none."""
    http_allowed_origins: tuple[str, ...] = ()
    """Sites whose pages may call the HTTP port, as browsers name them ("https://app.example"); *
    for all. Empty for none."""
    http_allowed_hosts: tuple[str, ...] = ()
    """Names that a Host header may give, beside localhost, where the HTTP port listens on the
    loopback interface alone and auth.mode is none: those of a proxy on this machine; * for all."""
    max_request_s: float = pydantic.Field(default=600.0, gt=0)
    """Longest time for one call, whatever its deadline."""
    max_message_bytes: int = pydantic.Field(default=64 * 1024 * 1024, ge=1024)
    """Largest message, received or sent; of HTTP, largest body, or line of a stream."""
    reflection: bool = True
    """Whether clients such as grpcurl can list the services, and /openapi.json and /docs tell the
    paths of the HTTP port."""
    max_concurrent_streams: int = pydantic.Field(default=256, ge=1)
    """Calls at a time on one connection; bounds the memory for requests that wait to be read."""
    max_connection_age_s: float = pydantic.Field(default=120.0, gt=0)
    """Seconds after which a connection is renewed, so that clients find new replicas."""
    liveness_limit_s: float = pydantic.Field(default=300.0, gt=0)
    """Seconds without a sign of life from a busy model thread until "liveness" is NOT_SERVING."""
    tls: TlsConfig = TlsConfig()
    """Certificates of the gRPC and the HTTP port."""
    auth: AuthConfig = AuthConfig()
    """Who may call the gRPC and the HTTP port."""
    quotas: tuple[QuotaConfig, ...] = DEFAULT_QUOTAS
    """What each caller may take, and who goes first where calls wait."""
    audit: AuditMode = "auto"
    """Lines in the log about each call: "calls" for who, what and how long; "text" for what the
    requests hold, too; "off" for none; "auto" for "calls" unless auth.mode is none."""

    @pydantic.model_validator(mode="after")
    def _check(self) -> Self:
        if self.auth.mode == "mtls" and self.tls.client_ca is None:
            raise ValueError(
                "auth.mode mtls needs tls.client_ca, which signs callers' certificates"
            )
        if self.http_allowed_origins and not self.http_port:
            raise ValueError("http_allowed_origins has no effect without http_port")
        if self.http_allowed_hosts and not self.http_port:
            raise ValueError("http_allowed_hosts has no effect without http_port")
        return self


async def serve(
    services: Sequence[Service],
    config: ServerConfig,
    *,
    on_ready: Callable[[int], None] | None = None,
) -> None:
    """Host ``services`` until SIGTERM or SIGINT, then drain and return.

    Ports are bound before anything is loaded. ``on_ready`` gets the gRPC port once calls are
    served. Signals are handled when this runs in the main thread; a second one ends the process at
    once, with 128 and its number as the status.

    Raises UserError for a port or host that cannot be used, and what a service's ``load`` raises.
    """
    stop = asyncio.Event()
    with _Signals(stop):
        await _Host(services, config).run(stop, on_ready)


class BackgroundServer:
    """Runs a server in a thread of this process: for the trainer's own service, tests, benchmarks.

    All of them share one event loop: grpc.aio does not work with several in one process
    (https://github.com/grpc/grpc/issues/42357).
    """

    def __init__(self, services: Sequence[Service], config: ServerConfig | None = None) -> None:
        self._services = services
        self._config = config or ServerConfig()
        self.port = 0

    @property
    def address(self) -> str:
        """Where clients connect, "127.0.0.1:50051"."""
        return join(self._config.host, self.port)

    def __enter__(self) -> BackgroundServer:
        ready: concurrent.futures.Future[int] = concurrent.futures.Future()
        self._stop = asyncio.Event()

        async def run() -> None:
            try:
                await _Host(self._services, self._config).run(self._stop, ready.set_result)
            except BaseException as error:
                if ready.done():
                    raise
                ready.set_exception(error)

        self._loop = background_loop()
        self._done = asyncio.run_coroutine_threadsafe(run(), self._loop)
        self.port = ready.result()
        return self

    def __exit__(self, *_exception: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._done.result()


class _Host:
    """One server's ports, services and health."""

    def __init__(self, services: Sequence[Service], config: ServerConfig) -> None:
        self._services = services
        self._config = config
        self._names = tuple(name for service in services for name in service.full_names)
        self._health = HealthBoard(self._names)
        self._handlers = LateHandlers()
        self._is_draining = False
        self._gateway: Gateway | None = None
        self._started: list[Service] = []
        self._drain_end = 0.0

    async def run(self, stop: asyncio.Event, on_ready: Callable[[int], None] | None) -> None:
        """Serve until ``stop`` is set."""
        async with contextlib.AsyncExitStack() as cleanup:
            gate = Gate(self._config.auth)
            cleanup.callback(gate.close)
            server, port = self._bind_main(gate)
            self._gateway = self._bind_gateway(cleanup)
            # Leaving runs these from the last to the first: probes see NOT_SERVING to the end.
            self._bind_probes(cleanup)
            page = serve_metrics(self._config.host, self._config.metrics_port)
            if page is not None:
                cleanup.callback(page)
            cleanup.push_async_callback(self._stop_services)
            cleanup.push_async_callback(self._stop_server, server)
            await server.start()
            if self._gateway is not None:
                await self._gateway.start()
            if self._probes is not None:
                await self._probes.start()
            if not await self._load(stop):
                return
            refresh = asyncio.create_task(self._refresh_health(), name="health")
            cleanup.callback(refresh.cancel)
            await self._show_health()
            logger.info("serving %s on %s", ", ".join(self._names), join(self._config.host, port))
            if on_ready is not None:
                on_ready(port)
            await stop.wait()
            logger.info("draining: at most %g s for running calls", self._config.drain_grace_s)
            await asyncio.sleep(self._config.drain_announce_s)
            self._is_draining = True
            if self._gateway is not None:
                self._gateway.drain()
            await self._show_health()
            await asyncio.sleep(self._config.drain_delay_s)

    async def _stop_server(self, server: grpc.aio.Server) -> None:
        self._health.end_watches()
        grace_s = self._config.drain_grace_s
        self._drain_end = asyncio.get_running_loop().time() + grace_s
        stopping = [server.stop(grace_s)]
        if self._gateway is not None:
            stopping.append(self._gateway.stop(grace_s))
        await asyncio.gather(*stopping)

    def _bind_main(self, gate: Gate) -> tuple[grpc.aio.Server, int]:
        config = self._config
        warn_about_plain_tokens(config.auth, has_tls=config.tls.is_on, host=config.host)
        self._guards = Guards(
            self._names,
            gate,
            quotas=Quotas(config.quotas, trusts_claims=not gate.is_on),
            audits=Audits.of(config.audit, knows_callers=gate.is_on),
            max_request_s=config.max_request_s,
        )
        server = grpc.aio.server(
            interceptors=[CallInterceptor(self._guards)], options=_server_options(config)
        )
        self._health.register(server)
        server.add_generic_rpc_handlers((self._handlers,))
        if config.reflection:
            reflection.enable_server_reflection(
                (*self._names, HEALTH_SERVICE, reflection.SERVICE_NAME), server
            )
        credentials = server_credentials(config.tls)
        return server, bind(server, config.host, config.port, credentials, key="server.port")

    def _bind_gateway(self, cleanup: contextlib.AsyncExitStack) -> Gateway | None:
        if not self._config.http_port:
            return None
        from kleash.rpc.gateway import open_gateway  # the laptop's part of Kleash has no aiohttp

        gateway = open_gateway(
            self._services, self._config, self._guards, self._handlers, self._health.is_serving
        )
        cleanup.callback(gateway.close)
        return gateway

    def _bind_probes(self, cleanup: contextlib.AsyncExitStack) -> None:
        self._probes: grpc.aio.Server | None = None
        if self._config.health_port:
            self._probes = grpc.aio.server(options=_server_options(self._config))
            cleanup.push_async_callback(self._probes.stop, None)
            self._health.register(self._probes)
            port = self._config.health_port
            bind(self._probes, self._config.host, port, None, key="server.health_port")

    async def _load(self, stop: asyncio.Event) -> bool:
        """Load and start every service; False when told to stop before the end."""
        for service in self._services:
            began = time.monotonic()
            loading = in_thread(service.load)
            stopping = asyncio.create_task(stop.wait())
            await asyncio.wait([loading, stopping], return_when=asyncio.FIRST_COMPLETED)
            stopping.cancel()
            if not loading.done():
                return False
            loading.result()
            service.register(self._handlers.as_server())
            await service.start()
            self._started.append(service)
            self._guards.mark_loaded(service.full_names)
            label = service.full_names[0].split(".")[1]
            metrics.MODEL_LOADED.labels(label).set(1)
            metrics.MODEL_LOAD_SECONDS.labels(label).set(time.monotonic() - began)
        return not stop.is_set()

    async def _refresh_health(self) -> None:
        while True:
            asked = time.monotonic()
            await asyncio.sleep(REFRESH_S)
            metrics.EVENT_LOOP_LAG_SECONDS.observe(time.monotonic() - asked - REFRESH_S)
            await self._show_health()

    async def _show_health(self) -> None:
        ready = {
            name: service.is_ready(name) and not self._is_draining
            for service in self._services
            for name in service.full_names
        }
        oldest = max((service.heartbeat_age_s() for service in self._services), default=0.0)
        await self._health.show(ready, is_alive=oldest < self._config.liveness_limit_s)

    async def _stop_services(self) -> None:
        """Within what is left of the time to drain, or a second in all where nothing is left."""
        now = asyncio.get_running_loop().time
        end = max(self._drain_end, now() + STOP_S)
        for service in self._started:
            metrics.MODEL_LOADED.labels(service.full_names[0].split(".")[1]).set(0)
            try:
                await asyncio.wait_for(service.stop(), timeout=max(end - now(), SHORTEST_STOP_S))
            except TimeoutError:
                logger.warning("%s did not finish its work in time", service.full_names[0])


class _Signals:
    """SIGTERM and SIGINT set an event, once; a second one ends the process."""

    def __init__(self, stop: asyncio.Event) -> None:
        self._stop = stop
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        self._loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.getsignal(number)
            self._loop.add_signal_handler(number, self._receive)

    def __exit__(self, *_exception: object) -> None:
        if self._stop.is_set():
            return  # what comes after the drain may hang, too
        for number, handler in self._before.items():
            self._loop.remove_signal_handler(number)
            signal.signal(number, handler)

    def _receive(self) -> None:
        self._stop.set()
        for number in self._before:
            self._loop.remove_signal_handler(number)
            signal.signal(number, end_at_once)


def _server_options(config: ServerConfig) -> list[tuple[str, int]]:
    age_ms = round(config.max_connection_age_s * 1e3)
    return [
        ("grpc.max_receive_message_length", config.max_message_bytes),
        ("grpc.max_send_message_length", config.max_message_bytes),
        ("grpc.max_concurrent_streams", config.max_concurrent_streams),
        # Two servers on one port would each get half of the calls; a taken port must be an error.
        ("grpc.so_reuseport", 0),
        # gRPC ignores an unknown key silently; a wrong one here means "Too many pings".
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ("grpc.http2.max_ping_strikes", 0),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.max_connection_age_ms", age_ms),
        ("grpc.max_connection_age_grace_ms", round(config.max_request_s * 1e3)),
    ]
