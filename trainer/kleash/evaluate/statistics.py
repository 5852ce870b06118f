"""Figures and their uncertainty: proportions, win rates, paired differences, noise ceiling.

NumPy float64, no I/O. Intervals cover 95 % unless ``z`` or ``level`` says otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Z_95 = 1.959963984540054
"""Two-sided 95 % quantile of the standard normal distribution."""

NUM_RESAMPLES = 2000
"""Bootstrap resamples: the ends of a 95 % interval then vary by about 2 % of its width."""

RESAMPLE_BLOCK = 2**20
"""Rows drawn at a time by the bootstrap: bounds its memory to some 32 MB."""


class Interval(NamedTuple):
    """Lower and upper end."""

    low: float
    high: float


@dataclass(frozen=True)
class WinRate:
    """How often one side wins against another, ties counting 1/2."""

    rate: float
    ci95: Interval
    n: int
    wins: int
    ties: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a JSON report."""
        return asdict(self) | {"ci95": list(self.ci95)}


@dataclass(frozen=True)
class PairedComparison:
    """Two systems on the same prompts."""

    mean_difference: float
    """Mean of first minus second."""
    ci95: Interval
    """Of the mean difference."""
    win_rate: WinRate
    """Of the first against the second, prompt by prompt."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a JSON report."""
        return {
            "mean_difference": self.mean_difference,
            "ci95": list(self.ci95),
            "win_rate": self.win_rate.to_dict(),
        }


def wilson_interval(successes: float, n: int, *, z: float = Z_95) -> Interval:
    """Score interval of a proportion (Wilson 1927); (0, 1) for n = 0. Half successes are allowed.

    Example: 50 of 100 gives (0.4038, 0.5962).
    """
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} successes of {n} trials: give 0 <= successes <= n.")
    if n == 0:
        return Interval(0.0, 1.0)
    p = successes / n
    scale = 1 + z * z / n
    centre = (p + z * z / (2 * n)) / scale
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / scale
    # Rounding must not push the ends of 0 or n successes past 0 and 1.
    return Interval(max(centre - half, 0.0), min(centre + half, 1.0))


def bootstrap_interval(
    groups: Sequence[ArrayLike] | NDArray[Any],
    *,
    seed: int,
    level: float = 0.95,
    num_resamples: int = NUM_RESAMPLES,
) -> Interval:
    """Percentile interval of the mean over all values, drawing whole groups again (Efron 1979).

    A group holds the values of one prompt, or one number. Values of one prompt depend on each
    other (the pairs of a ranking): an interval that took them as independent would be too narrow.
    """
    if len(groups) == 0:
        raise ValueError("cannot resample an empty list of groups.")
    arrays = [np.atleast_1d(np.asarray(group, dtype=np.float64)) for group in groups]
    sums = np.array([group.sum() for group in arrays])
    counts = np.array([len(group) for group in arrays], dtype=np.float64)
    generator = np.random.default_rng(seed)
    block = max(RESAMPLE_BLOCK // len(arrays), 1)
    means = np.empty(num_resamples)
    for start in range(0, num_resamples, block):
        size = (min(block, num_resamples - start), len(arrays))
        rows = generator.integers(len(arrays), size=size)
        means[start : start + block] = sums[rows].sum(1) / counts[rows].sum(1)
    tail = (1 - level) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(float(low), float(high))


def win_rate(first: ArrayLike, second: ArrayLike) -> WinRate:
    """Win rate of ``first`` against ``second``: one score a prompt, ties 1/2, Wilson interval."""
    difference = _paired_difference(first, second)
    n = len(difference)
    wins, ties = int((difference > 0).sum()), int((difference == 0).sum())
    score = wins + ties / 2
    return WinRate(score / n, wilson_interval(score, n), n, wins, ties)


def compare_paired(
    first: ArrayLike, second: ArrayLike, *, seed: int, num_resamples: int = NUM_RESAMPLES
) -> PairedComparison:
    """Mean difference with a bootstrap interval over prompts, and the win rate."""
    difference = _paired_difference(first, second)
    interval = bootstrap_interval(difference, seed=seed, num_resamples=num_resamples)
    return PairedComparison(float(difference.mean()), interval, win_rate(first, second))


def label_noise_ceiling(probabilities: ArrayLike) -> float:
    """Best accuracy on noisy labels, E[max(p, 1 - p)]; p = P(the first of a pair wins)."""
    p = np.asarray(probabilities, dtype=np.float64)
    if p.size == 0 or not ((p >= 0) & (p <= 1)).all():
        raise ValueError("the noise ceiling needs at least one probability, each between 0 and 1.")
    return float(np.maximum(p, 1 - p).mean())


def pearson(x: ArrayLike, y: ArrayLike) -> float:
    """Correlation coefficient; 0 when one side does not vary."""
    a, b = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if a.shape != b.shape or a.ndim != 1:
        raise ValueError(
            f"correlation needs two lists of one length, got shapes {a.shape} and {b.shape}."
        )
    if a.size < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return 0.0
    a, b = a - a.mean(), b - b.mean()
    return float(np.clip((a @ b) / math.sqrt((a @ a) * (b @ b)), -1, 1))


def _paired_difference(first: ArrayLike, second: ArrayLike) -> NDArray[np.float64]:
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if a.shape != b.shape or a.ndim != 1 or a.size == 0:
        raise ValueError(
            f"two systems need one score a prompt each, got shapes {a.shape} and {b.shape}."
        )
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("a paired comparison needs finite scores.")
    return a - b
