"""Events about a run, on its record: ``kubectl get events`` and ``kubectl describe`` show them."""

from __future__ import annotations

import datetime
import logging
import os
import socket

from kleash.cluster.connection import ClusterError, UnreachableError
from kleash.cluster.events import event_of
from kleash.cluster.objects import CONFIG_MAP, Objects
from kleash.cluster.run_record import RunRecord
from kleash.cluster.stages import RUN_LABEL

logger = logging.getLogger(__name__)

CONTROLLER = "kleash.dev/pipeline"


def caller_name() -> str:
    """Host and process."""
    return f"{socket.gethostname()}-{os.getpid()}"[:128]


def emit(
    objects: Objects, record: RunRecord, reason: str, note: str, *, is_warning: bool = False
) -> None:
    """Add an Event. A run does not fail because its Events are refused."""
    regarding = {
        "apiVersion": CONFIG_MAP.api_version,
        "kind": CONFIG_MAP.name,
        "name": record.name,
        "namespace": objects.namespace,
        "uid": record.uid,
    }
    event = event_of(
        regarding,
        reason,
        note,
        is_warning=is_warning,
        controller=CONTROLLER,
        instance=caller_name(),
        when=datetime.datetime.now(datetime.UTC),
        labels={RUN_LABEL: record.run_id},
    )
    try:
        objects.create(event)
    except (ClusterError, UnreachableError) as error:
        # One of its random name is there already when the answer to a first attempt was lost.
        if getattr(error, "status", 0) != 409:
            logger.warning("the Event %s was not written: %s", reason, error)
