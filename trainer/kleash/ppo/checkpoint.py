"""Complete, verified checkpoints: a run goes on from one as if it had never stopped.

    checkpoints/step-000010/
      policy/                        a plain Hugging Face folder, tokenizer included
      value.safetensors
      policy_optimizer.safetensors   exp_avg, exp_avg_sq and step of every parameter
      value_optimizer.safetensors
      state.json                     step, prompt position, version, fence, KL controller, digests,
                                     calibration of the reward model
      probes.json                    with services.calibration: responses and scores to compare a
                                     new reward model on
      config.json                    the resolved configuration
      manifest.json                  size and SHA-256 of every other file

A checkpoint is written into a hidden folder, flushed to disk, and renamed when it is complete.
There are no random-number states to store: every draw is a function of (seed, purpose, step).
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from kleash.base import tracing
from kleash.base.config import describe_config, save_config
from kleash.base.durable import flush_folder, flush_tree
from kleash.base.errors import ConfigError
from kleash.lm.digest import canonical_tensors
from kleash.lm.load import save_checkpoint_folder
from kleash.ppo.calibration import (
    Calibration,
    RewardState,
    probes_from_json,
    probes_to_json,
)
from kleash.ppo.config import PPOConfig
from kleash.ppo.learner import Learner
from kleash.ppo.telemetry import export_checkpoint

logger = logging.getLogger(__name__)

FORMAT = 1

FREE_KEYS = (
    "out", "run_id", "prompts", "model", "reward_model", "services", "publish", "server",
    "evaluation", "samples", "checkpoint", "record", "sinks", "tracing",
    "micro_batch_tokens", "isolate_scoring", "device", "num_threads", "resume", "skip_bad",
    "pad_token", "chat_template",
)  # fmt: skip
"""Configuration that may change in a resumed run: where things are and how they are computed, not
what is computed. Models and prompts may move; their digests may not change. The id of a run is
that of run.json, which the run folder compares."""


@dataclass(frozen=True)
class RunPosition:
    """Where a run is; with the models, everything that the next step depends on."""

    step: int = 0
    """PPO steps done."""
    prompt_position: int = 0
    """Prompts drawn so far."""
    weights_version: int = 1
    """Version of the weights that replicas serve; 0 is what a replica loaded at its start."""


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    path: Path
    position: RunPosition
    run_id: str
    fence: int
    kl: dict[str, float]
    digests: dict[str, str]
    reward: RewardState
    config: dict[str, Any]

    @property
    def run_folder(self) -> Path:
        return self.path.parent.parent

    def load_into(self, learner: Learner) -> None:
        """Value network, optimizers, KL controller; the policy is loaded from ``path/policy``."""
        device = str(next(learner.value.parameters()).device)
        learner.value.load_state_dict(load_file(self.path / "value.safetensors", device=device))
        _load_optimizer(
            self.path / "policy_optimizer.safetensors", learner.policy, learner.policy_optimizer
        )
        _load_optimizer(
            self.path / "value_optimizer.safetensors", learner.value, learner.value_optimizer
        )
        learner.kl.load_state_dict(self.kl)

    def check_config(self, config: PPOConfig) -> None:
        """Raise ConfigError that names a key whose change would change the run's mathematics."""
        # A key that is younger than the checkpoint had its default's effect.
        old = {
            key: json.loads(default)
            for key, _, default, _ in describe_config(PPOConfig)
            if default != "required"
        } | _flat(self.config)
        new = _flat(config.model_dump(mode="json"))
        for key in sorted(old.keys() | new.keys()):
            if key.split(".")[0] not in FREE_KEYS and old.get(key) != new.get(key):
                raise ConfigError(
                    f"'{key}' is {json.dumps(new.get(key))}, but the run in {self.run_folder} was "
                    f"started with {json.dumps(old.get(key))}; set it back to resume, or start a "
                    "new run in another --out."
                )

    def check_digests(self, digests: dict[str, str], *, may_adopt: bool = False) -> None:
        """Raise ConfigError when a model or the prompts are not those of the run.

        ``may_adopt``: another reward model is told in the log, and accepted.
        """
        for name, old in self.digests.items():
            if digests.get(name) == old:
                continue
            if name == "reward_model" and may_adopt:
                logger.warning("the run goes on with reward model %s, not %s", digests[name], old)
            else:
                raise ConfigError(
                    f"the {name.replace('_', ' ')} ({digests.get(name)}) is not the one that the "
                    f"run in {self.run_folder} was started with ({old}); bring that one back to "
                    "resume, or start a new run in another --out."
                )


@tracing.measured("checkpoint")
def save(folder: Path, learner: Learner, tokenizer: Any, config: PPOConfig, **state: Any) -> Path:
    """``write``, and remove the oldest beyond checkpoint.keep."""
    began = time.monotonic()
    target = write(folder, learner, tokenizer, config, **state)
    for old in _steps(folder)[: -config.checkpoint.keep]:
        shutil.rmtree(old)
    export_checkpoint(target, time.monotonic() - began)
    return target


def write(
    folder: Path,
    learner: Learner,
    tokenizer: Any,
    config: PPOConfig,
    *,
    position: RunPosition,
    run_id: str,
    fence: int,
    digests: dict[str, str],
    reward: RewardState,
    lineage: dict[str, Any],
) -> Path:
    """Write ``folder/step-NNNNNN``, all at once."""
    target = path_of(folder, position.step)
    for cut_off in folder.glob(".step-*.partial"):  # a trainer was killed while it wrote
        shutil.rmtree(cut_off)
    partial = folder / f".{target.name}.partial"
    partial.mkdir(parents=True)
    save_checkpoint_folder(learner.policy, tokenizer, partial / "policy", lineage)
    save_file(_own(canonical_tensors(learner.value)), partial / "value.safetensors")
    _save_optimizer(
        partial / "policy_optimizer.safetensors", learner.policy, learner.policy_optimizer
    )
    _save_optimizer(partial / "value_optimizer.safetensors", learner.value, learner.value_optimizer)
    state = {
        "step": position.step,
        "prompt_position": position.prompt_position,
        "weights_version": position.weights_version,
        "run_id": run_id,
        "fence": fence,
        "kl": learner.kl.state_dict(),
        "seed": config.seed,
        "random_numbers": "functions of (seed, purpose, step); there is no generator state",
        "digests": digests,
        "reward_calibration": asdict(reward.calibration),
    }
    if reward.probes:
        text = json.dumps(probes_to_json(reward.probes), ensure_ascii=False)
        (partial / "probes.json").write_text(text + "\n", encoding="utf-8")
    (partial / "state.json").write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
    save_config(config, partial / "config.json")
    manifest = {
        "format": FORMAT,
        "files": {name: _describe(partial / name) for name in _files(partial)},
    }
    (partial / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    flush_tree(partial)
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
    flush_folder(folder)
    return target


def path_of(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step is."""
    return folder / f"step-{step:06d}"


def newest(folder: Path) -> Checkpoint | None:
    """The newest complete checkpoint; damaged ones are named in the log and set aside."""
    for path in reversed(_steps(folder)):
        if problem := _problem(path):
            aside = path.with_name(f"{path.name}.damaged")
            logger.warning(
                "checkpoint %s is damaged (%s) and was set aside as %s", path, problem, aside.name
            )
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
            continue
        return _read(path)
    return None


def load(path: Path) -> Checkpoint:
    """The checkpoint in a folder. Raises ConfigError when it is damaged."""
    if problem := _problem(path):
        raise ConfigError(f"the checkpoint {path} is damaged ({problem}).")
    return _read(path)


def _read(path: Path) -> Checkpoint:
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    return Checkpoint(
        path=path,
        position=RunPosition(state["step"], state["prompt_position"], state["weights_version"]),
        run_id=state["run_id"],
        fence=state["fence"],
        kl=state["kl"],
        digests=state["digests"],
        reward=_reward_state(path, state),
        config=json.loads((path / "config.json").read_text(encoding="utf-8")),
    )


def _reward_state(path: Path, state: dict[str, Any]) -> RewardState:
    probes = path / "probes.json"
    return RewardState(
        state["digests"]["reward_model"],
        # Checkpoints of older software have none.
        Calibration(**state.get("reward_calibration", {})),
        probes_from_json(json.loads(probes.read_text(encoding="utf-8")))
        if probes.is_file()
        else (),
    )


def _problem(path: Path) -> str:
    """What is wrong with a checkpoint; empty when every byte is as it was written."""
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        files, written_as = manifest["files"], manifest["format"]
    except (OSError, ValueError, KeyError, TypeError):
        return "manifest.json is missing or cannot be read"
    if written_as != FORMAT:
        return f"its format is {written_as} and this software reads {FORMAT}"
    for name, expected in files.items():
        if not (path / name).is_file():
            return f"{name} is missing"
        if _describe(path / name) != expected:
            return f"{name} is not what was written"
    return ""


def _steps(folder: Path) -> list[Path]:
    """Checkpoint folders, oldest first."""
    return sorted(path for path in folder.glob("step-[0-9]*") if path.name[5:].isdigit())


def _save_optimizer(path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    tensors = {
        f"{name}.{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state[parameter].items()
    }
    save_file(_own(tensors), path)


def _load_optimizer(path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    tensors = load_file(path)
    for name, parameter in model.named_parameters():
        state = {
            key: tensors[f"{name}.{key}"]
            for key in ("step", "exp_avg", "exp_avg_sq")
            if f"{name}.{key}" in tensors
        }
        # Adam's step counter stays on the CPU, its moments live with the parameter.
        optimizer.state[parameter] = {
            key: value if key == "step" else value.to(parameter.device)
            for key, value in state.items()
        }


def _own(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Contiguous tensors that share no memory, as safetensors wants them."""
    return {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}


def _files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {
            "bytes": path.stat().st_size,
            "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
        }


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= (
            _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return flat
