"""kubectl and helm as the scenarios use them; one namespace, one release."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


class ScenarioError(AssertionError):
    """What was seen is not what must be; the message is the scenario's line."""


@dataclass(frozen=True)
class Kube:
    """A release in a namespace of the cluster that KUBECONFIG names."""

    namespace: str
    release: str
    fullname: str

    def kubectl(self, *arguments: str, stdin: str | None = None, timeout_s: float = 120) -> str:
        """Standard output. Raises ScenarioError with what kubectl said."""
        return run(["kubectl", "-n", self.namespace, *arguments], stdin, timeout_s)

    def helm(self, *arguments: str, timeout_s: float = 600) -> str:
        """Standard output of helm."""
        return run(["helm", "-n", self.namespace, *arguments], None, timeout_s)

    def get(self, kind: str, *arguments: str) -> Any:
        """Objects as kubectl prints them in JSON."""
        return json.loads(self.kubectl("get", kind, *arguments, "-o", "json"))

    def pods(self, component: str) -> list[dict[str, Any]]:
        """Pods of a component that are not on their way out, oldest first."""
        selector = (
            f"app.kubernetes.io/instance={self.release},app.kubernetes.io/component={component}"
        )
        pods = self.get("pods", "-l", selector)["items"]
        living = [pod for pod in pods if "deletionTimestamp" not in pod["metadata"]]
        return sorted(living, key=lambda pod: pod["metadata"]["creationTimestamp"])

    def trainer(self) -> str:
        """Name of the running trainer pod. Raises ScenarioError."""
        for pod in self.pods("trainer"):
            if pod["status"].get("phase") == "Running":
                return pod["metadata"]["name"]
        raise ScenarioError("no trainer pod is running")

    def trainer_job(self) -> dict[str, Any]:
        """The trainer's Job."""
        selector = f"app.kubernetes.io/instance={self.release},app.kubernetes.io/component=trainer"
        (job,) = self.get("jobs", "-l", selector)["items"]
        return job

    def steps(self, run_id: str) -> list[dict[str, Any]]:
        """Lines of metrics.jsonl that are steps; [] while there is none to be had."""
        try:
            text = self.kubectl(
                "exec", self.trainer(), "--", *_CAT, f"/runs/{run_id}/ppo/metrics.jsonl"
            )
        except ScenarioError:
            return []
        rows = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
        return [row for row in rows if "step_s" in row]


_CAT = ("python3", "-c", "import sys; sys.stdout.write(open(sys.argv[1]).read())")


def run(command: Sequence[str], stdin: str | None = None, timeout_s: float = 120) -> str:
    """Standard output of a command that must succeed."""
    done = subprocess.run(
        command, input=stdin, capture_output=True, text=True, timeout=timeout_s, check=False
    )
    if done.returncode:
        said = " ".join((done.stderr or done.stdout).split())[-400:]
        raise ScenarioError(f"{' '.join(command[:6])} ...: {said}")
    return done.stdout


def until(what: str, condition: Callable[[], Any], timeout_s: float, pause_s: float = 1.0) -> Any:
    """The first true answer of ``condition``. Raises ScenarioError that names ``what``."""
    deadline = time.monotonic() + timeout_s
    while True:
        if answer := condition():
            return answer
        if time.monotonic() > deadline:
            raise ScenarioError(f"{what}: not within {timeout_s:.0f} s")
        time.sleep(pause_s)
