"""Events about a run, on its record: ``kubectl get events`` and ``kubectl describe`` show them."""

from __future__ import annotations

import datetime
import logging
import os
import secrets
import socket

from kleash.cluster.connection import ClusterError, UnreachableError
from kleash.cluster.objects import CONFIG_MAP, Objects
from kleash.cluster.run_record import RunRecord
from kleash.cluster.stages import RUN_LABEL

logger = logging.getLogger(__name__)

CONTROLLER = "kleash.dev/pipeline"
MAX_NOTE = 1000
"""Characters; the API refuses more than 1024 bytes."""


def caller_name() -> str:
    """Host and process."""
    return f"{socket.gethostname()}-{os.getpid()}"[:128]


def emit(
    objects: Objects, record: RunRecord, reason: str, note: str, *, is_warning: bool = False
) -> None:
    """Add an Event. A run does not fail because its Events are refused."""
    now = datetime.datetime.now(datetime.UTC)
    event = {
        "apiVersion": "events.k8s.io/v1",
        "kind": "Event",
        "metadata": {
            "name": f"{record.name}.{secrets.token_hex(8)}",
            "namespace": objects.namespace,
            "labels": {RUN_LABEL: record.run_id},
        },
        "eventTime": now.strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
        "reportingController": CONTROLLER,
        "reportingInstance": caller_name(),
        "action": reason,
        "reason": reason,
        "type": "Warning" if is_warning else "Normal",
        "note": note.encode()[:MAX_NOTE].decode(errors="ignore"),
        "regarding": {
            "apiVersion": CONFIG_MAP.api_version,
            "kind": CONFIG_MAP.name,
            "name": record.name,
            "namespace": objects.namespace,
            "uid": record.uid,
        },
    }
    try:
        objects.create(event)
    except (ClusterError, UnreachableError) as error:
        logger.warning("the Event %s was not written: %s", reason, error)
