"""Decoding with a KV cache for any Hugging Face causal language model with full attention.

    requests ─► add ─► prefill (all new prompts in one padded forward, without their last token)
                         │
                         ▼        slots      columns = positions, no padding on the left
                       step ─►  0 ▓▓▓▓▓▓░░   one forward reads the newest token of every row,
                         ▲      1 ▓▓▓░░░░░   one draw per row extends it
                         │      2 ▓▓▓▓▓░░░
                         └──────────┴─ a finished row's slot goes to a new request or to the last row

A row's result does not depend on its neighbours, its slot or the number of slots. Tokens are drawn
with kleash.lm.sampling, so they depend on (seed, prompt id, sample index, position) alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from kleash.base.errors import ModelError
from kleash.lm.load import max_positions
from kleash.lm.log_probs import response_log_probs
from kleash.lm.sampling import sample_tokens, uniforms
from kleash.lm.sequences import TokenSequence, micro_batches, pack

REFILL_FRACTION = 8
"""New rows join when a slots/REFILL_FRACTION of them can: a forward for one prompt costs as much as a step."""


@dataclass(frozen=True, eq=False)
class DecodeRequest:
    """One response to generate."""

    prompt: np.ndarray
    """Prompt token ids, at least one."""
    prompt_id: str
    """Part of the sampling counter."""
    sample_index: int
    """Part of the sampling counter."""
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


class Decoder:
    """Runs up to ``max_slots`` sequences of up to ``max_length`` tokens (prompt and response) side by side."""

    def __init__(self, model: Any, *, max_slots: int, max_length: int, max_batch_tokens: int = 16384) -> None:
        """Args:
        max_batch_tokens: padded tokens in one prefill forward.
        """
        from kleash.lm.slot_cache import SlotCache

        self.max_slots = max_slots
        self.max_length = max_length
        self._model = model
        self._max_batch_tokens = max_batch_tokens
        self._cache = SlotCache(_num_cached_layers(model, max_length), max_slots, max_length)
        self._version = 0
        self._requests: list[DecodeRequest | None] = []
        self._spans: list[list[tuple[int, int]]] = []
        self._holes: list[int] = []
        self._width = 0
        self._sampling: list[tuple[float, int, float]] = []

        device, size = model.device, (max_slots, max_length)
        self._first_cells = torch.arange(max_slots, device=device) * max_length
        self._ids = torch.zeros(size, dtype=torch.int64, device=device)
        self._log_probs = torch.zeros(size, dtype=torch.float32, device=device)
        self._uniforms = torch.zeros(size, dtype=torch.float64, device=device)
        self._mask = torch.full(size, -torch.inf, dtype=model.dtype, device=device)
        self._positions = torch.zeros(max_slots, dtype=torch.int64, device=device)
        self._limits = torch.zeros(max_slots, dtype=torch.int64, device=device)
        self._stop_ids = torch.full((max_slots, 1), -1, dtype=torch.int64, device=device)

    @property
    def num_active(self) -> int:
        """Sequences that are running."""
        return len(self._requests) - len(self._holes)

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
        for row, request in enumerate(self._requests):
            if request is not None:
                count = int(self._positions[row]) + 1 - len(request.prompt)
                if self._spans[row][-1][0] == count:
                    self._spans[row].pop()
                self._spans[row].append((count, version))

    @torch.inference_mode()
    def add(self, requests: Sequence[DecodeRequest]) -> None:
        """Start ``requests``, at most ``num_free`` of them.

        Raises ValueError for a prompt that is empty or leaves no room for a response.
        """
        for request in requests:
            if not 0 < len(request.prompt) < self.max_length:
                raise ValueError(
                    f"prompt {request.prompt_id!r} has {len(request.prompt)} tokens; it needs at least 1 and at most "
                    f"{self.max_length - 1}, one less than the longest sequence."
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
        count = len(self._requests)
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
        is_finished = is_stop | (positions >= self._limits[:count])
        if not is_finished.any():
            return []
        rows = is_finished.nonzero().squeeze(1)
        return [
            self._collect(row, "stop" if stopped else "length")
            for row, stopped in zip(rows.tolist(), is_stop[rows].tolist(), strict=True)
        ]

    def remove(self, request: DecodeRequest) -> None:
        """Drop a running sequence; its slot is free at once. Unknown requests are ignored."""
        for row, running in enumerate(self._requests):
            if running is request:
                self._release(row)

    def _place(self, request: DecodeRequest) -> int:
        """Write a request's state into a free row."""
        if self._holes:
            row = self._holes.pop()
        else:
            row = len(self._requests)
            self._requests.append(None)
            self._spans.append([])
            self._sampling.append((1.0, 0, 1.0))
        length = len(request.prompt)
        end = min(length + request.max_new_tokens, self.max_length)
        random = uniforms(request.seed, request.prompt_id, request.sample_index, end - length)
        self._requests[row] = request
        self._spans[row] = [(0, self._version)]
        self._sampling[row] = (request.temperature, request.top_k, request.top_p)
        self._ids[row, :length] = torch.from_numpy(request.prompt.astype(np.int64))
        self._uniforms[row, length:end] = torch.from_numpy(random)
        self._mask[row] = -torch.inf
        self._mask[row, : length - 1] = 0
        self._positions[row] = length - 1
        self._limits[row] = end - 1
        if len(request.stop_ids) > self._stop_ids.shape[1]:
            missing = len(request.stop_ids) - self._stop_ids.shape[1]
            self._stop_ids = torch.nn.functional.pad(self._stop_ids, (0, missing), value=-1)
        self._stop_ids[row] = -1
        self._stop_ids[row, : len(request.stop_ids)] = torch.tensor(sorted(request.stop_ids), dtype=torch.int64)
        return row

    def _prefill(self, requests: Sequence[DecodeRequest], rows: Sequence[int]) -> None:
        """Keys and values of each prompt but its last token, which the next step reads. Samples share a forward."""
        rows_of: dict[bytes, list[int]] = {}
        prompts: list[TokenSequence] = []
        for request, row in zip(requests, rows, strict=True):
            prompt = np.asarray(request.prompt[:-1], dtype=np.int32)
            if len(prompt):
                if prompt.tobytes() not in rows_of:
                    prompts.append(TokenSequence(prompt, len(prompt)))
                rows_of.setdefault(prompt.tobytes(), []).append(row)
        device = self._model.device
        for group in micro_batches(prompts, self._max_batch_tokens):
            batch = pack([prompts[index] for index in group], device)
            targets = [rows_of[prompts[index].ids.tobytes()] for index in group]
            sources = [source for source, samples in enumerate(targets) for _ in samples]
            self._cache.start_prefill(
                torch.tensor([row for samples in targets for row in samples], device=device),
                torch.tensor(sources, device=device),
            )
            positions = torch.arange(batch.ids.shape[1], device=device)[None]
            self._model.base_model(
                input_ids=batch.ids, position_ids=positions, past_key_values=self._cache, use_cache=True
            )

    def _draw(self, logits: torch.Tensor, random: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Sample every row with its own request's settings, one call per distinct setting."""
        settings = set(self._sampling)
        if len(settings) == 1:
            temperature, top_k, top_p = settings.pop()
            return sample_tokens(logits, random, temperature=temperature, top_k=top_k, top_p=top_p)
        tokens = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
        log_probs = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
        for setting in settings:
            rows = torch.tensor([own == setting for own in self._sampling], device=logits.device).nonzero().squeeze(1)
            temperature, top_k, top_p = setting
            tokens[rows], log_probs[rows] = sample_tokens(
                logits[rows], random[rows], temperature=temperature, top_k=top_k, top_p=top_p
            )
        return tokens, log_probs

    def _collect(self, row: int, finish_reason: Literal["stop", "length"]) -> Decoded:
        request = self._requests[row]
        assert request is not None
        start, end = len(request.prompt), int(self._positions[row]) + 1
        log_probs = self._log_probs[row, start:end].cpu().numpy().copy()
        if not np.isfinite(log_probs).all():
            self._cache.clear(row)
        spans = self._spans[row]
        ends = [span_start for span_start, _ in spans[1:]] + [end - start]
        decoded = Decoded(
            request=request,
            ids=self._ids[row, start:end].to(torch.int32).cpu().numpy(),
            log_probs=log_probs,
            finish_reason=finish_reason,
            versions=[(first, last, version) for (first, version), last in zip(spans, ends, strict=True)],
        )
        self._release(row)
        return decoded

    def _release(self, row: int) -> None:
        self._requests[row] = None
        self._holes.append(row)

    def _close_holes(self) -> None:
        """Move the last rows into the free ones, so that rows 0..num_active-1 are the running ones."""
        if not self._holes:
            return
        count = self.num_active
        targets = sorted(hole for hole in self._holes if hole < count)
        sources = [row for row in range(count, len(self._requests)) if self._requests[row] is not None]
        if targets:
            device = self._model.device
            to, of = torch.tensor(targets, device=device), torch.tensor(sources, device=device)
            self._cache.move(of, to)
            for state in (self._ids, self._log_probs, self._uniforms, self._mask, self._positions, self._limits,
                          self._stop_ids):
                state[to] = state[of]
            for target, source in zip(targets, sources, strict=True):
                for values in (self._requests, self._spans, self._sampling):
                    values[target] = values[source]
        for values in (self._requests, self._spans, self._sampling):
            del values[count:]
        self._holes.clear()
        self._measure()

    def _measure(self) -> None:
        """Columns that the next step's attention has to read."""
        self._width = int(self._positions[: len(self._requests)].max()) + 1 if self._requests else 0


def generate(model: Any, requests: Sequence[DecodeRequest], *, max_slots: int = 64) -> list[Decoded]:
    """Decode ``requests`` with at most ``max_slots`` of them at a time; results in request order."""
    if not requests:
        return []
    longest = max(len(request.prompt) + request.max_new_tokens for request in requests)
    waiting = deque(dict.fromkeys(requests))
    decoder = Decoder(
        model, max_slots=min(max_slots, len(waiting)), max_length=min(longest, max_positions(model))
    )
    results: dict[DecodeRequest, Decoded] = {}
    while waiting or decoder.num_active:
        if take := refill_count(decoder, len(waiting)):
            decoder.add([waiting.popleft() for _ in range(take)])
        results.update((decoded.request, decoded) for decoded in decoder.step())
    return [results[request] for request in requests]


def refill_count(decoder: Decoder, num_waiting: int) -> int:
    """How many of the waiting requests to add now: all that fit, or none until enough of them fit."""
    take = min(decoder.num_free, num_waiting)
    return take if take >= min(num_waiting, max(1, decoder.max_slots // REFILL_FRACTION)) else 0


def _num_cached_layers(model: Any, max_length: int) -> int:
    """Number of attention layers; ModelError when one of them is not plain full attention."""
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    kind = model.config.model_type
    layers = DynamicCache(config=model.config).layers
    for layer in layers:
        if isinstance(layer, DynamicSlidingWindowLayer) and layer.sliding_window < max_length:
            raise ModelError(
                f"the {kind} model attends to a sliding window of {layer.sliding_window} tokens only; decoding supports "
                f"it up to that length, and {max_length} tokens are asked for."
            )
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise ModelError(
                f"the {kind} model has layers without plain attention ({type(layer).__name__}); decoding supports "
                "decoder-only models with full attention, such as Llama, Qwen2 and GPT-2."
            )
    if not layers:
        raise ModelError(f"the {kind} model has no attention layers; decoding supports decoder-only transformers.")
    return len(layers)
