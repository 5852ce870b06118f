"""Configuration of ``kleash reward-model``."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

import pydantic

from kleash.base.config import Config


class RewardModelConfig(Config):
    """Stage 2: a Bradley-Terry reward model from comparisons.

    The default learning rate and batch follow Ouyang et al. 2022 (9e-6, 64 prompts) and suit models of
    a billion parameters and more; models of a million learn at 1e-3.
    """

    model: Path
    """Folder of the SFT checkpoint (any Hugging Face causal language model); gets a scalar head."""
    data: str
    """Comparisons: a JSON Lines file or a Hugging Face dataset, as pairs or as rankings."""
    out: Path
    """Folder to write; must not exist."""
    evaluation_data: str | None = None
    """Held-out comparisons, in the formats of data; null holds out evaluation_fraction of the data."""
    evaluation_fraction: float = pydantic.Field(default=0.05, ge=0, lt=1)
    """Share of the prompts that is held out, whole prompts at a time; 0 holds none out."""
    reference_data: str | None = None
    """Demonstrations whose responses are to score mean 0; null takes every response of the training
    comparisons, which are samples of the model that PPO starts from when `kleash candidates` made them."""
    normalization: Literal["mean_std", "mean"] = "mean_std"
    """mean_std: reference responses score mean 0 and standard deviation 1; mean: mean 0 alone."""
    learning_rate: float = pydantic.Field(default=1e-5, gt=0)
    """Highest learning rate; falls to 0 over the run."""
    schedule: Literal["cosine", "linear"] = "cosine"
    """Shape of the fall."""
    warmup_fraction: float = pydantic.Field(default=0.03, ge=0, lt=1)
    """Share of the steps in which the learning rate rises from 0."""
    epochs: int = pydantic.Field(default=1, ge=1)
    """Passes over the data; more than one overfits quickly (Ouyang et al. 2022)."""
    batch_size: int = pydantic.Field(default=64, ge=1)
    """Prompts of one optimizer step; all responses and pairs of a prompt stay together."""
    micro_batch_tokens: int = pydantic.Field(default=16384, ge=1)
    """Padded tokens of one forward pass; the result does not depend on it. One ranking is never split."""
    max_tokens: int | None = pydantic.Field(default=None, ge=2)
    """Longest prompt plus response in tokens; null is the model's context. A longer one is an error."""
    use_margins: bool = True
    """Subtract the margin of a comparison from its score difference; data without margins has 0."""
    label_smoothing: float = pydantic.Field(default=0.0, ge=0, lt=0.5)
    """Probability that a label is wrong."""
    centring_coefficient: float = pydantic.Field(default=0.0, ge=0)
    """Weight of mean((winner's score + loser's score)^2), which keeps raw scores around 0."""
    weight_decay: float = pydantic.Field(default=0.0, ge=0)
    """AdamW's decoupled weight decay, on matrices alone."""
    max_grad_norm: float = pydantic.Field(default=1.0, gt=0)
    """Norm that the gradient of a step is clipped to."""
    seed: int = 0
    """Of the head, the held-out prompts, the order of the data and the bootstrap."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type the backbone computes in; weights, optimizer and head stay float32."""
    device: str = "cpu"
    """Torch device."""
    pad_token: str | None = None
    """Text of the pad token, for tokenizers that have none; added to the vocabulary when it is new."""
    chat_template: Path | None = None
    """File with a chat template, for tokenizers that have none and data with messages."""
    skip_bad: bool = False
    """Count and skip unusable lines of data instead of stopping at the first."""
    num_threads: int = pydantic.Field(default=0, ge=0)
    """Threads that torch computes with; 0 leaves its own choice."""

    @pydantic.model_validator(mode="after")
    def _check(self) -> Self:
        if self.evaluation_data is not None and "evaluation_fraction" in self.model_fields_set:
            raise ValueError("evaluation_data and evaluation_fraction exclude each other; give one")
        return self
