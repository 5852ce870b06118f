"""Requests of the reward service to rows for the model, and the model's answers to results."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from kleash.common.v1 import common_pb2
from kleash.lm.heads import Normalization
from kleash.reward.inputs import InputError, Messages
from kleash.reward.scorer import RawScore, RewardScorer, ScoreJob
from kleash.reward.v1 import reward_pb2
from kleash.rpc.codec import encode_floats
from kleash.rpc.errors import InvalidRequest
from kleash.rpc.requests import decode_sequence, too_long, unknown_id

Fault = tuple[common_pb2.ItemStatusCode, str]

TOO_LONG = common_pb2.ITEM_STATUS_CODE_INPUT_TOO_LONG
INVALID = common_pb2.ITEM_STATUS_CODE_INVALID_INPUT


@dataclass
class PreparedItems:
    """Items of one request after tokenization: rows for the model, and faults of the others."""

    options: reward_pb2.ScoreOptions
    results: list[reward_pb2.ScoreResult]
    """One per item, in order; those without a row hold their fault already."""
    jobs: list[ScoreJob] = field(default_factory=list)
    job_items: list[int] = field(default_factory=list)
    """Index of the item of each job."""

    @property
    def lengths(self) -> list[int]:
        """Tokens of each job."""
        return [len(job.ids) for job in self.jobs]


def check_options(options: reward_pb2.ScoreOptions) -> None:
    """Raise InvalidRequest for a truncation that this version does not know."""
    if options.truncation not in reward_pb2.Truncation.values():
        raise InvalidRequest(
            f"options.truncation is {options.truncation}, which this server does not know.",
            field="options.truncation",
        )


def encode_items(
    scorer: RewardScorer, items: Sequence[reward_pb2.ScoreItem], *, field: str = "items"
) -> list[np.ndarray | Fault]:
    """Token ids of each item before truncation, or why there are none.

    Raises InvalidRequest or PreconditionFailed for an item that is malformed as a message.
    """
    inputs: list[np.ndarray | Fault] = [(INVALID, "the input has no tokens.")] * len(items)
    texts: dict[int, str] = {}
    for index, item in enumerate(items):
        place = f"{field}[{index}]"
        kind = item.WhichOneof("input")
        if kind == "text":
            texts[index] = item.text
        elif kind == "conversation":
            inputs[index] = _encode_conversation(scorer, item.conversation)
        elif kind == "tokens":
            inputs[index], _ = decode_sequence(
                item.tokens,
                tokenizer_sha256=scorer.frozen.tokenizer_sha256,
                field=f"{place}.tokens",
            )
        else:
            raise InvalidRequest(
                f"{place} has no input; set conversation, text or tokens.", field=f"{place}.input"
            )
    encoded = scorer.encoder.encode_texts(list(texts.values()))
    for index, ids in zip(texts, encoded, strict=True):
        inputs[index] = ids
    return [_checked(ids, scorer.frozen.vocab_size) for ids in inputs]


def prepare(
    scorer: RewardScorer,
    items: Sequence[reward_pb2.ScoreItem],
    options: reward_pb2.ScoreOptions,
    *,
    field: str = "items",
) -> PreparedItems:
    """Tokenize, check and truncate. Slow for text: call it off the event loop."""
    check_options(options)
    prepared = PreparedItems(options, [reward_pb2.ScoreResult(item_id=i.item_id) for i in items])
    limit = scorer.frozen.max_item_tokens
    for index, ids in enumerate(encode_items(scorer, items, field=field)):
        result = prepared.results[index]
        if isinstance(ids, tuple):
            result.code, result.error_message = ids
            continue
        if fault := too_long(len(ids), limit):
            if options.truncation == reward_pb2.TRUNCATION_LEFT:
                ids = ids[-limit:]
            elif options.truncation == reward_pb2.TRUNCATION_RIGHT:
                ids = ids[:limit]
            else:
                result.code, result.error_message = TOO_LONG, fault
                continue
            result.truncated = True
        prepared.jobs.append(ScoreJob(ids, options.return_token_scores))
        prepared.job_items.append(index)
    return prepared


def complete(
    prepared: PreparedItems, raw_scores: Sequence[RawScore], normalization: Normalization
) -> list[reward_pb2.ScoreResult]:
    """Fill in the model's answers. A score that is not finite becomes a status and never leaves."""
    scale = normalization if prepared.options.normalize else Normalization()
    for index, job, raw in zip(prepared.job_items, prepared.jobs, raw_scores, strict=True):
        result = prepared.results[index]
        if raw.fault:
            result.code, result.error_message = TOO_LONG, raw.fault
            continue
        score = np.float32((raw.score - scale.mean) / scale.std)
        values = score[None] if raw.token_scores is None else _scaled(raw.token_scores, scale)
        if not (np.isfinite(score) and np.isfinite(values).all()):
            result.code = common_pb2.ITEM_STATUS_CODE_NON_FINITE
            result.error_message = "the model's score is NaN or infinite."
            continue
        result.code = common_pb2.ITEM_STATUS_CODE_OK
        result.score = float(score)
        result.token_count = len(job.ids)
        if raw.token_scores is not None:
            result.token_scores.CopyFrom(encode_floats(values))
    return prepared.results


def rank(
    results: Sequence[reward_pb2.ScoreResult], raw_scores: Sequence[float | None]
) -> tuple[list[int], list[float]]:
    """Ranking of candidates, best first, and the probability that the best beats each.

    The Bradley-Terry probability is sigmoid(best - each) of raw scores: the model is trained on
    those, and dividing by a normalization would change the odds. A candidate without a score is
    not ranked; its probability is 0.
    """
    scored = {
        index: raw
        for index, (result, raw) in enumerate(zip(results, raw_scores, strict=True))
        if result.code == common_pb2.ITEM_STATUS_CODE_OK and raw is not None
    }
    ranking = sorted(scored, key=lambda index: (-scored[index], index))
    preference = [0.0] * len(results)
    for index, score in scored.items():
        preference[index] = 1 / (1 + math.exp(-(scored[ranking[0]] - score)))
    return ranking, preference


def messages_of(conversation: common_pb2.Conversation) -> Messages:
    """Turns as chat templates take them."""
    return [{"role": turn.role, "content": turn.content} for turn in conversation.messages]


def _encode_conversation(
    scorer: RewardScorer, conversation: common_pb2.Conversation
) -> np.ndarray | Fault:
    try:
        return scorer.encoder.encode_conversation(messages_of(conversation))
    except InputError as error:
        return INVALID, str(error)


def _checked(ids: np.ndarray | Fault, vocab_size: int) -> np.ndarray | Fault:
    if isinstance(ids, tuple):
        return ids
    if not len(ids):
        return INVALID, "the input has no tokens."
    fault = unknown_id(ids, vocab_size)
    return (INVALID, fault) if fault else ids


def _scaled(token_scores: np.ndarray, scale: Normalization) -> np.ndarray:
    return ((token_scores.astype(np.float64) - scale.mean) / scale.std).astype(np.float32)
