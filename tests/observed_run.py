"""A PPO run as a Prometheus in the cluster sees it: every process with its metrics port, scraped.

    with observed_run(folder, program, models) as run:
        run.train(total_steps=1000)
        run.wait_for_steps(2)
        run.prometheus.query("kleash_train_step")

Each process is what a pod of the chart's release ``demo`` in the namespace ``rlhf`` is, with the
labels that its ServiceMonitor or PodMonitor gives to a target. A process is started with the
``kleash`` command and ended by its id, so that a test can stop, freeze or break it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.prometheus import START_S, Prometheus, Target

from kleash.ppo.config import PPOConfig
from kleash.up.supervisor import free_port, kleash_command

NAMESPACE, RELEASE = "rlhf", "demo"
PROMPTS = [f"What is {number} plus 4?" for number in range(64)]
MANY_STEPS = 100_000
"""More than a run does before it is ended."""


@dataclass(frozen=True)
class Models:
    """Folders of the SFT checkpoint, which is the policy's start, and of the reward model."""

    policy: Path
    reward: Path


@dataclass
class Pod:
    """One process, and what its target is called in Prometheus."""

    name: str
    """Of the pod, "demo-kleash-policy-0"."""
    component: str
    """policy, reward, reference or trainer."""
    command: list[str]
    port: int
    metrics_port: int
    labels: Mapping[str, str]
    """Those of its target."""
    log: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables beside this process's own."""
    process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        """Of its gRPC server."""
        return f"127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        """Of its process, which was started."""
        assert self.process is not None
        return self.process.pid

    @property
    def is_running(self) -> bool:
        """Whether it was started and has not ended."""
        return self.process is not None and self.process.poll() is None

    def start(self) -> None:
        """Start it; a second time after its end is a restart of the container."""
        assert not self.is_running
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **self.environment}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )

    def kill(self) -> None:
        """End it without a word, as the kernel does for want of memory."""
        self._send(signal.SIGKILL)
        assert self.process is not None
        self.process.wait(START_S)

    def freeze(self) -> None:
        """Stop every thread of it where it is; its ports stay open and answer nothing."""
        self._send(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it go on."""
        self._send(signal.SIGCONT)

    def begin_to_end(self) -> None:
        """SIGTERM, when it runs; frozen or not."""
        if self.is_running:
            self._send(signal.SIGTERM)
            self.thaw()

    def wait_for_end(self) -> None:
        """Until it has ended; it is killed when it does not in time."""
        if self.process is None:
            return
        try:
            self.process.wait(START_S)
        except subprocess.TimeoutExpired:
            self.kill()

    def _send(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)


class ObservedRun:
    """The pods of a release, and the Prometheus that reads them."""

    def __init__(self, folder: Path, prometheus: Prometheus, models: Models) -> None:
        self.folder = folder
        self.prometheus = prometheus
        self.models = models
        self.pods: dict[str, Pod] = {}
        """By name."""
        self._store_port = free_port()
        """Of the trainer's weights store, from which replicas catch up."""

    def pod(self, component: str, replica: int = 0) -> Pod:
        """The pod of a service, or of the trainer."""
        return self.pods[_pod_name(component, replica)]

    def serve(
        self,
        component: str,
        *,
        replica: int = 0,
        environment: Mapping[str, str] | None = None,
        **keys: Any,
    ) -> Pod:
        """Start a replica of policy, reward or reference and have it scraped.

        ``keys`` are sections and keys of its configuration file that differ from those here:
        ``server={"http_port": 8080}``, ``limits={"max_queued_tokens": 64}``. None leaves a key out.
        """
        port, metrics_port = free_port(), free_port()
        model = self.models.reward if component == "reward" else self.models.policy
        server = {"port": port, "metrics_port": metrics_port, **keys.pop("server", {})}
        given = {"model": str(model), "device": "cpu", "num_threads": 1, **keys}
        if component == "policy":
            publisher = {"publisher": f"127.0.0.1:{self._store_port}"}
            given["weights"] = {**publisher, **keys.get("weights", {})}
        section = {name: value for name, value in given.items() if value is not None}
        path = self.folder / f"{component}-{replica}.json"
        path.write_text(json.dumps({"server": server, component: section}))
        command = kleash_command("serve", component, str(path))
        return self._start(component, replica, command, port, metrics_port, environment)

    def train(self, *, environment: Mapping[str, str] | None = None, **changes: Any) -> Pod:
        """Start the trainer of the services that run; ``changes`` are sections or keys of its
        configuration. It goes on until it is ended, unless ``total_steps`` is among them.
        """
        port, metrics_port = free_port(), free_port()
        config = self._config(port, metrics_port, changes)
        path = self.folder / "trainer.json"
        path.write_text(config.model_dump_json())
        command = kleash_command("ppo", str(path))
        return self._start("trainer", 0, command, port, metrics_port, environment)

    def steps(self) -> list[dict[str, Any]]:
        """The steps of metrics.jsonl that are complete lines."""
        path = self.folder / "run" / "metrics.jsonl"
        text = path.read_text() if path.exists() else ""
        rows = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
        return [row for row in rows if "step_s" in row]

    def wait_for_steps(self, count: int, seconds: float = 3 * START_S) -> None:
        """Until so many steps were done, in all."""
        trainer = self.pod("trainer")
        deadline = time.monotonic() + seconds
        while len(self.steps()) < count:
            assert trainer.is_running, f"the trainer ended early:\n{trainer.log.read_text()}"
            assert time.monotonic() < deadline, f"no {count} steps:\n{trainer.log.read_text()}"
            time.sleep(0.05)

    def wait_until_loaded(self) -> None:
        """Until every service has its model, as Prometheus sees it."""
        services = [pod for pod in self.pods.values() if pod.component != "trainer"]

        def are_loaded() -> bool:
            for pod in services:
                assert pod.is_running, f"{pod.name} ended:\n{pod.log.read_text()}"
            there = 'kleash_model_loaded{app_kubernetes_io_component!="trainer"} == 1'
            return self.prometheus.value(f"sum({there})") == len(services)

        self.prometheus.wait_until(are_loaded, f"{len(services)} loaded models", 2 * START_S)

    def end(self) -> None:
        """End what runs: the trainer first, as its services serve it to its end."""
        for trainers in (True, False):
            pods = [pod for pod in self.pods.values() if (pod.component == "trainer") is trainers]
            for pod in pods:
                pod.begin_to_end()
            for pod in pods:
                pod.wait_for_end()

    def _config(self, port: int, metrics_port: int, changes: Mapping[str, Any]) -> PPOConfig:
        policies = [pod.address for pod in self.pods.values() if pod.component == "policy"]
        prompts = self.folder / "prompts.jsonl"
        prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS))
        keys: dict[str, Any] = {
            "out": self.folder / "run",
            "prompts": str(prompts),
            "model": self.models.policy,
            "reward_model": self.models.reward,
            "server": {"port": port, "metrics_port": metrics_port},
            "publish": {"server": {"port": self._store_port}},
            "total_steps": MANY_STEPS,
            "batch_size": 16,
            "max_prompt_tokens": 64,
            "sampling": {"max_new_tokens": 12, "stop_token_ids": list(range(5, 30))},
            "algorithm": {"epochs": 2, "minibatches": 2},
            "policy": {"learning_rate": 1e-3},
            "value": {"learning_rate": 1e-3},
            "kl": {"controller": "adaptive", "coefficient": 0.1, "target": 0.5},
            "services": {
                "group_size": 4,
                "wait_s": START_S,
                "policy": policies,
                "reward": self.pod("reward").address,
                "reference": self.pod("reference").address,
            },
            "checkpoint": {"every": MANY_STEPS},
            "num_threads": 1,
        }
        for name, value in changes.items():
            keys[name] = {**keys.get(name, {}), **value} if isinstance(value, dict) else value
        return PPOConfig.model_validate(keys)

    def _start(
        self,
        component: str,
        replica: int,
        command: list[str],
        port: int,
        metrics_port: int,
        environment: Mapping[str, str] | None,
    ) -> Pod:
        name = _pod_name(component, replica)
        pod = Pod(
            name=name,
            component=component,
            command=command,
            port=port,
            metrics_port=metrics_port,
            labels=target_labels(component, replica, address=f"10.0.0.{11 + len(self.pods)}:9090"),
            log=self.folder / f"{component}-{replica}.log",
            environment=environment or {},
        )
        assert not (name in self.pods and self.pods[name].is_running), f"{name} runs already"
        self.pods[name] = pod
        pod.start()
        self.prometheus.scrape(name, Target(f"127.0.0.1:{metrics_port}", pod.labels))
        return pod


def target_labels(component: str, replica: int, *, address: str) -> dict[str, str]:
    """Labels of a pod's target, as the operator makes them of the chart's monitors.

    templates/monitoring/servicemonitor.yaml is for the services, podmonitor.yaml for the trainer:
    its job is the monitor's namespace and name, and no Service stands in between.
    """
    fullname = f"{RELEASE}-kleash-{component}"
    labels = {
        "namespace": NAMESPACE,
        "pod": _pod_name(component, replica),
        "container": component,
        "endpoint": "http-metrics",
        "instance": address,
        "app_kubernetes_io_component": component,
        "app_kubernetes_io_instance": RELEASE,
        "app_kubernetes_io_part_of": "kleash",
        "kleash_dev_run": RELEASE,
    }
    if component == "trainer":
        return {**labels, "job": f"{NAMESPACE}/{fullname}"}
    return {**labels, "job": fullname, "service": fullname}


@contextlib.contextmanager
def observed_run(
    folder: Path,
    program: Path,
    models: Models,
    *,
    num_policies: int = 2,
    interval_s: float = 2.0,
    **sections: Mapping[str, Any],
) -> Iterator[ObservedRun]:
    """A Prometheus, and every service ready; the caller starts the trainer. All end with it.

    ``program`` is Prometheus, ``interval_s`` its scrape interval; ``sections`` are keys of a
    service by its name: ``reward={"limits": {"max_queued_tokens": 64}}``.
    """
    with Prometheus(program, folder / "prometheus", interval_s=interval_s) as prometheus:
        run = ObservedRun(folder, prometheus, models)
        try:
            for replica in range(num_policies):
                run.serve("policy", replica=replica, **sections.get("policy", {}))
            run.serve("reward", **sections.get("reward", {}))
            run.serve("reference", **sections.get("reference", {}))
            run.wait_until_loaded()
            yield run
        finally:
            run.end()


def tiny_models(folder: Path) -> Models:
    """Models with random weights, made below ``folder``; tests have theirs as fixtures."""
    from kleash.lm.heads import Normalization, reward_model_from_causal_lm
    from kleash.lm.load import load_tokenizer, save_checkpoint_folder
    from kleash.lm.tiny import write_tiny_folder

    policy = write_tiny_folder(folder / "policy", "llama", PROMPTS)
    model = reward_model_from_causal_lm(policy, seed=1)
    Normalization(0.0, 0.5).store(model.config)
    stage = {"stage": "reward-model"}
    save_checkpoint_folder(model, load_tokenizer(policy), folder / "reward", stage)
    return Models(policy, folder / "reward")


def _pod_name(component: str, replica: int) -> str:
    return f"{RELEASE}-kleash-{component}-{replica}"
