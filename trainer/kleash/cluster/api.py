"""How this process reaches the Kubernetes API, and who it is there."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from kleash.cluster.connection import (
    SERVICE_ACCOUNT_NAMESPACE,
    load_configuration,
    open_client,
)


@dataclass(frozen=True)
class Pod:
    """The pod that this process runs in, from the environment that the chart sets."""

    name: str
    uid: str
    namespace: str


def this_pod() -> Pod | None:
    """POD_NAME, POD_UID, POD_NAMESPACE; None outside of a cluster."""
    name = os.environ.get("POD_NAME", "")
    return Pod(name, os.environ.get("POD_UID", ""), own_namespace()) if name else None


def own_namespace() -> str:
    """POD_NAMESPACE, else the ServiceAccount's, else "default"."""
    if named := os.environ.get("POD_NAMESPACE"):
        return named
    path = SERVICE_ACCOUNT_NAMESPACE
    return path.read_text(encoding="utf-8").strip() if path.is_file() else "default"


def open_api() -> Any:
    """An ApiClient of this process's account. Raises ConfigError when there is no way to one."""
    configuration, _ = load_configuration()
    configuration.retries = False
    return open_client(configuration)
