"""The way to a cluster: kubeconfig or the pod's own account, and what its refusals mean.

ClusterError (KleashError)      the cluster refused, or something in it failed; exit status 1
├── ForbiddenError              no right to do this
└── MissingError                the object, its kind or its namespace does not exist
UnreachableError (RemoteError)  no answer; exit status 3
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kleash.base.errors import ConfigError, KleashError, RemoteError

CONNECT_TIMEOUT_S = 10.0
READ_TIMEOUT_S = 30.0

SERVICE_ACCOUNT_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


class ClusterError(KleashError):
    """The cluster refused, or something in it failed."""

    def __init__(self, message: str, *, status: int = 0, reason: str = "") -> None:
        super().__init__(message)
        self.status, self.reason = status, reason


class ForbiddenError(ClusterError):
    """The caller's account may not do this."""


class MissingError(ClusterError):
    """What was named does not exist."""


class UnreachableError(RemoteError):
    """The API server did not answer."""


@dataclass(frozen=True)
class Connection:
    """An open connection; ``namespace`` is where commands work."""

    api_client: Any
    dynamic: Any
    namespace: str
    server: str


@contextlib.contextmanager
def connect(context: str | None = None, namespace: str | None = None) -> Iterator[Connection]:
    """Connect as kubectl does: KUBECONFIG or ~/.kube/config, or else the pod's own account.

    ``context`` null is the current one; ``namespace`` null is the context's, or ``default``.
    Raises ConfigError, UnreachableError or ClusterError.
    """
    from kubernetes.client import ApiClient
    from kubernetes.dynamic import DynamicClient

    configuration, own_namespace = load_configuration(context)
    # Commands look again by themselves and say so; urllib3 would log each of its own attempts.
    configuration.retries = 0
    api_client = ApiClient(configuration=configuration)
    with contextlib.ExitStack() as stack:
        stack.callback(api_client.close)
        # The default cache of API kinds is a file of a known name in the shared /tmp.
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="kleash-k8s-"))
        with translated(server=configuration.host):
            dynamic = DynamicClient(api_client, cache_file=str(Path(folder) / "kinds.json"))
        yield Connection(
            api_client, dynamic, namespace or own_namespace or "default", configuration.host
        )


def load_configuration(context: str | None = None) -> tuple[Any, str | None]:
    """The kubernetes package's Configuration, and the namespace that goes with it.

    Of KUBECONFIG or ~/.kube/config, or else of the pod's own account. Raises ConfigError.
    """
    from kubernetes.client import Configuration
    from kubernetes.config import (
        ConfigException,
        list_kube_config_contexts,
        load_incluster_config,
        load_kube_config,
    )

    configuration = Configuration()
    path = os.environ.get("KUBECONFIG") or "~/.kube/config"
    first = Path(path.split(os.pathsep)[0]).expanduser()
    if context is None and not first.exists() and SERVICE_ACCOUNT_NAMESPACE.exists():
        load_incluster_config(client_configuration=configuration)
        return configuration, SERVICE_ACCOUNT_NAMESPACE.read_text(encoding="utf-8").strip()
    if not first.exists():
        raise ConfigError(
            f"there is no kubeconfig at {first}; set KUBECONFIG to that of your cluster."
        )
    try:
        load_kube_config(path, context=context, client_configuration=configuration)
        listed: Any = list_kube_config_contexts(path)
    except (ConfigException, OSError, ValueError) as error:
        raise ConfigError(
            f"the kubeconfig {path} cannot be used{f' with context {context}' if context else ''}: "
            f"{_one_line(str(error))}; kubectl config get-contexts lists what is there."
        ) from None
    contexts, active = listed
    named = [each for each in contexts if each["name"] == context] if context else [active]
    return configuration, named[0]["context"].get("namespace") if named else None


@contextlib.contextmanager
def translated(what: str = "", *, server: str = "") -> Iterator[None]:
    """Turn what the kubernetes package raises into one sentence; ``what`` is the object meant."""
    from kubernetes.client import ApiException
    from kubernetes.dynamic.exceptions import ResourceNotFoundError
    from urllib3.exceptions import HTTPError

    try:
        yield
    except ApiException as error:
        raise _refusal(error, what) from None
    except ResourceNotFoundError:
        raise MissingError(
            f"this cluster does not know the kind of {what}; install its custom resource "
            "definition, or turn it off in the chart's values.",
            status=404,
            reason="NoKindMatch",
        ) from None
    except (HTTPError, OSError) as error:
        at = f" at {server}" if server else ""
        raise UnreachableError(
            f"the cluster{at} does not answer ({_one_line(str(error))}); check the address in the "
            "kubeconfig, and that the cluster runs: kubectl cluster-info."
        ) from None


def _refusal(error: Any, what: str) -> KleashError:
    details = _status_of(error)
    message = details["message"]
    subject = f"{what}: " if what else ""
    status, reason = int(error.status or 0), details["reason"]
    if status in (0, 502, 503, 504):
        return UnreachableError(f"{subject}the cluster cannot answer now: {message}; try again.")
    if status == 401:
        return ClusterError(
            f"{subject}the cluster does not accept the credentials of the kubeconfig; log in "
            "again, or choose another --context.",
            status=status,
            reason=reason,
        )
    if "exceeded quota" in message:
        return ClusterError(
            f"{subject}{message}; ask for less in the pipeline, or have the quota raised.",
            status=status,
            reason=reason,
        )
    is_right_missing = "violates PodSecurity" not in message and "terminated" not in message
    if status == 403 and is_right_missing:
        return ForbiddenError(
            f"{subject}not allowed: {message}; ask the cluster's administrator for a Role with "
            "this right in the namespace.",
            status=status,
            reason=reason,
        )
    if status == 404:
        return MissingError(f"{subject}{message}.", status=status, reason=reason)
    return ClusterError(f"{subject}the cluster refuses: {message}.", status=status, reason=reason)


def _status_of(error: Any) -> dict[str, str]:
    """Reason and message of the Status object in the reply; other replies are quoted."""
    body = error.body
    text = body.decode(errors="replace") if isinstance(body, bytes) else str(body or "")
    try:
        status = json.loads(text)
    except ValueError:
        status = None
    if not isinstance(status, dict):
        status = {"message": text or str(error.reason)}
    message = _one_line(str(status.get("message") or error.reason))
    return {"message": message.rstrip("."), "reason": str(status.get("reason") or "")}


def _one_line(text: str) -> str:
    return " ".join(text.split())[:600]
