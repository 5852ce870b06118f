"""The time that a server takes to end is the one that its configuration states."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any

import pytest
from tests.services.doubler import Doubler, client, hold

from kleash.rpc.server import STOP_S, BackgroundServer, ServerConfig

pytestmark = pytest.mark.services

GRACE_S = 30.0


@pytest.fixture
def allowed(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that services are given to stop."""
    found: list[float] = []
    wait_for = asyncio.wait_for

    async def record(stopping: Awaitable[Any], timeout: float | None) -> Any:  # noqa: ASYNC109
        if getattr(stopping, "__qualname__", "") == "Doubler.stop":
            assert timeout is not None
            found.append(timeout)
        return await wait_for(stopping, timeout)

    monkeypatch.setattr(asyncio, "wait_for", record)
    return found


def test_a_service_stops_in_what_is_left_of_the_time_to_drain(allowed: list[float]) -> None:
    with BackgroundServer([Doubler()], ServerConfig(drain_grace_s=GRACE_S)):
        pass
    (seconds,) = allowed
    assert GRACE_S / 2 < seconds <= GRACE_S


def test_a_service_gets_a_second_when_calls_have_used_it_up(allowed: list[float]) -> None:
    """And not the whole time again: the pod is killed ten seconds after it."""
    service = Doubler()
    with BackgroundServer([service], ServerConfig(drain_grace_s=1.5)) as server:
        stub = client(server.address, retry=False)
        call = hold(service, stub.__enter__(), 1)
    service.gate.set()
    stub.__exit__(None, None, None)
    assert call.done()
    (seconds,) = allowed
    assert 0 < seconds <= STOP_S
