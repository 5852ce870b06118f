"""Responses of a step as lines of samples.jsonl: texts, figures of tokens, the models behind them.

docs/metrics.md explains every key.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from kleash.ppo.batch import RolloutBatch
from kleash.ppo.config import AlgorithmConfig
from kleash.ppo.loss import apply_missing_eos, kl_per_token, token_rewards
from kleash.ppo.rollout import Sample

DECIMALS = 6
"""Of per-token figures: a float32 has about seven digits."""


def describe_samples(
    samples: Sequence[Sample],
    batch: RolloutBatch,
    tokenizer: Any,
    algorithm: AlgorithmConfig,
    *,
    kl_coefficient: float,
) -> list[dict[str, Any]]:
    """The samples, which are the first rows of ``batch``; ``kl_coefficient`` is the step's."""
    part = batch.select(range(len(samples))).to("cpu")
    kl = kl_per_token(part.old_log_probs, part.reference_log_probs, part.mask)
    scores = apply_missing_eos(
        part.scores,
        part.is_stopped,
        mode=algorithm.missing_eos,
        penalty=algorithm.missing_eos_penalty,
    )
    rewards = token_rewards(scores, kl, part.mask, kl_coefficient=kl_coefficient)
    return [
        _describe(sample, tokenizer)
        | {
            "log_probs": _rounded(part.old_log_probs[row], sample),
            "kl": _rounded(kl[row], sample),
            "rewards": _rounded(rewards[row], sample),
        }
        for row, sample in enumerate(samples)
    ]


def _describe(sample: Sample, tokenizer: Any) -> dict[str, Any]:
    ids = sample.sequence.ids.tolist()
    start = sample.sequence.response_start
    return {
        "prompt_id": sample.record.prompt_id,
        "prompt": sample.record.text,
        "response": tokenizer.decode(ids[start:], skip_special_tokens=True),
        "prompt_token_ids": ids[:start],
        "response_token_ids": ids[start:],
        "finish_reason": "stop" if sample.is_stopped else "length",
        "score": sample.score,
        "uncalibrated_score": sample.uncalibrated_score,
        "weights_versions": [
            [span.start, span.end, span.weights_version] for span in sample.version_spans
        ],
        "reward_revision": sample.reward_revision,
        "reference_revision": sample.reference_revision,
    }


def _rounded(row: torch.Tensor, sample: Sample) -> list[float]:
    return [round(value, DECIMALS) for value in row[: sample.sequence.response_length].tolist()]
