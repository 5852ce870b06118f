"""The way to a cluster: kubeconfig or the pod's own account, and what its refusals mean.

ClusterError (KleashError)      the cluster refused, or something in it failed; exit status 1
├── ForbiddenError              no right to do this
└── MissingError                the object, its kind or its namespace does not exist
UnreachableError (RemoteError)  no answer, or 429 or 5xx; exit status 3

What is asked of a cluster is asked again after an UnreachableError, for a stated time: `repeated`.
"""

from __future__ import annotations

import contextlib
import json
import os
import ssl
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from kleash.base.api_server_tls import LEFT_OUT
from kleash.base.errors import ConfigError, KleashError, RemoteError

CONNECT_TIMEOUT_S = 10.0
READ_TIMEOUT_S = 30.0

FIRST_CONTACT_S = 3.0
"""A cluster that never answered is tried for so long: its address may be wrong."""
PATIENCE_S = 60.0
"""One that has answered is tried for so long; the server of one control plane may be restarted."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.25, 5.0

TRANSIENT = (0, 429, 500, 502, 503, 504)
"""HTTP status codes that the same request may not meet again; 0 is a connection that broke."""

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
    """The API server did not answer, or not now."""

    def __init__(
        self, message: str, *, retry_after_s: float = 0.0, is_transient: bool = True
    ) -> None:
        """``is_transient`` false: another attempt ends the same way."""
        super().__init__(message)
        self.retry_after_s, self.is_transient = retry_after_s, is_transient


T = TypeVar("T")


def repeated(
    call: Callable[[], T],
    *,
    patience_s: float,
    tell: Callable[[str], None] = lambda _: None,
    sleep: Callable[[float], None] = time.sleep,
) -> T:
    """What ``call`` returns; after an UnreachableError it is called again, for ``patience_s``.

    For calls that may be made twice. ``tell`` gets the first failure. Raises the last one.
    """
    end, pause_s, is_told = time.monotonic() + patience_s, FIRST_PAUSE_S, False
    while True:
        try:
            return call()
        except UnreachableError as error:
            left_s = end - time.monotonic()
            if not error.is_transient:
                raise
            if left_s <= 0:
                raise UnreachableError(f"{error} It was tried for {patience_s:g} s.") from None
            if not is_told:
                tell(str(error))
            is_told = True
            sleep(min(max(pause_s, error.retry_after_s), left_s))
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)


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
    from kubernetes.dynamic import DynamicClient

    configuration, own_namespace = load_configuration(context)
    # Commands look again by themselves and say so; urllib3 would log each of its own attempts.
    configuration.retries = 0
    api_client = open_client(configuration)
    with contextlib.ExitStack() as stack:
        stack.callback(api_client.close)
        # The default cache of API kinds is a file of a known name in the shared /tmp.
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="kleash-k8s-"))

        def open_dynamic() -> Any:
            with translated(server=configuration.host):
                return DynamicClient(api_client, cache_file=str(Path(folder) / "kinds.json"))

        dynamic = repeated(open_dynamic, patience_s=FIRST_CONTACT_S)
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
    files = [Path(each).expanduser() for each in path.split(os.pathsep) if each]
    there = [file for file in files if file.exists()]
    if context is None and not there and SERVICE_ACCOUNT_NAMESPACE.exists():
        load_incluster_config(client_configuration=configuration)
        return configuration, SERVICE_ACCOUNT_NAMESPACE.read_text(encoding="utf-8").strip()
    if not there:
        raise ConfigError(
            f"there is no kubeconfig at {' or '.join(map(str, files))}; set KUBECONFIG to that of "
            "your cluster."
        )
    try:
        path = os.pathsep.join(map(str, there))
        chosen = context or _current_context(there)
        load_kube_config(path, context=chosen, client_configuration=configuration)
        listed: Any = list_kube_config_contexts(path)
    except (ConfigException, OSError, ValueError) as error:
        raise ConfigError(
            f"the kubeconfig {path} cannot be used{f' with context {context}' if context else ''}: "
            f"{_one_line(str(error))}; kubectl config get-contexts lists what is there."
        ) from None
    contexts, active = listed
    named = [each for each in contexts if each["name"] == chosen] if chosen else [active]
    return configuration, named[0]["context"].get("namespace") if named else None


def open_client(configuration: Any) -> Any:
    """The kubernetes package's ApiClient."""
    from kubernetes.client import ApiClient
    from urllib3.util.ssl_ import create_urllib3_context

    client = ApiClient(configuration)
    tls = create_urllib3_context()
    tls.verify_flags &= ~LEFT_OUT
    client.rest_client.pool_manager.connection_pool_kw["ssl_context"] = tls
    return client


def _current_context(files: list[Path]) -> str | None:
    """Of several files the first that names one, as kubectl does; the package takes the last."""
    import yaml

    for file in files:
        try:
            content = yaml.safe_load(file.read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise ValueError(f"{file} is no YAML ({error})") from None
        if isinstance(content, dict) and content.get("current-context"):
            return content["current-context"]
    return None


@contextlib.contextmanager
def translated(what: str = "", *, server: str = "") -> Iterator[None]:
    """Turn what the kubernetes package raises into one sentence; ``what`` is the object meant."""
    from kubernetes.client import ApiException
    from kubernetes.dynamic.exceptions import ResourceNotFoundError
    from urllib3.exceptions import HTTPError

    try:
        yield
    except ApiException as error:
        if _is_untrusted(error.__context__):  # the package hides it behind status 0
            raise _untrusted(error.reason, what, server) from None
        raise _refusal(error, what) from None
    except ResourceNotFoundError:
        raise MissingError(
            f"this cluster does not know the kind of {what}; install its custom resource "
            "definition, or turn it off in the chart's values.",
            status=404,
            reason="NoKindMatch",
        ) from None
    except (HTTPError, OSError) as error:
        subject, at = f"{what}: " if what else "", f" at {server}" if server else ""
        if _is_untrusted(error):
            raise _untrusted(error, what, server) from None
        raise UnreachableError(
            f"{subject}the cluster{at} does not answer ({_one_line(str(error))}); check the "
            "address in the kubeconfig, and that the cluster runs: kubectl cluster-info."
        ) from None


def _untrusted(error: object, what: str, server: str) -> UnreachableError:
    subject, at = f"{what}: " if what else "", f" at {server}" if server else ""
    return UnreachableError(
        f"{subject}the certificate of the cluster{at} is not accepted ({_one_line(str(error))}); "
        "correct certificate-authority in the kubeconfig, or the address.",
        is_transient=False,
    )


def _is_untrusted(error: BaseException | None) -> bool:
    """Whether a certificate was refused; urllib3 wraps that twice."""
    while error is not None:
        if isinstance(error, ssl.SSLCertVerificationError):
            return True
        inner = getattr(error, "reason", None) or (error.args[0] if error.args else None)
        error = inner if isinstance(inner, BaseException) else None
    return False


def _refusal(error: Any, what: str) -> KleashError:
    details = _status_of(error)
    message = details["message"]
    subject = f"{what}: " if what else ""
    status, reason = int(error.status or 0), details["reason"]
    if status in TRANSIENT:
        said = f" (status {status})" if status else ""
        return UnreachableError(
            f"{subject}the cluster cannot answer now{said}: {message}; try again.",
            retry_after_s=_retry_after_s(error),
        )
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
        return MissingError(
            f"{subject}{message}; somebody has deleted it, or never made it: kleash k8s status "
            "shows what is there.",
            status=status,
            reason=reason,
        )
    return ClusterError(
        f"{subject}the cluster refuses (status {status}): {message}; correct what it names and "
        "run the same command again.",
        status=status,
        reason=reason,
    )


def _retry_after_s(error: Any) -> float:
    """Seconds that the server asks for; 0 when it does not."""
    value = (error.headers or {}).get("Retry-After", "")
    return float(value) if value.isdigit() else 0.0


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
