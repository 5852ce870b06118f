"""Shared by tests of the trainer in one process: the services' own engines, without gRPC."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from kleash.data.prompts import load_prompts
from kleash.lm.digest import tokenizer_sha256
from kleash.lm.heads import ValueModel
from kleash.lm.load import load_causal_lm, load_tokenizer
from kleash.policy.config import PolicyConfig
from kleash.policy.local import LocalPolicy, LocalWeights
from kleash.ppo.calibration import RewardState
from kleash.ppo.config import PPOConfig
from kleash.ppo.learner import Learner
from kleash.ppo.rollout import Collector, Rollout, Sample
from kleash.ppo.services import Services
from kleash.reference.config import ReferenceConfig
from kleash.reference.local import LocalReference
from kleash.reward.config import RewardConfig
from kleash.reward.local import LocalReward

PROMPTS = (
    "<|user|>What is 3 plus 4?<|assistant|>",
    "<|user|>Which is bigger, 9 or 12?<|assistant|>",
    "the quick brown fox",
    "<|user|>hello<|assistant|>",
    "says",
    "<|user|>What is 9 plus 12?<|assistant|>",
)
STOP_IDS = tuple(range(5, 30))
"""None of them is the tokenizer's end of sequence; a random model draws one in most responses."""


@dataclass(frozen=True, eq=False)
class World:
    """Folders, and the two frozen services that every test shares."""

    model: Path
    reward_model: Path
    prompts: Path
    reward: LocalReward
    reference: LocalReference
    texts: tuple[str, ...] = PROMPTS
    stop_ids: tuple[int, ...] = STOP_IDS
    policies: list[LocalPolicy] = field(default_factory=list)
    """Every replica that a test asked for, to be ended with the session."""

    def config(self, out: Path, **changes: Any) -> PPOConfig:
        """A run of two steps; ``changes`` are sections or keys."""
        keys: dict[str, Any] = {
            "out": out,
            "prompts": str(self.prompts),
            "model": self.model,
            "reward_model": self.reward_model,
            "total_steps": 2,
            "batch_size": 12,
            "max_prompt_tokens": 40,
            "sampling": {
                "temperature": 0.7,
                "max_new_tokens": 12,
                "stop_token_ids": STOP_IDS,
            },
            "algorithm": {"epochs": 2, "minibatches": 2},
            "policy": {"learning_rate": 1e-3},
            "value": {"learning_rate": 1e-3},
            "services": {"group_size": 4, "wait_s": 5},
        }
        for name, value in changes.items():
            keys[name] = {**keys.get(name, {}), **value} if isinstance(value, dict) else value
        return PPOConfig.model_validate(keys)

    def services(self, num_policies: int = 1) -> Services:
        """Fresh policy replicas beside the shared frozen services."""
        policies = [LocalPolicy.load(PolicyConfig(model=self.model)) for _ in range(num_policies)]
        self.policies.extend(policies)
        return Services(
            policies=dict(enumerate(policies)),
            weights={i: LocalWeights(policy.engine) for i, policy in enumerate(policies)},
            reward=self.reward,
            reference=self.reference,
        )

    def collector(self, services: Services, config: PPOConfig, **changes: Any) -> Collector:
        return Collector(
            services,
            config,
            tokenizer_sha256=tokenizer_sha256(load_tokenizer(self.model)),
            reward=RewardState(self.reward.get_model().model.revision),
            reference_revision=self.reference.get_model().model.revision,
            **{"ensure_weights": lambda replica, version: None, **changes},
        )

    def rollout(self, config: PPOConfig, services: Services | None = None) -> Rollout:
        """Responses of the SFT policy, which is version 0 and the reference at the same time."""
        collector = self.collector(services or self.services(), config)
        records = load_prompts(config.prompts, load_tokenizer(self.model), max_tokens=40)
        prompts = (list(records) * config.batch_size)[: config.batch_size]
        return collector.collect(prompts, seed=7, weights_version=0)

    def learner(self, config: PPOConfig) -> Learner:
        policy = load_causal_lm(self.model)
        return Learner(policy, ValueModel.from_reward_model(self.reward_model), config)

    def learned(self, out: Path) -> list[dict[str, float]]:
        """Steps of metrics.jsonl without what depends on the clock."""
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        return [
            {name: value for name, value in row.items() if not name.endswith("_s")}
            for row in rows
            if "step_s" in row
        ]


@pytest.fixture(scope="session")
def world(
    tiny_folder: Path, tiny_reward_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[World]:
    """A tiny Llama, its reward model, six prompts, and the frozen services."""
    prompts = tmp_path_factory.mktemp("data") / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    world = World(
        model=tiny_folder,
        reward_model=tiny_reward_folder,
        prompts=prompts,
        reward=LocalReward.load(RewardConfig(model=tiny_reward_folder)),
        reference=LocalReference.load(ReferenceConfig(model=tiny_folder)),
    )
    yield world
    for policy in world.policies:
        policy.close()


@pytest.fixture(scope="session")
def samples(world: World, tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    """One rollout of the SFT policy; nobody changes it."""
    return world.rollout(world.config(tmp_path_factory.mktemp("unused"))).samples
