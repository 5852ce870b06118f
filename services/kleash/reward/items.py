"""Items of a request to jobs for a reward model, and its raw scores to results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from kleash.common.v1 import common_pb2
from kleash.lm.heads import Normalization
from kleash.reward.model import RawScore, RewardModel, ScoreJob
from kleash.reward.v1 import reward_pb2
from kleash.rpc.codec import encode_floats
from kleash.rpc.errors import InvalidRequest, PreconditionFailed

ITEM_PLACE = "items[{}]"
"""Path of an item in a request, for errors."""


@dataclass
class PreparedItems:
    """Items of one request after tokenization."""

    options: reward_pb2.ScoreOptions
    results: list[reward_pb2.ScoreResult]
    """One per item, in order; those without a job hold their fault already."""
    jobs: list[ScoreJob] = field(default_factory=list)
    job_items: list[int] = field(default_factory=list)
    """Index of the item of each job."""


def prepare(
    model: RewardModel,
    items: Sequence[reward_pb2.ScoreItem],
    options: reward_pb2.ScoreOptions,
    place: str = ITEM_PLACE,
) -> PreparedItems:
    """Tokenize, check and truncate. Slow for text: call it off the event loop."""
    if options.truncation not in reward_pb2.Truncation.values():
        raise InvalidRequest(
            f"options.truncation is {options.truncation}, which this server does not know.",
            field="options.truncation",
        )
    if options.return_token_scores and not model.facts.supports_token_scores:
        raise PreconditionFailed(
            f"the model '{model.facts.name}' has no score per token; leave "
            "options.return_token_scores out.",
            reason="NO_TOKEN_SCORES",
            field="options.return_token_scores",
        )
    prepared = PreparedItems(options, [reward_pb2.ScoreResult(item_id=i.item_id) for i in items])
    for index, job in enumerate(model.prepare(items, options, place)):
        result = prepared.results[index]
        if isinstance(job, tuple):
            result.code, result.error_message = job
            continue
        result.truncated = job.is_truncated
        prepared.jobs.append(job)
        prepared.job_items.append(index)
    return prepared


def complete(
    prepared: PreparedItems, raw_scores: Sequence[RawScore], model: RewardModel
) -> list[reward_pb2.ScoreResult]:
    """Fill in the model's answers. A score that is not finite becomes a status and never leaves."""
    facts = model.facts
    scale = facts.normalization if prepared.options.normalize else Normalization()
    for index, job, raw in zip(prepared.job_items, prepared.jobs, raw_scores, strict=True):
        result = prepared.results[index]
        if raw.fault is not None:
            result.code, result.error_message = raw.fault
            continue
        score = _scaled(np.array([raw.score]), scale)
        values = score if raw.token_scores is None else _scaled(raw.token_scores, scale)
        parts = np.array([*raw.components, raw.uncertainty / scale.std], dtype=np.float32)
        if not all(np.isfinite(each).all() for each in (score, values, parts)):
            result.code = common_pb2.ITEM_STATUS_CODE_NON_FINITE
            result.error_message = "the model's score is NaN or infinite."
            continue
        result.code = common_pb2.ITEM_STATUS_CODE_OK
        result.score = float(score[0])
        result.token_count = job.num_tokens if raw.num_tokens is None else raw.num_tokens
        result.truncated = job.is_truncated or raw.is_truncated
        if raw.token_scores is not None:
            result.token_scores.CopyFrom(encode_floats(values))
        for component, value in zip(facts.components, raw.components, strict=True):
            result.components.add(name=component.name, score=value)
        result.uncertainty = float(parts[-1])
    return prepared.results


def _scaled(scores: np.ndarray, scale: Normalization) -> np.ndarray:
    with np.errstate(over="ignore"):  # an overflow is infinite, and infinite is a status
        return ((scores.astype(np.float64) - scale.mean) / scale.std).astype(np.float32)
