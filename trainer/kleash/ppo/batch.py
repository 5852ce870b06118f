"""One rollout as tensors: what the services and the old models said about B responses.

B sequences, S positions of prompt plus response, T response positions. Shapes, types and finite
numbers are checked here, once; the mathematics in loss.py does not check again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch

_SHAPES = {
    "ids": ("B", "S", torch.int64),
    "lengths": ("B", None, torch.int64),
    "response_starts": ("B", None, torch.int64),
    "mask": ("B", "T", torch.bool),
    "behaviour_log_probs": ("B", "T", torch.float32),
    "old_log_probs": ("B", "T", torch.float32),
    "reference_log_probs": ("B", "T", torch.float32),
    "old_values": ("B", "T", torch.float32),
    "scores": ("B", None, torch.float32),
    "is_stopped": ("B", None, torch.bool),
    "weights_version": ("B", None, torch.int64),
    "advantages": ("B", "T", torch.float32),
    "returns": ("B", "T", torch.float32),
}


@dataclass(frozen=True, eq=False)
class RolloutBatch:
    """B responses and everything known about them before the first optimizer step.

    Example, one prompt of 2 tokens with the responses [7, 2] (2 is the stop token) and [8]
    (cut by the length limit), T = 2:

    >>> batch = RolloutBatch(
    ...     prompt_ids=("p1", "p1"),
    ...     ids=torch.tensor([[5, 6, 7, 2], [5, 6, 8, 0]]),
    ...     lengths=torch.tensor([4, 3]),
    ...     response_starts=torch.tensor([2, 2]),
    ...     mask=torch.tensor([[True, True], [True, False]]),
    ...     behaviour_log_probs=torch.tensor([[-1.0, -0.5], [-2.0, 0.0]]),
    ...     old_log_probs=torch.tensor([[-1.0, -0.5], [-2.0, 0.0]]),
    ...     reference_log_probs=torch.tensor([[-1.5, -0.5], [-2.0, 0.0]]),
    ...     old_values=torch.tensor([[0.2, 0.4], [0.1, 0.0]]),
    ...     scores=torch.tensor([1.0, -0.3]),
    ...     is_stopped=torch.tensor([True, False]),
    ...     weights_version=torch.tensor([3, 3]),
    ... )
    >>> batch.num_tokens
    3
    >>> batch.select([1]).ids.tolist()
    [[5, 6, 8]]
    """

    prompt_ids: tuple[str, ...]
    """B names, one a row; several samples of one prompt repeat its name."""
    ids: torch.Tensor
    """(B, S) int64, prompt then response, padded on the right."""
    lengths: torch.Tensor
    """(B,) int64, tokens of prompt plus response."""
    response_starts: torch.Tensor
    """(B,) int64, column of the first response token in ``ids``."""
    mask: torch.Tensor
    """(B, T) bool: the first lengths - response_starts columns of each row, stop token included."""
    behaviour_log_probs: torch.Tensor
    """(B, T) what the sampler said of the token it drew."""
    old_log_probs: torch.Tensor
    """(B, T) the trainer's own policy, before the first update on this batch."""
    reference_log_probs: torch.Tensor
    """(B, T) the frozen reference."""
    old_values: torch.Tensor
    """(B, T) V before each response token, from the value network before its first update."""
    scores: torch.Tensor
    """(B,) reward model output, normalised, before the missing-EOS rule."""
    is_stopped: torch.Tensor
    """(B,) bool: the response ends with a stop token (finish reason "stop", not "length")."""
    weights_version: torch.Tensor
    """(B,) int64: the oldest policy weights that produced a token of this response."""
    advantages: torch.Tensor | None = None
    """(B, T) whitened; None until with_advantages."""
    returns: torch.Tensor | None = None
    """(B, T) not whitened; None until with_advantages."""

    def __post_init__(self) -> None:
        sizes = {"B": len(self.prompt_ids), "S": _width(self.ids), "T": _width(self.mask)}
        for name, (rows, columns, dtype) in _SHAPES.items():
            tensor = getattr(self, name)
            if tensor is None:
                continue
            expected = tuple(sizes[axis] for axis in (rows, columns) if axis)
            if tuple(tensor.shape) != expected or tensor.dtype != dtype:
                raise ValueError(
                    f"RolloutBatch.{name} is {tuple(tensor.shape)} {tensor.dtype}; "
                    f"{len(self.prompt_ids)} prompt_ids, ids and mask ask for {expected} {dtype}."
                )
        self._check_lengths()
        for name, (_, columns, dtype) in _SHAPES.items():
            tensor = getattr(self, name)
            if tensor is not None and dtype == torch.float32:
                self._check_finite(name, tensor, self.mask if columns else None)

    def _check_lengths(self) -> None:
        response_lengths = self.lengths - self.response_starts
        is_bad = (self.response_starts < 1) | (response_lengths < 0)
        is_bad |= self.lengths > self.ids.shape[1]
        if bool(is_bad.any()):
            row = int(is_bad.nonzero()[0, 0])
            raise ValueError(
                f"RolloutBatch row {row} has length {int(self.lengths[row])} and response_start "
                f"{int(self.response_starts[row])} in {self.ids.shape[1]} columns; "
                "a response follows at least one prompt token and ends inside of the row."
            )
        columns = torch.arange(self.mask.shape[1], device=self.mask.device)
        is_wrong = (self.mask != (columns < response_lengths[:, None])).any(1)
        is_wrong |= response_lengths > self.mask.shape[1]
        if bool(is_wrong.any()):
            row = int(is_wrong.nonzero()[0, 0])
            raise ValueError(
                f"RolloutBatch.mask row {row} has {int(self.mask[row].sum())} tokens in "
                f"{self.mask.shape[1]} columns; it must be True for exactly the first "
                f"{int(response_lengths[row])} (lengths - response_starts)."
            )

    def _check_finite(self, name: str, tensor: torch.Tensor, mask: torch.Tensor | None) -> None:
        is_bad = ~tensor.isfinite()
        if mask is not None:
            is_bad &= mask
        if bool(is_bad.any()):
            place = is_bad.nonzero()[0].tolist()
            raise ValueError(
                f"RolloutBatch.{name}{place} is {float(tensor[tuple(place)])} "
                f"(prompt {self.prompt_ids[place[0]]!r}); every figure must be finite."
            )

    def __len__(self) -> int:
        return len(self.prompt_ids)

    @property
    def num_tokens(self) -> int:
        """Response tokens in the batch: what policy_loss and value_loss want as ``num_tokens``."""
        return int(self.mask.sum())

    @property
    def response_lengths(self) -> torch.Tensor:
        """(B,) int64, the stop token included."""
        return self.lengths - self.response_starts

    def with_advantages(self, advantages: torch.Tensor, returns: torch.Tensor) -> RolloutBatch:
        """The same batch with the two targets that stay fixed for all PPO epochs."""
        return replace(self, advantages=advantages, returns=returns)

    def select(self, rows: Sequence[int] | torch.Tensor) -> RolloutBatch:
        """The given rows in the given order, without the padding columns that none of them needs.

        The result depends on these rows alone, whatever the rest of the batch looks like.
        """
        index = torch.as_tensor(rows, dtype=torch.int64, device=self.ids.device)
        if not len(index):
            raise ValueError("RolloutBatch.select was given no rows.")
        num_positions = int(self.lengths[index].max())
        num_responses = max(int(self.response_lengths[index].max()), 1)
        widths = {"S": num_positions, "T": num_responses}
        changed: dict[str, object] = {
            "prompt_ids": tuple(self.prompt_ids[row] for row in index.tolist())
        }
        for name, (_, columns, _) in _SHAPES.items():
            tensor = getattr(self, name)
            if tensor is not None:
                tensor = tensor[index]
                changed[name] = tensor[:, : widths[columns]] if columns else tensor
        return replace(self, **changed)

    def to(self, device: torch.device | str) -> RolloutBatch:
        """The same batch on another device."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        moved = {k: v.to(device) for k, v in tensors.items() if isinstance(v, torch.Tensor)}
        return replace(self, **moved)


def _width(tensor: torch.Tensor) -> int:
    """Number of columns; at least 1, so that an empty or one-dimensional tensor fails the check."""
    return max(int(tensor.shape[1]), 1) if tensor.dim() == 2 else 1
