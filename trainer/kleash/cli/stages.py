"""``kleash sft``, ``candidates``, ``reward-model``, ``ppo``: parse, run, name the result."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

from kleash.base.config import Config
from kleash.cli.options import limit_threads, parse


def run_sft(arguments: Sequence[str]) -> int:
    """Stage 1."""
    from kleash.sft.config import SFTConfig

    return _run_stage("sft", SFTConfig, "kleash.sft.train:train", arguments)


def run_candidates(arguments: Sequence[str]) -> int:
    """Responses to compare."""
    from kleash.reward_model.candidates import CandidatesConfig

    return _run_stage(
        "candidates", CandidatesConfig, "kleash.reward_model.candidates:run", arguments
    )


def run_reward_model(arguments: Sequence[str]) -> int:
    """Stage 2."""
    from kleash.reward_model.config import RewardModelConfig

    return _run_stage(
        "reward-model", RewardModelConfig, "kleash.reward_model.train:train", arguments
    )


def run_ppo(arguments: Sequence[str]) -> int:
    """Stage 3, the trainer alone."""
    from kleash.ppo.config import PPOConfig

    return _run_stage("ppo", PPOConfig, "kleash.ppo.run:run", arguments)


def _run_stage(
    name: str, config_class: type[Config], function: str, arguments: Sequence[str]
) -> int:
    config: Any = parse(
        config_class, arguments, usage=f"kleash {name} [CONFIG.toml] [--key=value ...]"
    )
    if config is None:
        return 0
    from kleash.base.logging import configure_logging
    from kleash.cli.progress import TerminalProgress

    configure_logging()
    limit_threads(config.num_threads)
    module, _, attribute = function.partition(":")
    progress = TerminalProgress()
    try:
        getattr(importlib.import_module(module), attribute)(config, progress)
    finally:
        progress.finish()
    print(f"{name}: done, {config.out}")  # noqa: T201
    return 0
