"""Size and hyper-parameters of the demo: what two CPU cores do in minutes."""

from __future__ import annotations

import pydantic

from kleash.base.config import Config

Mixture = dict[str, float]
"""Relative frequency of demonstrators by name."""


class WorldSettings(Config):
    """How much of the small world is written."""

    base_dialogues: int = 64000
    """Dialogues that the base model reads."""
    sft_dialogues: int = 4000
    """Demonstrations of stage 1."""
    comparison_prompts: int = 5000
    """Prompts whose responses annotators compare."""
    held_out_comparison_prompts: int = 300
    """Prompts of the comparisons that the reward model is evaluated on."""
    ppo_prompts: int = 4000
    """Training prompts of stage 3."""
    held_out_prompts: int = 600
    """Prompts that nothing was trained on, for the win rates."""
    base_mixture: Mixture = pydantic.Field(
        default={"careful": 0.35, "hurried": 0.15, "pleaser": 0.2, "guesser": 0.15, "shy": 0.15}
    )
    """Who wrote what the base model reads: everybody."""
    sft_mixture: Mixture = pydantic.Field(
        default={"careful": 0.45, "hurried": 0.2, "pleaser": 0.25, "guesser": 0.1}
    )
    """Who wrote the demonstrations: fewer than half of them careful people."""


class ModelSettings(Config):
    """The language model; the reward model and the value network have its size."""

    vocab_size: int = 640
    """Most entries of the tokenizer."""
    hidden_size: int = 96
    """Width."""
    num_layers: int = 3
    """Transformer layers."""
    num_heads: int = 4
    """Attention heads."""
    intermediate_size: int = 256
    """Width of the feed-forward layers."""
    max_positions: int = 96
    """Context in tokens."""


class SupervisedSettings(Config):
    """Training of the base model or of stage 1."""

    learning_rate: float
    """Peak of the cosine schedule."""
    batch_size: int
    """Dialogues in one optimizer step."""
    epochs: int = 1
    """Passes over the dialogues."""
    loss_on_prompt: bool = False
    """Learn the user's turns too."""


class RewardModelSettings(Config):
    """Stage 2."""

    num_responses: int = 4
    """Candidates for each prompt."""
    disagreement: float = 0.22
    """Share of pairs on which two annotators disagree."""
    learning_rate: float = 1e-3
    """Peak of the cosine schedule."""
    batch_size: int = 16
    """Prompts in one optimizer step."""


class PPOSettings(Config):
    """Stage 3."""

    total_steps: int = 60
    """PPO steps."""
    batch_size: int = 128
    """Responses in one step."""
    epochs: int = 2
    """Passes over each batch."""
    minibatches: int = 2
    """Optimizer steps in one pass."""
    learning_rate: float = 3e-4
    """Policy."""
    value_learning_rate: float = 1e-3
    """Value network."""
    kl_coefficient: float = 0.1
    """Beta, fixed."""
    evaluation_every: int = 10
    """Steps between evaluations."""
    evaluation_prompts: int = 200
    """Prompts of an evaluation during the run."""


class DemoSettings(Config):
    """Everything that decides what the demo computes, but for the seed."""

    world: WorldSettings = WorldSettings()
    """Data."""
    model: ModelSettings = ModelSettings()
    """Sizes."""
    base: SupervisedSettings = SupervisedSettings(learning_rate=3e-3, batch_size=32)
    """The base model."""
    sft: SupervisedSettings = SupervisedSettings(learning_rate=1e-3, batch_size=32)
    """Stage 1."""
    reward_model: RewardModelSettings = RewardModelSettings()
    """Stage 2."""
    ppo: PPOSettings = PPOSettings()
    """Stage 3."""
    max_new_tokens: int = pydantic.Field(default=32, ge=1)
    """Longest response in tokens; the longest good one has 26."""


QUICK = DemoSettings(
    world=WorldSettings(
        base_dialogues=8000,
        sft_dialogues=400,
        comparison_prompts=150,
        held_out_comparison_prompts=50,
        ppo_prompts=200,
        held_out_prompts=60,
    ),
    model=ModelSettings(vocab_size=512, hidden_size=48, num_layers=2, intermediate_size=96),
    ppo=PPOSettings(total_steps=3, batch_size=16, evaluation_every=2, evaluation_prompts=20),
)
"""Every stage in a minute, for tests: the results are not good."""
