"""A channel that shows a token on every call and follows its TLS files.

gRPC cannot replace the certificate of an open channel (https://github.com/grpc/grpc/issues/41779):
a call that finds new files opens a new channel. Calls under way end on the old one, which a later
call closes when none is left.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc

from kleash.rpc.pem import Pem
from kleash.rpc.reloading import Reloading


class RotatingChannel(grpc.Channel):
    """Safe to use from several threads."""

    def __init__(
        self,
        open_channel: Callable[[Pem | None], grpc.Channel],
        pem: Reloading[Pem] | None,
        token: Callable[[], str] | None,
    ) -> None:
        """``pem`` is None without TLS, ``token`` without a token."""
        self._open_channel = open_channel
        self._pem = pem
        self._token = token
        self._lock = threading.Lock()
        self._is_closed = False
        self._retired: list[_Generation] = []
        self._newest = self._open(pem.current() if pem is not None else None)

    def _open(self, pem: Pem | None) -> _Generation:
        return _Generation(self._open_channel(pem), pem)

    def join(self) -> _Generation:
        """The channel for a call that begins now; the call must ``leave`` it in the end."""
        with self._lock:
            pem = self._pem.current() if self._pem is not None else None
            if pem is not self._newest.pem and not self._is_closed:
                self._retired.append(self._newest)
                self._newest = self._open(pem)
            idle = [its for its in self._retired if its.num_calls == 0]
            self._retired = [its for its in self._retired if its.num_calls]
            generation = self._newest
            generation.num_calls += 1
        for its in idle:
            its.channel.close()
        return generation

    def leave(self, generation: _Generation) -> None:
        """A call has ended."""
        with self._lock:
            generation.num_calls -= 1

    def metadata(self, given: Any) -> Any:
        """Metadata of a call, with the token."""
        if self._token is None:
            return given
        return (*(given or ()), ("authorization", f"Bearer {self._token()}"))

    def close(self) -> None:
        """Close; calls under way are cancelled."""
        with self._lock:
            self._is_closed = True
            generations = [*self._retired, self._newest]
            self._retired = []
        for its in generations:
            its.channel.close()

    def __enter__(self) -> RotatingChannel:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def subscribe(self, callback: Any, try_to_connect: bool = False) -> None:
        """Of the channel of now; a later one does not report."""
        self._newest.channel.subscribe(callback, try_to_connect)

    def unsubscribe(self, callback: Any) -> None:
        """Of the channel of now."""
        self._newest.channel.unsubscribe(callback)

    def unary_unary(self, *arguments: Any, **keywords: Any) -> Any:
        """A method, as generated stubs ask for it."""
        return _Method(self, "unary_unary", arguments, keywords)

    def unary_stream(self, *arguments: Any, **keywords: Any) -> Any:
        """A method, as generated stubs ask for it."""
        return _StreamMethod(self, "unary_stream", arguments, keywords)

    def stream_unary(self, *arguments: Any, **keywords: Any) -> Any:
        """A method, as generated stubs ask for it."""
        return _Method(self, "stream_unary", arguments, keywords)

    def stream_stream(self, *arguments: Any, **keywords: Any) -> Any:
        """A method, as generated stubs ask for it."""
        return _StreamMethod(self, "stream_stream", arguments, keywords)


class _Generation:
    """A channel and the files that it was opened with."""

    def __init__(self, channel: grpc.Channel, pem: Pem | None) -> None:
        self.channel = channel
        self.pem = pem
        self.num_calls = 0


class _Method:
    """A method with one response, on whichever channel is the newest."""

    def __init__(
        self,
        channel: RotatingChannel,
        kind: str,
        arguments: tuple[Any, ...],
        keywords: dict[str, Any],
    ) -> None:
        self._channel = channel
        self._kind = kind
        self._arguments = arguments
        self._keywords = keywords
        self._known: tuple[_Generation, Any] | None = None

    def _on(self, generation: _Generation) -> Any:
        """The method of that channel."""
        known = self._known
        if known is None or known[0] is not generation:
            make = getattr(generation.channel, self._kind)
            known = self._known = generation, make(*self._arguments, **self._keywords)
        return known[1]

    @contextmanager
    def _joined(self) -> Iterator[Any]:
        generation = self._channel.join()
        try:
            yield self._on(generation)
        finally:
            self._channel.leave(generation)

    def _begin(self, begin: Callable[[Any], Any]) -> Any:
        """A call that goes on when this returns."""
        generation = self._channel.join()

        def end() -> None:
            self._channel.leave(generation)

        try:
            call = begin(self._on(generation))
        except BaseException:
            end()
            raise
        if not call.add_callback(end):
            end()  # it is over already
        return call

    def __call__(self, request: Any, *more: Any, metadata: Any = None, **options: Any) -> Any:
        """Make the call and wait for its response."""
        with self._joined() as method:
            return method(request, *more, metadata=self._channel.metadata(metadata), **options)

    def with_call(self, request: Any, *more: Any, metadata: Any = None, **options: Any) -> Any:
        """Make the call, wait, and return the response and the call."""
        given = self._channel.metadata(metadata)
        with self._joined() as method:
            return method.with_call(request, *more, metadata=given, **options)

    def future(self, request: Any, *more: Any, metadata: Any = None, **options: Any) -> Any:
        """Make the call without waiting."""
        given = self._channel.metadata(metadata)
        return self._begin(lambda method: method.future(request, *more, metadata=given, **options))


class _StreamMethod(_Method):
    """A method with a stream of responses."""

    def __call__(self, request: Any, *more: Any, metadata: Any = None, **options: Any) -> Any:
        """Make the call; iterate what this returns."""
        given = self._channel.metadata(metadata)
        return self._begin(lambda method: method(request, *more, metadata=given, **options))
