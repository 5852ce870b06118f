"""How well a reward model predicts comparisons: accuracy, calibration, margin, pull of length.

P pairs, K responses of a ranking. Scores here are raw: sigma(difference) is the probability that
the model gives the winner, which a normalized score (divided by its std) no longer says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from kleash.data.comparisons import Ranking
from kleash.evaluate.statistics import Interval, bootstrap_interval, pearson, wilson_interval
from kleash.lm.heads import last_token_scores
from kleash.lm.sequences import TokenSequence, micro_batches, pack
from kleash.reward_model.batches import ranking_sequences

NUM_CALIBRATION_BINS = 10


@dataclass(frozen=True)
class Accuracy:
    """Share of pairs whose winner scores higher; a pair with equal scores counts 1/2."""

    accuracy: float
    ci95: Interval
    """Wilson interval over pairs."""
    num_pairs: int


@dataclass(frozen=True)
class CalibrationBin:
    """Pairs that the model is equally sure of: sigma(abs(difference)), its confidence, 0.5 to 1."""

    low: float
    high: float
    predicted: float
    """Mean confidence."""
    observed: float
    """Share of pairs in which the response with the higher score won."""
    num_pairs: int


@dataclass(frozen=True)
class Evaluation:
    """Figures of a reward model on comparisons."""

    num_rankings: int
    num_pairs: int
    accuracy: float
    """Share of pairs whose winner scores higher; a pair with equal scores counts 1/2."""
    accuracy_ci95: Interval
    """Wilson interval over pairs."""
    accuracy_ci95_over_prompts: Interval
    """Bootstrap over prompts: the honest one where a prompt has several pairs."""
    loss: float
    """Mean of -log sigma(difference) over pairs, nats; log 2 = 0.693 is a coin."""
    mean_margin: float
    """Mean of score of winner - score of loser, raw."""
    expected_calibration_error: float
    """Mean over pairs of abs(observed - predicted) of their bin."""
    calibration: list[CalibrationBin]
    score_length_correlation: float
    """Pearson correlation of raw score and response length in tokens, over responses."""
    longer_is_better_accuracy: float
    """Accuracy of preferring the longer response: what length alone explains."""
    prefers_longer: float | None
    """Share of pairs whose longer response scores higher; null when all are of equal length."""
    by_dimension: dict[str, Accuracy]
    by_annotator: dict[str, Accuracy]


def score_sequences(model: Any, sequences: Sequence[TokenSequence], max_tokens: int) -> np.ndarray:
    """Raw scores, (len(sequences),) float64, at most ``max_tokens`` padded tokens at a time."""
    scores = np.zeros(len(sequences))
    with torch.no_grad():
        for rows in micro_batches(sequences, max_tokens):
            batch = pack([sequences[row] for row in rows], model.device)
            scores[rows] = last_token_scores(model, batch).cpu().numpy()
    return scores


def score_rankings(model: Any, rankings: Sequence[Ranking], max_tokens: int) -> list[np.ndarray]:
    """Raw scores of every ranking's responses, one (K,) array each."""
    sequences = [sequence for ranking in rankings for sequence in ranking_sequences(ranking)]
    ends = np.cumsum([len(ranking.responses) for ranking in rankings])
    return np.split(score_sequences(model, sequences, max_tokens), ends[:-1])


def evaluate(rankings: Sequence[Ranking], scores: Sequence[np.ndarray], *, seed: int) -> Evaluation:
    """Compare raw ``scores``, a (K,) array for each ranking, with the labels.

    ``seed`` is the bootstrap's.
    """
    owners = [ranking for ranking in rankings for _ in ranking.pairs]
    lengths = [
        np.array([len(r) for r in ranking.responses], dtype=np.float64) for ranking in rankings
    ]
    differences = winner_minus_loser(rankings, scores)
    extra_length = winner_minus_loser(rankings, lengths)
    hits = _share_above_zero(differences)
    bins = calibration_bins(differences)
    return Evaluation(
        num_rankings=len(rankings),
        num_pairs=len(hits),
        accuracy=float(hits.mean()),
        accuracy_ci95=wilson_interval(float(hits.sum()), len(hits)),
        accuracy_ci95_over_prompts=bootstrap_interval(_by_prompt(hits, owners), seed=seed),
        loss=float(np.logaddexp(0, -differences).mean()),
        mean_margin=float(differences.mean()),
        expected_calibration_error=sum(abs(b.observed - b.predicted) * b.num_pairs for b in bins)
        / len(hits),
        calibration=bins,
        score_length_correlation=pearson(np.concatenate(scores), np.concatenate(lengths)),
        longer_is_better_accuracy=float(_share_above_zero(extra_length).mean()),
        prefers_longer=_prefers_longer(differences, extra_length),
        by_dimension=_accuracy_by(hits, [ranking.dimension for ranking in owners]),
        by_annotator=_accuracy_by(hits, [ranking.annotator for ranking in owners]),
    )


def winner_minus_loser(rankings: Sequence[Ranking], values: Sequence[np.ndarray]) -> np.ndarray:
    """Value of each pair's winner minus its loser's, (P,); ``values`` are (K,) for each ranking."""
    return np.array(
        [
            row[winner] - row[loser]
            for ranking, row in zip(rankings, values, strict=True)
            for winner, loser, _ in ranking.pairs
        ]
    )


def calibration_bins(
    differences: np.ndarray, num_bins: int = NUM_CALIBRATION_BINS
) -> list[CalibrationBin]:
    """Bins of equal width over the confidence 0.5 to 1, empty ones left out."""
    confidences = np.exp(-np.logaddexp(0, -np.abs(differences)))
    hits = _share_above_zero(differences)
    rows = np.minimum(((confidences - 0.5) * 2 * num_bins).astype(int), num_bins - 1)
    return [
        CalibrationBin(
            low=0.5 + index / (2 * num_bins),
            high=0.5 + (index + 1) / (2 * num_bins),
            predicted=float(confidences[rows == index].mean()),
            observed=float(hits[rows == index].mean()),
            num_pairs=int((rows == index).sum()),
        )
        for index in np.unique(rows)
    ]


def _share_above_zero(differences: np.ndarray) -> np.ndarray:
    """1 above 0, 1/2 at 0, 0 below."""
    return (1 + np.sign(differences)) / 2


def _prefers_longer(differences: np.ndarray, extra_length: np.ndarray) -> float | None:
    unequal = extra_length != 0
    if not unequal.any():
        return None
    return float(_share_above_zero((differences * np.sign(extra_length))[unequal]).mean())


def _by_prompt(hits: np.ndarray, owners: Sequence[Ranking]) -> list[list[float]]:
    """The values of each prompt's pairs, from all rankings of that prompt."""
    groups: dict[bytes, list[float]] = {}
    for hit, ranking in zip(hits.tolist(), owners, strict=True):
        groups.setdefault(ranking.prompt_ids.tobytes(), []).append(hit)
    return list(groups.values())


def _accuracy_by(hits: np.ndarray, names: Sequence[str]) -> dict[str, Accuracy]:
    groups = {}
    for name in sorted(set(names) - {""}):
        chosen = hits[np.array(names) == name]
        interval = wilson_interval(float(chosen.sum()), len(chosen))
        groups[name] = Accuracy(float(chosen.mean()), interval, len(chosen))
    return groups
