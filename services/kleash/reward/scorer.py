"""The reward model: token ids in, raw scores out. No gRPC, no queue.

B rows, S positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from kleash.base.errors import ModelError
from kleash.lm.config import FrozenModelConfig
from kleash.lm.frozen import FrozenModel, load_frozen, warm_up
from kleash.lm.heads import Normalization, check_scalar_head, position_scores
from kleash.lm.load import load_sequence_classifier, read_lineage
from kleash.lm.sequences import TokenSequence, pack
from kleash.reward.inputs import InputEncoder
from kleash.rpc.requests import Limits


@dataclass(frozen=True, eq=False)
class ScoreJob:
    """One row to score."""

    ids: np.ndarray
    """int32, at least one token, all inside of the vocabulary."""
    wants_token_scores: bool = False


@dataclass(frozen=True, eq=False)
class RawScore:
    """What the model answered for one row, before normalization."""

    score: float
    """Output at the last token; may be NaN, which the caller must not pass on."""
    token_scores: np.ndarray | None = None
    """float32, one per token, when asked for."""


class RewardScorer:
    """A loaded reward model."""

    def __init__(self, frozen: FrozenModel, *, is_trained_here: bool) -> None:
        self.frozen = frozen
        self.normalization = Normalization.of(frozen.model.config)
        self.encoder = InputEncoder(frozen.tokenizer, ends_with_eos=is_trained_here)

    @staticmethod
    def load(config: FrozenModelConfig, limits: Limits) -> RewardScorer:
        """Load, check and warm up. Raises ModelError."""
        frozen = load_frozen(
            config,
            load_sequence_classifier,
            max_item_tokens=limits.max_item_tokens,
            max_batch_tokens=limits.max_batch_tokens,
        )
        check_scalar_head(frozen.model, config.model)
        scorer = RewardScorer(frozen, is_trained_here=bool(read_lineage(config.model)))
        scorer._check_causal(config)
        warm_up(frozen, limits.max_batch_tokens, scorer._score_zeros)
        return scorer

    @torch.inference_mode()
    def compute(self, jobs: list[ScoreJob]) -> list[RawScore]:
        """Score one batch."""
        batch = pack([TokenSequence(job.ids, len(job.ids)) for job in jobs], self.frozen.device)
        positions_BS = position_scores(self.frozen.model, batch.ids).cpu().numpy()
        results = []
        for job, row in zip(jobs, positions_BS, strict=True):
            length = len(job.ids)
            token_scores = row[:length].copy() if job.wants_token_scores else None
            results.append(RawScore(float(row[length - 1]), token_scores))
        return results

    @torch.inference_mode()
    def _check_causal(self, config: FrozenModelConfig) -> None:
        """Right padding is right only when no token sees a later one: two pads, same scores."""
        ids = torch.zeros((2, 4), dtype=torch.int64, device=self.frozen.device)
        ids[1, 2:] = self.frozen.vocab_size - 1
        scores = position_scores(self.frozen.model, ids)[:, :2]
        if not torch.allclose(scores[0], scores[1], rtol=1e-3, atol=1e-3, equal_nan=True):
            raise ModelError(
                f"the model in {config.model} ({type(self.frozen.model).__name__}) lets tokens see "
                "later ones; a reward model must be a causal language model with a scalar head."
            )

    def _score_zeros(self, lengths: list[int]) -> None:
        self.compute([ScoreJob(np.zeros(length, dtype=np.int32)) for length in lengths])
