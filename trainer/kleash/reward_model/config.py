"""Configuration of ``kleash reward-model``."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pydantic

from kleash.base.config import Config, RunId

DEFAULT_EVALUATION_FRACTION = 0.05
"""Share of the prompts that is held out when nothing else is said."""


class RewardModelConfig(Config):
    """Stage 2: a Bradley-Terry reward model from comparisons.

    The default learning rate and batch are those of Ouyang et al. 2022 and suit models of a billion
    parameters and more; models of a million learn at 1e-3.
    """

    model: Path
    """Folder of the SFT checkpoint (any Hugging Face causal language model); gets a scalar head."""
    data: str
    """Comparisons: a JSON Lines file or a Hugging Face dataset, as pairs or as rankings."""
    out: Path
    """Folder to write; must not exist."""
    run_id: RunId = None
    """Name of the run that this stage belongs to, recorded in kleash.json; null records none."""
    evaluation_data: str | None = None
    """Held-out comparisons, in the formats of data; null takes evaluation_fraction of data."""
    evaluation_fraction: float | None = pydantic.Field(default=None, ge=0, lt=1)
    """Share of the prompts to hold out, whole prompts at a time; 0 holds none out, null is 0.05 or,
    with evaluation_data, none."""
    reference_data: str | None = None
    """Demonstrations whose responses are to score mean 0; null takes all responses of the training
    comparisons: made by `kleash candidates`, they are samples of the model that PPO starts from."""
    normalization: Literal["mean_std", "mean"] = "mean_std"
    """mean_std: reference responses score mean 0 and standard deviation 1; mean: mean 0 alone."""
    learning_rate: float = pydantic.Field(default=9e-6, gt=0, allow_inf_nan=False)
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
    """Padded tokens that go through the model at once; changes memory, not the result. One ranking
    is never split."""
    max_tokens: int | None = pydantic.Field(default=None, ge=2)
    """Longest prompt plus response in tokens; null: the model's context."""
    use_margins: bool = True
    """Subtract the margin of a comparison from its score difference; data without margins has 0."""
    label_smoothing: float = pydantic.Field(default=0.0, ge=0, lt=0.5)
    """Probability that a label is wrong."""
    centring_coefficient: float = pydantic.Field(default=0.0, ge=0, allow_inf_nan=False)
    """Weight of mean((winner's score + loser's score)^2), which keeps raw scores around 0."""
    weight_decay: float = pydantic.Field(default=0.0, ge=0, allow_inf_nan=False)
    """AdamW's decoupled weight decay, on matrices alone."""
    max_grad_norm: float | None = pydantic.Field(default=1.0, gt=0)
    """Longer gradients are scaled down to this norm; null: none are."""
    seed: int = pydantic.Field(default=0, ge=0)
    """Of the head, the held-out prompts, the order of the data and the bootstrap."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: compute and save in it; weights and optimizer state are float32 in training, the
    head always computes in float32."""
    device: str = "cpu"
    """Where to train: cpu, cuda or cuda:N."""
    pad_token: str | None = None
    """Text of the token to pad with, for a tokenizer without one."""
    chat_template: Path | None = None
    """File with a Jinja chat template to use instead of the tokenizer's own."""
    skip_bad: bool = False
    """Leave bad lines of the data out and count them, instead of stopping at the first one."""
    num_threads: int = pydantic.Field(default=0, ge=0)
    """Threads that torch computes with on the CPU; 0: its own choice."""

    @property
    def held_out_fraction(self) -> float:
        """Share of the prompts of ``data`` that is held out."""
        if self.evaluation_fraction is not None:
            return self.evaluation_fraction
        return 0.0 if self.evaluation_data else DEFAULT_EVALUATION_FRACTION

    @pydantic.model_validator(mode="after")
    def _check_evaluation(self) -> RewardModelConfig:
        if self.evaluation_data and self.evaluation_fraction:
            raise ValueError("evaluation_data and evaluation_fraction exclude each other; set one")
        return self
