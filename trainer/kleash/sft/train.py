"""Stage 1: supervised fine-tuning of a causal language model on demonstrations.

    kleash sft --model=FOLDER --data=demonstrations.jsonl --out=runs/sft

Next-token cross-entropy on the response and its end token, AdamW, one pass by default. The result
starts PPO and, frozen, is its reference.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from kleash.base.errors import ConfigError, UserError
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


@dataclass(frozen=True)
class SFTReport:
    """What a run did; ``report.json`` of the folder. Losses are nats per learned token."""

    loss_first: float
    """Mean training loss of the first tenth of the steps."""
    loss_last: float
    """Mean training loss of the last tenth of the steps."""
    evaluation_loss_first: float | None
    """Held-out loss before training; null without held-out data."""
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
    """Digest of the weights as written."""


@dataclass(frozen=True, eq=False)
class _Data:
    training: list[TokenSequence]
    held_out: list[TokenSequence]
    num_skipped: int
    sha256: str


def train(config: SFTConfig, progress: Progress) -> SFTReport:
    """Train as ``config`` says and write ``config.out``, or raise UserError and write nothing."""
    check_output(config.out)
    tokenizer = load_tokenizer(
        config.model, pad_token=config.pad_token, chat_template=config.chat_template
    )
    model = load_causal_lm(config.model, dtype="auto", device=config.device)
    parent_digest = model_digest(model)
    model.float()
    resize_embeddings(model, tokenizer)
    data = _load_data(config, tokenizer, context=max_positions(model))

    num_batches = math.ceil(len(data.training) / config.batch_size)
    schedule = Schedule(config.schedule, config.epochs * num_batches, config.warmup_fraction)
    optimizer = adamw(model, learning_rate=config.learning_rate, weight_decay=config.weight_decay)
    started = time.monotonic()
    evaluation_loss_first = _evaluate(model, data.held_out, config)
    metrics: list[dict[str, float]] = []
    progress.start(schedule.num_steps, "SFT")
    for epoch in range(config.epochs):
        order = shuffled(len(data.training), seed=config.seed, epoch=epoch)
        for first in range(0, len(order), config.batch_size):
            batch = [data.training[index] for index in order[first : first + config.batch_size]]
            learning_rate = config.learning_rate * schedule.factor(len(metrics))
            set_learning_rate(optimizer, learning_rate)
            loss, grad_norm = _optimizer_step(model, optimizer, batch, config)
            metrics.append(
                {
                    "step": len(metrics),
                    "loss": loss,
                    "grad_norm": grad_norm,
                    "learning_rate": learning_rate,
                }
            )
            if not (math.isfinite(loss) and math.isfinite(grad_norm)):
                raise _diverged(config, metrics[-1], schedule.num_steps)
            progress.advance(1, loss=loss, learning_rate=learning_rate)
    evaluation_loss = _evaluate(model, data.held_out, config)
    progress.finish()
    seconds = time.monotonic() - started

    model.to(getattr(torch, config.dtype))
    losses = [row["loss"] for row in metrics]
    tenth = math.ceil(len(losses) / 10)
    report = SFTReport(
        loss_first=sum(losses[:tenth]) / tenth,
        loss_last=sum(losses[-tenth:]) / tenth,
        evaluation_loss_first=evaluation_loss_first,
        evaluation_loss=evaluation_loss,
        steps=len(losses),
        tokens=config.epochs * sum(sequence.response_length for sequence in data.training),
        samples=len(data.training),
        samples_held_out=len(data.held_out),
        samples_skipped=data.num_skipped,
        seconds=round(seconds, 3),
        digest=model_digest(model),
    )
    lineage = describe_lineage(
        "sft",
        config,
        parent=config.model,
        parent_digest=parent_digest,
        digest=report.digest,
        data_sha256=data.sha256,
        run_id=config.run_id,
    )
    files = {
        "report.json": json.dumps(asdict(report), indent=2) + "\n",
        "metrics.jsonl": "".join(json.dumps(row) + "\n" for row in metrics),
    }
    save_checkpoint_folder(model, tokenizer, config.out, lineage, files)
    return report


def _load_data(config: SFTConfig, tokenizer: Any, *, context: int) -> _Data:
    max_tokens = config.max_tokens or context
    if max_tokens > context:
        raise ConfigError(
            f"max_tokens is {max_tokens}, but the model in {config.model} takes {context} tokens."
        )

    def load(source: str) -> Loaded[TokenSequence]:
        loaded = load_demonstrations(
            source, tokenizer, max_tokens=max_tokens, skip_bad=config.skip_bad
        )
        if config.loss_on_prompt:
            # The first token has nothing before it that could predict it.
            loaded[:] = [TokenSequence(sequence.ids, 1) for sequence in loaded]
        return loaded

    data = load(config.data)
    if config.evaluation_data:
        held_out = load(config.evaluation_data)
        num_skipped = len(data.skipped) + len(held_out.skipped)
        return _Data(list(data), list(held_out), num_skipped, data.sha256)
    if not config.evaluation_fraction:
        return _Data(list(data), [], len(data.skipped), data.sha256)
    order = shuffled(len(data), seed=config.seed, purpose="held out")
    num_held_out = max(1, round(config.evaluation_fraction * len(data)))
    if num_held_out == len(data):
        raise ConfigError(
            f"evaluation_fraction {config.evaluation_fraction} of {len(data)} demonstrations "
            "leaves none to train on; lower it or add data."
        )
    held_out = [data[index] for index in order[:num_held_out]]
    training = [data[index] for index in order[num_held_out:]]
    return _Data(training, held_out, len(data.skipped), data.sha256)


def _optimizer_step(
    model: Any, optimizer: torch.optim.Optimizer, batch: Sequence[TokenSequence], config: SFTConfig
) -> tuple[float, float]:
    """One update; returns the mean loss over the batch's tokens and the norm of its gradient."""
    num_tokens = sum(sequence.response_length for sequence in batch)
    optimizer.zero_grad(set_to_none=True)
    loss = 0.0
    for group in micro_batches(batch, config.micro_batch_tokens):
        part = _loss(model, [batch[index] for index in group], num_tokens, config)
        part.backward()
        loss += part.item()
    grad_norm = torch.nn.utils.clip_grad_norm_(
        model.parameters(), math.inf if config.max_grad_norm is None else config.max_grad_norm
    )
    optimizer.step()
    return loss, grad_norm.item()


@torch.no_grad()
def _evaluate(model: Any, held_out: Sequence[TokenSequence], config: SFTConfig) -> float | None:
    """Mean loss over the tokens of the held-out demonstrations; None without any."""
    if not held_out:
        return None
    num_tokens = sum(sequence.response_length for sequence in held_out)
    groups = micro_batches(held_out, config.micro_batch_tokens)
    return sum(
        _loss(model, [held_out[index] for index in group], num_tokens, config).item()
        for group in groups
    )


def _loss(
    model: Any, sequences: Sequence[TokenSequence], num_tokens: int, config: SFTConfig
) -> torch.Tensor:
    packed = pack(sequences, model.device)
    with torch.autocast(model.device.type, torch.bfloat16, enabled=config.dtype == "bfloat16"):
        log_probs = response_log_probs(model, packed)
    return cross_entropy(log_probs, packed.response_mask, num_tokens=num_tokens)


def _diverged(config: SFTConfig, row: dict[str, float], num_steps: int) -> UserError:
    return UserError(
        f"training diverged at step {row['step']} of {num_steps} (loss {row['loss']}, gradient "
        f"norm {row['grad_norm']}) and nothing was written; lower learning_rate, which is "
        f"{config.learning_rate}, or check the weights in {config.model}."
    )
