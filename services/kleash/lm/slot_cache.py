"""Keys and values of running sequences in preallocated slots, as a transformers cache.

N slots, L positions, H key/value heads, D head size. Row r, column p of a buffer belongs to
position p of the sequence in slot r: no padding on the left, so positions are columns.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin


class SlotCache(Cache):
    """Buffers (N, H, L, D) per layer, filled by ``start_prefill`` and ``start_decode`` forwards."""

    def __init__(self, num_layers: int, num_slots: int, max_length: int) -> None:
        super().__init__(layers=[_SlotLayer(self) for _ in range(num_layers)])
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
        """The next forward reads one token of slots 0..n-1.

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
            count = len(self._positions) * num_heads
            first = torch.arange(0, count * self.max_length, self.max_length, device=self._positions.device)
            self._cells[num_heads] = first + self._positions.repeat_interleave(num_heads)
        return self._cells[num_heads]

    def move(self, sources: torch.Tensor, targets: torch.Tensor) -> None:
        """Copy slots ``sources`` over slots ``targets``."""
        for buffer in self._buffers():
            buffer[targets] = buffer[sources]

    def clear(self, row: int) -> None:
        """Zero a slot: masked positions must hold finite numbers, and a broken model leaves NaN there."""
        for buffer in self._buffers():
            buffer[row] = 0

    def _buffers(self) -> list[torch.Tensor]:
        filled = [layer for layer in self.layers if layer.is_initialized]
        return [buffer for layer in filled for buffer in (layer.keys, layer.values)]


class _SlotLayer(CacheLayerMixin):
    """One layer's buffers; allocated at the first forward, which shows head count, size and data type."""

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

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store (n, H, q, D) keys and values; returns what attention reads, (n, H, columns, D)."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        cache = self._cache
        if cache.prefill_rows is not None:
            width = key_states.shape[2]
            self.keys[cache.prefill_rows, :, :width] = key_states[cache.prefill_sources]
            self.values[cache.prefill_rows, :, :width] = value_states[cache.prefill_sources]
            return key_states, value_states
        count, num_heads = key_states.shape[:2]
        cells = cache.cells(num_heads)
        for buffer, states in ((self.keys, key_states), (self.values, value_states)):
            buffer.view(-1, buffer.shape[3]).index_copy_(0, cells, states.reshape(len(cells), -1))
        return self.keys[:count, :, : cache.width], self.values[:count, :, : cache.width]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Prompts attend to themselves; decode steps bring their own mask."""
        return query_length, 0

    def get_seq_length(self) -> int:
        """Forwards bring their own position ids, so the offset is never used."""
        return 0

    def get_max_length(self) -> int:
        """Columns of a slot."""
        return self._cache.max_length
