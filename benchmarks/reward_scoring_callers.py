"""The callers of reward_scoring.py, in a process of their own: closed loops over one server.

Reads one JSON object a line and answers with one: see ``measure``.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import aiohttp

from kleash.client.reward import RewardClient
from kleash.client.reward_aio import AsyncRewardClient

END = "<|end|>"
"""The other server adds the end-of-sequence token; ours takes a text as it is."""

Score = Callable[[list[str]], Coroutine[Any, Any, list[float]]]


def main() -> None:
    """Answer until the input ends."""
    for line in sys.stdin:
        job = json.loads(line)
        texts = json.loads(Path(job["texts"]).read_text())
        if job["client"] == "sync":
            answer = measure_threads(job, texts)
        else:
            answer = asyncio.run(measure(job, texts))
        print(json.dumps(answer), flush=True)


async def measure(job: dict[str, Any], texts: list[str]) -> dict[str, Any]:
    """Score with ``callers`` tasks for ``seconds``, ``items`` texts a call, after a warm-up.

    Calls that end within the time count; ``seconds`` and latencies are theirs. With ``seconds`` 0
    every text is scored once, and the scores are returned.
    """
    if job["client"] == "http":
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector) as session:
            return await _measure(job, texts, _http(session, job["address"]))
    async with AsyncRewardClient(job["address"], timeout_s=600) as client:
        return await _measure(job, texts, _ours(client))


def _http(session: aiohttp.ClientSession, address: str) -> Score:
    url = f"http://{address}/get_reward"

    async def score(texts: list[str]) -> list[float]:
        async with session.post(url, json={"query": texts}) as response:
            response.raise_for_status()
            return (await response.json())["rewards"]

    return score


def _ours(client: AsyncRewardClient) -> Score:
    async def score(texts: list[str]) -> list[float]:
        scores = await client.score_texts([text + END for text in texts], normalize=False)
        return [each.score for each in scores]

    return score


async def _measure(job: dict[str, Any], texts: list[str], score: Score) -> dict[str, Any]:
    items, seconds = job["items"], job["seconds"]
    if not seconds:
        return {"scores": [(await score([text]))[0] for text in texts]}
    batches = _batches(texts, items)
    times: list[tuple[float, float]] = []

    async def call_until(end: float) -> None:
        while (began := time.perf_counter()) < end:
            await score(next(batches))
            times.append((began, time.perf_counter()))

    await score(next(batches))
    began = time.perf_counter()
    async with asyncio.TaskGroup() as tasks:
        for _ in range(job["callers"]):
            tasks.create_task(call_until(began + seconds))
    return _summary(times, began, items)


def measure_threads(job: dict[str, Any], texts: list[str]) -> dict[str, Any]:
    """As ``measure``, with the synchronous client in threads."""
    items, batches, lock = job["items"], _batches(texts, job["items"]), threading.Lock()
    times: list[tuple[float, float]] = []
    with RewardClient(job["address"], timeout_s=600) as client:

        def call_until(end: float) -> None:
            while (began := time.perf_counter()) < end:
                with lock:
                    batch = next(batches)
                client.score_texts([text + END for text in batch], normalize=False)
                times.append((began, time.perf_counter()))

        client.score_texts([texts[0]])
        began = time.perf_counter()
        with ThreadPoolExecutor(job["callers"]) as threads:
            end = began + job["seconds"]
            for done in [threads.submit(call_until, end) for _ in range(job["callers"])]:
                done.result()
    return _summary(times, began, items)


def _batches(texts: list[str], items: int) -> Iterator[list[str]]:
    endless = itertools.cycle(texts)
    while True:
        yield [next(endless) for _ in range(items)]


def _summary(times: list[tuple[float, float]], began: float, items: int) -> dict[str, Any]:
    """All calls count, the last ones included: each caller ends after its last answer."""
    latencies = sorted(end - start for start, end in times)
    return {
        "sequences_per_s": items * len(times) / (max(end for _, end in times) - began),
        "p50_ms": 1e3 * latencies[len(latencies) // 2],
        "p99_ms": 1e3 * latencies[min(int(0.99 * len(latencies)), len(latencies) - 1)],
        "calls": len(times),
    }


if __name__ == "__main__":
    main()
