"""A real Prometheus on loopback: targets and rules that change while it runs, and its answers.

`make k8s-tools` puts Debian's into build/tools; tests.k8s.tools finds it.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import yaml
from k8s.dashboards.prometheus_api import PrometheusApi

from kleash.up.supervisor import free_port

START_S = 60.0
"""Longest start, and longest wait for a target, on a busy machine."""


@dataclass(frozen=True)
class Target:
    """A page to scrape, and the labels of every series that is read there."""

    address: str
    """host:port; its path is /metrics."""
    labels: Mapping[str, str] = field(default_factory=dict)


class Prometheus(PrometheusApi):
    """The process, and what it answers; use it in a ``with`` block.

    ``honor_labels`` is on, as in the chart's monitors: where a series has a label of its own that
    the target has, too, its own stays.
    """

    def __init__(self, program: Path, folder: Path, *, interval_s: float = 2.0) -> None:
        super().__init__("")
        self.folder = folder
        self.interval_s = interval_s
        """Seconds between scrapes, and between evaluations of rules that name no interval."""
        self._program = program
        self._targets: dict[str, Target] = {}

    def __enter__(self) -> Self:
        (self.folder / "rules").mkdir(parents=True, exist_ok=True)
        self._write_targets()
        self._configure()
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        command = [
            str(self._program),
            f"--config.file={self.folder / 'prometheus.yaml'}",
            f"--storage.tsdb.path={self.folder / 'data'}",
            f"--web.listen-address=127.0.0.1:{port}",
            "--web.enable-lifecycle",
            "--log.level=warn",
        ]
        with (self.folder / "prometheus.log").open("ab") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env={**os.environ}
            )
        self.wait_until(self._is_ready, "answer of Prometheus")
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait(START_S)

    def scrape(self, name: str, target: Target) -> None:
        """Read a page from now on; a target of the same name is replaced."""
        self._targets[name] = target
        self._write_targets()

    def forget(self, name: str) -> None:
        """Read that page no more."""
        del self._targets[name]
        self._write_targets()

    def add_rules(self, name: str, groups: Sequence[Mapping[str, Any]]) -> None:
        """Evaluate groups of rules from now on; those of the same name are replaced.

        Raises ValueError with Prometheus's own words for rules that it does not take.
        """
        path = self.folder / "rules" / f"{name}.yaml"
        path.write_text(yaml.safe_dump({"groups": list(groups)}, sort_keys=False))
        request = urllib.request.Request(f"{self.url}/-/reload", method="POST")
        try:
            with urllib.request.urlopen(request, timeout=START_S):
                pass
        except urllib.error.HTTPError as error:
            path.unlink()
            log = (self.folder / "prometheus.log").read_text()[-2000:]
            raise ValueError(f"{error.read().decode()}\n{log}") from None

    def value(self, expression: str) -> float | None:
        """The value now of an expression that has at most one series; None when it has none."""
        result = self.query(expression)
        assert len(result) <= 1, f"{expression} has {len(result)} series"
        return float(result[0]["value"][1]) if result else None

    def targets(self) -> list[dict[str, Any]]:
        """The active targets, with "labels", "health" and "lastError"."""
        return self.get("targets", state="active")["activeTargets"]

    def alerts(self) -> list[dict[str, Any]]:
        """Pending and firing alerts, with "labels", "state" and "activeAt"."""
        return self.get("alerts")["alerts"]

    def rules(self) -> list[dict[str, Any]]:
        """Every rule with "name", "health" ("ok" after a good evaluation) and "lastError"."""
        return [rule for group in self.get("rules")["groups"] for rule in group["rules"]]

    def wait_for_targets(self, seconds: float = START_S) -> None:
        """Until every target has been read at least once."""

        def are_up() -> bool:
            seen = self.targets()
            return len(seen) == len(self._targets) and all(one["health"] == "up" for one in seen)

        self.wait_until(are_up, f"answer of each of {len(self._targets)} targets", seconds)

    def wait_until(
        self, is_done: Callable[[], object], what: str, seconds: float = START_S
    ) -> None:
        """Until a condition holds; raises TimeoutError when it does not in time."""
        deadline = time.monotonic() + seconds
        while not is_done():
            status = self.process.poll()
            log = (self.folder / "prometheus.log").read_text()
            assert status is None, f"Prometheus ended with status {status}:\n{log}"
            if time.monotonic() > deadline:
                raise TimeoutError(f"no {what} within {seconds:g} s:\n{log}")
            time.sleep(0.1)

    def _is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/-/ready", timeout=START_S):
                return True
        except urllib.error.URLError:
            return False

    def _write_targets(self) -> None:
        """Prometheus looks at the file by itself; a rename, so that it never reads half of one."""
        text = json.dumps(
            [
                {"targets": [target.address], "labels": dict(target.labels)}
                for target in self._targets.values()
            ]
        )
        path = self.folder / "targets.json"
        path.with_suffix(".new").write_text(text)
        path.with_suffix(".new").rename(path)

    def _configure(self) -> None:
        interval = f"{round(self.interval_s * 1000)}ms"
        job = {
            "job_name": "pods",
            "honor_labels": True,
            "file_sd_configs": [{"files": ["targets.json"], "refresh_interval": "1s"}],
        }
        configuration = {
            "global": {
                "scrape_interval": interval,
                "scrape_timeout": interval,
                "evaluation_interval": interval,
            },
            "rule_files": ["rules/*.yaml"],
            "scrape_configs": [job],
        }
        path = self.folder / "prometheus.yaml"
        path.write_text(yaml.safe_dump(configuration, sort_keys=False))
