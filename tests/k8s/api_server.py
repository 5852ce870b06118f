"""A real Kubernetes API server for tests: etcd and kube-apiserver on loopback, started as envtest
does. No controller, scheduler or kubelet runs, so that objects stay as they were written.

KUBEBUILDER_ASSETS names a folder with ``etcd`` and ``kube-apiserver``, such as the one that
``setup-envtest use -p path`` prints. By hand, until Ctrl-C:

    KUBEBUILDER_ASSETS=... python tests/k8s/api_server.py
"""

from __future__ import annotations

import base64
import json
import os
import secrets
import socket
import ssl
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

ASSETS_VARIABLE = "KUBEBUILDER_ASSETS"
START_LIMIT_S = 60.0
STOP_LIMIT_S = 20.0
BINARIES = ("etcd", "kube-apiserver")


def assets_folder() -> Path | None:
    """The folder that holds the binaries, None when the variable is not set.

    Raises ValueError when it is set and a binary is missing: a typo must not skip tests.
    """
    value = os.environ.get(ASSETS_VARIABLE)
    if not value:
        return None
    missing = [name for name in BINARIES if not os.access(Path(value) / name, os.X_OK)]
    if missing:
        raise ValueError(
            f"{ASSETS_VARIABLE}={value} has no executable {' and no '.join(missing)}; "
            "point it at the folder that `setup-envtest use -p path` prints, or unset it"
        )
    return Path(value)


class ApiServer:
    """etcd and kube-apiserver with RBAC and Pod Security; use it as a context manager.

    ``host``, ``token`` and ``ca_file`` are what a client needs; the token's user may do anything.
    """

    def __init__(self, assets: Path, folder: Path | None = None) -> None:
        """``folder`` takes data, certificates and logs; without it a temporary one, removed."""
        self.assets = assets
        self.token = secrets.token_urlsafe(24)
        self.host = ""
        self.folder = folder or Path()
        self._own_folder = folder is None
        self._stack = ExitStack()
        self._num_kubeconfigs = 0

    @property
    def ca_file(self) -> Path:
        """PEM file that verifies the server."""
        return self.folder / "certs" / "apiserver.crt"

    @property
    def kubeconfig(self) -> Path:
        """File for kubectl, helm and the clients; its user may do anything."""
        return self.folder / "kubeconfig"

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            if self._own_folder:
                self.folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            self.folder.mkdir(parents=True, exist_ok=True)
            self._start(stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def _start(self, stack: ExitStack) -> None:
        etcd_port, peer_port, port = free_ports(3)
        etcd_url = f"http://127.0.0.1:{etcd_port}"
        etcd = self._spawn(
            stack,
            "etcd",
            f"--data-dir={self.folder / 'etcd'}",
            f"--listen-client-urls={etcd_url}",
            f"--advertise-client-urls={etcd_url}",
            f"--listen-peer-urls=http://127.0.0.1:{peer_port}",
            "--unsafe-no-fsync=true",
        )
        self._wait_until_ready(f"{etcd_url}/health", {"etcd": etcd}, None)
        self.host = f"https://127.0.0.1:{port}"
        key_file = self.folder / "service-account.key"
        key_file.write_bytes(_new_private_key())
        token_file = self.folder / "tokens.csv"
        token_file.write_text(f"{self.token},admin,admin,system:masters\n")
        server = self._spawn(
            stack,
            "kube-apiserver",
            f"--etcd-servers={etcd_url}",
            f"--cert-dir={self.folder / 'certs'}",
            f"--token-auth-file={token_file}",
            "--advertise-address=127.0.0.1",
            "--bind-address=127.0.0.1",
            f"--secure-port={port}",
            "--authorization-mode=RBAC",
            f"--service-account-issuer={self.host}/",
            f"--service-account-key-file={key_file}",
            f"--service-account-signing-key-file={key_file}",
            "--service-cluster-ip-range=10.0.0.0/24",
            # Nobody makes the ServiceAccount `default` of a namespace without a controller.
            "--disable-admission-plugins=ServiceAccount",
            "--allow-privileged=true",
        )
        processes = {"etcd": etcd, "kube-apiserver": server}
        self._wait_until_ready(f"{self.host}/readyz", processes, self.ca_file)
        self._write_kubeconfig(self.kubeconfig, self.token, "default")

    def _spawn(self, stack: ExitStack, name: str, *arguments: str) -> subprocess.Popen[bytes]:
        log = stack.enter_context((self.folder / f"{name}.log").open("wb"))
        process = subprocess.Popen(
            [str(self.assets / name), *arguments], stdout=log, stderr=subprocess.STDOUT
        )
        stack.callback(_stop, process)
        return process

    def _wait_until_ready(
        self, url: str, processes: dict[str, subprocess.Popen[bytes]], ca_file: Path | None
    ) -> None:
        end = time.monotonic() + START_LIMIT_S
        while not _answers(url, self.token, ca_file):
            for name, process in processes.items():
                if process.poll() is not None:
                    raise RuntimeError(f"{name} exited with {process.returncode}: {self.log(name)}")
            if time.monotonic() > end:
                name = list(processes)[-1]
                raise RuntimeError(f"{url} is not ready after {START_LIMIT_S} s: {self.log(name)}")
            time.sleep(0.1)

    def log(self, name: str, num_lines: int = 30) -> str:
        """The last lines that ``etcd`` or ``kube-apiserver`` wrote."""
        lines = (self.folder / f"{name}.log").read_text(errors="replace").splitlines()
        return "\n".join(lines[-num_lines:])

    def _write_kubeconfig(self, path: Path, token: str, namespace: str) -> None:
        authority = base64.b64encode(self.ca_file.read_bytes()).decode()
        cluster = {"server": self.host, "certificate-authority-data": authority}
        context = {"cluster": "test", "user": "test", "namespace": namespace}
        # JSON is YAML: every client reads it.
        content = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "test", "cluster": cluster}],
            "users": [{"name": "test", "user": {"token": token}}],
            "contexts": [{"name": "test", "context": context}],
            "current-context": "test",
        }
        path.write_text(json.dumps(content, indent=2))
        path.chmod(0o600)

    def request(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """One call of the REST API as the administrator: decoded JSON of the reply.

        ``path`` starts with ``/api`` or ``/apis``. Raises RuntimeError with the server's message.
        """
        headers = {"Authorization": f"Bearer {self.token}", "Content-Type": "application/json"}
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.host + path, data, headers, method=method)
        context = ssl.create_default_context(cafile=str(self.ca_file))
        try:
            with urllib.request.urlopen(request, timeout=30, context=context) as reply:
                return json.load(reply)
        except urllib.error.HTTPError as error:
            with error:
                text = error.read().decode(errors="replace")
            raise RuntimeError(f"{method} {path}: {error.code} {text}") from None

    def create_namespace(
        self, prefix: str = "test", labels: Mapping[str, str] | None = None
    ) -> str:
        """A new namespace; nothing removes it, as its deletion needs a controller."""
        name = f"{prefix}-{secrets.token_hex(4)}"
        metadata = {"name": name, "labels": dict(labels or {})}
        self.request("POST", "/api/v1/namespaces", {"metadata": metadata})
        return name

    def service_account_token(self, namespace: str, name: str, lifetime_s: int = 3600) -> str:
        """A token of an existing ServiceAccount, which has that account's rights and no more."""
        path = f"/api/v1/namespaces/{namespace}/serviceaccounts/{name}/token"
        spec = {"expirationSeconds": lifetime_s}
        reply = self.request("POST", path, {"spec": spec})
        return reply["status"]["token"]

    def service_account_kubeconfig(self, namespace: str, name: str) -> Path:
        """A kubeconfig whose user is an existing ServiceAccount, in its namespace."""
        self._num_kubeconfigs += 1
        path = self.folder / f"kubeconfig-{self._num_kubeconfigs}"
        self._write_kubeconfig(path, self.service_account_token(namespace, name), namespace)
        return path


def free_ports(count: int) -> list[int]:
    """Different ports of loopback that nobody listens on at this moment."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def _answers(url: str, token: str, ca_file: Path | None) -> bool:
    if ca_file is not None and not ca_file.exists():
        return False
    context = None if ca_file is None else ssl.create_default_context(cafile=str(ca_file))
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"})
    try:
        with urllib.request.urlopen(request, timeout=5, context=context) as reply:
            return reply.status == 200
    except urllib.error.HTTPError as error:
        error.close()
        return False
    except OSError:
        return False


def _new_private_key() -> bytes:
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_LIMIT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def main() -> int:
    """Run until Ctrl-C."""
    assets = assets_folder()
    if assets is None:
        print(f"{ASSETS_VARIABLE} is not set", file=sys.stderr)
        return 2
    with ApiServer(assets) as server:
        print(f"export KUBECONFIG={server.kubeconfig}", flush=True)
        try:
            while True:
                time.sleep(3600)
        except KeyboardInterrupt:
            return 0


if __name__ == "__main__":
    sys.exit(main())
