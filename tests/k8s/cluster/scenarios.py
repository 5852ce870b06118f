"""What happens to a deployment in its life, done to a real one. Each returns what was seen."""

from __future__ import annotations

import json
import math
import os
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.k8s.cluster.kube import Kube, ScenarioError, run, until

LOAD = Path(__file__).with_name("scoring_load.py")
SERVICES = ("policy", "reward", "reference")
CUT_S = 60


class SkippedError(Exception):
    """The scenario needs something that was not given; says what."""


@dataclass
class Situation:
    """The release under test and what earlier scenarios found out."""

    kube: Kube
    chart: Path
    helm_values: list[str]
    run_id: str
    budget_s: float
    cut: str
    """Shell command that drops packets between $TRAINER_IP and $POLICY_IP; empty for none."""
    heal: str
    reboot: str
    """Shell command that restarts the node and comes back when its API answers; empty for none."""
    rows: dict[int, dict[str, Any]] = field(default_factory=dict)
    """Figures of every step that was ever seen, by step."""
    differing: list[str] = field(default_factory=list)

    def look(self) -> int:
        """The newest step, 0 before the first; steps seen again must have the same figures."""
        newest = 0
        for row in self.kube.steps(self.run_id):
            newest = step = int(row["step"])
            kept = {key: its for key, its in row.items() if not key.endswith("_s")}
            kept = {key: its for key, its in kept.items() if not key.startswith("publish_")}
            before = self.rows.setdefault(step, kept)
            for key in before.keys() & kept.keys():
                if before[key] != kept[key] and not _both_nan(before[key], kept[key]):
                    self.differing.append(f"step {step} {key}: {before[key]} then {kept[key]}")
        return newest

    def wait_for_step(self, step: int, timeout_s: float) -> int:
        """Until that many steps are done."""
        return until(f"step {step}", lambda: (at := self.look()) >= step and at, timeout_s)


def _both_nan(one: Any, other: Any) -> bool:
    return isinstance(one, float) and isinstance(other, float) and math.isnan(one + other)


def install(at: Situation) -> str:
    """helm install of the chart; the first PPO step and every pod Ready within the budget."""
    kube, began = at.kube, time.monotonic()
    run(["kubectl", "create", "namespace", kube.namespace])
    label = "pod-security.kubernetes.io/enforce=restricted"
    run(["kubectl", "label", "namespace", kube.namespace, label])
    kube.helm("install", kube.release, str(at.chart), *at.helm_values)
    at.wait_for_step(1, at.budget_s)
    stepped = time.monotonic() - began
    for component in (*SERVICES, "trainer"):
        until(
            f"{component} Ready",
            lambda name=component: all(_is_ready(pod) for pod in kube.pods(name)),
            max(at.budget_s - (time.monotonic() - began), 1),
        )
    ready = time.monotonic() - began
    if max(stepped, ready) > at.budget_s:
        raise ScenarioError(f"first step after {stepped:.0f} s, all Ready after {ready:.0f} s")
    return f"first PPO step after {stepped:.0f} s, all pods Ready after {ready:.0f} s"


def memory(at: Situation) -> str:
    """Resident memory of all pods together."""
    total = 0
    code = "print(open('/proc/1/status').read())"
    for component in (*SERVICES, "trainer"):
        for pod in at.kube.pods(component):
            name = pod["metadata"]["name"]
            status = at.kube.kubectl("exec", name, "--", "python3", "-c", code)
            total += int(status.partition("VmRSS:")[2].split()[0]) * 1024
    if total > 6 * 2**30:
        raise ScenarioError(f"{total / 2**30:.2f} GiB resident, more than 6")
    return f"{total / 2**30:.2f} GiB resident in all pods"


def helm_test(at: Situation) -> str:
    """The chart's own test."""
    said = at.kube.helm("test", at.kube.release, "--logs", "--timeout", "5m")
    lines = [line for line in said.splitlines() if line.startswith("ok ")]
    if not lines:
        raise ScenarioError(f"helm test printed no check: {' '.join(said.split())[-300:]}")
    return f"{len(lines)} checks: " + "; ".join(line.removeprefix("ok ") for line in lines)


def roll_reward(at: Situation) -> str:
    """kubectl rollout restart of the reward service while a client scores without a pause."""
    kube = at.kube
    seconds = 90
    address = f"dns:///{kube.fullname}-reward-headless.{kube.namespace}.svc:50051"
    outcome: list[str] = []

    def load() -> None:
        command = ("exec", "-i", kube.trainer(), "--", "python3", "-", address, str(seconds))
        outcome.append(kube.kubectl(*command, stdin=LOAD.read_text(), timeout_s=seconds + 120))

    thread = threading.Thread(target=load)
    thread.start()
    time.sleep(10)
    kube.kubectl("rollout", "restart", f"deployment/{kube.fullname}-reward")
    kube.kubectl(
        "rollout", "status", f"deployment/{kube.fullname}-reward", "--timeout=300s", timeout_s=320
    )
    thread.join()
    figures = json.loads(outcome[0].splitlines()[-1]) if outcome else {}
    if not figures or figures["failures"] or not figures["calls"]:
        raise ScenarioError(f"rolling restart under load: {figures or 'the client failed'}")
    at.wait_for_step(at.look() + 1, 120)
    return f"{figures['calls']} calls during a rolling restart, 0 failed; the run goes on"


def scale_policy(at: Situation) -> str:
    """1 → 3 → 1 policies: each is used at the right version, and the run does not stop."""
    kube = at.kube
    deployment = f"deployment/{kube.fullname}-policy"
    first = at.wait_for_step(1, 300)
    kube.kubectl("scale", deployment, "--replicas=3")
    grown = until("three replicas in a publish", lambda: _published(at, 3, first), 300)
    kube.kubectl("scale", deployment, "--replicas=1")
    shrunk = until("one replica in a publish", lambda: _published(at, 1, grown), 300)
    at.wait_for_step(shrunk + 1, 120)
    return f"3 replicas from step {grown}, 1 again from step {shrunk}, the run went on"


def _published(at: Situation, replicas: int, after: int) -> int:
    for row in at.kube.steps(at.run_id):
        if row["step"] > after and row.get("publish_replicas") == replicas:
            return int(row["step"])
    return 0


def delete_trainer(at: Situation) -> str:
    """The trainer's pod is killed without a grace period: same steps, same losses."""
    kube = at.kube
    at.differing.clear()
    seen = at.wait_for_step(at.look() + 2, 300)
    pod = kube.trainer()
    kube.kubectl("delete", "pod", pod, "--grace-period=0", "--force")
    until("another trainer pod", lambda: _other_trainer(kube, pod), 300)
    began = time.monotonic()
    at.wait_for_step(seen + 1, 400)
    took = time.monotonic() - began
    if at.differing:
        raise ScenarioError(f"redone steps differ: {'; '.join(at.differing[:3])}")
    return (
        f"killed after step {seen}, past it again {took:.0f} s later, figures bit for bit the same"
    )


def _other_trainer(kube: Kube, old: str) -> str:
    names = [pod["metadata"]["name"] for pod in kube.pods("trainer")]
    return next((name for name in names if name != old), "")


def upgrade(at: Situation) -> str:
    """helm upgrade that changes the trainer's pod: the run goes on from where it was."""
    kube = at.kube
    at.differing.clear()
    seen = at.wait_for_step(at.look() + 1, 300)
    job = kube.trainer_job()["metadata"]["name"]
    extra = ["--set", "trainer.podAnnotations.upgraded=yes"]
    kube.helm("upgrade", kube.release, str(at.chart), *at.helm_values, *extra)
    until("a new Job of the trainer", lambda: kube.trainer_job()["metadata"]["name"] != job, 120)
    at.wait_for_step(seen + 2, 400)
    if at.differing:
        raise ScenarioError(f"redone steps differ: {'; '.join(at.differing[:3])}")
    return f"upgraded at step {seen}, the new trainer went on"


def second_trainer(at: Situation) -> str:
    """A trainer of another run on the same replicas is refused, and the first is not disturbed."""
    kube = at.kube
    job = kube.trainer_job()
    name = f"{kube.fullname}-intruder"
    template = job["spec"]["template"]
    template["metadata"] = {
        "labels": {
            key: value
            for key, value in template["metadata"]["labels"].items()
            if not key.startswith("batch.kubernetes.io/")
            and key not in ("controller-uid", "job-name")
        },
        "annotations": template["metadata"].get("annotations", {}),
    }
    container = template["spec"]["containers"][0]
    container["args"] = [*container["args"], "--run_id=intruder", "--out=/runs/intruder/ppo"]
    spec = {"backoffLimit": 0, "template": template}
    intruder = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": name, "labels": {"kleash.dev/intruder": "yes"}},
        "spec": spec,
    }
    before = at.look()
    kube.kubectl("apply", "-f", "-", stdin=json.dumps(intruder))
    try:
        until("the second trainer's end", lambda: _has_failed(kube, name), 240)
        log = kube.kubectl("logs", f"job/{name}", "--tail=5")
        at.wait_for_step(before + 1, 120)
    finally:
        kube.kubectl("delete", "job", name, "--ignore-not-found")
    (sentence,) = [line for line in log.splitlines() if line.startswith("error:")] or [log[-300:]]
    if "belong to the run" not in sentence:
        raise ScenarioError(f"the second trainer ended for another reason: {sentence}")
    return sentence.removeprefix("error: ")


def _has_failed(kube: Kube, name: str) -> bool:
    return bool(kube.get("job", name)["status"].get("failed"))


def cut_network(at: Situation) -> str:
    """No packet between trainer and policy for a minute: the run waits, then goes on."""
    if not at.cut:
        raise SkippedError(
            "give --cut and --heal, shell commands for the node ($TRAINER_IP, $POLICY_IP)"
        )
    kube = at.kube
    at.wait_for_step(at.look() + 1, 300)
    trainer = kube.trainer()
    addresses = {
        "TRAINER_IP": kube.get("pod", trainer)["status"]["podIP"],
        "POLICY_IP": kube.pods("policy")[0]["status"]["podIP"],
    }
    environment = {**os.environ, **addresses}
    _shell(at.cut, environment)
    try:
        time.sleep(5)
        cut_at = at.look()
        time.sleep(CUT_S - 5)
        stood_at = at.look()
    finally:
        _shell(at.heal, environment)
    began = time.monotonic()
    at.wait_for_step(stood_at + 2, 300)
    took = time.monotonic() - began
    restarts = kube.get("pod", trainer)["status"]["containerStatuses"][0]["restartCount"]
    if stood_at > cut_at + 1 or restarts:
        raise ScenarioError(f"step {cut_at} to {stood_at} while cut, {restarts} restarts")
    return f"stood at step {stood_at} for {CUT_S} s, two more steps {took:.0f} s after, no restart"


def _shell(command: str, environment: dict[str, str]) -> None:
    done = subprocess.run(
        command, shell=True, check=False, env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise ScenarioError(f"{command}: {(done.stderr or done.stdout).strip()}")


def reboot_node(at: Situation) -> str:
    """Everything on the node ends at once: the run goes on from its checkpoint."""
    if not at.reboot:
        raise SkippedError("give --reboot, a shell command that restarts the node")
    at.differing.clear()
    seen = at.wait_for_step(at.look() + 1, 300)
    _shell(at.reboot, dict(os.environ))
    began = time.monotonic()
    until("the cluster", lambda: _answers(at.kube), 300)
    at.wait_for_step(seen + 1, 600)
    took = time.monotonic() - began
    if at.differing:
        raise ScenarioError(f"redone steps differ: {'; '.join(at.differing[:3])}")
    return f"rebooted after step {seen}, past it again {took:.0f} s later, figures the same"


def _answers(kube: Kube) -> bool:
    try:
        kube.kubectl("get", "pods")
    except ScenarioError:
        return False
    return True


def complete(at: Situation) -> str:
    """The run ends, its policy and checkpoint are on the volume, with one run id in all."""
    kube = at.kube
    job = kube.trainer_job()["metadata"]["name"]
    until("the end of the run", lambda: kube.get("job", job)["status"].get("succeeded"), 1800, 3)
    code = (
        "import json, pathlib\n"
        f"run = pathlib.Path('/runs/{at.run_id}/ppo')\n"
        "report = json.loads((run / 'report.json').read_text())\n"
        "lineage = json.loads((run / 'policy/kleash.json').read_text())\n"
        "newest = sorted((run / 'checkpoints').glob('step-*'))[-1].name\n"
        "print(json.dumps([report['steps'], report['run_id'], lineage['run_id'], newest]))\n"
    )
    reward = kube.pods("reward")[0]["metadata"]["name"]
    said = kube.kubectl("exec", "-i", reward, "--", "python3", "-", stdin=code)
    steps, run_id, lineage_id, newest = json.loads(said)
    if not run_id == lineage_id == at.run_id:
        raise ScenarioError(f"run ids {run_id}, {lineage_id}, {at.run_id}")
    return f"{steps} steps, {newest} and policy/ on the volume, run id {run_id} in both"


def _is_ready(pod: dict[str, Any]) -> bool:
    conditions = pod["status"].get("conditions", ())
    return any(its["type"] == "Ready" and its["status"] == "True" for its in conditions)


SCENARIOS: dict[str, Callable[[Situation], str]] = {
    "install": install,
    "memory": memory,
    "helm-test": helm_test,
    "second-trainer": second_trainer,
    "roll-reward": roll_reward,
    "scale-policy": scale_policy,
    "delete-trainer": delete_trainer,
    "upgrade": upgrade,
    "cut-network": cut_network,
    "reboot": reboot_node,
    "complete": complete,
}
