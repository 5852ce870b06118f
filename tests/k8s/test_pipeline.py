"""Runs of ``kleash k8s`` against a real API server: whole sequences, crashes of the caller in every
stage, failures, and what a run waits for."""

from __future__ import annotations

import pytest
from tests.k8s.pipeline_cluster import COMPONENT_OF, JOB_STAGES, Cluster, Crash

from kleash.cluster.pipeline import StageFailedError
from kleash.cluster.run_record import RunState, StageState

pytestmark = pytest.mark.k8s


def test_every_stage_waits_for_the_one_before(cluster: Cluster) -> None:
    seen: dict[str, set[str]] = {}

    def look_around() -> None:
        there = {name.removeprefix("alpha-") for name in cluster.job_uids()}
        deployments = cluster.controllers.items("/apis/apps/v1", "deployments")
        there |= {each["metadata"]["name"].removeprefix("alpha-") for each in deployments}
        seen.setdefault(cluster.record().stage, set()).update(there)

    cluster.controllers.on_step = look_around
    record = cluster.begin().run()
    services = {"policy", "reward", "reference"}
    assert seen == {
        "demo": {"demo"},
        "sft": {"demo", "sft"},
        "reward-model": {"demo", "sft", "reward-model"},
        "services": {"demo", "sft", "reward-model"} | services,
        "ppo": {"demo", "sft", "reward-model", "trainer"} | services,
    }
    assert record.state is RunState.COMPLETE
    assert cluster.controllers.created == list(JOB_STAGES)
    assert {each.state for each in record.stages.values()} == {StageState.COMPLETE}
    assert all(each.started and each.ended for each in record.stages.values())
    stages = [*JOB_STAGES[:3], "services", "ppo"]
    assert cluster.events() == [*["StageStarted", "StageCompleted"] * len(stages), "RunCompleted"]


@pytest.mark.parametrize("stage", ["demo", "sft", "reward-model", "services", "ppo"])
def test_a_caller_that_dies_in_a_stage_is_just_started_again(cluster: Cluster, stage: str) -> None:
    def die_in_stage() -> None:
        if cluster.record().stage == stage:
            raise Crash

    first = cluster.begin()
    cluster.controllers.on_step = die_in_stage
    with pytest.raises(Crash):
        first.run()
    before = cluster.job_uids()
    cluster.controllers.on_step = lambda: None
    assert cluster.caller().run().state is RunState.COMPLETE
    after = cluster.job_uids()
    assert before.items() <= after.items(), "a Job was made a second time"
    assert set(after) == {f"alpha-{COMPONENT_OF[each]}" for each in JOB_STAGES}


def test_a_stage_that_ended_while_nobody_looked_is_complete(cluster: Cluster) -> None:
    """The caller dies right after it applied the Job, before it writes that down."""
    first = cluster.begin()
    first.sleep = lambda _: (_ for _ in ()).throw(Crash())
    with pytest.raises(Crash):
        first.run()
    uid = cluster.job_uids()["alpha-demo"]
    cluster.wait_until(lambda: cluster.controllers.created == ["demo"])
    for _ in range(4):
        cluster.controllers.step()
    assert cluster.record().of("demo").state is StageState.RUNNING
    assert cluster.caller().run().state is RunState.COMPLETE
    assert cluster.job_uids()["alpha-demo"] == uid
    assert cluster.controllers.created == list(JOB_STAGES)


def test_a_complete_run_is_not_run_again(cluster: Cluster) -> None:
    cluster.begin().run()
    before = cluster.job_uids()
    events = len(cluster.events())
    assert cluster.caller().run().state is RunState.COMPLETE
    assert cluster.job_uids() == before
    assert len(cluster.events()) == events
    assert "run alpha is complete already" in cluster.notebook.notes


@pytest.mark.parametrize("stage", JOB_STAGES)
def test_a_stage_that_fails_stops_the_run_and_is_tried_again(cluster: Cluster, stage: str) -> None:
    cluster.controllers.script = {stage: ["fail"]}
    driver = cluster.begin()
    with pytest.raises(StageFailedError) as failure:
        driver.run()
    sentence = str(failure.value)
    assert (
        f"stage {stage} of run alpha failed: the data /runs/none.jsonl does not exist" in sentence
    )
    assert "ended with status 2 (Error, its input cannot be used)" in sentence
    assert "run 'kleash k8s run pipeline.toml' again" in sentence
    assert cluster.notebook.logs == ["loading\n" + cluster.controllers.lines["fail"][1] + "\n"]
    record = cluster.record()
    assert (record.state, record.stage) == (RunState.FAILED, stage)
    assert record.message.startswith("the data /runs/none.jsonl does not exist")
    assert cluster.events()[-1] == "StageFailed"

    failed = cluster.job_uids()
    assert cluster.caller().run().state is RunState.COMPLETE
    name = f"alpha-{COMPONENT_OF[stage]}"
    assert cluster.job_uids()[name] != failed.pop(name)
    assert failed.items() <= cluster.job_uids().items(), "a complete stage was run again"


def test_what_pods_wait_for_is_told(cluster: Cluster) -> None:
    cluster.controllers.script = {"sft": ["unschedulable"]}
    steps = iter(range(12))

    def end_soon() -> None:
        if next(steps, None) is None:
            raise Crash

    cluster.controllers.on_step = end_soon
    with pytest.raises(Crash):
        cluster.begin().run()
    (reason,) = cluster.notebook.views[-1].reasons
    assert "no node takes pod alpha-sft-" in reason.text
    assert "1 Insufficient cpu; ask for less" in reason.text


@pytest.mark.parametrize(("stage", "component"), [("sft", "sft"), ("services", "reward")])
def test_what_time_does_not_cure_ends_the_command_after_a_while(
    cluster: Cluster, stage: str, component: str
) -> None:
    cluster.controllers.script = {component: ["no image"]}
    cluster.begin()
    with pytest.raises(StageFailedError) as failure:
        cluster.caller(patience_s=0.3).run()
    assert f"stage {stage} of run alpha failed: image example.org/kleash:1 of pod" in str(
        failure.value
    )
    assert "cannot be had (ImagePullBackOff" in str(failure.value)
    # The objects stay: when the image is there, the same command goes on.
    before = cluster.job_uids()
    cluster.controllers.script = {}
    cluster.controllers.outcomes_are_now("complete")
    assert cluster.caller().run().state is RunState.COMPLETE
    assert before.items() <= cluster.job_uids().items()


def test_a_quota_that_is_full_is_named(cluster: Cluster) -> None:
    cluster.begin()
    event = {
        "metadata": {"name": "alpha-demo.1", "namespace": cluster.namespace},
        "involvedObject": {"kind": "Job", "name": "alpha-demo", "namespace": cluster.namespace},
        "reason": "FailedCreate",
        "type": "Warning",
        "message": 'pods "alpha-demo-x" is forbidden: exceeded quota: small, requested: cpu=2',
        "lastTimestamp": "2026-11-25T12:00:00Z",
    }
    path = f"/api/v1/namespaces/{cluster.namespace}/events"
    cluster.controllers.request("POST", path, event)
    driver = cluster.caller(sleep=lambda _: (_ for _ in ()).throw(Crash()))
    with pytest.raises(Crash):
        driver.run()
    (reason,) = cluster.notebook.views[-1].reasons
    assert reason.text.startswith('Job alpha-demo gets no pod: pods "alpha-demo-x" is forbidden')
    assert reason.text.endswith("or have the quota raised")
