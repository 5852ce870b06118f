"""The reward service as ci/reward-product-values.yaml configures it, on this machine."""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.k8s.chart import CHART, pod_of, render
from tests.k8s.test_config import config_of
from tests.services.http_client import HttpPort

from kleash.client.reward import RewardClient
from kleash.reward.config import RewardConfig
from kleash.reward.service import RewardService
from kleash.rpc.credentials import Credentials
from kleash.rpc.server import BackgroundServer, ServerConfig
from kleash.rpc.static_tokens import make_token

pytestmark = pytest.mark.k8s

BREVITY = """
def score(items):
    return [-float(len(item.get("response", item.get("text", "")).split())) for item in items]
"""
ITEMS = {"items": [{"text": "some words"}, {"text": "a"}]}


@pytest.fixture
def tokens(tmp_path: Path) -> dict[str, str]:
    """Keys by caller; the servers' file of them is ``tmp_path / "tokens"``."""
    made = {name: make_token(name) for name in ("kleash", "guardrails", "stranger")}
    (tmp_path / "tokens").write_text("".join(f"{line}\n" for _, line in made.values()))
    return {name: token for name, (token, _) in made.items()}


@pytest.fixture
def server(
    helm: object, tokens: dict[str, str], tiny_reward_folder: Path, tmp_path: Path
) -> Iterator[tuple[BackgroundServer, HttpPort]]:
    """With the folders and ports of this test, and without the wait for DNS at the end."""
    items = render(CHART / "ci" / "reward-product-values.yaml")
    tree: dict[str, Any] = config_of(items, pod_of(items, "reward"), "serve.json")
    reward = tree["reward"]
    reward["models"]["judge"]["model"] = tiny_reward_folder
    (tmp_path / "brevity.py").write_text(BREVITY)
    assert reward["models"]["brevity"]["function_path"] == ["/runs/code"]
    reward["models"]["brevity"]["function_path"] = [tmp_path]
    reward["model_folders"] = [tmp_path]
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    here = {"host": "127.0.0.1", "port": 0, "health_port": 0, "metrics_port": 0, "http_port": port}
    drain = {"drain_announce_s": 0, "drain_delay_s": 0, "drain_grace_s": 5}
    auth = {**tree["server"]["auth"], "tokens_file": tmp_path / "tokens"}
    config = ServerConfig.model_validate({**tree["server"], **here, **drain, "auth": auth})
    service = RewardService(RewardConfig.model_validate(reward))
    with BackgroundServer([service], config) as running:
        yield running, HttpPort(port)


def test_the_example_serves(
    server: tuple[BackgroundServer, HttpPort],
    tokens: dict[str, str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    running, web = server
    caplog.set_level(logging.INFO, logger="kleash.audit")
    assert web.get("/readyz").status == 200
    assert web.post("/v1/score", ITEMS).status == 401

    key = {"Authorization": f"Bearer {tokens['guardrails']}"}
    judged = web.post("/v1/score", ITEMS, key).json
    assert judged["model"]["name"] == "judge"
    short = web.post("/v1/score", {**ITEMS, "model": "brevity"}, key).json
    assert [each["score"] for each in short["results"]] == [-2.0, -1.0]
    panel = web.post("/v1/score", {**ITEMS, "model": "panel"}, key).json
    for one, two, both in zip(judged["results"], short["results"], panel["results"], strict=True):
        assert both["score"] == pytest.approx(0.9 * one["score"] + 0.1 * two["score"], abs=1e-5)
    site = {"Origin": "https://app.example.org", **key}
    assert web.get("/v1/models", site).headers["access-control-allow-origin"] == site["Origin"]

    own = Credentials(token=tokens["kleash"])
    with RewardClient(running.address, credentials=own) as of_the_run:
        assert all(each.is_ok for each in of_the_run.score_texts(["some words", "a"]))
    lines = [each.getMessage() for each in caplog.records if each.name == "kleash.audit"]
    assert any("caller=guardrails peer=http:" in line and "model=panel" in line for line in lines)
