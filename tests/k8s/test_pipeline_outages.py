"""Runs of ``kleash k8s`` against a real API server: lost requests, and hands that come a moment
too late."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from kubernetes.client import ApiException
from tests.k8s.pipeline_cluster import JOB_STAGES, Cluster
from urllib3.exceptions import ProtocolError

from kleash.cluster import pipeline
from kleash.cluster.connection import UnreachableError
from kleash.cluster.objects import JOB, Kind, Objects, name_of
from kleash.cluster.pipeline import StageFailedError
from kleash.cluster.run_record import RunState, change_record
from kleash.cluster.steering import pause, resume
from kleash.cluster.suspension import obey_record

pytestmark = pytest.mark.k8s


class Outages:
    """Loses every third request: on its way there, on its way back, or to a busy server."""

    def __init__(self, request: Any) -> None:
        self.request = request
        self.count = 0
        self.ways: Counter[str] = Counter()

    def __call__(self, method: str, path: str, **options: Any) -> Any:
        self.count += 1
        way = ("there", "back", "429", "500", "503")[self.count // 3 % 5]
        if self.count % 3:
            return self.request(method, path, **options)
        self.ways[way] += 1
        if way == "back":
            self.request(method, path, **options)
        if way in ("there", "back"):
            raise ProtocolError("Connection aborted.")
        raise ApiException(status=int(way), reason="Busy")


def test_lost_requests_change_nothing(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every kind, between stages too: each is made again, and made twice it does no harm."""
    outages = Outages(cluster.objects.connection.dynamic.request)
    cluster.controllers.script = {"sft": ["fail"]}
    first = cluster.begin()
    monkeypatch.setattr(cluster.objects.connection.dynamic, "request", outages)
    with pytest.raises(StageFailedError, match="stage sft of run alpha failed: the data"):
        first.run()
    assert cluster.caller().run().state is RunState.COMPLETE
    stages = [*JOB_STAGES[:2], *JOB_STAGES[1:3], "services", "ppo"]
    assert cluster.controllers.created == [each for each in stages if each != "services"]
    assert cluster.events() == [
        *("StageStarted", "StageCompleted", "StageStarted", "StageFailed"),
        *["StageStarted", "StageCompleted"] * 4,
        "RunCompleted",
    ]
    assert set(outages.ways) == {"there", "back", "429", "500", "503"}


def test_an_outage_that_lasts_ends_with_what_was_asked(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "OUTAGE_S", 0.2)
    driver = cluster.begin()

    def lose(*_arguments: Any, **_options: Any) -> Any:
        raise ProtocolError("Connection aborted.")

    monkeypatch.setattr(cluster.objects.connection.dynamic, "request", lose)
    with pytest.raises(UnreachableError) as outage:
        driver.run()
    assert str(outage.value).startswith("ConfigMap kleash-run-alpha: the cluster at https://")
    assert str(outage.value).endswith("kubectl cluster-info. It was tried for 0.2 s.")
    (note,) = cluster.notebook.notes
    assert note.endswith("The run goes on; looking again.")


def a_running_job(cluster: Cluster) -> None:
    """The run is in SFT, whose pod goes on for ever, and its caller has died."""
    cluster.controllers.script = {"sft": ["hang"]}
    cluster.begin_and_die(lambda: "sft" in cluster.controllers.created)


def is_suspended(cluster: Cluster) -> bool:
    job = cluster.objects.get(JOB, "alpha-sft")
    assert job is not None
    return bool(job["spec"].get("suspend"))


@pytest.mark.parametrize("first", ["pause", "resume"])
def test_who_steers_by_an_old_record_corrects_it(
    cluster: Cluster, first: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between its reading of the record and its change of the Job somebody says the contrary."""
    a_running_job(cluster)
    steer = {"pause": pause, "resume": resume}
    second = "resume" if first == "pause" else "pause"
    if first == "resume":
        pause(cluster.objects, "alpha")
    merge, others = Objects.merge, [second]

    def merge_late(self: Objects, kind: Kind, name: str, changes: Any) -> Any:
        if kind == JOB and others:
            steer[others.pop()](cluster.objects, "alpha")
        return merge(self, kind, name, changes)

    monkeypatch.setattr(Objects, "merge", merge_late)
    steer[first](cluster.objects, "alpha")
    assert others == []
    wanted = RunState.PAUSED if second == "pause" else RunState.RUNNING
    assert cluster.record().state is wanted
    assert is_suspended(cluster) is (second == "pause")


def test_a_driver_that_suspends_too_late_lets_the_job_go_on(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It saw the pause, and before it acts the run is resumed: nobody would wake the Job."""
    a_running_job(cluster)
    # Paused in the moment before the Job was applied: it is not suspended.
    change_record(cluster.objects, "alpha", lambda its: replace(its, state=RunState.PAUSED))
    merge, late = Objects.merge, [True]

    def merge_late(self: Objects, kind: Kind, name: str, changes: Any) -> Any:
        if kind == JOB and late:
            late.clear()
            resume(cluster.objects, "alpha")
        return merge(self, kind, name, changes)

    monkeypatch.setattr(Objects, "merge", merge_late)
    assert [name_of(job) for job in obey_record(cluster.objects, "alpha")] == ["alpha-sft"]
    assert late == []
    assert not is_suspended(cluster)
    cluster.controllers.outcomes_are_now("complete")
    assert cluster.caller().run().state is RunState.COMPLETE
