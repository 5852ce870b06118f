"""Configuration of ``kleash up`` and of ``kleash serve``."""

from __future__ import annotations

from typing import Any, Self

import pydantic

from kleash.base.config import Config
from kleash.base.trace_setup import ServiceTracingConfig
from kleash.policy.config import PolicyConfig
from kleash.ppo.config import PPOConfig
from kleash.reference.config import ReferenceConfig
from kleash.reward.config import RewardConfig
from kleash.rpc.server import ServerConfig

SERVICES: dict[str, type[Config]] = {
    "policy": PolicyConfig,
    "reward": RewardConfig,
    "reference": ReferenceConfig,
}
"""The services by name, in the order in which they are started."""


class ServeConfig(Config):
    """One process that hosts the services whose section is given, on one port."""

    server: ServerConfig = ServerConfig()
    """Addresses, limits and the way to stop."""
    tracing: ServiceTracingConfig = ServiceTracingConfig()
    """Spans of calls, for who looks for lost time."""
    policy: PolicyConfig | None = None
    """The policy service."""
    reward: RewardConfig | None = None
    """The reward service."""
    reference: ReferenceConfig | None = None
    """The reference service."""


class UpConfig(Config):
    """The three services and the PPO trainer on one machine.

    The services take their models from the trainer's configuration; a section adds to it.
    """

    ppo: PPOConfig
    """The trainer; the addresses of its services are filled in."""
    policy: dict[str, Any] = pydantic.Field(default_factory=dict)
    """Keys of ``kleash serve policy`` that differ from their defaults."""
    reward: dict[str, Any] = pydantic.Field(default_factory=dict)
    """Keys of ``kleash serve reward`` that differ from their defaults."""
    reference: dict[str, Any] = pydantic.Field(default_factory=dict)
    """Keys of ``kleash serve reference`` that differ from their defaults."""
    service_threads: int = pydantic.Field(default=0, ge=0)
    """Threads that each service computes with; 0 leaves torch's own choice."""
    in_process: bool = False
    """Run the three services as objects inside the trainer's process, without gRPC: one process
    to debug. Results are those of separate processes, bit for bit."""
    max_restarts: int = pydantic.Field(default=3, ge=0)
    """Times that a service which died is started again before the run is given up."""

    @pydantic.model_validator(mode="after")
    def _check_services(self) -> Self:
        if self.ppo.reward_model is None:
            raise ValueError("ppo.reward_model is required: the reward service scores with it")
        for name in SERVICES:
            self.section(name)
        return self

    def section(self, name: str) -> Config:
        """Configuration of one service."""
        model = self.ppo.reward_model if name == "reward" else self.ppo.model
        defaults = {"model": model, "device": self.ppo.device, "num_threads": self.service_threads}
        return SERVICES[name].model_validate({**defaults, **getattr(self, name)})

    def serve_config(self, name: str, port: int) -> ServeConfig:
        """Configuration of the process of one service, on loopback."""
        return ServeConfig.model_validate(
            {
                "server": ServerConfig(port=port),
                "tracing": self._tracing(name),
                name: self.section(name),
            }
        )

    def _tracing(self, name: str) -> ServiceTracingConfig:
        """As the trainer traces, and nothing beside its steps."""
        its = self.ppo.tracing
        if its.exporter == "none":
            return ServiceTracingConfig()
        file = self.ppo.traces / f"{name}.jsonl" if its.exporter == "file" else None
        return ServiceTracingConfig(
            exporter=its.exporter, file=file, endpoint=its.endpoint, sample_ratio=0.0
        )
