"""Log records with an ``event`` become Events of Kubernetes: ``kubectl describe`` tells the story.

Whoever has something to tell logs it with ``extra={"event": "ReasonInCamelCase"}`` and knows
nothing of clusters.
"""

from __future__ import annotations

import contextlib
import datetime
import logging
import queue
import threading
from collections.abc import Iterator
from typing import Any

from kleash.base.errors import ConfigError
from kleash.cluster.api import Pod, open_api, this_pod

logger = logging.getLogger(__name__)

LONGEST_NOTE = 1024
"""Bytes, the API's limit."""
QUEUE_LENGTH = 1000


class EventHandler(logging.Handler):
    """Posts from a thread of its own: whoever logs never waits for the API."""

    def __init__(self, api: Any, pod: Pod) -> None:
        import kubernetes

        super().__init__()
        self._models: Any = kubernetes.client
        self._api = kubernetes.client.EventsV1Api(api)
        self._pod = pod
        self._records: queue.Queue[logging.LogRecord | None] = queue.Queue(QUEUE_LENGTH)
        self._number = 0
        self._thread = threading.Thread(target=self._run, name="kleash-events", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        """Queue a record that is an event."""
        if hasattr(record, "event"):
            with contextlib.suppress(queue.Full):
                self._records.put_nowait(record)

    def close(self) -> None:
        """Post what is queued, within a few seconds."""
        with contextlib.suppress(queue.Full):
            self._records.put_nowait(None)
        self._thread.join(timeout=5)
        super().close()

    def _run(self) -> None:
        told = False
        while (record := self._records.get()) is not None:
            try:
                self._post(record)
            except Exception as error:
                if not told:
                    logger.info("events cannot be written: %s", " ".join(str(error).split())[:200])
                told = True

    def _post(self, record: logging.LogRecord) -> None:
        models, pod = self._models, self._pod
        self._number += 1
        when = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        note = record.getMessage().encode()[:LONGEST_NOTE].decode(errors="ignore")
        self._api.create_namespaced_event(
            pod.namespace,
            models.EventsV1Event(
                metadata=models.V1ObjectMeta(
                    name=f"{pod.name}.{int(record.created * 1e6):x}{self._number:x}"
                ),
                event_time=when,
                type="Warning" if record.levelno >= logging.WARNING else "Normal",
                reason=vars(record)["event"],
                action=vars(record)["event"],
                note=note,
                regarding=models.V1ObjectReference(
                    api_version="v1",
                    kind="Pod",
                    name=pod.name,
                    namespace=pod.namespace,
                    uid=pod.uid or None,
                ),
                reporting_controller="kleash.dev/trainer",
                reporting_instance=pod.name,
            ),
            _request_timeout=(3, 5),
        )


@contextlib.contextmanager
def events_of_this_pod() -> Iterator[None]:
    """While this lasts, log records with an event are posted; outside of a cluster nothing is."""
    pod = this_pod()
    handler: EventHandler | None = None
    if pod is not None:
        try:
            handler = EventHandler(open_api(), pod)
        except ConfigError as error:
            logger.info("events are not written: %s", error)
    if handler is None:
        yield
        return
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
        handler.close()
