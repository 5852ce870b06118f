"""Handshakes that fail, told in a sentence with the remedy; certificates that a server refuses."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from tests.services.authority import LOOPBACK, Authority
from tests.services.doubler import CALL_S, free_port, serving
from tests.services.test_auth_rotation import Named

from kleash.base.errors import UserError
from kleash.client import Credentials, ReferenceClient, Unavailable
from kleash.rpc import channel
from kleash.rpc.static_tokens import make_token

pytestmark = pytest.mark.services


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tls")


@pytest.fixture(scope="module")
def authority(folder: Path) -> Authority:
    return Authority(folder)


@pytest.fixture(scope="module")
def addresses(authority: Authority) -> Iterator[dict[str, str]]:
    """Of servers with a certificate for loopback, for a Service, a stale one, and without TLS."""
    name = x509.DNSName("policy.rlhf.svc")
    pairs = {
        "loopback": authority.issue("server", *LOOPBACK),
        "service": authority.issue("service", name),
        "stale": authority.issue("stale", *LOOPBACK, is_expired=True),
    }
    with ExitStack() as stack:
        found = {
            kind: stack.enter_context(serving(Named(), tls={"cert": its.cert, "key": its.key}))
            for kind, its in pairs.items()
        }
        found["plain"] = stack.enter_context(serving(Named()))
        yield {kind: its.address for kind, its in found.items()}


TLS = Credentials(ca=Path("authority"))


@pytest.mark.parametrize(
    ("server", "credentials", "reason", "sentence"),
    [
        ("loopback", TLS, "", ""),
        ("service", replace(TLS, server_name="policy.rlhf.svc"), "", ""),
        ("loopback", replace(TLS, ca=Path("stranger")), "TLS", "set that to the right one"),
        ("service", TLS, "TLS", "set KLEASH_TLS_SERVER_NAME"),
        ("service", replace(TLS, server_name="policy.other.svc"), "TLS", "is for another name"),
        ("stale", TLS, "TLS", "its certificate has expired; renew it"),
        ("plain", TLS, "TLS", "it uses no TLS; unset KLEASH_TLS_CA"),
        ("loopback", Credentials(), "UNREACHABLE", "both sides use TLS or neither"),
    ],
)
def test_a_handshake(
    addresses: dict[str, str],
    authority: Authority,
    folder: Path,
    server: str,
    credentials: Credentials,
    reason: str,
    sentence: str,
) -> None:
    if credentials.ca is not None:
        files = {"authority": authority.ca, "stranger": Authority(folder, "stranger").ca}
        credentials = replace(credentials, ca=files[credentials.ca.name])
    address = addresses[server]
    with ReferenceClient(address, timeout_s=CALL_S, credentials=credentials) as client:
        if not reason:
            assert client.get_model().dtype == "float32"
            return
        with pytest.raises(Unavailable) as caught:
            client.get_model()
    assert caught.value.reason == reason
    assert sentence in str(caught.value)
    assert address in str(caught.value)


def test_a_server_does_not_start_with_files_that_it_cannot_use(
    authority: Authority, folder: Path
) -> None:
    """One sentence with the file, before anything is loaded; and the port stays free."""
    one, other = authority.issue("one", *LOOPBACK), authority.issue("another", *LOOPBACK)
    empty, secret = folder / "empty", folder / "secret.key"
    empty.write_text("")
    key = serialization.load_pem_private_key(one.key.read_bytes(), None)
    secret.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"password"),
        )
    )
    good = {"cert": one.cert, "key": one.key}
    keys = {"mode": "token", "tokens_file": folder / "missing"}
    wrong: list[tuple[dict[str, Any], str]] = [
        (
            {"tls": {**good, "cert": folder / "missing"}},
            f"cannot read {folder / 'missing'}: No such",
        ),
        ({"tls": {**good, "cert": folder}}, f"cannot read {folder}: Is a directory"),
        ({"tls": {**good, "key": other.key}}, "are not a certificate and its private key"),
        ({"tls": {**good, "key": secret}}, "the key without a password"),
        ({"tls": {**good, "cert": empty}}, f"{empty} and {one.key} are not a certificate"),
        ({"tls": {**good, "client_ca": empty}}, f"{empty} holds no certificates of authorities"),
        ({"tls": {**good, "client_ca": one.key}}, f"{one.key} holds no certificates"),
        ({"auth": keys}, f"cannot read {folder / 'missing'}"),
        ({"auth": {**keys, "tokens_file": empty}}, f"kleash token NAME --tokens_file={empty}"),
    ]
    port = free_port()
    for options, sentence in wrong:
        with pytest.raises(UserError) as caught, serving(port=port, **options):
            pass
        assert sentence in str(caught.value)
        assert str(caught.value).endswith(".")
    with serving(Named(), port=port, tls=good):
        pass


def test_tokens_in_clear_are_told(
    authority: Authority, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """By a server that others can reach, and once by the client."""
    channel._warn_about_plain_token.cache_clear()
    token, line = make_token("trainer")
    (folder / "keys").write_text(line)
    auth = {"mode": "token", "tokens_file": folder / "keys"}
    pair = authority.issue("told", *LOOPBACK)

    def told(**options: Any) -> int:
        caplog.clear()
        with serving(Named(), **options):
            pass
        return caplog.text.count("callers send their tokens in clear")

    caplog.set_level(logging.WARNING)
    assert told(host="0.0.0.0", auth=auth) == 1
    assert told(host="127.0.0.1", auth=auth) == 0
    assert told(host="0.0.0.0", auth=auth, tls={"cert": pair.cert, "key": pair.key}) == 0
    caplog.clear()
    for credentials in (
        Credentials(token=token, ca=authority.ca),
        Credentials(token=token),
        Credentials(token=token),
    ):
        ReferenceClient("127.0.0.1:1", credentials=credentials).close()
    assert caplog.text.count("the token of this client travels in clear") == 1
