"""``kleash up``: the three services and the PPO trainer on this machine, over loopback, supervised."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from kleash.base.config import save_config
from kleash.up.config import SERVICES, UpConfig
from kleash.up.supervisor import Child, Supervisor, free_port, kleash_command

logger = logging.getLogger(__name__)


def run(config: UpConfig) -> int:
    """Start everything, wait for the trainer's end, stop everything; returns the trainer's exit status.

    Logs of the services are in ``OUT/logs``; the trainer keeps the terminal. Ctrl-C and SIGTERM stop
    the trainer, which writes a checkpoint; a second one ends it at once.
    """
    out = config.ppo.out
    ports = {name: free_port() for name in SERVICES}
    supervisor = Supervisor(max_restarts=config.max_restarts)
    supervisor.children = [_service(name, config, ports[name], out) for name in SERVICES]
    trainer_config = _trainer_config(config, ports, out)
    supervisor.start()
    try:
        status = supervisor.run_to_end(kleash_command("ppo", str(trainer_config)))
    finally:
        supervisor.stop()
    return status


def _service(name: str, config: UpConfig, port: int, out: Path) -> Child:
    path = out / "services" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_config(config.serve_config(name, port), path)
    return Child(name=name, command=kleash_command("serve", name, str(path)), log=out / "logs" / f"{name}.log")


def _trainer_config(config: UpConfig, ports: dict[str, int], out: Path) -> Path:
    addresses: dict[str, Any] = {name: f"127.0.0.1:{port}" for name, port in ports.items()}
    addresses["policy"] = [addresses["policy"]]
    services = config.ppo.services.model_copy(update=addresses)
    path = out / "services" / "trainer.json"
    save_config(config.ppo.model_copy(update={"services": services}), path)
    return path
