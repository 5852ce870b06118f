"""How this process reaches the Kubernetes API, and who it is there."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kleash.base.errors import ConfigError

NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


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
    return NAMESPACE_FILE.read_text().strip() if NAMESPACE_FILE.is_file() else "default"


def open_api() -> Any:
    """An ApiClient: of the pod's ServiceAccount, else of KUBECONFIG or ~/.kube/config.

    Raises ConfigError when there is neither.
    """
    import kubernetes

    configuration: Any = kubernetes.client.Configuration()
    try:
        kubernetes.config.load_incluster_config(client_configuration=configuration)
    except kubernetes.config.ConfigException:
        try:
            # The package reads KUBECONFIG once, when it is imported.
            kubernetes.config.load_kube_config(
                config_file=os.environ.get("KUBECONFIG"), client_configuration=configuration
            )
        except (kubernetes.config.ConfigException, OSError) as error:
            raise ConfigError(
                f"there is no way to the Kubernetes API ({error}); run this in a pod with a "
                "ServiceAccount, or set KUBECONFIG."
            ) from None
    configuration.retries = False
    return kubernetes.client.ApiClient(configuration)
