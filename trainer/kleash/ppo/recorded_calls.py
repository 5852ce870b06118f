"""Calls of the trainer to its services as lines of JSON: requests, replies, errors, times.

Token ids are base64 of little-endian int32, log-probs of float32; scores are JSON numbers that read
back to the same bits.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf.json_format import MessageToDict, ParseDict
from google.protobuf.message import Message

from kleash.base.errors import ConfigError
from kleash.client.reward import Score
from kleash.client.types import GeneratedSequence, Prompt, Sampling, Tokens, VersionSpan

_IDS, _FLOATS = np.dtype("<i4"), np.dtype("<f4")


@dataclass(frozen=True)
class Call:
    """One call: what was asked and what came of it."""

    service: str
    """policy, reward or reference."""
    method: str
    """Of its gRPC service."""
    request: dict[str, Any]
    reply: Any = None
    """None when the call failed; of a stream, what came before that."""
    error: dict[str, str] | None = None
    """code, reason and message of the status; None when the call succeeded."""
    began_s: float = 0.0
    """Seconds since the step began."""
    ended_s: float = 0.0
    replica: int | None = None
    """Of the policy."""

    def to_line(self) -> str:
        """As a line of calls.jsonl."""
        return json.dumps(asdict(self), ensure_ascii=False) + "\n"


def read_calls(path: Path) -> list[Call]:
    """The calls of a file, in the order in which they ended. Raises ConfigError."""
    try:
        with path.open(encoding="utf-8") as file:
            return [Call(**json.loads(line)) for line in file]
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(
            f"the calls in {path} cannot be read ({error}); bring the file back, or take another "
            "recording."
        ) from None


def key_of(request: dict[str, Any]) -> str:
    """The same for equal requests."""
    return json.dumps(request, sort_keys=True)


# ------------------------------------------------------------------------------------- the requests


def generate_request(
    prompts: Iterable[Prompt],
    sampling: Sampling,
    *,
    min_weights_version: int,
    tokenizer_sha256: str,
) -> dict[str, Any]:
    """PolicyService.Generate."""
    return {
        "prompts": [
            {
                "prompt_id": prompt.prompt_id,
                "ids": _pack(prompt.ids, _IDS),
                "num_samples": prompt.num_samples,
                "first_sample_index": prompt.first_sample_index,
            }
            for prompt in prompts
        ],
        "sampling": asdict(sampling) | {"stop_token_ids": list(sampling.stop_token_ids)},
        "min_weights_version": min_weights_version,
        "tokenizer_sha256": tokenizer_sha256,
    }


def score_request(
    sequences: Iterable[Tokens],
    *,
    revision: str,
    tokenizer_sha256: str,
    normalize: bool,
    isolate: bool,
) -> dict[str, Any]:
    """RewardService.Score of token ids."""
    return {
        "revision": revision,
        "sequences": [_sequence(each) for each in sequences],
        "tokenizer_sha256": tokenizer_sha256,
        "normalize": normalize,
        "isolate": isolate,
    }


def log_probs_request(
    sequences: Iterable[Tokens], *, temperature: float, tokenizer_sha256: str, isolate: bool
) -> dict[str, Any]:
    """ReferenceService.LogProbs."""
    return {
        "sequences": [_sequence(each) for each in sequences],
        "temperature": temperature,
        "tokenizer_sha256": tokenizer_sha256,
        "isolate": isolate,
    }


# -------------------------------------------------------------------------------------- the replies


def generated_to_json(sequence: GeneratedSequence, at_s: float) -> dict[str, Any]:
    """A finished response, ``at_s`` seconds after the step began."""
    return {
        "prompt_id": sequence.prompt_id,
        "sample_index": sequence.sample_index,
        "ids": _pack(sequence.ids, _IDS),
        "log_probs": _pack(sequence.log_probs, _FLOATS),
        "finish_reason": sequence.finish_reason,
        "version_spans": [
            [span.start, span.end, span.weights_version] for span in sequence.version_spans
        ],
        "at_s": at_s,
    }


def generated_from_json(row: dict[str, Any]) -> GeneratedSequence:
    """What ``generated_to_json`` made."""
    return GeneratedSequence(
        prompt_id=row["prompt_id"],
        sample_index=row["sample_index"],
        ids=_unpack(row["ids"], _IDS),
        log_probs=_unpack(row["log_probs"], _FLOATS),
        finish_reason=row["finish_reason"],
        version_spans=tuple(VersionSpan(*span) for span in row["version_spans"]),
    )


def scores_to_json(scores: Sequence[Score]) -> list[dict[str, Any]]:
    """Scores of a call; per-token ones are not asked for."""
    return [
        {
            "index": score.index,
            "code": score.code,
            "error_message": score.error_message,
            "token_count": score.token_count,
            "is_truncated": score.is_truncated,
            "revision": score.revision,
            "value": score.value,
            "components": dict(score.components),
            "uncertainty": score.uncertainty,
            "model": score.model,
        }
        for score in scores
    ]


def scores_from_json(rows: Iterable[dict[str, Any]]) -> list[Score]:
    """What ``scores_to_json`` made."""
    return [Score(**row, token_scores=None) for row in rows]


def log_probs_to_json(rows: Iterable[np.ndarray]) -> list[str]:
    """Log-probs of the response tokens of each sequence."""
    return [_pack(row, _FLOATS) for row in rows]


def log_probs_from_json(rows: Iterable[str]) -> list[np.ndarray]:
    """What ``log_probs_to_json`` made."""
    return [_unpack(row, _FLOATS) for row in rows]


def message_to_json(message: Message) -> dict[str, Any]:
    """A reply that is used as the message that it is."""
    return MessageToDict(message, preserving_proto_field_name=True)


def message_from_json(row: dict[str, Any], message: Message) -> Any:
    """``message``, filled with what ``message_to_json`` made."""
    return ParseDict(row, message, ignore_unknown_fields=True)


def _sequence(sequence: Tokens) -> dict[str, Any]:
    return {
        "ids": _pack(np.asarray(sequence.ids), _IDS),
        "response_start": sequence.response_start,
    }


def _pack(array: np.ndarray, dtype: np.dtype) -> str:
    return base64.b64encode(np.ascontiguousarray(array, dtype=dtype).tobytes()).decode("ascii")


def _unpack(text: str, dtype: np.dtype) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), dtype)
