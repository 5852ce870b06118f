"""The Bradley-Terry loss of a reward model: tensors in, tensors out.

P pairs, R responses, N prompts. Scores are raw, float32. A pair is (winner, loser).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import logsigmoid


@dataclass(frozen=True)
class RankingLoss:
    """The loss of some pairs, and what it consists of."""

    loss: torch.Tensor
    """Scalar to differentiate: Bradley-Terry term plus centring term, both weighted."""
    preference_loss: torch.Tensor
    """Scalar, detached: the Bradley-Terry term alone."""
    accuracy: torch.Tensor
    """Scalar, detached: weighted share of pairs whose winner scores higher; equal ones are 1/2."""


def pair_losses(
    differences: torch.Tensor, margins: torch.Tensor | float = 0.0, *, label_smoothing: float = 0.0
) -> torch.Tensor:
    """-(1 - e) log sigma(d) - e log sigma(-d), (P,); d = winner's score - loser's score - margin.

    Bradley & Terry 1952 as in Ouyang et al. 2022, equation 1; margin: Touvron et al. 2023,
    equation 2; ``label_smoothing`` e is the probability that a label is wrong. logsigmoid is
    finite for every finite d, log(1 + exp(-d)) is not.
    """
    d = differences - margins
    if not label_smoothing:
        return -logsigmoid(d)
    return -(1 - label_smoothing) * logsigmoid(d) - label_smoothing * logsigmoid(-d)


def pair_weights(num_pairs: torch.Tensor, num_prompts: int) -> torch.Tensor:
    """Weight of every pair of a step, (sum of num_pairs,) float32: 1 / (pairs of its prompt * N).

    ``num_pairs`` (n,) int64 are the pairs of each prompt, N = ``num_prompts`` the prompts of the
    whole step: the losses of its micro-batches add up to the mean over prompts of the mean over
    pairs.
    """
    return torch.repeat_interleave(1.0 / (num_pairs * num_prompts), num_pairs)


def ranking_loss(
    scores: torch.Tensor,
    pairs: torch.Tensor,
    weights: torch.Tensor,
    margins: torch.Tensor,
    *,
    label_smoothing: float = 0.0,
    centring_coefficient: float = 0.0,
) -> RankingLoss:
    """Weighted sum over pairs of the Bradley-Terry loss.

    K-way rankings: -1/C(K,2) sum over i > j of log sigma(r_i - r_j) per prompt, mean over prompts
    (Ouyang et al. 2022, equation 1), through the weights of ``pair_weights``. The centring term
    c (r_w + r_l)^2 holds the scores of a pair around 0 (Eisenstein et al. 2023, equation 2).

    Args:
        scores: (R,) raw scores.
        pairs: (P, 2) int64, rows of ``scores``: winner, loser.
        weights: (P,).
        margins: (P,), subtracted from the difference; 0 for none.
        label_smoothing: probability that a label is wrong, 0 to 0.5.
        centring_coefficient: c, 0 for none.
    """
    winners, losers = scores[pairs[:, 0]], scores[pairs[:, 1]]
    losses = pair_losses(winners - losers, margins, label_smoothing=label_smoothing)
    preference = (weights * losses).sum()
    centring = (weights * (winners + losers).square()).sum()
    with torch.no_grad():
        hits = (winners > losers).float() + 0.5 * (winners == losers).float()
        accuracy = (weights * hits).sum()
    return RankingLoss(preference + centring_coefficient * centring, preference.detach(), accuracy)
