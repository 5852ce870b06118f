"""Items of a request to rows for the reward model, and its raw scores to results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from kleash.common.v1 import common_pb2
from kleash.lm.heads import Normalization
from kleash.reward.inputs import InputError
from kleash.reward.scorer import RawScore, RewardScorer, ScoreJob
from kleash.reward.v1 import reward_pb2
from kleash.rpc.codec import encode_floats
from kleash.rpc.errors import InvalidRequest
from kleash.rpc.requests import decode_sequence, too_long, unknown_id

Fault = tuple[common_pb2.ItemStatusCode, str]
"""Status of an item that has no score, and the cause."""

ITEM_PLACE = "items[{}]"
"""Path of an item in a request, for errors."""

_TOO_LONG = common_pb2.ITEM_STATUS_CODE_INPUT_TOO_LONG
_INVALID = common_pb2.ITEM_STATUS_CODE_INVALID_INPUT
_EMPTY: Fault = (_INVALID, "the input has no tokens.")


@dataclass
class PreparedItems:
    """Items of one request after tokenization."""

    options: reward_pb2.ScoreOptions
    results: list[reward_pb2.ScoreResult]
    """One per item, in order; those without a row hold their fault already."""
    jobs: list[ScoreJob] = field(default_factory=list)
    job_items: list[int] = field(default_factory=list)
    """Index of the item of each job."""


def encode_items(
    scorer: RewardScorer, items: Sequence[reward_pb2.ScoreItem], place: str = ITEM_PLACE
) -> list[np.ndarray | Fault]:
    """Token ids of each item before truncation, or why there are none.

    Raises InvalidRequest or PreconditionFailed for an item that is malformed as a message;
    ``place`` with the item's index filled in is its path in the request.
    """
    inputs: list[np.ndarray | Fault] = [_EMPTY] * len(items)
    texts: dict[int, str] = {}
    for index, item in enumerate(items):
        kind = item.WhichOneof("input")
        if kind == "text":
            texts[index] = item.text
        elif kind == "conversation":
            inputs[index] = _encode_conversation(scorer, item.conversation)
        elif kind == "tokens":
            inputs[index], _ = decode_sequence(
                item.tokens,
                tokenizer_sha256=scorer.frozen.tokenizer_sha256,
                field=f"{place.format(index)}.tokens",
            )
        else:
            raise InvalidRequest(
                f"{place.format(index)} has no input; set conversation, text or tokens.",
                field=f"{place.format(index)}.input",
            )
    encoded = scorer.encoder.encode_texts(list(texts.values()))
    for index, ids in zip(texts, encoded, strict=True):
        inputs[index] = ids
    return [_checked(ids, scorer.frozen.vocab_size) for ids in inputs]


def prepare(
    scorer: RewardScorer,
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
    prepared = PreparedItems(options, [reward_pb2.ScoreResult(item_id=i.item_id) for i in items])
    limit = scorer.frozen.max_item_tokens
    for index, ids in enumerate(encode_items(scorer, items, place)):
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
                result.code, result.error_message = _TOO_LONG, fault
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
        score = _scaled(np.array([raw.score]), scale)
        values = score if raw.token_scores is None else _scaled(raw.token_scores, scale)
        if not (np.isfinite(score).all() and np.isfinite(values).all()):
            result.code = common_pb2.ITEM_STATUS_CODE_NON_FINITE
            result.error_message = "the model's score is NaN or infinite."
            continue
        result.code = common_pb2.ITEM_STATUS_CODE_OK
        result.score = float(score[0])
        result.token_count = len(job.ids)
        if raw.token_scores is not None:
            result.token_scores.CopyFrom(encode_floats(values))
    return prepared.results


def _encode_conversation(
    scorer: RewardScorer, conversation: common_pb2.Conversation
) -> np.ndarray | Fault:
    messages = [{"role": turn.role, "content": turn.content} for turn in conversation.messages]
    try:
        return scorer.encoder.encode_conversation(messages)
    except InputError as error:
        return _INVALID, str(error)


def _checked(ids: np.ndarray | Fault, vocab_size: int) -> np.ndarray | Fault:
    if isinstance(ids, tuple):
        return ids
    if not len(ids):
        return _EMPTY
    fault = unknown_id(ids, vocab_size)
    return (_INVALID, fault) if fault else ids


def _scaled(scores: np.ndarray, scale: Normalization) -> np.ndarray:
    with np.errstate(over="ignore"):  # an overflow is infinite, and infinite is a status
        return ((scores.astype(np.float64) - scale.mean) / scale.std).astype(np.float32)
