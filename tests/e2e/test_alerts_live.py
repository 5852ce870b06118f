"""The chart's rules in a real Prometheus that reads a real run: silent, until something breaks.

A fault is made in a process by its own means, a reward function that hangs or gives NaN, a judge
that hangs, a signal, a learning rate; then its alert fires, and no other. The rules' clock is
faster by FACTOR, see tests/fast_rules.py. Faults of scoring are those of a second reward replica
that the trainer does not ask, so that the run goes on meanwhile.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.fast_rules import installed_rules
from tests.k8s.tools import find, need
from tests.observed_run import Models, ObservedRun, Pod, observed_run

from kleash.client import ItemError, RewardClient, ServiceError

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(600)]

FACTOR = 30
"""A rule that waits for five minutes waits for ten seconds here."""
LATEST_S = 120.0
"""Longest time from a fault to its alert on a busy machine; the rules take 10 to 25 s of it."""

FAULTY_FUNCTION = """
import math, time

def score(items):
    if any(item["text"] == "hang" for item in items):
        time.sleep(3600)
    return [math.nan if item["text"] == "nan" else 1.0 for item in items]
"""
FAULTY_JUDGE = """
import pathlib, time

def judge(record, response):
    while pathlib.Path(__file__).with_name("judge-hangs").exists():
        time.sleep(0.1)
    return float(len(response))
"""


@pytest.fixture(scope="module")
def rules() -> list[dict[str, Any]]:
    """Of a release, as it installs them."""
    if find("helm") is None:
        pytest.skip("helm is neither on PATH nor in build/tools: run `make k8s-tools`")
    return installed_rules(FACTOR)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the modules of the faults in it."""
    folder = tmp_path_factory.mktemp("alerts")
    (folder / "faulty.py").write_text(FAULTY_FUNCTION)
    (folder / "slow_judge.py").write_text(FAULTY_JUDGE)
    return folder


@pytest.fixture(scope="module")
def models(tiny_folder: Path, tiny_reward_folder: Path) -> Models:
    return Models(tiny_folder, tiny_reward_folder)


@pytest.fixture(scope="module")
def living(folder: Path, models: Models, rules: list[dict[str, Any]]) -> Iterator[ObservedRun]:
    """A run that goes on, with the rules loaded."""
    with observed_run(folder, need("prometheus"), models) as run:
        run.prometheus.add_rules("kleash", rules)
        prompts = folder / "prompts.jsonl"
        run.train(
            environment={"PYTHONPATH": str(folder)},
            policy={"learning_rate": 1e-4},
            evaluation={
                "prompts": str(prompts), "num_prompts": 4, "every": 2, "judge": "slow_judge:judge",
            },
        )  # fmt: skip
        run.wait_for_steps(2)
        run.prometheus.wait_for_targets()
        yield run


@pytest.fixture
def run(living: ObservedRun) -> ObservedRun:
    """The run when the alerts of the test before are over."""
    living.prometheus.wait_until(lambda: not firing(living), "end of all alerts", LATEST_S)
    return living


@pytest.fixture
def faulty(run: ObservedRun, folder: Path) -> Iterator[Pod]:
    """A second replica of the reward service, with a model that hangs or gives NaN when asked."""
    pod = run.serve(
        "reward",
        replica=1,
        model=None,
        device=None,
        num_threads=None,
        function="faulty:score",
        function_path=[str(folder)],
        function_timeout_s=3600,
    )
    run.wait_until_loaded()
    # On the quick clock a start is long enough for a target that is down.
    run.prometheus.wait_until(lambda: not firing(run), "end of all alerts", LATEST_S)
    yield pod
    pod.kill()
    run.prometheus.forget(pod.name)


def firing(run: ObservedRun) -> list[dict[str, str]]:
    """Labels of the alerts that fire now."""
    return [alert["labels"] for alert in run.prometheus.alerts() if alert["state"] == "firing"]


def names(alerts: list[dict[str, str]]) -> set[str]:
    return {alert["alertname"] for alert in alerts}


def wait_for_alert(run: ObservedRun) -> list[dict[str, str]]:
    """What fires first."""
    run.prometheus.wait_until(lambda: firing(run), "alert", LATEST_S)
    return firing(run)


def wait_for_evaluations(run: ObservedRun, count: int) -> set[str]:
    """Names of all alerts that fired at any of the next ``count`` evaluations of the rules."""
    fired: set[str] = set()
    evaluations: set[str] = set()

    def are_enough() -> bool:
        fired.update(names(firing(run)))
        # Every group is evaluated once within the same interval.
        evaluations.add(run.prometheus.get("rules")["groups"][0]["lastEvaluation"])
        return len(evaluations) > count

    run.prometheus.wait_until(are_enough, f"{count} evaluations", LATEST_S)
    return fired


def test_every_rule_is_evaluated_and_no_alert_fires_in_a_healthy_run(run: ObservedRun) -> None:
    run.wait_for_steps(25)  # some alerts have nothing to say before step 20
    assert wait_for_evaluations(run, 15) == set()
    rules = run.prometheus.rules()
    assert len(rules) == sum(len(group["rules"]) for group in installed_rules())
    assert {rule["name"]: rule["lastError"] for rule in rules if rule["health"] != "ok"} == {}


def test_recording_rules_have_values(run: ObservedRun) -> None:
    for rule in run.prometheus.rules():
        if rule["type"] == "recording" and "increase" not in rule["name"]:
            assert run.prometheus.query(rule["name"]), rule["name"]


def test_a_model_that_hangs_is_a_stuck_batcher(run: ObservedRun, faulty: Pod) -> None:
    with RewardClient(faulty.address, timeout_s=600) as client:
        call = threading.Thread(target=score_until_closed, args=(client, "hang"))
        call.start()
        fired = wait_for_alert(run)
        assert names(fired) == {"KleashBatcherStuck"}
        assert [(alert["instance"], alert["service"]) for alert in fired] == [
            (faulty.labels["instance"], "reward")
        ]
        assert wait_for_evaluations(run, 5) == {"KleashBatcherStuck"}
        faulty.kill()
        call.join()


def score_until_closed(client: RewardClient, text: str) -> None:
    with pytest.raises(ServiceError):
        client.score_texts([text])


def test_a_score_that_is_nan_fires_at_once(run: ObservedRun, faulty: Pod) -> None:
    with RewardClient(faulty.address) as client:
        with pytest.raises(ItemError, match="NON_FINITE"):
            client.score_texts(["fine", "nan"])
        fired = wait_for_alert(run)
        assert names(fired) == {"KleashScoreNonFinite"}
        assert [(alert["job"], alert["service"]) for alert in fired] == [
            (faulty.labels["job"], "reward")
        ]
        assert wait_for_evaluations(run, 3) == {"KleashScoreNonFinite"}


def test_a_trainer_that_hangs_in_a_step_has_stalled(run: ObservedRun, folder: Path) -> None:
    """Its metrics are still read; a function of the operator never returns."""
    (folder / "judge-hangs").touch()
    try:
        fired = wait_for_alert(run)
        assert names(fired) == {"KleashTrainerStalled"}
        assert [alert["instance"] for alert in fired] == [run.pod("trainer").labels["instance"]]
        assert wait_for_evaluations(run, 5) == {"KleashTrainerStalled"}
    finally:
        (folder / "judge-hangs").unlink()
    run.wait_for_steps(len(run.steps()) + 2)


def test_a_trainer_that_is_frozen_is_a_target_that_is_down(run: ObservedRun) -> None:
    """A stopped process answers nobody: Prometheus ends its series, and other alerts have none."""
    trainer = run.pod("trainer")
    trainer.freeze()
    try:
        fired = wait_for_alert(run)
        assert names(fired) == {"KleashTargetDown"}
        assert [alert["instance"] for alert in fired] == [trainer.labels["instance"]]
        assert wait_for_evaluations(run, 5) == {"KleashTargetDown"}
    finally:
        trainer.thaw()
    run.wait_for_steps(len(run.steps()) + 2)


def test_a_run_that_diverges_is_seen_before_it_ends(
    tmp_path: Path, models: Models, rules: list[dict[str, Any]]
) -> None:
    """A learning rate that no model survives: the trainer ends, and lets Prometheus read why."""
    with observed_run(tmp_path, need("prometheus"), models, num_policies=1) as run:
        run.prometheus.add_rules("kleash", rules)
        trainer = run.train(policy={"learning_rate": 1e30})
        fired: dict[str, dict[str, str]] = {}

        def is_seen() -> bool:
            fired.update({alert["alertname"]: alert for alert in firing(run)})
            return "KleashTrainingNonFinite" in fired

        run.prometheus.wait_until(is_seen, "alert", LATEST_S)
        fired.pop("KleashTargetDown", None)  # its start, on the quick clock
        assert set(fired) == {"KleashTrainingNonFinite"}
        assert fired["KleashTrainingNonFinite"]["instance"] == trainer.labels["instance"]
        assert trainer.process is not None
        assert trainer.process.wait(LATEST_S) != 0
        assert "is not finite" in trainer.log.read_text()
