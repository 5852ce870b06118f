"""Handlers that come after the server has started: a server answers probes while a model loads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import grpc


class LateHandlers(grpc.GenericRpcHandler):
    """Added to a server before its start; takes the place of the server in ``Service.register``."""

    def __init__(self) -> None:
        self._handlers: list[grpc.GenericRpcHandler] = []

    def as_server(self) -> grpc.aio.Server:
        """Itself, as generated ``add_*_to_server`` functions take it."""
        return cast("grpc.aio.Server", self)

    def add_generic_rpc_handlers(self, handlers: Sequence[grpc.GenericRpcHandler]) -> None:
        """What generated code calls to register a servicer."""
        self._handlers += handlers

    def add_registered_method_handlers(
        self, service_name: str, method_handlers: Mapping[str, grpc.RpcMethodHandler]
    ) -> None:
        """Generated code repeats the generic handlers here, for a faster path before the start."""

    def service(
        self, handler_call_details: grpc.HandlerCallDetails
    ) -> grpc.RpcMethodHandler | None:
        """The handler of a method, when it is registered by now."""
        found = (handler.service(handler_call_details) for handler in self._handlers)
        return next((handler for handler in found if handler is not None), None)

    def find(self, service: str, method: str) -> grpc.RpcMethodHandler | None:
        """The handler of a method that is named, when it is registered by now."""
        return self.service(_Details(f"/{service}/{method}"))


class _Details(grpc.HandlerCallDetails):
    """Of a call that no gRPC client has made."""

    def __init__(self, method: str) -> None:
        self.method = method
        self.invocation_metadata = ()
