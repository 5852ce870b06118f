"""Events of Kubernetes: ``kubectl describe`` tells the story. How they look, and those of a pod.

Whoever has something to tell in a pod logs it with ``extra={"event": "ReasonInCamelCase"}`` and
knows nothing of clusters. kleash.cluster.run_events has those of a run.
"""

from __future__ import annotations

import contextlib
import datetime
import logging
import queue
import secrets
import threading
from collections.abc import Iterator
from typing import Any

from kleash.base.errors import ConfigError
from kleash.cluster.api import Pod, open_api, this_pod

logger = logging.getLogger(__name__)

LONGEST_NOTE = 1024
"""Bytes, the API's limit."""
QUEUE_LENGTH = 1000


def event_of(
    regarding: dict[str, str],
    reason: str,
    note: str,
    *,
    is_warning: bool,
    controller: str,
    instance: str,
    when: datetime.datetime,
    labels: dict[str, str] | None = None,
) -> dict[str, Any]:
    """A new Event, to be created.

    Args:
        regarding: apiVersion, kind, name, namespace and uid of what it is about.
        controller: what reports it, as kleash.dev/trainer, and ``instance`` which one.
    """
    return {
        "apiVersion": "events.k8s.io/v1",
        "kind": "Event",
        "metadata": {
            "name": f"{regarding['name']}.{secrets.token_hex(8)}",
            "namespace": regarding["namespace"],
            "labels": labels or {},
        },
        "eventTime": when.strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
        "reportingController": controller,
        "reportingInstance": instance,
        "action": reason,
        "reason": reason,
        "type": "Warning" if is_warning else "Normal",
        "note": note.encode()[:LONGEST_NOTE].decode(errors="ignore"),
        "regarding": regarding,
    }


class EventHandler(logging.Handler):
    """Posts from a thread of its own: whoever logs never waits for the API."""

    def __init__(self, api: Any, pod: Pod) -> None:
        import kubernetes

        super().__init__()
        self._api: Any = kubernetes.client.EventsV1Api(api)
        self._pod = pod
        self._records: queue.Queue[logging.LogRecord | None] = queue.Queue(QUEUE_LENGTH)
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
        pod = self._pod
        regarding = {
            "apiVersion": "v1",
            "kind": "Pod",
            "name": pod.name,
            "namespace": pod.namespace,
            **({"uid": pod.uid} if pod.uid else {}),
        }
        event = event_of(
            regarding,
            vars(record)["event"],
            record.getMessage(),
            is_warning=record.levelno >= logging.WARNING,
            controller="kleash.dev/trainer",
            instance=pod.name,
            when=datetime.datetime.fromtimestamp(record.created, datetime.UTC),
        )
        self._api.create_namespaced_event(pod.namespace, event, _request_timeout=(3, 5))


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
