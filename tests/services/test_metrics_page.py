"""The page of a process's metrics: its formats, and the traces that its histograms name."""

from __future__ import annotations

import re
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from tests.services.doubler import free_port

from kleash.base import tracing
from kleash.base.exemplar import current_exemplar, exemplar_of
from kleash.base.trace_setup import ServiceTracingConfig, traced
from kleash.base.version import software_version
from kleash.client import RewardClient
from kleash.client.policy import PolicyClient
from kleash.client.types import Prompt, Sampling
from kleash.policy.config import PolicyConfig
from kleash.policy.service import PolicyService
from kleash.reward.config import RewardConfig
from kleash.reward.service import RewardService
from kleash.rpc.server import BackgroundServer, ServerConfig

pytestmark = pytest.mark.services

OPEN_METRICS = "application/openmetrics-text; version=1.0.0"
TRACED = (
    ("grpc_server_handling_seconds", {"grpc_method": "Score"}),
    ("kleash_queue_wait_seconds", {"service": "reward"}),
    ("kleash_compute_seconds", {"service": "reward"}),
    ("grpc_server_handling_seconds", {"grpc_method": "Generate"}),
    ("kleash_queue_wait_seconds", {"service": "policy"}),
)
"""Histograms that name traces."""


@dataclass(frozen=True)
class Served:
    """A server with a reward model and a policy."""

    address: str
    port: int
    """Of its metrics."""

    def page(self, accept: str) -> tuple[str, str]:
        """Content type and text of the metrics."""
        url = f"http://127.0.0.1:{self.port}/metrics"
        request = urllib.request.Request(url, headers={"Accept": accept})
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.headers["Content-Type"], answer.read().decode()

    def call(self) -> None:
        """Score a text, and generate a response."""
        with RewardClient(self.address) as reward:
            reward.score_texts(["some text"])
        prompt = Prompt("0", np.array([5, 6, 7], np.int32))
        with PolicyClient(self.address) as policy:
            assert list(policy.generate([prompt], Sampling(seed=0, max_new_tokens=2)))


@pytest.fixture(scope="module")
def served(tiny_reward_folder: Path, tiny_folder: Path) -> Iterator[Served]:
    services = (
        RewardService(RewardConfig(model=tiny_reward_folder)),
        PolicyService(PolicyConfig(model=tiny_folder)),
    )
    port = free_port()
    with BackgroundServer(services, ServerConfig(metrics_port=port)) as server:
        yield Served(server.address, port)


def named_traces(text: str, metric: str, labels: dict[str, str]) -> set[str]:
    """What the buckets of a histogram name."""
    wanted = [f'{name}="{value}"' for name, value in labels.items()]
    bucket = re.compile(rf'{metric}_bucket{{(.*)}} \S+ # {{trace_id="([0-9a-f]{{32}})"}} \S+ \S+')
    found = [match for line in text.splitlines() if (match := bucket.fullmatch(line))]
    return {match[2] for match in found if all(pair in match[1] for pair in wanted)}


def trace_ids(file: Path) -> set[str]:
    """Of the spans in a file."""
    return set(re.findall(r'"traceId":"([0-9a-f]{32})"', file.read_text(encoding="utf-8")))


def test_histograms_name_the_traces_of_their_values(served: Served, tmp_path: Path) -> None:
    file = tmp_path / "spans.jsonl"
    with traced(ServiceTracingConfig(exporter="file", file=file), "test"):
        served.call()
    recorded = trace_ids(file)
    assert len(recorded) >= 2
    kind, text = served.page(OPEN_METRICS)
    assert kind.startswith("application/openmetrics-text")
    for metric, labels in TRACED:
        assert named_traces(text, metric, labels) & recorded, (metric, labels)


def test_a_trace_that_is_not_recorded_is_not_named(served: Served, tmp_path: Path) -> None:
    before = [named_traces(served.page(OPEN_METRICS)[1], *each) for each in TRACED]
    config = ServiceTracingConfig(exporter="file", file=tmp_path / "spans", sample_ratio=0.0)
    with traced(config, "test"):
        served.call()
    assert [named_traces(served.page(OPEN_METRICS)[1], *each) for each in TRACED] == before


def test_nothing_is_named_without_tracing() -> None:
    assert current_exemplar() is None
    assert exemplar_of(None) is None
    with tracing.span("work") as span:
        assert (current_exemplar(), exemplar_of(span)) == (None, None)


def test_the_plain_format_has_the_same_values_and_no_exemplars(served: Served) -> None:
    kind, text = served.page("text/plain")
    assert kind.startswith("text/plain")
    assert "trace_id" not in text
    line = 'kleash_model_loaded{service="reward"} 1.0'
    assert line in text.splitlines()
    assert line in served.page(OPEN_METRICS)[1].splitlines()


@pytest.mark.parametrize("accept", ["text/plain", OPEN_METRICS])
def test_no_series_tells_when_it_was_made(served: Served, accept: str) -> None:
    """They would double the number of series."""
    _, text = served.page(accept)
    assert "# TYPE grpc_server_handled" in text
    assert "_created" not in text


def test_the_page_says_which_version_it_is(served: Served) -> None:
    _, text = served.page("text/plain")
    assert f'kleash_build_info{{version="{software_version()}"}} 1.0' in text.splitlines()


def test_a_process_without_cuda_shows_no_memory_of_it(served: Served) -> None:
    _, text = served.page("text/plain")
    assert [line for line in text.splitlines() if line.startswith("kleash_gpu_memory_bytes")] == []
