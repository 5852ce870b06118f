"""Runs of ``kleash k8s`` against a real API server: pause, resume, cancel, two runs in a namespace,
other hands, and missing rights."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace

import pytest
from tests.k8s.api_server import ApiServer
from tests.k8s.controllers import Controllers
from tests.k8s.kubelet import Kubelet
from tests.k8s.pipeline_cluster import (
    EVERYTHING,
    JOB_STAGES,
    Account,
    Cluster,
    Crash,
    Notebook,
    names_of_everything,
    small_chart,
)

from kleash.base.config import parse_tree
from kleash.base.errors import UserError
from kleash.cluster.connection import ForbiddenError, MissingError, connect
from kleash.cluster.objects import CONFIG_MAP, JOB, Objects, check_namespace
from kleash.cluster.open_run import find_or_name
from kleash.cluster.pipeline import RunCancelledError, StageFailedError, try_objects
from kleash.cluster.pipeline_config import PipelineConfig
from kleash.cluster.run_record import (
    RunRecord,
    RunState,
    StageState,
    change_record,
    create_record,
    utc_now,
)
from kleash.cluster.run_status import hint
from kleash.cluster.stages import Stage, split
from kleash.cluster.steering import cancel, pause, resume

pytestmark = pytest.mark.k8s


def test_pause_ends_the_pods_and_resume_starts_them_again(cluster: Cluster) -> None:
    cluster.controllers.script = {"ppo": ["hang"]}
    done: list[str] = []

    def steer() -> None:
        record = cluster.record()
        view = cluster.notebook.views[-1] if cluster.notebook.views else None
        if not done and record.stage == "ppo" and view and view.pods_ready == 1:
            done.append(pause(cluster.objects, "alpha"))
            done.append(pause(cluster.objects, "alpha"))
        elif len(done) == 2 and view and view.state is StageState.PAUSED:
            pods = cluster.controllers.items("/api/v1", "pods")
            if not [pod for pod in pods if "trainer" in pod["metadata"]["name"]]:
                done.append(resume(cluster.objects, "alpha"))
                done.append(resume(cluster.objects, "alpha"))
                cluster.controllers.outcomes_are_now("complete")

    cluster.controllers.on_step = steer
    assert cluster.begin().run().state is RunState.COMPLETE
    assert done == [
        "run alpha is paused; kleash k8s resume alpha goes on; the trainer goes on from its "
        "checkpoint",
        "run alpha is paused already; kleash k8s resume alpha goes on",
        "run alpha goes on",
        "run alpha is not paused",
    ]
    assert cluster.events()[-4:] == ["Paused", "Resumed", "StageCompleted", "RunCompleted"]


def test_a_paused_run_starts_no_further_stage(cluster: Cluster) -> None:
    """Paused while no Job runs: the next one waits, also with another caller."""
    cluster.begin()
    assert pause(cluster.objects, "alpha") == (
        "run alpha is paused; kleash k8s resume alpha goes on"
    )
    steps = iter(range(3))

    def go_on_later(_: float) -> None:
        assert cluster.job_uids() == {}
        if next(steps, None) is None:
            raise Crash

    driver = cluster.caller(sleep=go_on_later)
    with pytest.raises(Crash):
        driver.run()
    assert cluster.record().state is RunState.PAUSED
    resume(cluster.objects, "alpha")
    assert cluster.caller().run().state is RunState.COMPLETE


def test_pausing_sft_says_that_it_begins_anew(cluster: Cluster) -> None:
    cluster.controllers.script = {"sft": ["hang"]}
    driver = cluster.begin()

    def stop_in_sft() -> None:
        if cluster.record().of("sft").state is StageState.RUNNING:
            raise Crash

    cluster.controllers.on_step = stop_in_sft
    with pytest.raises(Crash):
        driver.run()
    assert pause(cluster.objects, "alpha").endswith("sft has no checkpoints and begins anew then")


def test_what_has_ended_cannot_be_paused_nor_resumed(cluster: Cluster) -> None:
    cluster.begin().run()
    with pytest.raises(UserError, match="run alpha is complete: there is nothing to pause"):
        pause(cluster.objects, "alpha")
    with pytest.raises(UserError, match="run alpha is complete, not paused"):
        resume(cluster.objects, "alpha")


def test_cancel_keeps_data_and_record_unless_told_otherwise(cluster: Cluster) -> None:
    cluster.begin().run()
    lease = {
        "kind": "Lease",
        "apiVersion": "coordination.k8s.io/v1",
        "metadata": {"name": "alpha-trainer"},
    }
    cluster.objects.create(lease)
    step = cluster.controllers.step
    done = cancel(cluster.objects, "alpha", sleep=lambda _: step())
    assert names_of_everything(cluster) == {
        "configmaps/kleash-run-alpha",
        "persistentvolumeclaims/alpha-runs",
    }
    assert "kept: claim alpha-runs with /runs/alpha, and the record" in done
    assert cluster.record().state is RunState.CANCELLED
    assert cluster.events()[-1] == "Cancelled"

    assert cancel(cluster.objects, "alpha").startswith("run alpha is cancelled (0 objects deleted)")
    done = cancel(cluster.objects, "alpha", delete_data=True, sleep=lambda _: step())
    assert done.endswith("with its record and its data (claim alpha-runs)")
    cluster.controllers.step()
    assert names_of_everything(cluster) == set()
    with pytest.raises(UserError, match=r"there is no run alpha .*\(runs: none\)"):
        cancel(cluster.objects, "alpha")


def test_a_cancelled_run_is_taken_up_where_its_data_is(cluster: Cluster) -> None:
    cluster.controllers.script = {"ppo": ["hang"]}
    driver = cluster.begin()

    def cancel_in_ppo() -> None:
        if cluster.record().of("ppo").state is StageState.RUNNING:
            cluster.controllers.on_step = lambda: None
            cancel(cluster.objects, "alpha", sleep=lambda _: cluster.controllers.step())

    cluster.controllers.on_step = cancel_in_ppo
    with pytest.raises(RunCancelledError, match="run alpha was cancelled"):
        driver.run()
    assert cluster.job_uids() == {}
    assert cluster.caller().run().state is RunState.COMPLETE
    # SFT and the reward model are on the claim; only PPO, which has checkpoints, ran again.
    assert cluster.controllers.created == [*JOB_STAGES, "ppo"]


def test_two_runs_in_one_namespace_do_not_touch_each_other(cluster: Cluster) -> None:
    beta = Notebook()
    create_record(cluster.objects, RunRecord("beta", "beta"))
    second = cluster.caller("beta", display=beta)
    cluster.controllers.script = {"sft": ["complete", "fail"]}
    assert cluster.begin().run().state is RunState.COMPLETE
    with pytest.raises(StageFailedError, match="stage sft of run beta failed"):
        second.run()
    alpha = {name for name in names_of_everything(cluster) if "alpha" in name}
    cancel(cluster.objects, "beta", delete_data=True, sleep=lambda _: cluster.controllers.step())
    assert {name for name in names_of_everything(cluster) if "alpha" in name} == alpha
    assert cluster.record("alpha").state is RunState.COMPLETE


def test_who_scaled_a_service_by_hand_keeps_the_number(cluster: Cluster) -> None:
    driver = cluster.begin()

    def scale_up() -> None:
        if cluster.record().of("services").state is StageState.COMPLETE:
            path = f"/apis/apps/v1/namespaces/{cluster.namespace}/deployments/alpha-policy/scale"
            scale = cluster.controllers.request("GET", path)
            cluster.controllers.request("PUT", path, {**scale, "spec": {"replicas": 3}})
            raise Crash

    cluster.controllers.on_step = scale_up
    with pytest.raises(Crash):
        driver.run()
    cluster.controllers.on_step = lambda: None
    assert cluster.caller().run().state is RunState.COMPLETE
    deployments = cluster.controllers.items("/apis/apps/v1", "deployments")
    replicas = {each["metadata"]["name"]: each["spec"]["replicas"] for each in deployments}
    assert replicas == {"alpha-policy": 3, "alpha-reward": 1, "alpha-reference": 1}


def test_other_settings_for_a_complete_stage_are_told(cluster: Cluster) -> None:
    cluster.controllers.script = {"reward-model": ["fail"]}
    with pytest.raises(StageFailedError):
        cluster.begin().run()
    changed = cluster.manifests("alpha")
    changed[Stage.SFT][0]["data"]["sft.json"] = '{"epochs": 2}'
    cluster.caller(manifests=changed).run()
    assert any(
        note.startswith("stage sft is complete with other settings")
        for note in cluster.notebook.notes
    )
    assert not any("stage demo is complete with other" in note for note in cluster.notebook.notes)


def test_a_job_that_somebody_deletes_is_missed(cluster: Cluster) -> None:
    driver = cluster.begin()
    cluster.controllers.script = {"sft": ["hang"]}

    def delete_sft() -> None:
        if "alpha-sft" in cluster.job_uids():
            cluster.objects.delete(JOB, "alpha-sft")

    cluster.controllers.on_step = delete_sft
    with pytest.raises(StageFailedError, match="its Job has been deleted by somebody"):
        driver.run()


def test_a_missing_right_is_found_before_anything_is_made(
    account: Account, monkeypatch: pytest.MonkeyPatch
) -> None:
    kubeconfig = account.may(
        ("", "configmaps", EVERYTHING),
        ("", "persistentvolumeclaims", EVERYTHING),
        ("", "pods", ["list"]),
        ("", "services", EVERYTHING),
        ("batch", "jobs", EVERYTHING),
        ("apps", "deployments", ["get", "list"]),
    )
    monkeypatch.setenv("KUBECONFIG", str(kubeconfig))
    with connect(namespace=account.namespace) as connection:
        objects = Objects(connection)
        check_namespace(objects)  # may not see namespaces, and need not
        with pytest.raises(ForbiddenError) as refusal:
            try_objects(objects, "alpha", split(small_chart("alpha"), run_id="alpha"))
        assert "Deployment alpha-" in str(refusal.value)
        assert 'cannot patch resource "deployments"' in str(refusal.value)
        assert "ask the cluster's administrator for a Role" in str(refusal.value)
        assert objects.find(JOB) == []
        assert objects.find(CONFIG_MAP) == []


def test_a_run_does_not_need_the_right_to_write_events(
    account: Account, kubelet: Kubelet, monkeypatch: pytest.MonkeyPatch
) -> None:
    kubeconfig = account.may(
        ("", "configmaps", EVERYTHING),
        ("", "persistentvolumeclaims", EVERYTHING),
        ("", "services", EVERYTHING),
        ("", "pods", ["get", "list"]),
        ("batch", "jobs", EVERYTHING),
        ("apps", "deployments", EVERYTHING),
    )
    monkeypatch.setenv("KUBECONFIG", str(kubeconfig))
    with (
        connect(namespace=account.namespace) as connection,
        closing(Controllers(account.api, account.namespace, kubelet)) as controllers,
    ):
        cluster = Cluster(Objects(connection), controllers)
        assert cluster.begin().run().state is RunState.COMPLETE
        assert cluster.events() == []


def test_a_namespace_that_does_not_exist_is_named(
    api_server: ApiServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KUBECONFIG", str(api_server.kubeconfig))
    with (
        connect(namespace="nowhere") as connection,
        pytest.raises(MissingError, match="namespace nowhere does not exist; create it"),
    ):
        check_namespace(Objects(connection))


def test_which_run_a_pipeline_means(cluster: Cluster) -> None:
    def meant(is_new: bool = False, **changes: str) -> str:
        config = parse_tree(PipelineConfig, {"name": "small", "demo": True, **changes})
        return find_or_name(cluster.objects, config, is_new=is_new)

    def make(run_id: str, pipeline: str, state: RunState) -> None:
        create_record(cluster.objects, RunRecord(run_id, pipeline, state=state))

    assert meant().startswith("small-")
    assert meant() != meant(), "nothing was made yet"
    make("other-1", "other", RunState.RUNNING)
    make("small-1", "small", RunState.COMPLETE)
    make("small-2", "small", RunState.CANCELLED)
    assert meant() not in ("other-1", "small-1", "small-2")
    make("small-3", "small", RunState.FAILED)
    assert meant() == "small-3"
    assert meant(is_new=True) != "small-3"
    make("small-4", "small", RunState.PAUSED)
    with pytest.raises(UserError, match=r"has 2 runs that have not ended \(small-3, small-4\)"):
        meant()
    assert meant(run_id="small-4") == "small-4"
    assert meant(run_id="mine") == "mine"
    with pytest.raises(UserError, match="run small-4 exists already; leave out --new"):
        meant(is_new=True, run_id="small-4")
    with pytest.raises(UserError, match="run other-1 is one of pipeline other"):
        meant(run_id="other-1")


def test_two_callers_change_the_record_without_losing_a_word(cluster: Cluster) -> None:
    cluster.begin()
    changes = iter(("second",))

    def change(record: RunRecord) -> RunRecord:
        if other := next(changes, None):  # somebody else is faster, once
            change_record(cluster.objects, "alpha", lambda its: replace(its, message=other))
        return replace(record, stage="sft")

    change_record(cluster.objects, "alpha", change)
    record = cluster.record()
    assert (record.stage, record.message) == ("sft", "second")


def test_status_tells_what_can_be_done(cluster: Cluster) -> None:
    record = RunRecord("alpha", "alpha", stage="sft", caller="host-1", caller_seen=utc_now())
    assert hint(record) == "kleash k8s logs alpha --follow shows what the stage prints"
    gone = replace(record, caller_seen="2026-01-01T00:00:00Z")
    assert hint(gone).startswith("no caller takes the run on to its next stage (last seen:")
    assert "resume alpha" in hint(replace(record, state=RunState.PAUSED))
    assert "--run_id=alpha tries the stage again" in hint(replace(record, state=RunState.FAILED))


def test_cancel_sees_what_ended_while_nobody_looked(cluster: Cluster) -> None:
    """SFT wrote its model and the caller was gone: taken up again, SFT must not run again."""
    cluster.begin_and_die(lambda: "sft" in cluster.controllers.created)
    for _ in range(3):
        cluster.controllers.step()
    assert cluster.record().of("sft").state is StageState.RUNNING
    cancel(cluster.objects, "alpha", sleep=lambda _: cluster.controllers.step())
    assert cluster.record().of("sft").state is StageState.COMPLETE
    assert cluster.caller().run().state is RunState.COMPLETE
    assert cluster.controllers.created == list(JOB_STAGES)


def test_services_go_with_the_run_where_that_is_wanted(cluster: Cluster) -> None:
    cluster.begin()
    cluster.caller(keep_services=False).run()
    assert cluster.controllers.items("/apis/apps/v1", "deployments") == []
    assert set(cluster.job_uids()) == {
        "alpha-demo",
        "alpha-sft",
        "alpha-reward-model",
        "alpha-trainer",
    }
