"""Responses of a step as lines of samples.jsonl: texts, figures of tokens, the models behind them.

docs/metrics.md explains every key.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from kleash.ppo.batch import RolloutBatch
from kleash.ppo.config import AlgorithmConfig
from kleash.ppo.loss import apply_missing_eos, kl_per_token, token_rewards
from kleash.ppo.rollout import Sample
from kleash.ppo.token_texts import token_texts

DECIMALS = 6
"""Of per-token figures: a float32 has about seven digits."""
NEWEST_BYTES = 1 << 20
"""Of the end of samples.jsonl that is looked through for the newest step."""


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


def newest_samples(path: Path) -> list[dict[str, Any]]:
    """Lines of the newest step in samples.jsonl, as far as they fit into NEWEST_BYTES."""
    if not path.is_file():
        return []
    with path.open("rb") as file:
        start = max(0, file.seek(0, os.SEEK_END) - NEWEST_BYTES)
        file.seek(start)
        lines = file.read().split(b"\n")
    # What is cut at the front, or was at the end by a crash.
    rows = [json.loads(line) for line in lines[1 if start else 0 : -1]]
    return [row for row in rows if row["step"] == rows[-1]["step"]]


def _describe(sample: Sample, tokenizer: Any) -> dict[str, Any]:
    ids = sample.sequence.ids.tolist()
    start = sample.sequence.response_start
    return {
        "prompt_id": sample.record.prompt_id,
        "prompt": sample.record.text,
        "response": tokenizer.decode(ids[start:], skip_special_tokens=True),
        "prompt_token_ids": ids[:start],
        "response_token_ids": ids[start:],
        "response_tokens": token_texts(tokenizer, ids[start:]),
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
