"""How requests are fed to a decoder: lists of them, and the check that a model can be decoded."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from kleash.base.errors import ModelError
from kleash.lm.decode import Decoded, Decoder, DecodeRequest
from kleash.lm.load import max_positions
from kleash.lm.log_probs import response_log_probs
from kleash.lm.sequences import TokenSequence, pack

REFILL_DIVISOR = 8
"""Requests join once a slots/8 of them can: a forward for one prompt costs as much as a step."""

_checked_models: weakref.WeakSet[Any] = weakref.WeakSet()


def generate(
    model: Any, requests: Sequence[DecodeRequest], *, max_slots: int = 64
) -> list[Decoded]:
    """Decode ``requests``, at most ``max_slots`` at a time; results are in request order.

    Raises ModelError for a model that cannot be decoded so, UserError for a prompt without room.
    """
    if not requests:
        return []
    check_decodable(model)
    longest = max(len(request.prompt) + request.max_new_tokens for request in requests)
    num_slots = min(max_slots, len(requests))
    max_length = min(longest, max_positions(model))
    return _run(Decoder(model, max_slots=num_slots, max_length=max_length), requests)


def refill_count(decoder: Decoder, num_waiting: int) -> int:
    """How many waiting requests to add now: all that fit, but none until enough of them do."""
    take = min(decoder.num_free, num_waiting)
    enough = min(num_waiting, max(1, decoder.max_slots // REFILL_DIVISOR))
    return take if take >= enough else 0


def check_decodable(model: Any) -> None:
    """Raise ModelError unless decoding in slots gives the log-probabilities of a whole forward.

    Three short sequences of different lengths are decoded in two slots, once per model object.
    """
    if model in _checked_models:
        return
    ids = np.arange(6, dtype=np.int32)
    requests = [
        DecodeRequest(ids[:length], "check", sample_index=length, seed=0, max_new_tokens=4)
        for length in (1, 3, 6)
    ]
    decoder = Decoder(model, max_slots=2, max_length=10)
    remedy = "decoding supports full-attention decoders such as Llama, Qwen2 and GPT-2."
    try:
        results = _run(decoder, requests)
        whole = [np.append(result.request.prompt, result.ids) for result in results]
        starts = [len(request.prompt) for request in requests]
        batch = pack(list(map(TokenSequence, whole, starts)), model.device)
        with torch.inference_mode():
            expected = response_log_probs(model, batch).cpu().numpy()
    except (TypeError, ValueError, IndexError, AttributeError, RuntimeError) as error:
        name = model.config.model_type
        raise ModelError(
            f"cannot decode the {name} model with a KV cache: {error}; {remedy}"
        ) from error
    gap = max(
        float(np.abs(row - result.log_probs).max())
        for row, result in zip(expected, results, strict=True)
    )
    tolerance = 1e-3 if model.dtype == torch.float32 else 0.25
    if not gap <= tolerance:
        raise ModelError(
            f"log-probabilities of the {model.config.model_type} model differ by {gap:.2g} nats "
            f"between a KV cache and one whole forward (rounding makes {tolerance:g}); {remedy}"
        )
    _checked_models.add(model)


def _run(decoder: Decoder, requests: Sequence[DecodeRequest]) -> list[Decoded]:
    waiting = deque(dict.fromkeys(requests))
    results: dict[DecodeRequest, Decoded] = {}
    while waiting or decoder.num_active:
        if take := refill_count(decoder, len(waiting)):
            decoder.add([waiting.popleft() for _ in range(take)])
        results.update((decoded.request, decoded) for decoded in decoder.step())
    return [results[request] for request in requests]
