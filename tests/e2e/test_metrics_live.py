"""The metrics of each kind of process in a real run: clean, within their sets of labels, used."""

from __future__ import annotations

import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import Metric as Family
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample
from tests.k8s.tools import need
from tests.observed_run import Models, ObservedRun, observed_run
from tests.reward_callers import LIMITS, RewardCallers

from kleash.base import client_metrics, metrics
from kleash.base.metric import Label, Metric
from kleash.base.metric_labels import OTHER
from kleash.policy.v1 import policy_pb2
from kleash.reference.v1 import reference_pb2
from kleash.reward.v1 import admin_pb2, reward_pb2
from kleash.trainer.v1 import trainer_pb2
from kleash.up.supervisor import free_port
from kleash.weights.v1 import weights_pb2

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

METRICS = {
    metric.name: metric
    for group in (*metrics.GROUPS, *client_metrics.GROUPS)
    for metric in group.metrics
}
UNUSED = {
    "kleash_token_reviews_total": "no API server of Kubernetes is asked",
    "kleash_gpu_memory_bytes": "the processes compute on the CPU",
    "kleash_client_retries_total": "no service is so busy that the trainer has to wait",
    "kleash_policy_quarantined": "no change of weights breaks off halfway",
    "kleash_weights_update_failures_total": "every publish succeeds",
    "kleash_train_nonfinite_total": "every gradient is finite",
    "kleash_train_policy_lag_steps": "training is synchronous, so that it is 0",
}
"""What a run without a fault does not set, or leaves at 0, and why."""
CONTRACTS = (policy_pb2, reference_pb2, reward_pb2, admin_pb2, trainer_pb2, weights_pb2)
METHODS = {
    method.name
    for contract in CONTRACTS
    for service in contract.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}
JUDGE = "def judge(record, response): return {'': float(len(response)), 'NAME': 1.0}\n"


@pytest.fixture(scope="module")
def pages(
    tiny_folder: Path, tiny_reward_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, str]]:
    """The page of each kind of process, by its name, after some steps with other callers."""
    models = Models(policy=tiny_folder, reward=tiny_reward_folder)
    folder = tmp_path_factory.mktemp("observed")
    (folder / "judge_of_pages.py").write_text(JUDGE)
    prompts = folder / "evaluation.jsonl"
    prompts.write_text('{"prompt": "the quick"}\n{"prompt": "brown fox"}\n')
    http_port = free_port()
    reward = {"limits": LIMITS, "server": {"http_port": http_port}}
    with observed_run(folder, need("prometheus"), models, num_policies=1, reward=reward) as run:
        run.train(
            environment={"PYTHONPATH": str(folder)},
            evaluation={
                "prompts": str(prompts),
                "num_prompts": 2,
                "every": 1,
                "judge": "judge_of_pages:judge",
            },
            checkpoint={"every": 1},
            algorithm={"clip_range": 0.001},  # so that some tokens are clipped
        )
        with RewardCallers(run.pod("reward").address) as callers:
            url = f"http://127.0.0.1:{http_port}/nowhere"
            with pytest.raises(urllib.request.HTTPError, match="404"):
                urllib.request.urlopen(url, timeout=30)
            run.wait_for_steps(3)
            run.prometheus.wait_until(
                lambda: {"CANCELLED", "RESOURCE_EXHAUSTED"} <= callers.seen.keys(),
                "caller that was refused and one that left",
            )
            run.prometheus.wait_until(lambda: is_counted(run), "count of a caller that left")
            yield {pod.component: page_of(run, pod.component) for pod in run.pods.values()}


def page_of(run: ObservedRun, component: str) -> str:
    """The metrics of a process, as text."""
    url = f"http://127.0.0.1:{run.pod(component).metrics_port}/metrics"
    with urllib.request.urlopen(url, timeout=30) as answer:
        return answer.read().decode()


def is_counted(run: ObservedRun) -> bool:
    return "kleash_cancelled_total{" in page_of(run, "reward")


def families(page: str) -> dict[str, Family]:
    """Ours, by the names that their definitions have."""
    found = {
        family.name + ("_total" if family.type == "counter" else ""): family
        for family in text_string_to_metric_families(page)
    }
    return {name: family for name, family in found.items() if name.startswith(("kleash_", "grpc_"))}


@pytest.mark.parametrize("component", ["policy", "reward", "reference", "trainer"])
def test_promtool_finds_nothing_to_say(component: str, pages: dict[str, str]) -> None:
    done = subprocess.run(
        [str(need("promtool")), "check", "metrics"],
        input=pages[component],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stdout + done.stderr, done.returncode) == ("", 0)


def test_all_that_is_exported_is_defined(pages: dict[str, str]) -> None:
    for component, page in pages.items():
        exported = families(page)
        assert exported.keys() <= METRICS.keys()
        for name, family in exported.items():
            metric = METRICS[name]
            assert (family.type, family.documentation) == (metric.kind, metric.help), component


def test_labels_stay_within_their_sets(pages: dict[str, str]) -> None:
    seen = 0
    for component, page in pages.items():
        for name, family in families(page).items():
            for sample in family.samples:
                check_labels(METRICS[name], sample)
                seen += 1
        assert seen > 100, component


def check_labels(metric: Metric, sample: Sample) -> None:
    """Those that are defined, and no value beside those that they may have."""
    labels = {name: value for name, value in sample.labels.items() if name != "le"}
    assert sorted(labels) == sorted(label.name for label in metric.labels), metric.name
    for label in metric.labels:
        assert is_within(label, labels[label.name]), (metric.name, label.name, sample.labels)


def is_within(label: Label, value: str) -> bool:
    """Whether a label may have that value."""
    if label.values:
        return value in label.values
    if label.name == "grpc_method":
        return value in METHODS | {OTHER}
    if label.name == "figure":
        return value in ("judge", "NAME")
    if label.name == "status":
        return len(value) == 3 and value.isdigit()
    return bool(value)


def test_every_metric_is_used(pages: dict[str, str]) -> None:
    used = {
        name
        for page in pages.values()
        for name, family in families(page).items()
        # One with labels appears when it is set, and a gauge of a moment may be 0 at that one.
        if any(sample.value or METRICS[name].labels for sample in family.samples)
    }
    assert METRICS.keys() - used == UNUSED.keys()


def test_the_run_is_named_and_its_state_is_one(pages: dict[str, str]) -> None:
    shown = families(pages["trainer"])
    (info,) = shown["kleash_train_info"].samples
    assert info.labels["run_id"]
    states = {its.labels["state"]: its.value for its in shown["kleash_train_state"].samples}
    assert states == {**dict.fromkeys(states, 0.0), "running": 1.0}


def test_the_trainer_counts_its_calls(pages: dict[str, str]) -> None:
    shown = families(pages["trainer"])["grpc_client_handled_total"].samples
    called = {its.labels["grpc_service"].split(".")[1] for its in shown}
    assert called >= {"policy", "reward", "reference", "weights"}


def test_publishing_is_seen_from_both_sides(pages: dict[str, str]) -> None:
    trainer, policy = families(pages["trainer"]), families(pages["policy"])
    (published,) = trainer["kleash_publish_version"].samples
    (served,) = policy["kleash_policy_weights_version"].samples
    # The pages are read one after the other, while the run goes on.
    assert served.value <= published.value + 1
    assert published.value >= 2
