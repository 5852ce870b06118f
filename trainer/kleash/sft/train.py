"""Stage 1: supervised fine-tuning of a causal language model on demonstrations.

    kleash sft --model=FOLDER --data=demonstrations.jsonl --out=runs/sft

Next-token cross-entropy on the response and its end token, AdamW, one pass by default. The result
starts PPO and, frozen, is its reference.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from kleash.base.errors import ConfigError, ModelError, UserError
from kleash.base.progress import Progress
from kleash.data.demonstrations import load_demonstrations
from kleash.data.jsonl import Loaded
from kleash.data.shuffle import shuffled
from kleash.lm.digest import model_digest
from kleash.lm.lineage import describe_lineage
from kleash.lm.load import (
    check_output,
    load_causal_lm,
    load_tokenizer,
    max_positions,
    resize_embeddings,
    save_checkpoint_folder,
)
from kleash.lm.log_probs import response_log_probs
from kleash.lm.optimizer import adamw
from kleash.lm.schedule import Schedule, set_learning_rate
from kleash.lm.sequences import TokenSequence, micro_batches, pack
from kleash.sft.config import SFTConfig
from kleash.sft.loss import cross_entropy

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SFTReport:
    """What a run did; report.json of the folder."""

    loss_first: float
    """Mean training loss of the first tenth of the steps, nats per token."""
    loss_last: float
    """Mean training loss of the last tenth of the steps."""
    evaluation_loss_first: float | None
    """Held-out loss before training, nats per token; null without held-out data."""
    evaluation_loss: float | None
    """Held-out loss after training."""
    steps: int
    """Optimizer steps."""
    tokens: int
    """Tokens learned, over all epochs."""
    samples: int
    """Demonstrations trained on."""
    samples_held_out: int
    samples_skipped: int
    """Bad demonstrations that skip_bad left out, held-out ones included."""
    seconds: float
    """Time of the training loop and the evaluations."""
    digest: str
    """Digest of the weights written."""


def train(config: SFTConfig, progress: Progress) -> SFTReport:
    """Train as ``config`` says and write ``config.out``; raises UserError and writes nothing else."""
    check_output(config.out)
    tokenizer = load_tokenizer(
        config.model, pad_token=config.pad_token, chat_template=config.chat_template
    )
    model = load_causal_lm(config.model, dtype="auto", device=config.device)
    parent_digest = model_digest(model)
    model.float()
    resize_embeddings(model, tokenizer)
    data = _load_data(config, tokenizer, _max_tokens(config, model))

    num_batches = math.ceil(len(data.training) / config.batch_size)
    schedule = Schedule(config.schedule, config.epochs * num_batches, config.warmup_fraction)
    optimizer = adamw(
        model, learning_rate=config.learning_rate, weight_decay=config.weight_decay
    )
    metrics: list[dict[str, float]] = []
    started = time.monotonic()
    evaluation_loss_first = _evaluate(model, data.held_out, config)
    progress.start(schedule.num_steps, "SFT")
    for epoch in range(config.epochs):
        order = shuffled(len(data.training), seed=config.seed, epoch=epoch)
        for start in range(0, len(order), config.batch_size):
            batch = [data.training[index] for index in order[start : start + config.batch_size]]
            step = len(metrics)
            learning_rate = config.learning_rate * schedule.factor(step)
            set_learning_rate(optimizer, learning_rate)
            loss, grad_norm = _optimizer_step(model, optimizer, batch, config)
            if not (math.isfinite(loss) and math.isfinite(grad_norm)):
                raise UserError(
                    f"training diverged at step {step} of {schedule.num_steps} (loss {loss}, "
                    f"gradient norm {grad_norm}); nothing was written: lower learning_rate "
                    f"({config.learning_rate}) or check the weights in {config.model}."
                )
            metrics.append(
                {"step": step, "loss": loss, "grad_norm": grad_norm, "learning_rate": learning_rate}
            )
            progress.advance(1, loss=loss, learning_rate=learning_rate)
    evaluation_loss = _evaluate(model, data.held_out, config)
    progress.finish()

    model.to(getattr(torch, config.dtype))
    losses = [row["loss"] for row in metrics]
    tenth = math.ceil(len(losses) / 10)
    report = SFTReport(
        loss_first=sum(losses[:tenth]) / tenth,
        loss_last=sum(losses[-tenth:]) / tenth,
        evaluation_loss_first=evaluation_loss_first,
        evaluation_loss=evaluation_loss,
        steps=len(losses),
        tokens=config.epochs * sum(_learned(sequence, config) for sequence in data.training),
        samples=len(data.training),
        samples_held_out=len(data.held_out),
        samples_skipped=data.num_skipped,
        seconds=round(time.monotonic() - started, 3),
        digest=model_digest(model),
    )
    lineage = describe_lineage(
        "sft",
        config,
        parent=config.model,
        parent_digest=parent_digest,
        digest=report.digest,
        data_sha256=data.sha256,
    )
    files = {
        "report.json": json.dumps(asdict(report), indent=2) + "\n",
        "metrics.jsonl": "".join(json.dumps(row) + "\n" for row in metrics),
    }
    save_checkpoint_folder(model, tokenizer, config.out, lineage, files)
    return report
