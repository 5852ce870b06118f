"""Channels for asyncio: as kleash.rpc.channel opens them, with the same credentials.

A call that finds new TLS files opens a new channel; calls under way end on the old one, which the
last of them closes. See rotating_channel.py for the same with threads.

gRPC has one queue of events a process, and its channels belong to the event loop that they were
made in: keep to one running loop a process (https://github.com/grpc/grpc/issues/42357).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc

from kleash.base.errors import ConfigError
from kleash.rpc.channel import channel_options, target, tls_credentials, watch
from kleash.rpc.client_metrics import counted_aio
from kleash.rpc.credentials import Credentials
from kleash.rpc.pem import Pem
from kleash.rpc.reloading import Reloading

Metadata = tuple[tuple[str, str], ...]


class AioChannel:
    """Opens at the first call, in the event loop of that call, which later calls must share."""

    def __init__(
        self,
        address: str,
        *,
        service: str,
        methods_to_retry: Sequence[str],
        make_stub: Callable[[grpc.aio.Channel], Any],
        credentials: Credentials | None = None,
    ) -> None:
        """As kleash.rpc.channel.connect. Raises ConfigError for files that cannot be used."""
        own = Credentials.from_env() if credentials is None else credentials
        self._target = target(address)
        self._options = channel_options(service, methods_to_retry, own)
        self._make_stub = make_stub
        self._pem: Reloading[Pem] | None
        self._pem, self._token = watch(own)
        self._newest: _Generation | None = None
        self._retired: set[_Generation] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_closed = False

    @asynccontextmanager
    async def call(self) -> AsyncIterator[tuple[Any, Metadata]]:
        """The stub for a call that begins now, and its metadata: the token.

        Raises ConfigError in another event loop than that of the first call.
        """
        generation = await self._join()
        try:
            yield generation.stub, self._metadata()
        finally:
            generation.num_calls -= 1
            if generation in self._retired and not generation.num_calls:
                self._retired.remove(generation)
                await generation.channel.close()

    async def close(self) -> None:
        """Close; calls under way are cancelled."""
        self._is_closed = True
        open_ones = [*self._retired, *([self._newest] if self._newest else [])]
        self._retired, self._newest = set(), None
        for generation in open_ones:
            await generation.channel.close()

    async def _join(self) -> _Generation:
        self._check_loop()
        if self._is_closed:
            raise ConfigError("this client is closed; make another one.")
        pem = self._pem.current() if self._pem is not None else None
        old = newest = self._newest
        if newest is None or newest.pem is not pem:
            channel = self._open(pem)
            newest = self._newest = _Generation(channel, pem, self._make_stub(counted_aio(channel)))
        newest.num_calls += 1
        if old is not None and old is not newest:
            if old.num_calls:
                self._retired.add(old)
            else:
                await old.channel.close()
        return newest

    def _open(self, pem: Pem | None) -> grpc.aio.Channel:
        if pem is None:
            return grpc.aio.insecure_channel(self._target, options=self._options)
        return grpc.aio.secure_channel(self._target, tls_credentials(pem), options=self._options)

    def _metadata(self) -> Metadata:
        return (("authorization", f"Bearer {self._token()}"),) if self._token else ()

    def _check_loop(self) -> None:
        loop = asyncio.get_running_loop()
        if self._loop is None:
            self._loop = loop
        if loop is not self._loop:
            raise ConfigError(
                "this client belongs to the event loop of its first call, and another one runs: "
                "make a client in each loop, and let no two loops of a process run at a time "
                "(RewardClient is for threads)."
            )


class _Generation:
    """A channel and the files that it was opened with."""

    def __init__(self, channel: grpc.aio.Channel, pem: Pem | None, stub: Any) -> None:
        self.channel = channel
        self.pem = pem
        self.stub = stub
        self.num_calls = 0
