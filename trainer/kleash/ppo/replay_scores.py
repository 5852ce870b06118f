"""What two reward models say about the same responses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kleash.evaluate.statistics import pearson


@dataclass(frozen=True)
class ScoreComparison:
    """Of one batch of responses, all scores normalised."""

    mean: tuple[float, float]
    """Of the first and of the second model."""
    standard_deviation: tuple[float, float]
    """Divided by the number of responses."""
    correlation: float
    """Pearson's; 0 where a model's scores do not vary."""
    rank_correlation: float
    """Spearman's, with mean ranks for ties; 0 where a model's scores do not vary."""
    pair_agreement: float | None
    """Share of the pairs of responses that both models put in an order, in which it is the same;
    None without such a pair. A coin has 0.5."""


def compare_scores(first: Sequence[float], second: Sequence[float]) -> ScoreComparison:
    """Compare scores of the same responses, in the same order."""
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    rows, columns = np.triu_indices(len(a), k=1)
    orders = np.sign(a[rows] - a[columns]) * np.sign(b[rows] - b[columns])
    ordered = orders[orders != 0]
    return ScoreComparison(
        mean=(float(a.mean()), float(b.mean())),
        standard_deviation=(float(a.std()), float(b.std())),
        correlation=pearson(a, b),
        rank_correlation=pearson(_ranks(a), _ranks(b)),
        pair_agreement=float((ordered > 0).mean()) if len(ordered) else None,
    )


def _ranks(values: np.ndarray) -> np.ndarray:
    """From 0; equal values share the mean of their places."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return ((ends - counts + ends - 1) / 2)[place]
