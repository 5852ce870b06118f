"""Part ``overload`` of reward_load.py."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import random
import statistics
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

TEXT = "the quick brown fox jumps over the lazy dog and says hello to the world "
WAITERS = 64
"""Callers in the measurement of the capacity."""
CONNECTIONS = 16
"""Of each kind of caller. On one a server takes ``max_concurrent_streams`` calls, late ones that it
has not ended yet included, and refuses the next as a stream, before it knows whose they are."""
LATE = ("DEADLINE_EXCEEDED", "CANCELLED")
"""What a caller sees of a deadline that is over: of its own clock, or of the server just before."""

WINDOW_S = 10.0
"""After which the capacity is looked at again."""


@dataclass
class Outcome:
    """One call."""

    caller: str
    status: str
    has_hint: bool
    seconds: float


class Watch(threading.Thread):
    """Asks for health ten times a second, and reads the server's memory."""

    def __init__(self, server: Any) -> None:
        super().__init__(daemon=True)
        self._server = server
        self._ended = threading.Event()
        self.health_s: list[float] = []
        self.rss_mib: list[tuple[float, float]] = []

    def run(self) -> None:
        from grpc_health.v1 import health_pb2, health_pb2_grpc

        began = time.monotonic()
        with grpc.insecure_channel(self._server.address) as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            while not self._ended.wait(0.1):
                asked = time.monotonic()
                stub.Check(health_pb2.HealthCheckRequest(service="liveness"), timeout=30)
                self.health_s.append(time.monotonic() - asked)
                self.rss_mib.append((asked - began, self._server.rss_mib()))

    def end(self) -> None:
        """Stop, and wait for the last answer."""
        self._ended.set()
        self.join()


def overload(model: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Measure the capacity, then send ``factor`` times as much."""
    from reward_load import Server

    server = Server(model, 50971)
    try:
        return asyncio.run(_overload(server, options))
    finally:
        server.stop()


async def _overload(server: Any, options: argparse.Namespace) -> dict[str, Any]:
    from kleash.reward.v1 import reward_pb2, reward_pb2_grpc

    generator = random.Random(1)

    def request() -> Any:
        items = [
            reward_pb2.ScoreItem(text=TEXT * generator.randint(1, 5)) for _ in range(options.items)
        ]
        return reward_pb2.ScoreRequest(items=items)

    def channel(agent: str) -> grpc.aio.Channel:
        settings = [
            ("grpc.enable_retries", 0),
            ("grpc.primary_user_agent", agent),
            ("grpc.use_local_subchannel_pool", 1),
        ]
        return grpc.aio.insecure_channel(server.address, options=settings)

    async with contextlib.AsyncExitStack() as stack:
        stubs: dict[str, list[Any]] = {}
        for caller, agent in (("trainer", "kleash-trainer"), ("other", "other")):
            opened = [await stack.enter_async_context(channel(agent)) for _ in range(CONNECTIONS)]
            stubs[caller] = [reward_pb2_grpc.RewardServiceStub(each) for each in opened]
        measure_s = min(20.0, options.seconds / 2)
        await _closed_loop(stubs["other"], request, measure_s / 4)  # warm-up
        capacity = await _closed_loop(stubs["other"], request, measure_s)
        watch = Watch(server)
        watch.start()
        outcomes = await _open_loop(stubs, request, capacity, generator, options)
        watch.end()
    return _report(outcomes, watch, capacity, options)


async def _closed_loop(stubs: list[Any], request: Any, seconds: float) -> float:
    """Calls per second of callers that wait for each answer."""
    ends, done = time.monotonic() + seconds, 0

    async def caller(stub: Any) -> None:
        nonlocal done
        while time.monotonic() < ends:
            await stub.Score(request(), timeout=60)
            done += 1

    began = time.monotonic()
    await asyncio.gather(*(caller(stubs[n % len(stubs)]) for n in range(WAITERS)))
    return done / (time.monotonic() - began)


async def _open_loop(
    stubs: dict[str, list[Any]],
    request: Any,
    capacity: float,
    generator: random.Random,
    options: argparse.Namespace,
) -> list[Outcome]:
    """Send calls at random times, whatever becomes of them.

    They are ``factor`` times the capacity of the last seconds, which is what the server answers
    while it is overloaded: other work on the machine changes it in the middle of a run.
    """
    outcomes: list[Outcome] = []
    numbers = itertools.count()
    rate, window_began, window_first = capacity * options.factor, time.monotonic(), 0

    async def send(caller: str) -> None:
        began, status, has_hint = time.monotonic(), "OK", False
        try:
            stub = stubs[caller][next(numbers) % CONNECTIONS]
            await stub.Score(request(), timeout=options.deadline_s)
        except grpc.aio.AioRpcError as error:
            status = error.code().name
            trailers = dict(error.trailing_metadata() or ())
            has_hint = float(trailers.get("grpc-retry-pushback-ms", -1)) > 0
        outcomes.append(Outcome(caller, status, has_hint, time.monotonic() - began))

    began = time.monotonic()
    due = began
    tasks: set[asyncio.Task[None]] = set()
    while due < began + options.seconds:
        await asyncio.sleep(max(due - time.monotonic(), 0))
        task = asyncio.create_task(send("trainer" if generator.random() < 0.25 else "other"))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        due += generator.expovariate(rate)
        if (lasted := time.monotonic() - window_began) > WINDOW_S:
            done = sum(each.status == "OK" for each in outcomes[window_first:])
            rate = options.factor * max(done / lasted, capacity / 4)
            window_began, window_first = time.monotonic(), len(outcomes)
    if tasks:
        await asyncio.wait(tasks)
    return outcomes


def _report(
    outcomes: list[Outcome], watch: Watch, capacity: float, options: argparse.Namespace
) -> dict[str, Any]:
    counts: dict[str, dict[str, int]] = {}
    for each in outcomes:
        its = counts.setdefault(each.caller, {})
        its[each.status] = its.get(each.status, 0) + 1
    shed = [each for each in outcomes if each.status == "RESOURCE_EXHAUSTED"]
    accepted = [each for each in outcomes if each.status != "RESOURCE_EXHAUSTED"]
    done = [each for each in outcomes if each.status == "OK"]
    # The first tenth fills queues and caches.
    settled = [mib for second, mib in watch.rss_mib if second > options.seconds / 10]
    tail = max(len(settled) // 10, 1)
    latency = statistics.quantiles([each.seconds for each in done], n=100)
    summary = {
        "capacity_calls_per_s": round(capacity, 1),
        "sent": len(outcomes),
        "sent_to_done_ratio": round(len(outcomes) / max(len(done), 1), 3),
        "throughput_ratio": round(len(done) / options.seconds / capacity, 3),
        "accepted_in_time_ratio": round(len(done) / max(len(accepted), 1), 5),
        "shed": len(shed),
        "shed_with_hint_ratio": round(sum(each.has_hint for each in shed) / max(len(shed), 1), 5),
        "other_errors": len(accepted)
        - len(done)
        - sum(its.get(status, 0) for its in counts.values() for status in LATE),
        "trainer_ok_ratio": _ok_ratio(counts, "trainer"),
        "other_ok_ratio": _ok_ratio(counts, "other"),
        "latency_p50_s": round(latency[49], 3),
        "latency_p99_s": round(latency[98], 3),
        "health_p99_s": round(statistics.quantiles(watch.health_s, n=100)[98], 4),
        "health_max_s": round(max(watch.health_s), 4),
        "rss_first_mib": round(statistics.mean(settled[:tail]), 1),
        "rss_last_mib": round(statistics.mean(settled[-tail:]), 1),
    }
    return {
        "summary": summary,
        "counts": counts,
        "rss_mib": watch.rss_mib[:: max(len(watch.rss_mib) // 200, 1)],
    }


def _ok_ratio(counts: dict[str, dict[str, int]], caller: str) -> float:
    its = counts.get(caller, {})
    return round(its.get("OK", 0) / max(sum(its.values()), 1), 3)
