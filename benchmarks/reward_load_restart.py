"""Part ``restart`` of reward_load.py."""

from __future__ import annotations

import argparse
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

NUM_CALLERS = 4
TEXTS = ["the quick brown fox jumps over the lazy dog"] * 4


def restart(model: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Restart two replicas in turn while callers call."""
    from reward_load import Server

    # NOT_SERVING must be seen by clients before calls are refused.
    flags = ("--server.drain_delay_s=1", "--server.drain_grace_s=10")
    servers = [Server(model, port, 0, *flags) for port in (50981, 50982)]
    ended, outcomes, slowest = threading.Event(), Counter[str](), [0.0]
    address = "ipv4:///" + ",".join(server.address for server in servers)
    callers = [
        threading.Thread(target=_call, args=(address, ended, outcomes, slowest))
        for _ in range(NUM_CALLERS)
    ]
    began, restarts, statuses = time.monotonic(), 0, Counter[int]()
    try:
        for caller in callers:
            caller.start()
        while restarts < 2 or time.monotonic() < began + options.seconds:
            server = servers[restarts % 2]
            statuses[server.stop()] += 1
            server.start()
            time.sleep(1.0)
            restarts += 1
    finally:
        ended.set()
        for caller in callers:
            caller.join()
        for server in servers:
            server.stop()
    failed = sum(number for name, number in outcomes.items() if name != "OK")
    summary = {
        "restarts": restarts,
        "calls": outcomes.total(),
        "failed_calls": failed,
        "slowest_call_s": round(slowest[0], 2),
    }
    return {"summary": summary, "outcomes": dict(outcomes), "exit_statuses": dict(statuses)}


def _call(
    address: str, ended: threading.Event, outcomes: Counter[str], slowest: list[float]
) -> None:
    from kleash.client.reward import RewardClient
    from kleash.rpc.errors import ServiceError

    with RewardClient(address, timeout_s=60) as client:
        while not ended.is_set():
            began = time.monotonic()
            try:
                client.score_texts(TEXTS)
            except ServiceError as error:
                outcomes[f"{type(error).__name__} {error.message}"] += 1
            else:
                outcomes["OK"] += 1
            slowest[0] = max(slowest[0], time.monotonic() - began)
