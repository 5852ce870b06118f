"""Comparisons as training sees them: whole prompts held out, whole rankings in a step.

A ranking is one batch element with its K responses and all of its pairs: pairs of one prompt that
meet the model in different steps are overfitted within a single epoch (Ouyang et al. 2022, 3.5).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from kleash.base.errors import DataError
from kleash.data.comparisons import Ranking
from kleash.data.shuffle import shuffled
from kleash.lm.sequences import PackedBatch, TokenSequence, pack
from kleash.reward_model.loss import pair_weights


@dataclass(frozen=True, eq=False)
class RankingBatch:
    """Some rankings of a step as tensors.

    Example: two pairs of one prompt each, in a step of 4 prompts: 4 responses, pairs
    [[0, 1], [2, 3]], weights [1/4, 1/4].
    """

    responses: PackedBatch
    """R rows, the K responses of a ranking side by side."""
    pairs: torch.Tensor
    """(P, 2) int64, rows of winner and loser."""
    weights: torch.Tensor
    """(P,) share in the step's loss: 1 / (pairs of the prompt * prompts of the step)."""
    margins: torch.Tensor
    """(P,) float32."""


def hold_out(
    rankings: Sequence[Ranking], fraction: float, *, seed: int
) -> tuple[list[Ranking], list[Ranking]]:
    """Split into (train, held out) by prompt: no prompt is on both sides.

    A positive ``fraction`` holds out at least one prompt and leaves at least one; it raises
    DataError when there is one prompt only.
    """
    keys = [ranking.prompt_ids.tobytes() for ranking in rankings]
    prompts = list(dict.fromkeys(keys))
    if fraction > 0 and len(prompts) < 2:
        raise DataError(
            "the comparisons have one prompt only, so none can be held out; "
            "add data or set --evaluation_fraction=0."
        )
    count = round(fraction * len(prompts))
    if fraction > 0:
        count = min(max(count, 1), len(prompts) - 1)
    chosen = shuffled(len(prompts), seed=seed, purpose="held-out")[:count]
    held = {prompts[index] for index in chosen}
    train = [ranking for key, ranking in zip(keys, rankings, strict=True) if key not in held]
    return train, [ranking for key, ranking in zip(keys, rankings, strict=True) if key in held]


def micro_batches(
    rankings: Sequence[Ranking], max_tokens: int, *, device: torch.device | str = "cpu"
) -> list[RankingBatch]:
    """Split a step into batches of whole rankings with at most ``max_tokens`` padded tokens each.

    A ranking with more gets a batch of its own. The losses of the batches add up to the step's.
    """
    groups: list[list[Ranking]] = []
    rows = 0
    for ranking in sorted(rankings, key=_width):
        if groups and (rows + len(ranking.responses)) * _width(ranking) <= max_tokens:
            groups[-1].append(ranking)
            rows += len(ranking.responses)
        else:
            groups.append([ranking])
            rows = len(ranking.responses)
    return [_to_batch(group, len(rankings), device) for group in groups]


def ranking_sequences(ranking: Ranking) -> list[TokenSequence]:
    """Prompt plus response, once for each of the K responses."""
    start = len(ranking.prompt_ids)
    return [
        TokenSequence(np.concatenate([ranking.prompt_ids, response]), start)
        for response in ranking.responses
    ]


def _width(ranking: Ranking) -> int:
    return len(ranking.prompt_ids) + max(len(response) for response in ranking.responses)


def _to_batch(
    rankings: Sequence[Ranking], num_prompts: int, device: torch.device | str
) -> RankingBatch:
    first_rows = np.cumsum([0] + [len(ranking.responses) for ranking in rankings])
    pairs = [
        (row + winner, row + loser, margin)
        for row, ranking in zip(first_rows, rankings, strict=False)
        for winner, loser, margin in ranking.pairs
    ]
    num_pairs = torch.tensor([len(ranking.pairs) for ranking in rankings])
    return RankingBatch(
        responses=pack([s for ranking in rankings for s in ranking_sequences(ranking)], device),
        pairs=torch.tensor([pair[:2] for pair in pairs], device=device),
        weights=pair_weights(num_pairs, num_prompts).to(device),
        margins=torch.tensor([pair[2] for pair in pairs], dtype=torch.float32, device=device),
    )
