"""A replica that follows its publisher: whatever it missed, it fetches and puts in place by itself.

A fleet's commit comes from the coordinator beside the trainer. This thread watches the newest
committed version and acts only when that is not the one served: after a start, a restart, a
Prepare or a Commit that never arrived.
"""

from __future__ import annotations

import contextlib
import logging
import threading

from kleash.client.weights import WeightsStoreClient
from kleash.policy.replica import WeightsReplica, wait_for_commit
from kleash.rpc.errors import ServiceError
from kleash.weights.manifest import describe_key
from kleash.weights.v1 import weights_pb2

logger = logging.getLogger(__name__)

PAUSE_S = 0.5
"""Between two attempts to reach the publisher or a version."""


class CatchUp:
    """One thread; ``start`` it, and ``stop`` it before the replica ends."""

    def __init__(self, replica: WeightsReplica, publisher: str) -> None:
        """``publisher`` is the address of a WeightsStoreService."""
        self._replica = replica
        self._store = WeightsStoreClient(publisher)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kleash-catch-up", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Tell the thread to end; it does within a pause, or with the process."""
        self._stopping.set()
        self._store.close()

    def _run(self) -> None:
        last = ""
        while not self._stopping.wait(PAUSE_S):
            try:
                with contextlib.closing(self._store.watch_head()) as heads:  # type: ignore[type-var]
                    for head in heads:
                        last = ""
                        self._replica.require(head)
                        if head is not None and not self._replica.serves(head):
                            self._reach(head)
            except ServiceError as error:
                if str(error) != last:  # a publisher that is away for long is told once
                    logger.info("catching up with the publisher: %s", error)
                last = str(error)
            except Exception:  # the thread must live as long as the replica does
                if self._stopping.is_set():  # stop() has closed the channel
                    return
                logger.exception("catching up has failed; trying again")

    def _reach(self, head: weights_pb2.VersionKey) -> None:
        """Prepare and commit ``head``, which is committed already: nobody needs to be asked."""
        logger.info("catching up to %s", describe_key(head))
        request = weights_pb2.PrepareRequest(key=head, required_version=head.version)
        self._replica.prepare(request, [self._store])
        commit = self._replica.begin_commit(head)
        if commit is not None:
            wait_for_commit(commit, head)
