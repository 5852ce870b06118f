"""Decoding with a KV cache for any Hugging Face causal language model with full attention.

    requests ─► add ─► prefill (new prompts in padded forwards, without their last token)
                         │
                         ▼        slots      columns = positions, no padding on the left
                       step ─►  0 ▓▓▓▓▓▓░░   one forward reads the newest token of every row,
                         ▲      1 ▓▓▓░░░░░   one draw extends every row
                         │      2 ▓▓▓▓▓░░░
                         └──────────┴─ the slot of a finished row goes to a new request, else to
                                       the last row, so that running rows are always 0..n-1

A row's result does not depend on its neighbours, its slot or the number of slots. Tokens are drawn
with kleash.lm.sampling: they depend on (seed, prompt id, sample index, position) alone.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from kleash.base.errors import ModelError, UserError
from kleash.lm.load import max_positions
from kleash.lm.log_probs import response_log_probs
from kleash.lm.sampling import sample_tokens, uniforms
from kleash.lm.sequences import TokenSequence, micro_batches, pack

REFILL_DIVISOR = 8
"""Requests join once a slots/8 of them can: a forward for one prompt costs as much as a step."""

_checked_models: weakref.WeakSet[Any] = weakref.WeakSet()


@dataclass(frozen=True, eq=False)
class DecodeRequest:
    """One response to generate."""

    prompt: np.ndarray
    """Prompt token ids, at least one."""
    prompt_id: str
    """Part of the sampling counter, as are the next two."""
    sample_index: int
    seed: int
    max_new_tokens: int
    """Most tokens of the response, the stop token included."""
    temperature: float = 1.0
    """0 takes the most probable token."""
    top_k: int = 0
    """0 keeps all."""
    top_p: float = 1.0
    """1 keeps all."""
    stop_ids: frozenset[int] = frozenset()
    """Ids that end the response and stay its last token."""


@dataclass(frozen=True, eq=False)
class Decoded:
    """A finished response."""

    request: DecodeRequest
    ids: np.ndarray
    """Response token ids, int32, the stop token included."""
    log_probs: np.ndarray
    """Log-probability of each token under the distribution it was drawn from, float32, nats."""
    finish_reason: Literal["stop", "length"]
    versions: list[tuple[int, int, int]]
    """(start, end, weights version) of each run of tokens, in order, without gaps."""


@dataclass(eq=False)
class _Row:
    """What the loop needs of a running sequence outside of tensors."""

    request: DecodeRequest
    spans: list[tuple[int, int]]
    """(first token, weights version) of each run of tokens."""


class Decoder:
    """Runs up to ``max_slots`` sequences of up to ``max_length`` tokens, prompt and response."""

    def __init__(
        self, model: Any, *, max_slots: int, max_length: int, max_batch_tokens: int = 16384
    ) -> None:
        """``max_batch_tokens`` bounds the padded tokens of one prefill forward.

        Raises ModelError for a model whose attention this cache cannot serve.
        """
        from kleash.lm.slot_cache import SlotCache, num_attention_layers

        self.max_slots = max_slots
        self.max_length = max_length
        self._model = model
        self._max_batch_tokens = max_batch_tokens
        self._cache = SlotCache(
            num_attention_layers(model.config, max_length), max_slots, max_length
        )
        self._version = 0
        self._rows: list[_Row | None] = []
        self._holes: list[int] = []
        self._width = 0
        self._rows_of_setting: dict[tuple[float, int, float], list[int]] = {}

        device, size = model.device, (max_slots, max_length)
        self._first_cells = torch.arange(max_slots, device=device) * max_length
        self._ids = torch.zeros(size, dtype=torch.int64, device=device)
        self._log_probs = torch.zeros(size, dtype=torch.float32, device=device)
        self._uniforms = torch.zeros(size, dtype=torch.float64, device=device)
        self._mask = torch.full(size, -torch.inf, dtype=model.dtype, device=device)
        self._positions = torch.zeros(max_slots, dtype=torch.int64, device=device)
        self._last_positions = torch.zeros(max_slots, dtype=torch.int64, device=device)
        self._stop_ids = torch.full((max_slots, 1), -1, dtype=torch.int64, device=device)

    @property
    def num_active(self) -> int:
        """Sequences that are running."""
        return len(self._rows) - len(self._holes)

    @property
    def num_free(self) -> int:
        """Requests that ``add`` would take now."""
        return self.max_slots - self.num_active

    @property
    def weights_version(self) -> int:
        """Stamped on every token drawn from now on; set it when the model's weights change."""
        return self._version

    @weights_version.setter
    def weights_version(self, version: int) -> None:
        if version == self._version:
            return
        self._version = version
        for index, row in enumerate(self._rows):
            if row is not None:
                count = int(self._positions[index]) + 1 - len(row.request.prompt)
                if row.spans[-1][0] == count:
                    row.spans.pop()
                row.spans.append((count, version))

    @torch.inference_mode()
    def add(self, requests: Sequence[DecodeRequest]) -> None:
        """Start ``requests``, at most ``num_free`` of them.

        Raises UserError for a prompt that is empty or leaves no room for a response.
        """
        for request in requests:
            if not 0 < len(request.prompt) < self.max_length:
                raise UserError(
                    f"prompt '{request.prompt_id}' has {len(request.prompt)} tokens; it needs at "
                    f"least 1, and at most {self.max_length - 1} to leave room for a response."
                )
        assert len(requests) <= self.num_free
        self._holes.sort(reverse=True)
        rows = [self._place(request) for request in requests]
        self._prefill(requests, rows)
        self._measure()

    @torch.inference_mode()
    def step(self) -> list[Decoded]:
        """Extend every running sequence by one token; returns those that finished."""
        self._close_holes()
        count = len(self._rows)
        if not count:
            return []
        positions = self._positions[:count]
        cells = self._first_cells[:count] + positions
        self._mask.view(-1).index_fill_(0, cells, 0)
        self._cache.start_decode(positions, self._width)
        logits = self._model(
            input_ids=self._ids.view(-1)[cells, None],
            position_ids=positions[:, None],
            attention_mask=self._mask[:count, None, None, : self._width],
            past_key_values=self._cache,
            use_cache=True,
        ).logits[:, -1]
        positions += 1
        cells += 1
        self._width += 1
        tokens, log_probs = self._draw(logits, self._uniforms.view(-1)[cells])
        self._ids.view(-1).index_copy_(0, cells, tokens)
        self._log_probs.view(-1).index_copy_(0, cells, log_probs)
        is_stop = (tokens[:, None] == self._stop_ids[:count]).any(1)
        is_finished = is_stop | (positions >= self._last_positions[:count])
        if not is_finished.any():
            return []
        rows = is_finished.nonzero().squeeze(1)
        return [
            self._collect(row, "stop" if stopped else "length")
            for row, stopped in zip(rows.tolist(), is_stop[rows].tolist(), strict=True)
        ]

    def remove(self, request: DecodeRequest) -> None:
        """Drop a running sequence; its slot is free at once. Unknown requests are ignored."""
        for index, row in enumerate(self._rows):
            if row is not None and row.request is request:
                self._release(index)

    def _place(self, request: DecodeRequest) -> int:
        """Write a request's state into a free row."""
        if self._holes:
            row = self._holes.pop()
        else:
            row = len(self._rows)
            self._rows.append(None)
        length = len(request.prompt)
        end = min(length + request.max_new_tokens, self.max_length)
        random = uniforms(request.seed, request.prompt_id, request.sample_index, end - length)
        self._rows[row] = _Row(request, [(0, self._version)])
        self._ids[row, :length] = torch.from_numpy(request.prompt.astype(np.int64))
        self._uniforms[row, length:end] = torch.from_numpy(random)
        self._mask[row] = -torch.inf
        self._mask[row, : length - 1] = 0
        self._positions[row] = length - 1
        self._last_positions[row] = end - 1
        stop_ids = torch.tensor(sorted(request.stop_ids), dtype=torch.int64)
        if (missing := len(stop_ids) - self._stop_ids.shape[1]) > 0:
            self._stop_ids = torch.nn.functional.pad(self._stop_ids, (0, missing), value=-1)
        self._stop_ids[row] = -1
        self._stop_ids[row, : len(stop_ids)] = stop_ids
        return row

    def _prefill(self, requests: Sequence[DecodeRequest], rows: Sequence[int]) -> None:
        """Keys and values of every prompt token but the last, which the next step reads.

        Samples of one prompt share its forward.
        """
        rows_of: dict[bytes, list[int]] = {}
        for request, row in zip(requests, rows, strict=True):
            prompt = request.prompt[:-1].astype(np.int32).tobytes()
            rows_of.setdefault(prompt, []).append(row)
        rows_of.pop(b"", None)
        prompts = [TokenSequence(np.frombuffer(key, np.int32), 0) for key in rows_of]
        targets = list(rows_of.values())
        device = self._model.device
        for group in micro_batches(prompts, self._max_batch_tokens):
            batch = pack([prompts[index] for index in group], device)
            sources = [source for source, index in enumerate(group) for _ in targets[index]]
            self._cache.start_prefill(
                torch.tensor([row for index in group for row in targets[index]], device=device),
                torch.tensor(sources, device=device),
            )
            self._model.base_model(
                input_ids=batch.ids,
                position_ids=torch.arange(batch.ids.shape[1], device=device)[None],
                past_key_values=self._cache,
                use_cache=True,
            )

    def _draw(
        self, logits: torch.Tensor, random: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Sample every row with its own request's settings, one call per distinct setting."""
        if len(self._rows_of_setting) == 1:
            ((temperature, top_k, top_p),) = self._rows_of_setting
            return sample_tokens(logits, random, temperature=temperature, top_k=top_k, top_p=top_p)
        tokens = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
        log_probs = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
        for (temperature, top_k, top_p), rows in self._rows_of_setting.items():
            tokens[rows], log_probs[rows] = sample_tokens(
                logits[rows], random[rows], temperature=temperature, top_k=top_k, top_p=top_p
            )
        return tokens, log_probs

    def _collect(self, index: int, finish_reason: Literal["stop", "length"]) -> Decoded:
        row = self._rows[index]
        assert row is not None
        start, end = len(row.request.prompt), int(self._positions[index]) + 1
        log_probs = self._log_probs[index, start:end].cpu().numpy().copy()
        if not np.isfinite(log_probs).all():
            self._cache.clear(index)
        ends = [first for first, _ in row.spans[1:]] + [end - start]
        self._release(index)
        return Decoded(
            request=row.request,
            ids=self._ids[index, start:end].to(torch.int32).cpu().numpy(),
            log_probs=log_probs,
            finish_reason=finish_reason,
            versions=[
                (first, last, version)
                for (first, version), last in zip(row.spans, ends, strict=True)
            ],
        )

    def _release(self, index: int) -> None:
        self._rows[index] = None
        self._holes.append(index)

    def _close_holes(self) -> None:
        """Move the last rows into the free ones, so that the running ones are 0..num_active-1."""
        if not self._holes:
            return
        count = self.num_active
        targets = sorted(hole for hole in self._holes if hole < count)
        sources = [row for row in range(count, len(self._rows)) if self._rows[row] is not None]
        if targets:
            to = torch.tensor(targets, device=self._model.device)
            of = torch.tensor(sources, device=self._model.device)
            self._cache.move(of, to)
            for state in (
                self._ids,
                self._log_probs,
                self._uniforms,
                self._mask,
                self._positions,
                self._last_positions,
                self._stop_ids,
            ):
                state[to] = state[of]
            for target, source in zip(targets, sources, strict=True):
                self._rows[target] = self._rows[source]
        del self._rows[count:]
        self._holes.clear()
        self._measure()

    def _measure(self) -> None:
        """What steps need to know of the rows together; called whenever the rows change."""
        self._width = int(self._positions[: len(self._rows)].max()) + 1 if self._rows else 0
        self._rows_of_setting.clear()
        for index, row in enumerate(self._rows):
            if row is not None:
                setting = (row.request.temperature, row.request.top_k, row.request.top_p)
                self._rows_of_setting.setdefault(setting, []).append(index)


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
