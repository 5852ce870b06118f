"""What the decoding thread knows of one Generate request, and how it answers."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from kleash.base import tracing
from kleash.lm.decode import Decoded, DecodeRequest

Deliver = Callable[[list[Decoded] | Exception], None]
"""Called in the decoding thread: responses that finished in one step, or the end of the request."""


class Generation:
    """A request in the loop."""

    def __init__(self, requests: Sequence[DecodeRequest], deliver: Deliver) -> None:
        self.requests = list(requests)
        self.deliver = deliver
        self.open = set(requests)
        """Responses that have not been delivered."""
        self.submitted = time.monotonic()
        self.span = tracing.current()
        """Of the caller's request, when it is traced."""
        self.started: float | None = None
        """When the first response of it got a slot."""

    @property
    def is_running(self) -> bool:
        """Whether a response of it has a slot, or had one."""
        return self.started is not None
