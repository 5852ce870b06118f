"""Decoding with a KV cache for any Hugging Face causal language model with full attention.

    requests ─► add ─► prefill (new prompts in padded forwards, without their last token)
                         │
                         ▼        slots      columns = positions, no padding on the left
                       step ─►  0 ▓▓▓▓▓▓░░   one forward reads the newest token of every row,
                         ▲      1 ▓▓▓░░░░░   one draw extends every row
                         │      2 ▓▓▓▓▓░░░
                         └──────────┴─ the slot of a finished row goes to a new request, else to
                                       the last row, so that running rows are always 0..n-1

A prompt that a running row holds already is copied from it. Only rows that run now count, so that
what was generated before changes no bit of what is generated next.

A row's result does not depend on its neighbours, its slot or the number of slots. Tokens are drawn
with kleash.lm.sampling: they depend on (seed, prompt id, sample index, position) alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from kleash.base.errors import UserError
from kleash.lm.sampling import sample_tokens, uniforms
from kleash.lm.sequences import TokenSequence, micro_batches, pack
from kleash.lm.version_spans import VersionSpans

FinishReason = Literal["stop", "length", "aborted"]


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
    min_version: int = 0
    """Oldest weights version that may draw it; whoever changes the weights sees to that."""


@dataclass(frozen=True, eq=False)
class Decoded:
    """A finished response."""

    request: DecodeRequest
    ids: np.ndarray
    """Response token ids, int32, the stop token included."""
    log_probs: np.ndarray
    """Log-probability of each token under the distribution it was drawn from, float32, nats."""
    finish_reason: FinishReason
    """``Decoder.abort`` gives "aborted", a step the others."""
    versions: list[tuple[int, int, int]]
    """(start, end, weights version) of each run of tokens, in order, without gaps."""


@dataclass(eq=False)
class _Row:
    """What the loop needs of a running sequence outside of tensors."""

    request: DecodeRequest
    prefix: bytes
    """The prompt without its last token, int32: what the row's first columns hold."""
    prefix_change: int
    """``Decoder._num_changes`` when the keys and values of the prefix were computed."""
    spans: VersionSpans


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
        self.num_prefix_hits = 0
        """Requests whose prompt was copied from a running row."""
        self.num_prefix_misses = 0
        """Requests whose prompt was computed, alone or with others that joined with them."""
        self._version = 0
        self._num_changes = 0
        self._has_seen_nan = False
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
    def running(self) -> list[DecodeRequest]:
        """Requests that have a slot now."""
        return [row.request for row in self._rows if row is not None]

    @property
    def weights_version(self) -> int:
        """Stamped on every token drawn from now on; set it whenever the model's weights change.

        The running rows keep the keys and values that they have. No new row gets them.
        """
        return self._version

    @weights_version.setter
    def weights_version(self, version: int) -> None:
        # Counted even if the number stays: after a rollback it may return with other weights.
        self._num_changes += 1
        if version == self._version:
            return
        self._version = version
        for index, row in enumerate(self._rows):
            if row is not None:
                row.spans.change(self._num_drawn(index), version)

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
        held = {
            row.prefix: index
            for index, row in enumerate(self._rows)
            if row is not None and row.prefix_change == self._num_changes
        }
        self._holes.sort(reverse=True)
        rows_of: dict[bytes, list[int]] = {}
        for request in requests:
            prefix = _to_bytes(request.prompt[:-1])
            rows_of.setdefault(prefix, []).append(self._place(request, prefix))
        rows_of.pop(b"", None)
        for prefix in [prefix for prefix in rows_of if prefix in held]:
            rows = rows_of.pop(prefix)
            self._cache.copy_prefix(held[prefix], rows, len(_to_ids(prefix)))
            self.num_prefix_hits += len(rows)
        self.num_prefix_misses += sum(map(len, rows_of.values()))
        self._prefill(rows_of)
        self._measure()

    @torch.inference_mode()
    def refill_cache(self) -> None:
        """Compute the keys and values of every running row again, with the weights as they are.

        What is drawn next is then what a whole forward of these weights would give.
        """
        ids = self._ids[: len(self._rows)].cpu().numpy()
        positions = self._positions[: len(self._rows)].tolist()
        rows_of: dict[bytes, list[int]] = {}
        for index, row in enumerate(self._rows):
            if row is not None:
                # The newest token stays out: the next step reads it.
                rows_of.setdefault(_to_bytes(ids[index, : positions[index]]), []).append(index)
                row.prefix_change = self._num_changes
        rows_of.pop(b"", None)
        self._prefill(rows_of)

    @torch.inference_mode()
    def abort(self) -> list[Decoded]:
        """End every running sequence where it is; those that have drawn nothing yet stay."""
        return [
            self._collect(index, "aborted")
            for index, row in enumerate(self._rows)
            if row is not None and self._num_drawn(index)
        ]

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
                self._drawn_log_probs(index, row)
                self._release(index)

    def _place(self, request: DecodeRequest, prefix: bytes) -> int:
        """Write a request's state into a free row."""
        if self._holes:
            row = self._holes.pop()
        else:
            row = len(self._rows)
            self._rows.append(None)
        length = len(request.prompt)
        end = min(length + request.max_new_tokens, self.max_length)
        random = uniforms(request.seed, request.prompt_id, request.sample_index, end - length)
        self._rows[row] = _Row(request, prefix, self._num_changes, VersionSpans(self._version))
        if self._has_seen_nan:
            self._cache.clear(row)
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

    def _prefill(self, rows_of: Mapping[bytes, Sequence[int]]) -> None:
        """Keys and values of sequences of token ids (int32 bytes), for the rows that need them.

        Samples of one prompt share its forward.
        """
        prompts = [TokenSequence(_to_ids(key), 0) for key in rows_of]
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

    def _collect(self, index: int, finish_reason: FinishReason) -> Decoded:
        row = self._rows[index]
        assert row is not None
        log_probs = self._drawn_log_probs(index, row)
        start, end = len(row.request.prompt), len(row.request.prompt) + len(log_probs)
        self._release(index)
        return Decoded(
            request=row.request,
            ids=self._ids[index, start:end].to(torch.int32).cpu().numpy(),
            log_probs=log_probs,
            finish_reason=finish_reason,
            versions=row.spans.runs(len(log_probs)),
        )

    def _num_drawn(self, index: int) -> int:
        row = self._rows[index]
        assert row is not None
        return int(self._positions[index]) + 1 - len(row.request.prompt)

    def _drawn_log_probs(self, index: int, row: _Row) -> np.ndarray:
        """Of the response so far; remembers that broken weights have been here."""
        start = len(row.request.prompt)
        end = start + self._num_drawn(index)
        log_probs = self._log_probs[index, start:end].cpu().numpy().copy()
        if not np.isfinite(log_probs).all():
            # Masked columns must hold finite numbers, and copies of the row may lie in any slot.
            self._has_seen_nan = True
        return log_probs

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


def _to_bytes(ids: np.ndarray) -> bytes:
    return ids.astype(np.int32).tobytes()


def _to_ids(prefix: bytes) -> np.ndarray:
    return np.frombuffer(prefix, np.int32)
