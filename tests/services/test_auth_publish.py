"""Publishing under every mode: trainer, store, replicas, a late joiner, each with credentials."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography import x509
from tests.services.authority import Authority, in_cluster
from tests.services.doubler import eventually
from tests.services.test_publish import LIMITS, after_training

from kleash.base.errors import RemoteError
from kleash.client import PolicyClient, Prompt, Sampling, Unavailable, WeightsClient
from kleash.client.weights import WeightsStoreClient
from kleash.lm.load import load_causal_lm
from kleash.policy.config import PolicyConfig
from kleash.policy.service import PolicyService
from kleash.ppo.config import PublishConfig
from kleash.ppo.publish import Publisher
from kleash.rpc.server import BackgroundServer, ServerConfig
from kleash.rpc.static_tokens import make_token
from kleash.weights.store import Store
from kleash.weights.store_service import StoreService

pytestmark = pytest.mark.services

VARIABLES = (
    "KLEASH_TLS_CA",
    "KLEASH_TLS_CERT",
    "KLEASH_TLS_KEY",
    "KLEASH_TLS_SERVER_NAME",
    "KLEASH_TOKEN",
    "KLEASH_TOKEN_FILE",
)


@pytest.fixture(params=["token", "token with tls", "service_account", "mtls"])
def server_config(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[ServerConfig]:
    """Of every server, with the environment of who may call."""
    authority = Authority(tmp_path)
    # As in a cluster: the certificate has the Service's name, and replicas are reached by address.
    pair = authority.issue("server", x509.DNSName("policy.rlhf.svc"))
    environment: dict[str, str | Path] = {}
    settings: dict[str, Any] = {}
    if "tls" in request.param:
        settings["tls"] = {"cert": pair.cert, "key": pair.key}
        environment["KLEASH_TLS_CA"] = authority.ca
        environment["KLEASH_TLS_SERVER_NAME"] = "policy.rlhf.svc"
    if request.param == "mtls":
        client = authority.issue("client", x509.DNSName("trainer.rlhf.svc"))
        settings["tls"]["client_ca"] = authority.ca
        settings["auth"] = {"mode": "mtls", "allowed_callers": ["trainer.*"]}
        environment |= {"KLEASH_TLS_CERT": client.cert, "KLEASH_TLS_KEY": client.key}
    elif request.param.startswith("token"):
        token, line = make_token("trainer")
        (tmp_path / "keys").write_text(line)
        settings["auth"] = {"mode": "token", "tokens_file": tmp_path / "keys"}
        environment["KLEASH_TOKEN"] = token
    with ExitStack() as stack:
        if request.param == "service_account":
            reviewer = stack.enter_context(in_cluster(authority, tmp_path, monkeypatch))
            (tmp_path / "projected").write_text(reviewer.token("rlhf:trainer"))
            settings["auth"] = {"mode": "service_account", "audience": "kleash"}
            environment["KLEASH_TOKEN_FILE"] = tmp_path / "projected"
        for name, value in environment.items():
            monkeypatch.setenv(name, str(value))
        yield ServerConfig.model_validate(settings)


def test_a_version_reaches_replicas_and_late_joiners(
    server_config: ServerConfig, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path / "weights")
    model = after_training(tiny_folder)
    settings = {"model": tiny_folder, "limits": LIMITS}
    with ExitStack() as stack:
        stack.callback(store.close)
        host = stack.enter_context(BackgroundServer([StoreService(store)], server_config))
        replicas = [
            stack.enter_context(
                BackgroundServer(
                    [PolicyService(PolicyConfig.model_validate(settings))], server_config
                )
            )
            for _ in range(2)
        ]
        clients = [stack.enter_context(WeightsClient(replica.address)) for replica in replicas]
        # The second replica fetches from the first, with credentials of its own.
        publisher = Publisher(
            dict(enumerate(clients)),
            store,
            run_id="run",
            fence=1,
            config=PublishConfig(flat_replicas=1),
            store_address=host.address,
        )
        publisher.publish(load_causal_lm(tiny_folder), 1)
        fetched = counting_fetches(store)
        report = publisher.publish(model, 2)
        assert len(fetched) == 1
        assert [client.get_weights().digest for client in clients] == [report.digest] * 2

        late = PolicyConfig.model_validate({**settings, "weights": {"publisher": host.address}})
        joined = stack.enter_context(BackgroundServer([PolicyService(late)], server_config))
        policy = stack.enter_context(PolicyClient(joined.address))
        own = stack.enter_context(WeightsClient(joined.address))
        eventually(lambda: own.get_weights().version == 2)
        assert own.get_weights(audit=True).digest == report.digest
        eventually(lambda: versions_of(policy) == {2})  # when health has told that it is ready

        for name in VARIABLES:
            monkeypatch.delenv(name, raising=False)
        for address in (replicas[0].address, host.address, joined.address):
            assert_closed(address)


def counting_fetches(store: Store) -> list[bytes]:
    """Objects that are asked of the store itself from now on."""
    fetched: list[bytes] = []
    original = store.fetch

    def counted(object_id: bytes, offset: int) -> Any:
        fetched.append(object_id)
        return original(object_id, offset)

    store.fetch = counted  # type: ignore[method-assign]
    return fetched


def versions_of(policy: PolicyClient) -> set[int]:
    """Versions that produced a response; none while the replica is not ready."""
    prompt = Prompt("p", np.arange(5, 11, dtype=np.int32))
    try:
        (answer,) = policy.generate([prompt], Sampling(seed=1, max_new_tokens=4))
    except Unavailable:
        return set()
    return {span.weights_version for span in answer.version_spans}


def assert_closed(address: str) -> None:
    """Without credentials there is no way in."""
    with WeightsClient(address, timeout_s=5) as weights, pytest.raises(RemoteError) as first:
        weights.get_weights()
    with WeightsStoreClient(address, timeout_s=5) as store, pytest.raises(RemoteError) as second:
        next(store.watch_head())
    for caught in (first, second):
        reason = getattr(caught.value, "reason", "")
        assert reason in ("MISSING_CREDENTIALS", "UNREACHABLE"), str(caught.value)
