"""A server that accepts connections and never says a word."""

from __future__ import annotations

import socket
import threading
from types import TracebackType


class SilentServer:
    """Listens on a port of its own while entered."""

    def __enter__(self) -> SilentServer:
        self.was_called = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._taken: list[socket.socket] = []
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._accept)
        self._thread.start()
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _: TracebackType | None,
    ) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        for each in (*self._taken, self._listener):
            each.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self._taken.append(connection)
            self.was_called.set()
