"""Objects of a cluster as plain dictionaries: apply, get, list, patch, delete, by kind and name."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

from kleash.cluster.connection import (
    CONNECT_TIMEOUT_S,
    PATIENCE_S,
    READ_TIMEOUT_S,
    ClusterError,
    Connection,
    MissingError,
    repeated,
    translated,
)

FIELD_MANAGER = "kleash"

T = TypeVar("T")

Manifest = dict[str, Any]
"""An object as the API writes it."""


class Kind(NamedTuple):
    """What ``apiVersion`` and ``kind`` of an object say."""

    api_version: str
    name: str


CONFIG_MAP = Kind("v1", "ConfigMap")
POD = Kind("v1", "Pod")
CLAIM = Kind("v1", "PersistentVolumeClaim")
EVENT = Kind("v1", "Event")
NAMESPACE = Kind("v1", "Namespace")
JOB = Kind("batch/v1", "Job")
DEPLOYMENT = Kind("apps/v1", "Deployment")


def kind_of(manifest: Manifest) -> Kind:
    """Kind of an object."""
    return Kind(manifest["apiVersion"], manifest["kind"])


def name_of(manifest: Manifest) -> str:
    """Name of an object."""
    return manifest["metadata"]["name"]


def labels_of(manifest: Manifest) -> dict[str, str]:
    """Labels of an object; empty without any."""
    return manifest["metadata"].get("labels") or {}


def conditions_of(manifest: Manifest) -> dict[str, dict[str, Any]]:
    """Conditions in an object's status whose value is True or False, by type."""
    found = manifest.get("status", {}).get("conditions") or []
    return {condition["type"]: condition for condition in found}


def is_true(manifest: Manifest, condition: str) -> bool:
    """Whether a condition is True."""
    return conditions_of(manifest).get(condition, {}).get("status") == "True"


class Objects:
    """The objects of one namespace. Every method raises ClusterError or UnreachableError.

    A request whose answer is lost, or is 429 or 5xx, is made again for ``patience_s``: each says
    what is to be, and not what is to change. A log that breaks off is its reader's to go on with.
    """

    def __init__(
        self,
        connection: Connection,
        *,
        patience_s: float = PATIENCE_S,
        tell: Callable[[str], None] = lambda _: None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """``tell`` gets the sentence of a failure after which a request is made again."""
        self.connection = connection
        self.namespace = connection.namespace
        self._patience_s, self._tell, self._sleep = patience_s, tell, sleep

    def with_patience(
        self,
        patience_s: float,
        tell: Callable[[str], None],
        sleep: Callable[[float], None] = time.sleep,
    ) -> Objects:
        """The same objects for one who waits longer for an API server that is away."""
        return Objects(self.connection, patience_s=patience_s, tell=tell, sleep=sleep)

    def server_version(self) -> str:
        """Of Kubernetes, as v1.34.2."""
        return str(self.connection.dynamic.version["kubernetes"]["gitVersion"])

    def apply(self, manifest: Manifest, *, force: bool = False, dry_run: bool = False) -> Manifest:
        """Server-side apply: make what is stated here so, and leave other fields alone.

        Without ``force`` a field that somebody else has set differently is an error of status 409.
        ``dry_run`` does everything but store it.
        """
        kind, name = kind_of(manifest), name_of(manifest)
        return self._request(
            "patch",
            kind,
            name,
            body=manifest,
            content_type="application/apply-patch+yaml",
            field_manager=FIELD_MANAGER,
            force_conflicts=force,
            dry_run="All" if dry_run else None,
        )

    def get(self, kind: Kind, name: str) -> Manifest | None:
        """An object, or None when there is none of that name."""
        try:
            return self._request("get", kind, name)
        except MissingError:
            return None

    def find(self, kind: Kind, labels: Mapping[str, str | None] | None = None) -> list[Manifest]:
        """Objects whose labels have these values (None: any value); all without ``labels``."""
        selector = ",".join(
            key if value is None else f"{key}={value}" for key, value in (labels or {}).items()
        )
        answer = self._request("get", kind, None, label_selector=selector or None)
        # Elements of a list do not repeat what kind they are.
        return [
            {"apiVersion": kind.api_version, "kind": kind.name, **item}
            for item in answer.get("items") or []
        ]

    def warnings(self) -> list[Manifest]:
        """Events of type Warning in the namespace, as they come."""
        answer = self._request("get", EVENT, None, field_selector="type=Warning", limit=500)
        return answer.get("items") or []

    def create(self, manifest: Manifest) -> Manifest:
        """Create an object; status 409 when there is one of that name.

        That one may be of this very call, when the answer to its first attempt was lost.
        """
        return self._request("post", kind_of(manifest), None, body=manifest, of=name_of(manifest))

    def merge(self, kind: Kind, name: str, changes: Manifest) -> Manifest:
        """JSON merge patch: null removes a field."""
        return self._request(
            "patch",
            kind,
            name,
            body=changes,
            content_type="application/merge-patch+json",
            field_manager=FIELD_MANAGER,
        )

    def delete(self, kind: Kind, name: str) -> bool:
        """Delete an object, and what it owns soon after; False when there is none."""
        try:
            self._request("delete", kind, name, propagation_policy="Background")
        except MissingError:
            return False
        return True

    def log(self, pod: str, container: str, *, tail_lines: int, previous: bool = False) -> str:
        """End of a container's log; ``previous`` is of its run before the last restart."""
        pieces = self._repeat(
            lambda: list(
                self.follow_log(
                    pod, container, tail_lines=tail_lines, follow=False, previous=previous
                )
            )
        )
        return b"".join(pieces).decode(errors="replace")

    def follow_log(
        self,
        pod: str,
        container: str,
        *,
        tail_lines: int | None = None,
        since_s: int | None = None,
        follow: bool = True,
        previous: bool = False,
        has_times: bool = False,
    ) -> Iterator[bytes]:
        """A container's log in pieces, to its end or, with ``follow``, to the container's.

        ``since_s``: only what was written in these last seconds. ``has_times``: each line begins
        with the time of its writing and a space.
        """
        from kubernetes.client import CoreV1Api

        with translated(f"log of pod {pod}", server=self.connection.server):
            response: Any = CoreV1Api(self.connection.api_client).read_namespaced_pod_log(
                pod,
                self.namespace,
                container=container,
                follow=follow,
                previous=previous,
                tail_lines=tail_lines,
                since_seconds=since_s,
                timestamps=has_times,
                _preload_content=False,
                _request_timeout=(CONNECT_TIMEOUT_S, 3600.0 if follow else READ_TIMEOUT_S),
            )
            try:
                # Pieces as they arrive: a number of bytes would wait until so many are there.
                yield from response.stream(amt=None, decode_content=True)
            finally:
                response.close()
                response.release_conn()

    def _repeat(self, call: Callable[[], T]) -> T:
        return repeated(call, patience_s=self._patience_s, tell=self._tell, sleep=self._sleep)

    def _request(
        self, method: str, kind: Kind, name: str | None, of: str = "", **options: Any
    ) -> Manifest:
        dynamic = self.connection.dynamic
        subject = f"{kind.name} {name or of}".strip()

        def ask() -> Manifest:
            with translated(subject, server=self.connection.server):
                resource = dynamic.resources.get(api_version=kind.api_version, kind=kind.name)
                namespace = self.namespace if resource.namespaced else None
                reply = dynamic.request(
                    method,
                    resource.path(name=name, namespace=namespace),
                    serialize=False,
                    _request_timeout=(CONNECT_TIMEOUT_S, READ_TIMEOUT_S),
                    **options,
                )
                return json.loads(reply.data)

        return self._repeat(ask)


def check_namespace(objects: Objects) -> None:
    """Raise MissingError when the namespace does not exist.

    Lists of a namespace that does not exist are empty, so that a mistyped name looks like an idle
    cluster. An account without the right to see namespaces is not asked for it.
    """
    try:
        found = objects.get(NAMESPACE, objects.namespace)
    except ClusterError as error:
        if error.status == 403:
            return
        raise
    if found is None:
        raise MissingError(
            f"namespace {objects.namespace} does not exist; create it with kubectl create "
            f"namespace {objects.namespace}, or name another with --namespace.",
            status=404,
        )
