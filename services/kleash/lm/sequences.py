"""Token sequences and their packing into padded batches.

B sequences, S positions of prompt plus response, T response positions.
Sequences are padded on the right with id 0: under a causal mask no real token attends to a later
pad, so a row's result equals the row alone, whatever its neighbours' length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True, eq=False)
class TokenSequence:
    """A prompt and its response.

    ``ids`` is int32 (prompt tokens, then response tokens); ``response_start`` is the index of the
    first response token. With ids [5, 6, 7, 2] and response_start 2 the response is [7, 2].
    """

    ids: np.ndarray
    response_start: int

    def __post_init__(self) -> None:
        if not 0 <= self.response_start <= len(self.ids):
            raise ValueError(
                f"response_start {self.response_start} is outside of {len(self.ids)} tokens."
            )

    @property
    def response_length(self) -> int:
        return len(self.ids) - self.response_start


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """Right-padded sequences on one device."""

    ids: torch.Tensor
    """(B, S) int64; pads are 0."""
    lengths: torch.Tensor
    """(B,) int64, tokens in each row."""
    response_starts: torch.Tensor
    """(B,) int64, column of the first response token."""
    num_response_columns: int
    """T, the longest response."""

    @property
    def response_mask(self) -> torch.Tensor:
        """(B, T) bool, True for response tokens, the stop token included."""
        columns = torch.arange(self.num_response_columns, device=self.ids.device)
        return columns < (self.lengths - self.response_starts)[:, None]

    @property
    def response_ids(self) -> torch.Tensor:
        """(B, T) int64, 0 outside of the mask."""
        if not self.num_response_columns:
            return self.ids[:, :0]
        return self.ids.gather(1, self.response_columns(offset=0)) * self.response_mask

    def response_columns(self, *, offset: int) -> torch.Tensor:
        """(B, T) int64: column of response token t plus ``offset``, kept inside of the row.

        Offset -1 is the position whose logits predict token t and whose hidden state values it.
        """
        columns = torch.arange(self.num_response_columns, device=self.ids.device)
        return (self.response_starts[:, None] + columns + offset).clamp(0, self.ids.shape[1] - 1)


def pack(sequences: Sequence[TokenSequence], device: torch.device | str = "cpu") -> PackedBatch:
    """Pad ``sequences`` on the right to the longest one. Raises ValueError for an empty list."""
    if not sequences:
        raise ValueError("cannot pack an empty list of sequences.")
    ids = np.zeros((len(sequences), max(len(s.ids) for s in sequences)), dtype=np.int64)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence.ids)] = sequence.ids
    return PackedBatch(
        ids=torch.from_numpy(ids).to(device),
        lengths=torch.tensor([len(s.ids) for s in sequences], device=device),
        response_starts=torch.tensor([s.response_start for s in sequences], device=device),
        num_response_columns=max(s.response_length for s in sequences),
    )


CPU_PASS_TOKENS = 1024
"""Padded tokens at which a forward pass on a CPU is fastest per token, for models of 1 M to 50 M
parameters: what a layer writes stays in the cache. At 16 times as many, half as fast."""


def passes(lengths: Sequence[int], device: torch.device) -> list[list[int]]:
    """Groups of indices that are computed in one forward pass: all on a GPU, fewer on a CPU."""
    if device.type == "cpu":
        return micro_batches_of_lengths(lengths, CPU_PASS_TOKENS)
    return [list(range(len(lengths)))]


def micro_batches(sequences: Sequence[TokenSequence], max_tokens: int) -> list[list[int]]:
    """Groups of indices, similar lengths together, at most ``max_tokens`` padded tokens each.

    A sequence longer than ``max_tokens`` gets a group of its own. Lengths alone decide.
    """
    return micro_batches_of_lengths([len(sequence.ids) for sequence in sequences], max_tokens)


def micro_batches_of_lengths(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """``micro_batches`` for sequences of which only the lengths are known."""
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    groups: list[list[int]] = []
    for index in order:
        if groups and (len(groups[-1]) + 1) * lengths[index] <= max_tokens:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups
