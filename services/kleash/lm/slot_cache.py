"""Keys and values of running sequences in preallocated slots, as a transformers cache.

N slots, L positions, H key/value heads, D head size. Row r, column p of a buffer belongs to
position p of the sequence in slot r: no padding on the left, so positions are columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

from kleash.base.errors import ModelError


def num_attention_layers(config: Any, max_length: int) -> int:
    """Number of layers to cache, for a transformers model configuration.

    Raises ModelError when a layer needs more than the keys and values of all positions: a sliding
    window shorter than ``max_length``, a state-space or linear-attention layer.
    """
    kind = config.model_type
    layers = DynamicCache(config=config).layers
    windows = [its.sliding_window for its in layers if isinstance(its, DynamicSlidingWindowLayer)]
    if "local" in getattr(config, "attention_layers", ()):  # GPT-Neo's name for it
        windows.append(config.window_size)
    if windows and min(windows) < max_length:
        raise ModelError(
            f"the {kind} model attends to a sliding window of {min(windows)} tokens; decoding "
            f"supports sequences up to that length, and {max_length} tokens are asked for."
        )
    for layer in layers:
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise ModelError(
                f"the {kind} model has layers without plain attention ({type(layer).__name__}); "
                "decoding supports full-attention decoders such as Llama, Qwen2 and GPT-2."
            )
    return len(layers)


class SlotCache(Cache):
    """Buffers (N, H, L, D) per layer, filled by ``start_prefill`` and ``start_decode`` forwards."""

    def __init__(self, num_layers: int, num_slots: int, max_length: int) -> None:
        self.slot_layers = [_SlotLayer(self) for _ in range(num_layers)]
        super().__init__(layers=[*self.slot_layers])
        self.num_slots = num_slots
        self.max_length = max_length
        self.width = 0
        self.prefill_rows: torch.Tensor | None = None
        self.prefill_sources: torch.Tensor | None = None
        self._positions = torch.empty(0, dtype=torch.int64)
        self._cells: dict[int, torch.Tensor] = {}

    def start_prefill(self, rows: torch.Tensor, sources: torch.Tensor) -> None:
        """The next forward reads whole prompts: slot ``rows[i]`` gets row ``sources[i]`` of it."""
        self.prefill_rows, self.prefill_sources = rows, sources

    def start_decode(self, positions: torch.Tensor, width: int) -> None:
        """The next forward reads one token of each of the slots 0..n-1.

        Args:
            positions: (n,) int64, column of each token.
            width: columns that attention reads.
        """
        self.prefill_rows = self.prefill_sources = None
        self._positions, self.width = positions, width
        self._cells.clear()

    def cells(self, num_heads: int) -> torch.Tensor:
        """(n * H,) int64: where this step's token lies in a buffer seen as (N * H * L, D)."""
        if num_heads not in self._cells:
            end = len(self._positions) * num_heads * self.max_length
            first = torch.arange(0, end, self.max_length, device=self._positions.device)
            self._cells[num_heads] = first + self._positions.repeat_interleave(num_heads)
        return self._cells[num_heads]

    def move(self, sources: torch.Tensor, targets: torch.Tensor) -> None:
        """Copy slots ``sources`` over slots ``targets``."""
        for layer in self.slot_layers:
            for buffer in layer.buffers():
                buffer[targets] = buffer[sources]

    def copy_prefix(self, source: int, targets: Sequence[int], num_columns: int) -> None:
        """Copy the first columns of slot ``source`` into slots ``targets``."""
        for layer in self.slot_layers:
            for buffer in layer.buffers():
                buffer[list(targets), :, :num_columns] = buffer[source, :, :num_columns]

    def clear(self, row: int) -> None:
        """Zero a slot: masked positions must hold finite numbers, and broken weights make NaN."""
        for layer in self.slot_layers:
            for buffer in layer.buffers():
                buffer[row] = 0


class _SlotLayer(CacheLayerMixin):
    """One layer's buffers, allocated at its first forward, which shows heads, size and dtype."""

    def __init__(self, cache: SlotCache) -> None:
        super().__init__()
        self._cache = cache

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        cache = self._cache
        # Zeros and not uninitialised memory: attention weights of 0 do not hide NaN.
        self.keys, self.values = (
            states.new_zeros((cache.num_slots, states.shape[1], cache.max_length, states.shape[3]))
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def buffers(self) -> list[torch.Tensor]:
        """Keys and values; empty before the first forward."""
        return [buffer for buffer in (self.keys, self.values) if buffer is not None]

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        *args: Any,  # noqa: ARG002  part of the interface
        **kwargs: Any,  # noqa: ARG002
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store (n, H, q, D) keys and values; returns what attention reads, (n, H, columns, D)."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        cache = self._cache
        new_states = (key_states, value_states)
        if cache.prefill_rows is not None:
            for buffer, states in zip(self.buffers(), new_states, strict=True):
                columns = states.shape[2]
                buffer[cache.prefill_rows, :, :columns] = states[cache.prefill_sources]
            return new_states
        count, num_heads = key_states.shape[:2]
        cells = cache.cells(num_heads)
        for buffer, states in zip(self.buffers(), new_states, strict=True):
            buffer.view(-1, buffer.shape[3]).index_copy_(0, cells, states.reshape(len(cells), -1))
        keys, values = self.buffers()
        return keys[:count, :, : cache.width], values[:count, :, : cache.width]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Prompts attend to themselves; decode steps bring their own mask."""
        return query_length, 0

    def get_seq_length(self) -> int:
        """Forwards bring their own position ids, so the offset is never used."""
        return 0

    def get_max_length(self) -> int:
        """Columns of a slot."""
        return self._cache.max_length
