"""tracing.*: where the trainer and the services send spans, and the way there."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from tests.k8s.chart import NAMESPACE, of_kind, pods, render
from tests.k8s.netpol import Peer, is_allowed
from tests.k8s.test_config import config_of
from tests.k8s.test_network import peer
from tests.k8s.test_refusals import refusal

from kleash.ppo.config import PPOConfig
from kleash.up.config import ServeConfig

pytestmark = pytest.mark.k8s

PAGE = Path(__file__).parents[2] / "docs" / "tracing.md"
COLLECTOR = "http://otel-collector.observability:4318"
EGRESS = [
    {
        "to": [
            {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "observability"}}}
        ],
        "ports": [{"port": 4318}],
    }
]
ON = (f'tracing.endpoint="{COLLECTOR}"', f"tracing.egress={json.dumps(EGRESS)}")


def test_nothing_is_traced_unless_asked_for() -> None:
    for item in of_kind(render(), "ConfigMap"):
        assert "tracing" not in "".join(item.get("data", {}).values())


def test_every_process_sends_its_spans_to_the_collector() -> None:
    objects = render(settings=(*ON, "tracing.sampleEvery=5", "tracing.sampleRatio=0.25"))
    seen = set()
    for pod in pods(objects):
        if pod.is_server:
            its = ServeConfig.model_validate(config_of(objects, pod, "serve.json")).tracing
            assert (its.exporter, its.endpoint, its.sample_ratio) == ("otlp", COLLECTOR, 0.25)
            seen.add(pod.component)
        elif pod.component == "trainer":
            trainer = PPOConfig.model_validate(config_of(objects, pod, "ppo.json")).tracing
            assert (trainer.endpoint, trainer.sample_every) == (COLLECTOR, 5)
            seen.add("trainer")
    assert seen == {"policy", "reward", "reference", "trainer"}


def test_the_values_of_the_page_render(tmp_path: Path) -> None:
    (values,) = re.findall(r"^```yaml\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    (tmp_path / "values.yaml").write_text(values)
    objects = render(tmp_path / "values.yaml")
    (trainer,) = [pod for pod in pods(objects) if pod.component == "trainer" and not pod.is_test]
    assert config_of(objects, trainer, "ppo.json")["tracing"]["endpoint"] == COLLECTOR


def test_the_way_to_the_collector_is_open_to_those_that_trace() -> None:
    objects = render(settings=ON)
    labels = {"app": "otel-collector"}
    collector = Peer("collector", "observability", labels, {}, "10.244.0.60", {"otlp": 4318})
    closed = render()
    for pod in pods(objects):
        traces = pod.is_server or pod.component == "trainer"
        its = peer(pod)
        assert its.namespace == NAMESPACE
        assert is_allowed(objects, its, collector, 4318) == traces, pod.name
        assert not is_allowed(closed, its, collector, 4318), pod.name


def test_a_collector_behind_a_closed_policy_is_refused() -> None:
    said = refusal(ON[0])
    assert "the NetworkPolicies keep the way there closed; set tracing.egress" in said
    render(settings=(ON[0], "networkPolicy.enabled=false"))


@pytest.mark.parametrize(
    "setting",
    ['tracing.endpoint="collector:4318"', "tracing.sampleEvery=0", "tracing.sampleRatio=2"],
)
def test_values_that_no_process_takes_are_refused(setting: str) -> None:
    assert setting.partition("=")[0] in refusal(setting).replace("/", ".")
