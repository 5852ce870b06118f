"""Stage 2: a Bradley-Terry reward model from an SFT checkpoint and comparisons.

    kleash reward-model --model=runs/sft --data=comparisons.jsonl --out=runs/reward-model

One pass over whole rankings, AdamW, learning rate to 0; then the score is normalized on reference
responses and the model evaluated on prompts it has not seen. The result serves the reward service
and starts PPO's value network.
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
from kleash.data.comparisons import Ranking, load_comparisons
from kleash.data.demonstrations import load_demonstrations
from kleash.data.shuffle import shuffled
from kleash.lm.digest import model_digest
from kleash.lm.heads import Normalization, last_token_scores, reward_model_from_causal_lm
from kleash.lm.lineage import describe_lineage
from kleash.lm.load import (
    check_output,
    load_causal_lm,
    load_tokenizer,
    max_positions,
    resize_embeddings,
    save_checkpoint_folder,
)
from kleash.lm.optimizer import adamw
from kleash.lm.schedule import Schedule, set_learning_rate
from kleash.lm.sequences import TokenSequence
from kleash.reward_model.batches import hold_out, micro_batches, ranking_sequences
from kleash.reward_model.config import RewardModelConfig
from kleash.reward_model.evaluation import Evaluation, evaluate, score_rankings, score_sequences
from kleash.reward_model.loss import ranking_loss
from kleash.reward_model.normalize import measure_normalization

MIN_TRAINING_SAMPLE = 256
"""Rankings of the training data that are evaluated at least."""

MAX_STAND_IN_REFERENCES = 16384
"""Responses of comparisons that stand in for demonstrations: they know the mean to 0.01 std."""


@dataclass(frozen=True)
class StepFigures:
    """One optimizer step; a row of metrics.jsonl."""

    step: int
    loss: float
    preference_loss: float
    """Without the centring term."""
    accuracy: float
    """Before the update: in the first epoch the model has not seen these pairs."""
    grad_norm: float
    learning_rate: float


@dataclass(frozen=True)
class ReferenceScores:
    """Scores of the reference responses under the finished model."""

    source: str
    """demonstrations, or comparisons for all responses of the training comparisons."""
    num_responses: int
    raw_mean: float
    raw_std: float
    mean: float
    """Normalized: 0."""
    std: float
    """Normalized: 1 with normalization=mean_std."""


@dataclass(frozen=True)
class RewardModelReport:
    """What a run did; ``report.json`` of the folder."""

    digest: str
    """Digest of the weights as written."""
    steps: int
    """Optimizer steps."""
    num_rankings: int
    """Trained on; a pair of chosen and rejected is a ranking of two."""
    num_pairs: int
    num_ties_dropped: int
    """Pairs without a winner, held-out ones included."""
    num_records_skipped: int
    """Bad records that skip_bad left out, of all sources."""
    normalization: Normalization
    references: ReferenceScores
    held_out: Evaluation | None
    """On comparisons of prompts that training has not seen; null without any."""
    training: Evaluation
    """On a sample of the training comparisons: much better than held_out is overfitting."""
    seconds: float


@dataclass(frozen=True, eq=False)
class _Data:
    training: list[Ranking]
    held_out: list[Ranking]
    references: list[TokenSequence]
    reference_source: str
    num_ties: int
    num_skipped: int
    sha256: str


def train(config: RewardModelConfig, progress: Progress) -> RewardModelReport:
    """Train, normalize, evaluate and write ``config.out``, or raise UserError and write nothing."""
    started = time.monotonic()
    check_output(config.out)
    tokenizer = load_tokenizer(
        config.model, pad_token=config.pad_token, chat_template=config.chat_template
    )
    parent_digest = model_digest(load_causal_lm(config.model, dtype="auto"))
    model = reward_model_from_causal_lm(config.model, seed=config.seed, device=config.device)
    resize_embeddings(model, tokenizer)
    data = _load_data(config, tokenizer, context=max_positions(model))

    num_batches = math.ceil(len(data.training) / config.batch_size)
    schedule = Schedule(config.schedule, config.epochs * num_batches, config.warmup_fraction)
    optimizer = adamw(model, learning_rate=config.learning_rate, weight_decay=config.weight_decay)
    metrics: list[StepFigures] = []
    progress.start(schedule.num_steps, "reward model")
    for epoch in range(config.epochs):
        order = shuffled(len(data.training), seed=config.seed, epoch=epoch)
        for first in range(0, len(order), config.batch_size):
            batch = [data.training[index] for index in order[first : first + config.batch_size]]
            learning_rate = config.learning_rate * schedule.factor(len(metrics))
            set_learning_rate(optimizer, learning_rate)
            metrics.append(_optimizer_step(model, optimizer, batch, config, len(metrics)))
            progress.advance(1, loss=metrics[-1].loss, accuracy=metrics[-1].accuracy)

    model.to(getattr(torch, config.dtype))
    normalization, references = _normalize(model, data, config)
    normalization.store(model.config)
    report = RewardModelReport(
        digest=model_digest(model),
        steps=len(metrics),
        num_rankings=len(data.training),
        num_pairs=sum(len(ranking.pairs) for ranking in data.training),
        num_ties_dropped=data.num_ties,
        num_records_skipped=data.num_skipped,
        normalization=normalization,
        references=references,
        held_out=_evaluate(model, data.held_out, config) if data.held_out else None,
        training=_evaluate(model, _training_sample(data, config), config),
        seconds=round(time.monotonic() - started, 3),
    )
    progress.finish()
    lineage = describe_lineage(
        "reward-model",
        config,
        parent=config.model,
        parent_digest=parent_digest,
        digest=report.digest,
        data_sha256=data.sha256,
        run_id=config.run_id,
    )
    files = {
        "report.json": json.dumps(asdict(report), indent=2) + "\n",
        "metrics.jsonl": "".join(json.dumps(asdict(row)) + "\n" for row in metrics),
    }
    save_checkpoint_folder(model, tokenizer, config.out, lineage, files)
    return report


def _load_data(config: RewardModelConfig, tokenizer: Any, *, context: int) -> _Data:
    max_tokens = config.max_tokens or context
    if max_tokens > context:
        raise ConfigError(
            f"max_tokens is {max_tokens}, but the model in {config.model} takes {context} tokens."
        )
    limits = {"max_tokens": max_tokens, "skip_bad": config.skip_bad}
    data = load_comparisons(config.data, tokenizer, **limits)
    training, held_out = hold_out(data, config.held_out_fraction, seed=config.seed)
    num_ties, num_skipped = data.num_tied_pairs, len(data.skipped)
    if config.evaluation_data:
        evaluation = load_comparisons(config.evaluation_data, tokenizer, **limits)
        held_out = list(evaluation)
        num_ties += evaluation.num_tied_pairs
        num_skipped += len(evaluation.skipped)
    if config.reference_data:
        demonstrations = load_demonstrations(config.reference_data, tokenizer, **limits)
        references, source = list(demonstrations), "demonstrations"
        num_skipped += len(demonstrations.skipped)
    else:
        references = [s for ranking in training for s in ranking_sequences(ranking)]
        chosen = shuffled(len(references), seed=config.seed, purpose="references")
        references = [references[index] for index in chosen[:MAX_STAND_IN_REFERENCES]]
        source = "comparisons"
    return _Data(training, held_out, references, source, num_ties, num_skipped, data.sha256)


def _optimizer_step(
    model: Any,
    optimizer: torch.optim.Optimizer,
    batch: Sequence[Ranking],
    config: RewardModelConfig,
    step: int,
) -> StepFigures:
    """One update from whole rankings; raises UserError when the loss or gradient is not finite."""
    optimizer.zero_grad(set_to_none=True)
    loss = preference_loss = accuracy = 0.0
    for part in micro_batches(batch, config.micro_batch_tokens, device=model.device):
        with torch.autocast(model.device.type, torch.bfloat16, enabled=config.dtype == "bfloat16"):
            scores = last_token_scores(model, part.responses)
        result = ranking_loss(
            scores,
            part.pairs,
            part.weights,
            part.margins * config.use_margins,
            label_smoothing=config.label_smoothing,
            centring_coefficient=config.centring_coefficient,
        )
        result.loss.backward()
        loss += result.loss.item()
        preference_loss += result.preference_loss.item()
        accuracy += result.accuracy.item()
    max_norm = math.inf if config.max_grad_norm is None else config.max_grad_norm
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm).item()
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        raise UserError(
            f"training diverged at step {step} (loss {loss}, gradient norm {grad_norm}) and "
            f"nothing was written; lower learning_rate, which is {config.learning_rate}, or check "
            f"the weights in {config.model}."
        )
    optimizer.step()
    learning_rate = optimizer.param_groups[0]["lr"]
    return StepFigures(step, loss, preference_loss, accuracy, grad_norm, learning_rate)


def _normalize(
    model: Any, data: _Data, config: RewardModelConfig
) -> tuple[Normalization, ReferenceScores]:
    raw = score_sequences(model, data.references, config.micro_batch_tokens)
    normalization = measure_normalization(raw, config.normalization)
    scores = (raw - normalization.mean) / normalization.std
    return normalization, ReferenceScores(
        source=data.reference_source,
        num_responses=len(raw),
        raw_mean=float(raw.mean()),
        raw_std=float(raw.std()),
        mean=float(scores.mean()),
        std=float(scores.std()),
    )


def _evaluate(model: Any, rankings: Sequence[Ranking], config: RewardModelConfig) -> Evaluation:
    scores = score_rankings(model, rankings, config.micro_batch_tokens)
    return evaluate(rankings, scores, seed=config.seed)


def _training_sample(data: _Data, config: RewardModelConfig) -> list[Ranking]:
    """As many training rankings as held-out ones, to set the two accuracies side by side."""
    size = max(len(data.held_out), MIN_TRAINING_SAMPLE)
    order = shuffled(len(data.training), seed=config.seed, purpose="training sample")
    return [data.training[index] for index in order[:size]]
