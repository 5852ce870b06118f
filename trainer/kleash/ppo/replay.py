"""A recorded step done again: with what the services answered, or with another reward model.

    checkpoint before the step ─► learner ──┐
    recorded replies ─► Collector ─► samples ┴─► prepare ─► update ─► figures, digests

The same code as in the run, on the same numbers: on a CPU, with the same software and as many
threads, every figure and both models are the same, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kleash.base.config import parse_tree
from kleash.base.errors import ConfigError
from kleash.data.demonstrations import load_demonstrations
from kleash.lm.load import load_tokenizer
from kleash.lm.sequences import TokenSequence
from kleash.ppo import checkpoint as checkpoints
from kleash.ppo.calibration import RewardState
from kleash.ppo.checkpoint import Checkpoint
from kleash.ppo.config import PPOConfig
from kleash.ppo.environment import describe_start
from kleash.ppo.models import make_learner
from kleash.ppo.randomness import sampling_seed
from kleash.ppo.recorded_calls import read_calls
from kleash.ppo.recorder import Recording, digests_of
from kleash.ppo.replay_services import replay_services
from kleash.ppo.rollout import Collector, Sample
from kleash.ppo.services import Reward, describe_misfit


@dataclass(frozen=True, eq=False)
class Replay:
    """A step that was done again."""

    samples: list[Sample]
    figures: dict[str, float]
    """As docs/metrics.md defines them; no times, nothing of the publish."""
    after: dict[str, str]
    """Digests of both models after the update."""
    responses: list[str]
    """Texts, in the order of the samples."""


@dataclass(frozen=True)
class Difference:
    """A figure of the recorded step and of its replay; None where one has none."""

    name: str
    recorded: float | None
    replayed: float | None


def replay(
    recording: Recording, *, reward: Reward | None = None, device: str | None = None
) -> Replay:
    """Do the step again; ``reward`` scores the recorded responses in place of what did.

    Raises ConfigError for a recording that is damaged or was made with another configuration or on
    a device that this machine lacks, and what ``reward`` raises.
    """
    saved = checkpoints.load(recording.before)
    # The checkpoint holds the policy and its tokenizer; the folder that the run began with may be
    # gone. The reward model's is needed where the value network has its shape.
    config = _config(saved, device)
    config = config.model_copy(update={"model": saved.path / "policy", "chat_template": None})
    _check_what_is_needed(config)
    tokenizer = load_tokenizer(config.model)
    learner = make_learner(
        config, None, _pretraining(config, tokenizer, saved), saved, saved.digests
    )
    services = replay_services(read_calls(recording.calls))
    state = saved.reward
    if reward is not None:
        services = replace(services, reward=reward)
        state = RewardState(_revision_of(reward, config, saved.digests["tokenizer"]))
        config = config.model_copy(
            update={"services": config.services.model_copy(update={"calibration": "none"})}
        )
    collector = Collector(
        services,
        config,
        tokenizer_sha256=saved.digests["tokenizer"],
        reward=state,
        reference_revision=recording.described["reference_revision"],
        ensure_weights=lambda _replica, _version: None,
    )
    rollout = collector.collect(
        recording.prompts(),
        seed=sampling_seed(config.seed, recording.step),
        weights_version=recording.described["weights_version"],
    )
    batch, figures = learner.prepare(rollout.samples)
    figures |= learner.update(batch, recording.step)
    return Replay(
        samples=rollout.samples,
        figures=figures,
        after=digests_of(learner),
        responses=[_response(sample, tokenizer) for sample in rollout.samples],
    )


def differences(recording: Recording, replayed: Replay) -> list[Difference]:
    """Figures that are not the same number."""
    return different(recording.described["figures"], replayed.figures)


def different(old: Mapping[str, float], new: Mapping[str, float]) -> list[Difference]:
    """Figures of two steps that are not the same number, in the order of the first."""
    names = [*old, *(name for name in new if name not in old)]
    return [
        Difference(name, old.get(name), new.get(name))
        for name in names
        if not _is_same(old.get(name), new.get(name))
    ]


def _is_same(one: float | None, two: float | None) -> bool:
    if one is None or two is None:
        return one is two
    return one == two or (math.isnan(one) and math.isnan(two))


def different_surroundings(recording: Recording, *, device: str | None = None) -> list[str]:
    """What is not as it was when the step was recorded and may change the last bits."""
    then = recording.described["environment"]
    config = _config(checkpoints.load(recording.before), device)
    now = describe_start(config, from_step=0, seen_step=0, digests={}, lineage={})
    found = []
    for part, names in (
        ("software", ("kleash", "revision", "python", "torch", "transformers", "numpy")),
        ("machine", ("cpu", "device", "gpus", "threads")),
    ):
        found += [
            f"{name} is {now[part].get(name)} and was {then[part].get(name)}"
            for name in names
            if now[part].get(name) != then[part].get(name)
        ]
    return found


def _config(saved: Checkpoint, device: str | None) -> PPOConfig:
    """The run's; on ``device``, where it is given."""
    config = parse_tree(PPOConfig, saved.config, place=str(saved.path / "config.json"))
    return config.model_copy(update={"device": device}) if device else config


def _check_what_is_needed(config: PPOConfig) -> None:
    folder = Path(config.reward_model or "").resolve()
    if config.value.init == "reward_model" and not folder.is_dir():
        raise ConfigError(
            f"the value network has the shape of the run's reward model, and its folder {folder} "
            "is not there; bring it back, or replay the step where the run was started, if its "
            "path is a relative one."
        )


def _revision_of(reward: Reward, config: PPOConfig, tokenizer_sha256: str) -> str:
    """Digest of another reward model. Raises ConfigError for one that cannot score the step."""
    answer = reward.get_model()
    if why := describe_misfit(answer, config, tokenizer_sha256):
        raise ConfigError(f"the other reward model {why}.")
    return answer.model.revision


def _pretraining(config: PPOConfig, tokenizer: Any, saved: Checkpoint) -> Sequence[TokenSequence]:
    if config.ptx.data is None:
        return ()
    loaded = load_demonstrations(
        config.ptx.data, tokenizer, max_tokens=config.max_sequence_tokens, skip_bad=config.skip_bad
    )
    if loaded.sha256 != saved.digests["pretraining_data"]:
        raise ConfigError(
            f"{config.ptx.data} is not the pretraining data that the step was recorded with "
            f"({loaded.sha256} instead of {saved.digests['pretraining_data']}); bring that back."
        )
    return loaded


def _response(sample: Sample, tokenizer: Any) -> str:
    ids = sample.sequence.ids[sample.sequence.response_start :]
    return tokenizer.decode(ids.tolist(), skip_special_tokens=True)
