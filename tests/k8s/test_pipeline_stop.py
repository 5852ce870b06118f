"""Runs of ``kleash k8s`` whose trainer somebody tells to stop, against a real API server."""

from __future__ import annotations

import pytest
from tests.k8s.pipeline_cluster import JOB_STAGES, Cluster

from kleash.base.errors import UserError
from kleash.cluster.run_record import RunState, StageState
from kleash.cluster.run_status import describe_run, list_runs
from kleash.cluster.steering import cancel, pause

pytestmark = pytest.mark.k8s


STOP_LINE = "ppo: stopped after step 12 of 100; --resume goes on"


def test_a_trainer_that_was_told_to_stop_is_not_complete(cluster: Cluster) -> None:
    """Its Job is: nothing starts it again. The same command goes on from the checkpoint."""
    cluster.controllers.lines["ppo"] = ["loading", STOP_LINE]
    record = cluster.begin().run()
    assert record.state is RunState.STOPPED
    assert record.of("ppo").state is StageState.STOPPED
    assert cluster.events()[-2:] == ["StageStarted", "RunStopped"]
    (row,) = list_runs(cluster.objects, [record])
    assert (row["state"], row["doing"]) == ("Stopped", "stopped at step 12 of 100")
    told = describe_run(cluster.objects, record)
    (ppo,) = [each for each in told["stages"] if each["stage"] == "ppo"]
    assert (ppo["state"], ppo["doing"]) == ("Stopped", "stopped at step 12 of 100")
    assert "--run_id=alpha goes on from its checkpoint" in told["hint"]
    with pytest.raises(UserError, match="run alpha is stopped"):
        pause(cluster.objects, "alpha")

    before = cluster.job_uids()
    cluster.controllers.lines["ppo"] = ["loading"]
    assert cluster.caller().run().state is RunState.COMPLETE
    after = cluster.job_uids()
    assert after.pop("alpha-trainer") != before.pop("alpha-trainer")
    assert after == before


def test_a_stop_while_no_caller_looks_is_seen_by_the_next(cluster: Cluster) -> None:
    cluster.controllers.lines["ppo"] = [STOP_LINE]
    cluster.begin_and_die(lambda: "ppo" in cluster.controllers.created)
    for _ in range(3):
        cluster.controllers.step()
    (row,) = list_runs(cluster.objects, [cluster.record()])
    assert (row["state"], row["doing"]) == ("Running", "stopped at step 12 of 100")
    assert cluster.caller().run().state is RunState.STOPPED
    assert cluster.controllers.created == list(JOB_STAGES)
    cancel(cluster.objects, "alpha", sleep=lambda _: cluster.controllers.step())
    # Taken up again, PPO goes on from its checkpoint.
    cluster.controllers.lines["ppo"] = []
    assert cluster.caller().run().state is RunState.COMPLETE
    assert cluster.controllers.created == [*JOB_STAGES, "ppo"]
