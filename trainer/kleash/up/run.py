"""``kleash up``: the three services and the PPO trainer on this machine, over loopback, supervised."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kleash.base.config import save_config
from kleash.ppo.config import ServicesConfig
from kleash.up.config import SERVICES, UpConfig
from kleash.up.supervisor import Child, Supervisor, free_port, kleash_command


def run(config: UpConfig) -> int:
    """Start everything, wait for the trainer's end, stop everything; returns the trainer's exit status.

    Logs of the services are in ``OUT/logs``; the trainer keeps the terminal. Ctrl-C and SIGTERM stop
    the trainer, which writes a checkpoint; a second one ends it at once.
    """
    with _running(config) as (supervisor, services):
        path = config.ppo.out / "services" / "trainer.json"
        save_config(config.ppo.model_copy(update={"services": services}), path)
        return supervisor.run_to_end(kleash_command("ppo", str(path)))


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
    return Child(name=name, command=kleash_command("serve", name, str(path)), log=out / "logs" / f"{name}.log")
