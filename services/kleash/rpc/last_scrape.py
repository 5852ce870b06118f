"""Keeps a process that fails until Prometheus has read why: its counters end with it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable

from prometheus_client import REGISTRY, Metric
from prometheus_client.registry import Collector

POLL_S = 0.1
ANSWER_S = 1.0
"""For the rest of the answer to a scrape that has begun."""


class _Scrape(Collector):
    """Is asked, with all metrics, when the page is read; it has none of its own."""

    def __init__(self) -> None:
        self.has_begun = threading.Event()

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterable[Metric]:
        self.has_begun.set()
        return ()


def wait_for_scrape(timeout_s: float, is_abandoned: Callable[[], bool]) -> bool:
    """Wait until the page of metrics is read once more; whether it was.

    Ends early, too, when ``is_abandoned`` says that nobody has the time.
    """
    scrape = _Scrape()
    REGISTRY.register(scrape)
    try:
        deadline = time.monotonic() + timeout_s
        while not scrape.has_begun.wait(POLL_S):
            if is_abandoned() or time.monotonic() > deadline:
                return False
    finally:
        REGISTRY.unregister(scrape)
    time.sleep(ANSWER_S)
    return True
