"""The models of a run as it begins or goes on: policy, value network, and their learner."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from kleash.base.errors import ConfigError, ModelError
from kleash.lm.digest import model_digest
from kleash.lm.heads import ValueModel
from kleash.lm.load import load_causal_lm, max_positions
from kleash.lm.sequences import TokenSequence
from kleash.ppo.checkpoint import Checkpoint
from kleash.ppo.config import PPOConfig
from kleash.ppo.learner import Learner


def sft_digest(config: PPOConfig, dtype: str) -> str:
    """Digest of the SFT checkpoint's weights in a data type, or as they are stored ("auto")."""
    return model_digest(load_causal_lm(config.model, dtype=dtype))  # pyright: ignore[reportArgumentType]


def make_learner(
    config: PPOConfig,
    policy: Any,
    pretraining: Sequence[TokenSequence],
    saved: Checkpoint | None,
    digests: dict[str, str],
) -> Learner:
    """At the start of the run, or where ``saved`` left it."""
    if saved is None:
        return Learner(policy, _value_model(config), config, pretraining)
    saved.check_config(config)
    saved.check_digests(digests, may_adopt=config.services.new_reward_model == "adopt")
    policy = load_causal_lm(saved.path / "policy", device=config.device)
    learner = Learner(policy, _value_model(config), config, pretraining)
    saved.load_into(learner)
    return learner


def check_vocabulary_and_length(config: PPOConfig, policy: Any, tokenizer: Any) -> None:
    if config.max_sequence_tokens > max_positions(policy):
        raise ConfigError(
            f"max_prompt_tokens {config.max_prompt_tokens} plus sampling.max_new_tokens "
            f"{config.sampling.max_new_tokens} is {config.max_sequence_tokens}, but the model in "
            f"{config.model} takes {max_positions(policy)} tokens; lower one of them."
        )
    num_embeddings = policy.get_input_embeddings().num_embeddings
    if len(tokenizer) > num_embeddings:
        raise ModelError(
            f"the tokenizer in {config.model} has {len(tokenizer)} tokens and the model "
            f"{num_embeddings}; name a pad token that is in the vocabulary, or let kleash sft make "
            "room for it."
        )
    for token in config.sampling.stop_token_ids:
        if not 0 <= token < num_embeddings:
            raise ConfigError(
                f"sampling.stop_token_ids has {token}, and the model in {config.model} has the ids "
                f"0 to {num_embeddings - 1}; correct it, or leave it out for the model's own."
            )


def _value_model(config: PPOConfig) -> ValueModel:
    if config.value.init == "reward_model":
        assert config.reward_model is not None
        return ValueModel.from_reward_model(config.reward_model, device=config.device)
    causal = load_causal_lm(config.model, device=config.device)
    backbone = getattr(causal, causal.base_model_prefix)
    head = torch.nn.Linear(causal.config.hidden_size, 1, device=config.device)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    return ValueModel(backbone, head)
