"""The reference model: prompt and response ids in, log-probabilities of the response out.

No gRPC, no queue. B rows, T response positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from kleash.lm.config import FrozenModelConfig
from kleash.lm.frozen import FrozenModel, load_frozen, warm_up
from kleash.lm.load import load_causal_lm
from kleash.lm.log_probs import response_log_probs
from kleash.lm.sequences import TokenSequence, pack
from kleash.rpc.requests import Limits


@dataclass(frozen=True, eq=False)
class LogProbsJob:
    """One row: a prompt of at least one token, and its response."""

    sequence: TokenSequence
    temperature: float


class ReferenceScorer:
    """A loaded reference model."""

    def __init__(self, frozen: FrozenModel) -> None:
        self.frozen = frozen

    @staticmethod
    def load(config: FrozenModelConfig, limits: Limits) -> ReferenceScorer:
        """Load and warm up. Raises ModelError."""
        frozen = load_frozen(
            config,
            load_causal_lm,
            max_item_tokens=limits.max_item_tokens,
            max_batch_tokens=limits.max_batch_tokens,
        )
        scorer = ReferenceScorer(frozen)
        warm_up(frozen, limits.max_batch_tokens, scorer._score_zeros)
        return scorer

    def compute(self, jobs: list[LogProbsJob]) -> list[np.ndarray]:
        """Log-probability of every response token in nats, one float32 array per row.

        Rows of one temperature share a forward pass; a trainer uses one.
        """
        results: dict[int, np.ndarray] = {}
        for temperature in dict.fromkeys(job.temperature for job in jobs):
            rows = [index for index, job in enumerate(jobs) if job.temperature == temperature]
            sequences = [jobs[index].sequence for index in rows]
            results.update(zip(rows, self._forward(sequences, temperature), strict=True))
        return [results[index] for index in range(len(jobs))]

    @torch.inference_mode()
    def _forward(self, sequences: list[TokenSequence], temperature: float) -> list[np.ndarray]:
        batch = pack(sequences, self.frozen.device)
        log_probs_BT = response_log_probs(self.frozen.model, batch, temperature).cpu().numpy()
        return [
            row[: sequence.response_length].copy()
            for row, sequence in zip(log_probs_BT, sequences, strict=True)
        ]

    def _score_zeros(self, lengths: list[int]) -> None:
        rows = [TokenSequence(np.zeros(length, dtype=np.int32), 1) for length in lengths]
        self._forward(rows, temperature=1.0)
