"""``kleash sft``, ``candidates``, ``reward-model``, ``ppo``: parse, run, name the result."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from kleash.base.config import Config
from kleash.cli.options import limit_threads, parse
from kleash.cli.output import show

if TYPE_CHECKING:
    from kleash.ppo.config import PPOConfig
    from kleash.ppo.report import PPOReport


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

    return _run_stage("ppo", PPOConfig, "kleash.cluster.trainer:run", arguments, _ppo_outcome)


def _done(config: Any, _report: Any) -> str:
    return f"done, {config.out}"


def _ppo_outcome(config: PPOConfig, report: PPOReport) -> str:
    if report.is_complete:
        return _done(config, report)
    return f"stopped after step {report.steps} of {config.total_steps}; --resume goes on"


def _was_done(stage: str, config: Any) -> bool:
    """Whether this very stage of the run wrote ``out``: a Job's pod may be started once too often.

    Only with a run_id. PPO knows for itself where it is.
    """
    if stage == "ppo" or getattr(config, "run_id", None) is None:
        return False
    path = config.out / "kleash.json"
    if not path.is_file():
        return False
    made = json.loads(path.read_text(encoding="utf-8"))
    same = made.get("config") == json.loads(config.model_dump_json())
    return same and (made.get("stage"), made.get("run_id")) == (stage, config.run_id)


def _run_stage(
    name: str,
    config_class: type[Config],
    function: str,
    arguments: Sequence[str],
    describe: Callable[[Any, Any], str] = _done,
) -> int:
    config: Any = parse(
        config_class, arguments, usage=f"kleash {name} [CONFIG.toml] [--key=value ...]"
    )
    if config is None:
        return 0
    from kleash.base.logging import configure_logging
    from kleash.cli.progress import TerminalProgress

    configure_logging()
    if _was_done(name, config):
        show(f"{name}: done already, {config.out}")
        return 0
    limit_threads(config.num_threads)
    module, _, attribute = function.partition(":")
    progress = TerminalProgress()
    try:
        report = getattr(importlib.import_module(module), attribute)(config, progress)
    finally:
        progress.finish()
    show(f"{name}: {describe(config, report)}")
    # As a shell would say it of a process that the signal ended: whoever started it, a Job of
    # Kubernetes say, has to know that the work is not done.
    signal_number = getattr(report, "signal_number", 0)
    return 128 + signal_number if signal_number else 0
