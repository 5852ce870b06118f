"""``kleash k8s run`` and its siblings as they are typed, with the real chart, a real API server and
the example pipeline."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.k8s.api_server import ApiServer, free_ports
from tests.k8s.chart import Object
from tests.k8s.pipeline_cluster import Cluster
from tests.k8s.tools import ROOT, need

from kleash.cli.main import main
from kleash.cluster import pipeline
from kleash.cluster.objects import POD
from kleash.cluster.run_record import find_runs

pytestmark = pytest.mark.k8s

EXAMPLE = ROOT / "examples" / "pipeline.toml"
PPO_LINE = "PPO: 12/20  score 0.512  kl 3.1  reward 0.35  95 s, 63 s left"


@pytest.fixture
def typed(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A namespace in which pods are restricted, whose controllers work by themselves."""
    monkeypatch.setenv("KLEASH_HELM", str(need("helm")))
    monkeypatch.setattr(pipeline, "POLL_S", 0.1)
    path = f"/api/v1/namespaces/{cluster.namespace}"
    namespace = cluster.controllers.request("GET", path)
    namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] = "restricted"
    cluster.controllers.request("PUT", path, namespace)
    with cluster.controllers:
        yield cluster


def kleash(cluster: Cluster, *arguments: str) -> int:
    return main(["k8s", *arguments, f"--namespace={cluster.namespace}"])


def everything(api_server: ApiServer, namespace: str) -> list[Object]:
    """Every object of the namespace that a run may have made, pods included."""
    groups = {
        "/api/v1": (
            "configmaps",
            "persistentvolumeclaims",
            "pods",
            "secrets",
            "serviceaccounts",
            "services",
        ),
        "/apis/apps/v1": ("deployments",),
        "/apis/batch/v1": ("jobs",),
        "/apis/networking.k8s.io/v1": ("networkpolicies",),
        "/apis/policy/v1": ("poddisruptionbudgets",),
        "/apis/rbac.authorization.k8s.io/v1": ("roles", "rolebindings"),
    }
    return [
        {"kind": plural, **item}
        for group, plurals in groups.items()
        for plural in plurals
        for item in api_server.request("GET", f"{group}/namespaces/{namespace}/{plural}")["items"]
    ]


def test_the_example_runs_to_its_end_and_everything_bears_its_id(
    typed: Cluster, api_server: ApiServer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert kleash(typed, "run", str(EXAMPLE), "--run_id=trial") == 0
    printed = capsys.readouterr()
    assert printed.out == "run trial: complete, /runs/trial on claim trial-kleash-runs\n"
    assert "kubectl get all -n" in printed.err
    assert "-l kleash.dev/run=trial" in printed.err
    for stage in ("demo", "sft", "reward-model", "services", "ppo"):
        assert f"stage {stage} has started" in printed.err
        assert f"stage {stage} is complete" in printed.err

    found = everything(api_server, typed.namespace)
    kinds = {item["kind"] for item in found}
    assert {"jobs", "deployments", "pods", "services", "networkpolicies", "roles"} <= kinds
    strangers = [
        f"{item['kind']}/{item['metadata']['name']}"
        for item in found
        if item["metadata"].get("labels", {}).get("kleash.dev/run") != "trial"
        and item["metadata"]["name"] not in ("kube-root-ca.crt", "default")
    ]
    assert strangers == []
    files = {
        name: json.loads(text)
        for item in found
        if item["kind"] == "configmaps"
        for name, text in item["data"].items()
        if name in ("sft.json", "reward-model.json", "ppo.json")
    }
    assert {name: tree["run_id"] for name, tree in files.items()} == dict.fromkeys(files, "trial")
    outs = [files[name]["out"] for name in ("sft.json", "reward-model.json", "ppo.json")]
    assert outs == ["/runs/trial/sft", "/runs/trial/reward-model", "/runs/trial/ppo"]
    # Every stage starts from what the one before it has made.
    assert files["sft.json"]["model"] == "/runs/demo/base"
    assert files["reward-model.json"]["model"] == "/runs/trial/sft"
    assert files["ppo.json"]["model"] == "/runs/trial/sft"
    assert files["ppo.json"]["reward_model"] == "/runs/trial/reward-model"


def test_cancel_leaves_the_claim_and_the_record(
    typed: Cluster, api_server: ApiServer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert kleash(typed, "run", str(EXAMPLE), "--run_id=trial") == 0
    assert kleash(typed, "cancel", "trial") == 0
    left = {
        f"{item['kind']}/{item['metadata']['name']}"
        for item in everything(api_server, typed.namespace)
    } - {"configmaps/kube-root-ca.crt", "serviceaccounts/default"}
    assert left == {
        "configmaps/kleash-run-trial",
        "persistentvolumeclaims/trial-kleash-runs",
    }
    assert "kept: claim trial-kleash-runs" in capsys.readouterr().out
    assert kleash(typed, "status") == 0
    assert "trial  small-world  Cancelled" in capsys.readouterr().out


def test_progress_comes_from_the_pods_logs(
    typed: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    typed.controllers.script = {"ppo": ["hang"]}
    typed.controllers.lines["ppo"] = ["12:00:00 INFO kleash.ppo: loading", PPO_LINE]
    runner = threading.Thread(target=kleash, args=(typed, "run", str(EXAMPLE), "--run_id=trial"))
    runner.start()
    error = ""
    shown = "pods 1/1  PPO 12/20  score 0.512  kl 3.1  reward 0.35  63 s left"
    while shown not in error and runner.is_alive():
        time.sleep(0.05)
        error += capsys.readouterr().err
    try:
        assert kleash(typed, "status", "trial") == 0
        text = capsys.readouterr().out
        assert f"run trial of pipeline small-world in namespace {typed.namespace}: running" in text
        assert shown in text
        assert "Deployment             trial-kleash-policy" in text
        assert kleash(typed, "status", "trial", "--output=json") == 0
        status = json.loads(capsys.readouterr().out)
        assert status["stage"] == "ppo"
        states = {each["stage"]: each["state"] for each in status["stages"]}
        assert states == {
            "demo": "Complete",
            "sft": "Complete",
            "reward-model": "Complete",
            "services": "Complete",
            "ppo": "Running",
        }
        assert kleash(typed, "logs") == 0
        assert capsys.readouterr().out.splitlines() == typed.controllers.lines["ppo"]
        assert kleash(typed, "logs", "trial", "--tail", "1") == 0
        assert capsys.readouterr().out.splitlines() == [PPO_LINE]
    finally:
        typed.controllers.outcomes_are_now("complete")
        runner.join()


def test_logs_follow_a_stage_to_its_end(typed: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    typed.controllers.script = {"ppo": ["hang"]}
    typed.controllers.lines["ppo"] = ["one"]
    runner = threading.Thread(target=kleash, args=(typed, "run", str(EXAMPLE), "--run_id=trial"))
    runner.start()
    while runner.is_alive() and "ppo" not in typed.controllers.created:
        time.sleep(0.05)
    follower = threading.Thread(target=kleash, args=(typed, "logs", "trial", "ppo", "--follow"))
    follower.start()
    out = ""
    while "one\n" not in out and follower.is_alive():
        time.sleep(0.05)
        out += capsys.readouterr().out
    (pod,) = [
        item["metadata"]["name"]
        for item in typed.objects.find(POD)
        if item["metadata"]["labels"]["kleash.dev/stage"] == "ppo"
    ]
    assert typed.controllers.kubelet is not None
    container = "trainer"
    typed.controllers.kubelet.log(typed.namespace, pod, container, "two", "three")
    while "three\n" not in out and follower.is_alive():
        time.sleep(0.05)
        out += capsys.readouterr().out
    typed.controllers.outcomes_are_now("complete")
    runner.join()
    follower.join()
    assert out == "one\ntwo\nthree\n"


def start(cluster: Cluster, *arguments: str) -> subprocess.Popen[str]:
    """The command as a process of its own."""
    command = [sys.executable, "-m", "kleash.cli", "k8s", *arguments]
    return subprocess.Popen(
        [*command, f"--namespace={cluster.namespace}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"KLEASH_HELM": str(need("helm"))},
    )


def wait_for_stage(cluster: Cluster, process: subprocess.Popen[str], stage: str) -> str:
    """Until the run is in a stage; returns its id."""
    while process.poll() is None:
        time.sleep(0.05)
        for record in find_runs(cluster.objects):
            if record.stage == stage:
                return record.run_id
    raise AssertionError(process.communicate()[1])


def test_a_killed_command_is_just_typed_again(
    typed: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    typed.controllers.script = {"sft": ["hang"]}
    with start(typed, "run", str(EXAMPLE)) as process:
        run_id = wait_for_stage(typed, process, "sft")
        process.kill()
    assert run_id.startswith("small-world-")
    before = typed.job_uids()
    typed.controllers.outcomes_are_now("complete")
    assert kleash(typed, "run", str(EXAMPLE)) == 0
    assert capsys.readouterr().out.startswith(f"run {run_id}: complete")
    assert before.items() <= typed.job_uids().items()
    # That run is over: typed once more, the command begins another.
    assert kleash(typed, "run", str(EXAMPLE)) == 0
    assert len(find_runs(typed.objects)) == 2


def test_ctrl_c_leaves_the_run_and_says_how_to_look_at_it(typed: Cluster) -> None:
    typed.controllers.script = {"sft": ["hang"]}
    with start(typed, "run", str(EXAMPLE)) as process:
        run_id = wait_for_stage(typed, process, "sft")
        process.send_signal(signal.SIGINT)
        _, error = process.communicate()
    assert process.returncode == 130
    assert "interrupted: the stage goes on in the cluster" in error
    assert f"kleash k8s status {run_id} shows it" in error
    assert f"'kleash k8s run {EXAMPLE} --run_id={run_id}' takes the run on" in error
    assert f"{run_id}-kleash-sft" in typed.job_uids()


def test_a_failure_is_one_sentence_and_its_log(
    typed: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    typed.controllers.script = {"sft": ["fail"]}
    assert kleash(typed, "run", str(EXAMPLE), "--run_id=trial") == 1
    error = capsys.readouterr().err
    assert "  | error: the data /runs/none.jsonl does not exist; correct it.\n" in error
    (last,) = [line for line in error.splitlines() if line.startswith("error: ")]
    assert "stage sft of run trial failed: the data /runs/none.jsonl does not exist" in last
    assert last.endswith(
        f"run 'kleash k8s run {EXAMPLE} --run_id=trial' again, which keeps what is complete."
    )
    assert kleash(typed, "status", "trial") == 0
    assert "small-world in namespace" in (text := capsys.readouterr().out)
    assert "failed\n  the data /runs/none.jsonl does not exist" in text
    assert kleash(typed, "run", str(EXAMPLE), "--run_id=trial") == 0


def test_pause_and_resume_as_typed(typed: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    typed.controllers.script = {"ppo": ["hang"]}
    runner = threading.Thread(target=kleash, args=(typed, "run", str(EXAMPLE), "--run_id=trial"))
    runner.start()
    while runner.is_alive() and "ppo" not in typed.controllers.created:
        time.sleep(0.05)
    assert kleash(typed, "pause", "trial") == 0
    assert "run trial is paused; kleash k8s resume trial goes on" in capsys.readouterr().out
    error = ""
    while "ppo: paused  pods 0/1  kleash k8s resume goes on" not in error and runner.is_alive():
        time.sleep(0.05)
        error += capsys.readouterr().err
    typed.controllers.outcomes_are_now("complete")
    assert kleash(typed, "resume") == 0
    runner.join()
    assert "run trial goes on\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "status", "sentence"),
    [
        (["status", "nothing"], 2, "there is no run nothing in namespace {namespace} (runs: none)"),
        (["logs", "nothing"], 2, "there is no run nothing in namespace"),
        (["logs"], 2, "name the run, one of namespace {namespace} (none)"),
        (["pause", "nothing"], 2, "there is no run nothing in namespace"),
        (["resume", "nothing"], 2, "there is no run nothing in namespace"),
        (["cancel", "nothing"], 2, "there is no run nothing in namespace"),
        (["cancel"], 2, "name the run to cancel"),
        (["status", "one", "two"], 2, "'two' is one name too many"),
        (["run", "nowhere.toml"], 2, "cannot read the configuration file nowhere.toml"),
        (
            ["run", str(EXAMPLE), "--ppo.config.total_stepz=3"],
            2,
            "ppo.config: unknown key 'total_stepz'; did you mean 'total_steps'?",
        ),
        (
            ["run", str(EXAMPLE), '--policy.resources={"limit": {"cpu": 1}}'],
            2,
            "the chart cannot be rendered",
        ),
        (["run", str(EXAMPLE), "--values=none.yaml"], 2, "none.yaml does not exist"),
        (["run", str(EXAMPLE), "--image=kleash"], 2, "image is 'kleash'; write registry/"),
    ],
)
def test_bad_input_is_one_sentence(
    typed: Cluster,
    arguments: list[str],
    status: int,
    sentence: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert kleash(typed, *arguments) == status
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert sentence.format(namespace=typed.namespace) in error
    assert error.count("\n") == 1
    assert find_runs(typed.objects) == []


def test_a_namespace_that_does_not_exist(
    typed: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["k8s", "run", str(EXAMPLE), "--namespace=nowhere"]) == 1
    assert "namespace nowhere does not exist; create it" in capsys.readouterr().err


def test_a_cluster_that_does_not_answer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (port,) = free_ports(1)
    kubeconfig = tmp_path / "kubeconfig"
    content = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "c", "cluster": {"server": f"https://127.0.0.1:{port}"}}],
        "users": [{"name": "u", "user": {"token": "t"}}],
        "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
        "current-context": "x",
    }
    kubeconfig.write_text(json.dumps(content))
    monkeypatch.setenv("KUBECONFIG", str(kubeconfig))
    assert main(["k8s", "status"]) == 3
    error = capsys.readouterr().err
    assert f"the cluster at https://127.0.0.1:{port} does not answer" in error
    assert error.count("\n") == 1
    assert main(["k8s", "status", "--context=y"]) == 2
    assert "cannot be used with context y" in capsys.readouterr().err


def test_without_helm_it_says_where_to_get_it(
    typed: Cluster, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KLEASH_HELM", "no-such-helm")
    assert kleash(typed, "run", str(EXAMPLE)) == 2
    error = capsys.readouterr().err
    assert "KLEASH_HELM=no-such-helm is no program" in error
    assert "https://helm.sh/docs/intro/install" in error
