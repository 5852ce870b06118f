"""Configuration of stage 1, supervised fine-tuning."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from kleash.base.config import Config, RunId


class SFTConfig(Config):
    """Train a causal language model on demonstrations."""

    model: Path
    """Hugging Face folder of the causal language model to start from."""
    data: str
    """Demonstrations: a JSON Lines file, or a folder or hub name for `datasets`, with or without a
    :split."""
    out: Path
    """Folder to write: a Hugging Face checkpoint with kleash.json, report.json, metrics.jsonl."""
    run_id: RunId = None
    """Name of the run that this stage belongs to, recorded in kleash.json; null records none."""
    evaluation_data: str | None = None
    """Held-out demonstrations, in the same forms as data."""
    evaluation_fraction: float = Field(default=0.0, ge=0, lt=1)
    """Share of data to hold out when there is no evaluation_data; 0 holds out nothing."""
    learning_rate: float = Field(default=1e-5, gt=0, allow_inf_nan=False)
    """Peak learning rate of AdamW."""
    epochs: int = Field(default=1, ge=1)
    """Passes over the data, each in another order."""
    batch_size: int = Field(default=32, ge=1)
    """Demonstrations in one optimizer step."""
    micro_batch_tokens: int = Field(default=8192, ge=1)
    """Padded tokens that go through the model at once; changes memory, not the result."""
    max_tokens: int | None = Field(default=None, ge=2)
    """Longest demonstration in tokens, prompt and response; null: the model's context."""
    schedule: Literal["linear", "cosine", "constant"] = "cosine"
    """Decay of the learning rate after the warm-up, to 0 at the end."""
    warmup_fraction: float = Field(default=0.03, ge=0, lt=1)
    """Share of the steps in which the learning rate rises to its peak."""
    weight_decay: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """AdamW weight decay of matrices; norms and biases have none."""
    max_grad_norm: float | None = Field(default=1.0, gt=0)
    """Longer gradients are scaled down to this norm; null: none are."""
    loss_on_prompt: bool = False
    """Learn the tokens of the prompt too, not only the response and its end."""
    seed: int = Field(default=0, ge=0)
    """Decides the order of the data and what is held out."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: compute and save in it; weights and optimizer state are float32 in training."""
    device: str = "cpu"
    """Where to train: cpu, cuda or cuda:N."""
    pad_token: str | None = None
    """Text of the token to pad with, for a tokenizer without one."""
    chat_template: Path | None = None
    """File with a Jinja chat template to use instead of the tokenizer's own."""
    skip_bad: bool = False
    """Leave bad lines of the data out and count them, instead of stopping at the first one."""
    num_threads: int = Field(default=0, ge=0)
    """Threads that torch computes with on the CPU; 0: its own choice."""

    @model_validator(mode="after")
    def _check_evaluation(self) -> SFTConfig:
        if self.evaluation_data and self.evaluation_fraction:
            raise ValueError("evaluation_data and evaluation_fraction exclude each other; set one")
        return self
