"""A line in the log for every call to a server that knows its callers: logger ``kleash.audit``.

Names, times and status; never what a request or a response holds.
"""

from __future__ import annotations

import logging
from typing import Any

import grpc

logger = logging.getLogger("kleash.audit")


def record(
    context: Any, *, caller: str, method: str, code: grpc.StatusCode, reason: str, seconds: float
) -> None:
    """Write the line of a call that has ended; ``reason`` is that of its error, if any."""
    logger.info(
        "caller=%s peer=%s method=%s status=%s reason=%s seconds=%.3f",
        caller or "-",
        context.peer(),
        method,
        code.name,
        reason or "-",
        seconds,
    )
