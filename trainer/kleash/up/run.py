"""``kleash up``: the three services and the PPO trainer on one machine, supervised."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kleash.base.config import save_config
from kleash.base.progress import Progress
from kleash.ppo.config import ServicesConfig
from kleash.up.config import SERVICES, UpConfig
from kleash.up.supervisor import Child, Supervisor, free_port, kleash_command


def run(config: UpConfig, progress: Progress) -> int:
    """Start everything, wait for the trainer's end, stop everything; returns its exit status.

    Logs of the services are in ``OUT/logs``; the trainer keeps the terminal. Ctrl-C and SIGTERM
    stop the trainer, which writes a checkpoint; a second one ends it at once. ``progress`` is used
    by a run in this process; a trainer process draws its own.
    """
    if config.in_process:
        return _run_in_process(config, progress)
    config = _with_store(config)
    with _running(config) as (supervisor, services):
        path = config.ppo.out / "services" / "trainer.json"
        save_config(config.ppo.model_copy(update={"services": services}), path)
        return supervisor.run_to_end(kleash_command("ppo", str(path)))


def _with_store(config: UpConfig) -> UpConfig:
    """The policy knows where the trainer's weights store will be: it catches up after a restart."""
    server = config.ppo.publish.server
    server = server.model_copy(update={"port": server.port or free_port()})
    publish = config.ppo.publish.model_copy(update={"server": server})
    address = config.ppo.publish.address or f"127.0.0.1:{server.port}"
    weights = {"publisher": address, **config.policy.get("weights", {})}
    return config.model_copy(
        update={
            "ppo": config.ppo.model_copy(update={"publish": publish}),
            "policy": {**config.policy, "weights": weights},
        }
    )


def _run_in_process(config: UpConfig, progress: Progress) -> int:
    from kleash.ppo.run import run as run_trainer
    from kleash.up.local import local_services

    report = run_trainer(config.ppo, progress, open_services=lambda *_: local_services(config))
    return 128 + report.signal_number if report.signal_number else 0


@contextlib.contextmanager
def running_services(config: UpConfig) -> Iterator[ServicesConfig]:
    """The three services as child processes, without a trainer; yields their addresses."""
    with _running(config) as (_, services):
        yield services


@contextlib.contextmanager
def _running(config: UpConfig) -> Iterator[tuple[Supervisor, ServicesConfig]]:
    ports = {name: free_port() for name in SERVICES}
    children = [_service(name, config, port, config.ppo.out) for name, port in ports.items()]
    supervisor = Supervisor(max_restarts=config.max_restarts, children=children)
    addresses: dict[str, Any] = {name: f"127.0.0.1:{port}" for name, port in ports.items()}
    addresses["policy"] = (addresses["policy"],)
    supervisor.start()
    try:
        yield supervisor, config.ppo.services.model_copy(update=addresses)
    finally:
        supervisor.stop()


def _service(name: str, config: UpConfig, port: int, out: Path) -> Child:
    path = out / "services" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_config(config.serve_config(name, port), path)
    return Child(
        name=name,
        command=kleash_command("serve", name, str(path)),
        log=out / "logs" / f"{name}.log",
    )
