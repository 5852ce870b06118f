"""Who may replace models: each mode, with the credentials of administrators and of others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from tests.services.authority import LOOPBACK, Authority, TokenReviewer, in_cluster
from tests.services.doubler import CALL_S

from kleash.client.reward import RewardClient
from kleash.client.reward_admin import RewardAdminClient
from kleash.reward.config import RewardConfig
from kleash.reward.service import RewardService
from kleash.rpc.credentials import Credentials
from kleash.rpc.errors import ServiceError
from kleash.rpc.server import BackgroundServer, ServerConfig
from kleash.rpc.static_tokens import make_token

pytestmark = pytest.mark.services

KINDS = ("admin", "right", "wrong", "absent", "expired")
MODES = ("none", "token", "service_account", "mtls")
# An administrator passes, and is told that the folder is none that may be loaded.
PASSES = "INVALID_ARGUMENT"
BY_TOKEN = {
    "admin": PASSES,
    "right": "PERMISSION_DENIED CALLER_NOT_ALLOWED",
    "wrong": "UNAUTHENTICATED BAD_CREDENTIALS",
    "absent": "UNAUTHENTICATED MISSING_CREDENTIALS",
    "expired": "UNAUTHENTICATED EXPIRED",
}
EXPECTED: dict[str, dict[str, str]] = {
    "none": dict.fromkeys(KINDS, "PERMISSION_DENIED CALLER_NOT_ALLOWED"),
    "token": BY_TOKEN,
    "service_account": BY_TOKEN,
    "mtls": {
        "admin": PASSES,
        "right": BY_TOKEN["right"],
        **dict.fromkeys(("wrong", "absent", "expired"), "UNAVAILABLE TLS"),
    },
}
ADMINS = ("*admin*",)


@pytest.fixture(scope="module")
def servers(
    tiny_reward_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, tuple[str, dict[str, Credentials]]]]:
    """Address, and credentials by kind, of a server in each mode."""
    folder = tmp_path_factory.mktemp("admin")
    authority, stranger = Authority(folder), Authority(folder, "stranger")
    server = authority.issue("server", *LOOPBACK)
    tls = {"cert": server.cert, "key": server.key, "client_ca": authority.ca}
    settings: dict[str, dict[str, Any]] = {
        "none": {},
        "token": {"auth": {"mode": "token", "tokens_file": folder / "keys"}},
        "service_account": {"auth": {"mode": "service_account", "audience": "kleash"}},
        "mtls": {"tls": tls, "auth": {"mode": "mtls"}},
    }
    with ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        reviewer = stack.enter_context(in_cluster(authority, folder, patch))
        credentials = {
            # What a client claims to be counts for its place in the queue and for nothing else.
            "none": {kind: Credentials(caller="admin") for kind in KINDS},
            "token": _by_key(folder / "keys"),
            "service_account": _by_account(reviewer),
            "mtls": _by_certificate(authority, stranger),
        }
        found = {}
        for mode, options in settings.items():
            config = RewardConfig(
                model=tiny_reward_folder, admins=ADMINS, model_folders=(tiny_reward_folder,)
            )
            its = stack.enter_context(
                BackgroundServer([RewardService(config)], ServerConfig.model_validate(options))
            )
            found[mode] = (its.address, credentials[mode])
        yield found


def _by_account(reviewer: TokenReviewer) -> dict[str, Credentials]:
    return {
        "admin": Credentials(token=reviewer.token("ops:admin")),
        "right": Credentials(token=reviewer.token("ops:trainer")),
        "wrong": Credentials(token=reviewer.token("ops:admin")[:-3] + "AAA"),
        "absent": Credentials(),
        "expired": Credentials(token=reviewer.token("ops:admin", ends_in_s=-5)),
    }


def _by_key(keys: Path) -> dict[str, Credentials]:
    made = {
        "admin": make_token("admin"),
        "right": make_token("trainer"),
        "expired": make_token("admin", datetime.now(UTC) - timedelta(hours=1)),
    }
    keys.write_text("".join(f"{line}\n" for _, line in made.values()))
    found = {kind: Credentials(token=token) for kind, (token, _) in made.items()}
    return {**found, "wrong": Credentials(token=make_token("admin")[0]), "absent": Credentials()}


def _by_certificate(authority: Authority, stranger: Authority) -> dict[str, Credentials]:
    name = x509.DNSName("admin.ops.svc")
    pairs = {
        "admin": authority.issue("admin", name),
        "right": authority.issue("trainer", x509.DNSName("trainer.rlhf.svc")),
        "wrong": stranger.issue("wrong", name),
        "expired": authority.issue("expired", name, is_expired=True),
    }
    ca = authority.ca
    found = {kind: Credentials(ca=ca, cert=it.cert, key=it.key) for kind, it in pairs.items()}
    return {**found, "absent": Credentials(ca=ca)}


def outcome(call: Any, *arguments: Any) -> str:
    with pytest.raises(ServiceError) as caught:
        call(*arguments)
    if caught.value.code.name == PASSES:
        return PASSES
    if caught.value.code.name == "UNAVAILABLE":
        return "UNAVAILABLE TLS"  # told as TLS or as a closed socket, as the handshake went
    return f"{caught.value.code.name} {caught.value.reason}"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_only_administrators_load_and_unload(servers: Any, mode: str, kind: str) -> None:
    address, credentials = servers[mode]
    client = RewardAdminClient(address, timeout_s=CALL_S, credentials=credentials[kind])
    with client as admin:
        assert outcome(admin.load_model, "/etc") == EXPECTED[mode][kind]
        expected = EXPECTED[mode][kind].replace(PASSES, "NOT_FOUND REVISION_NOT_SERVED")
        assert outcome(admin.unload_revision, "sha256:none") == expected


@pytest.mark.parametrize("mode", MODES)
def test_administrators_and_others_score(servers: Any, mode: str) -> None:
    address, credentials = servers[mode]
    for kind in ("admin", "right"):
        with RewardClient(address, credentials=credentials[kind]) as client:
            assert len(client.score_texts(["hello"])) == 1
