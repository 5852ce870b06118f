"""The way to a cluster: kubeconfig files, certificates, and requests that are made again."""

from __future__ import annotations

import json
import os
import ssl
import threading
from collections.abc import Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import urllib3.connection
import urllib3.util.ssl_
from kubernetes.client import ApiClient, ApiException, Configuration, VersionApi
from tests.services.authority import LOOPBACK, Authority

from kleash.base.errors import ConfigError
from kleash.cluster.connection import (
    ClusterError,
    UnreachableError,
    load_configuration,
    open_client,
    repeated,
    translated,
)

pytestmark = pytest.mark.unit


def kubeconfig(path: Path, name: str, *, current: bool = True, user: str | None = None) -> Path:
    """A file with one cluster, one user and one context, all of one name."""
    context = {"cluster": name, "user": user or name, "namespace": f"of-{name}"}
    content: dict[str, Any] = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": name, "cluster": {"server": f"https://{name}.example:6443"}}],
        "users": [{"name": name, "user": {"token": f"token-of-{name}"}}],
        "contexts": [{"name": name, "context": context}],
    }
    if current:
        content["current-context"] = name
    path.write_text(json.dumps(content))
    return path


def set_files(monkeypatch: pytest.MonkeyPatch, *files: Path | str) -> None:
    monkeypatch.setenv("KUBECONFIG", os.pathsep.join(map(str, files)))


def token_of(configuration: Any) -> str:
    return configuration.get_api_key_with_prefix("BearerToken", "authorization")


def test_several_files_are_one_kubeconfig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As kubectl reads them: files that are not there do not count, the first context is current,
    and a context may use the user of another file."""
    first = kubeconfig(tmp_path / "first", "one", user="two")
    second = kubeconfig(tmp_path / "second", "two")
    set_files(monkeypatch, tmp_path / "none", first, "", second)
    configuration, namespace = load_configuration()
    assert (configuration.host, namespace) == ("https://one.example:6443", "of-one")
    assert token_of(configuration) == "Bearer token-of-two"
    configuration, namespace = load_configuration("two")
    assert (configuration.host, namespace) == ("https://two.example:6443", "of-two")


def test_the_first_file_that_names_a_current_context_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = kubeconfig(tmp_path / "first", "one", current=False)
    second = kubeconfig(tmp_path / "second", "two")
    third = kubeconfig(tmp_path / "third", "three")
    set_files(monkeypatch, first, second, third)
    assert load_configuration()[1] == "of-two"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (None, r"there is no kubeconfig at .*first or .*second; set KUBECONFIG"),
        ("{", r"first cannot be used: .*first is no YAML .*get-contexts lists what is there"),
    ],
)
def test_files_that_cannot_be_used(
    text: str | None, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = tmp_path / "first"
    if text is not None:
        first.write_text(text)
    set_files(monkeypatch, first, tmp_path / "second")
    with pytest.raises(ConfigError, match=sentence):
        load_configuration()


class Version(BaseHTTPRequestHandler):
    """Says a version, to whoever asks."""

    def do_GET(self) -> None:
        keys = ("major", "minor", "gitVersion", "gitCommit", "gitTreeState", "buildDate")
        names = dict.fromkeys((*keys, "goVersion", "compiler", "platform"), "1")
        text = json.dumps(names).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Silence."""


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    """Without an authority key identifier, as those of older clusters."""
    return Authority(tmp_path)


@pytest.fixture
def host(authority: Authority) -> Iterator[str]:
    pair = authority.issue("api-server", *LOOPBACK)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Version)
    server.daemon_threads = True
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pair.cert, pair.key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"https://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def _strict(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every Python checks certificates as 3.13 does."""
    make = urllib3.util.ssl_.create_urllib3_context

    def make_strict(*arguments: Any, **options: Any) -> ssl.SSLContext:
        context = make(*arguments, **options)
        context.verify_flags |= ssl.VERIFY_X509_STRICT
        return context

    monkeypatch.setattr(urllib3.util.ssl_, "create_urllib3_context", make_strict)
    monkeypatch.setattr(urllib3.connection, "create_urllib3_context", make_strict)


def configuration_of(host: str, ca: Path) -> Any:
    configuration = Configuration()
    configuration.host, configuration.ssl_ca_cert, configuration.retries = host, str(ca), False
    return configuration


@pytest.mark.usefixtures("_strict")
def test_the_authority_of_an_older_cluster_is_accepted(host: str, authority: Authority) -> None:
    configuration = configuration_of(host, authority.ca)
    with ApiClient(configuration) as strict, pytest.raises(ApiException, match="Authority Key"):
        VersionApi(strict).get_code()
    with closing(open_client(configuration)) as client:
        assert VersionApi(client).get_code().git_version == "1"


def test_an_unknown_authority_is_refused_at_once(host: str, tmp_path: Path) -> None:
    other = Authority(tmp_path, "other")
    calls: list[int] = []

    def ask() -> None:
        calls.append(1)
        with translated("Job sft", server=host):
            VersionApi(client).get_code()

    with (
        closing(open_client(configuration_of(host, other.ca))) as client,
        pytest.raises(UnreachableError, match=r"^Job sft: the certificate .*is not accepted"),
    ):
        repeated(ask, patience_s=60)
    assert len(calls) == 1


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_a_busy_server_is_asked_again_when_it_says(status: int) -> None:
    busy, slept, told = ["busy", "busy"], [], []

    def ask() -> str:
        with translated("Job sft"):
            if not busy:
                return "done"
            busy.pop()
            error = ApiException(status=status, reason="Busy")
            error.headers = {"Retry-After": "7"}
            raise error

    assert repeated(ask, patience_s=60, tell=told.append, sleep=slept.append) == "done"
    assert slept == [7.0, 7.0]
    assert told == [f"Job sft: the cluster cannot answer now (status {status}): Busy; try again."]


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 422])
def test_what_is_refused_is_not_asked_again(status: int) -> None:
    calls: list[int] = []

    def ask() -> None:
        calls.append(1)
        with translated("Job sft"):
            raise ApiException(status=status, reason="No")

    with pytest.raises(ClusterError):
        repeated(ask, patience_s=60)
    assert len(calls) == 1


def test_in_the_end_it_says_for_how_long_it_was_tried() -> None:
    def ask() -> None:
        with translated("Job sft", server="https://there"):
            raise ConnectionResetError("reset")

    with pytest.raises(UnreachableError) as error:
        repeated(ask, patience_s=0.05)
    assert str(error.value) == (
        "Job sft: the cluster at https://there does not answer (reset); check the address in the "
        "kubeconfig, and that the cluster runs: kubectl cluster-info. It was tried for 0.05 s."
    )
