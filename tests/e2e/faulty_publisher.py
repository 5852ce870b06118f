"""A trainer's publisher in a process of its own, which may kill itself in a phase; run as a script.

python tests/e2e/faulty_publisher.py MODEL STORE FENCE PHASE VERSIONS REPLICA...

Publishes versions 1 to VERSIONS, each with other weights (``weights_of``), and dies by SIGKILL in
PHASE of the last one, or prints "pause" there and waits for a line (PHASE "pause"). Prints the
digest of every version that it committed.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from kleash.client.weights import WeightsClient
from kleash.lm.load import load_causal_lm
from kleash.ppo import publish
from kleash.ppo.config import PublishConfig
from kleash.ppo.publish import Publisher
from kleash.rpc.errors import ServiceError
from kleash.rpc.server import BackgroundServer
from kleash.weights.coordinator import Coordinator
from kleash.weights.store import Store
from kleash.weights.store_service import StoreService

PHASES = ("encoding", "stored", "preparing", "prepared", "deciding", "committing", "committed")


def weights_of(folder: Path, version: int) -> Any:
    """The weights of a version: those of ``folder``, a tenth of them moved a little."""
    model = load_causal_lm(folder)
    generator = torch.Generator().manual_seed(version)
    with torch.no_grad():
        for parameter in model.parameters():
            is_moved = torch.rand(parameter.shape, generator=generator) < 0.1
            parameter.add_(is_moved * 0.125 * (version > 1))
    return model


def arm(phase: str, is_last: Any) -> None:
    """Make the process die when it reaches ``phase`` of the last version."""

    def die_if(when: str) -> None:
        if phase == when and is_last():
            os.kill(os.getpid(), signal.SIGKILL)

    def around(owner: Any, name: str, before: str, after: str) -> None:
        original = getattr(owner, name)

        def wrapped(*arguments: Any, **fields: Any) -> Any:
            die_if(before)
            result = original(*arguments, **fields)
            die_if(after)
            return result

        setattr(owner, name, wrapped)

    around(publish, "merge", "encoding", "-")
    around(Coordinator, "publish", "stored", "-")
    # Two replicas: dies once one of them is told, and maybe the other one too.
    around(WeightsClient, "prepare", "-", "preparing")
    around(WeightsClient, "commit", "-", "committing")
    record = Store.record

    def watched_record(self: Store, event: str, *arguments: Any, **fields: Any) -> None:
        if event == "deciding":
            die_if("prepared")
        record(self, event, *arguments, **fields)
        if event == "deciding":
            die_if("deciding")

    Store.record = watched_record  # type: ignore[method-assign]
    around(Store, "commit", "-", "committed")


def main() -> None:
    model, folder, fence, phase, versions, *addresses = sys.argv[1:]
    torch.set_num_threads(1)
    current = [0]
    arm(phase, lambda: current[0] == int(versions))
    store = Store(Path(folder))
    with BackgroundServer([StoreService(store)]) as server:
        publisher = Publisher(
            {index: WeightsClient(address) for index, address in enumerate(addresses)},
            store,
            run_id="run",
            fence=int(fence),
            config=PublishConfig(),
            store_address=server.address,
        )
        for version in range(1, int(versions) + 1):
            current[0] = version
            if phase == "pause" and version == int(versions):
                print("pause", flush=True)
                sys.stdin.readline()
            try:
                report = publisher.publish(weights_of(Path(model), version), version)
            except ServiceError as error:
                print(f"error {error.reason}", flush=True)
                break
            print(report.digest, flush=True)


if __name__ == "__main__":
    main()
