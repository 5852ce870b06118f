"""Intervals and rates against numbers worked by hand (facts/ppo.md sections 1.6 and 2.9)."""

from __future__ import annotations

import math

import numpy as np
import pytest

from kleash.evaluate.statistics import (
    Z_95,
    Interval,
    bootstrap_interval,
    compare_paired,
    label_noise_ceiling,
    pearson,
    wilson_interval,
    win_rate,
)

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        (50, 100, 0.40383, 0.59617),
        (15, 20, 0.53130, 0.88814),
        # z^2 / (n + z^2) = 3.8415 / 13.8415 is the other end when nothing or everything succeeds.
        (0, 10, 0.0, 0.27753),
        (10, 10, 0.72247, 1.0),
    ],
)
def test_wilson_interval(successes: int, n: int, low: float, high: float) -> None:
    assert wilson_interval(successes, n) == pytest.approx((low, high), abs=1e-5)


def test_wilson_interval_solves_its_equation() -> None:
    """Wilson 1927: the ends p satisfy (successes/n - p)^2 = z^2 p (1 - p) / n."""
    for end in wilson_interval(17.5, 40):
        assert (17.5 / 40 - end) ** 2 == pytest.approx(Z_95**2 * end * (1 - end) / 40)


def test_wilson_interval_knows_nothing_without_trials_and_rejects_nonsense() -> None:
    assert wilson_interval(0, 0) == Interval(0.0, 1.0)
    with pytest.raises(ValueError, match="5 successes of 4 trials"):
        wilson_interval(5, 4)


def test_wilson_interval_covers_95_percent() -> None:
    draws = np.random.default_rng(0).binomial(200, 0.7, size=2000)
    intervals = [wilson_interval(int(draw), 200) for draw in draws]
    covered = np.mean([low <= 0.7 <= high for low, high in intervals])
    assert 0.935 <= covered <= 0.965


def test_bootstrap_agrees_with_the_normal_interval_of_a_mean() -> None:
    values = np.random.default_rng(1).normal(3.0, 2.0, size=1000)
    half = Z_95 * values.std() / math.sqrt(1000)
    low, high = bootstrap_interval(values, seed=0)
    assert low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_bootstrap_draws_whole_prompts() -> None:
    """Ten equal values of a prompt are one observation: the interval is sqrt(10) times as wide."""
    values = np.random.default_rng(2).normal(size=400)
    clustered = bootstrap_interval([[value] * 10 for value in values], seed=0)
    alone = bootstrap_interval(values, seed=0)
    assert clustered == pytest.approx(alone, abs=1e-9)
    independent = bootstrap_interval(np.repeat(values, 10), seed=0)
    ratio = (clustered.high - clustered.low) / (independent.high - independent.low)
    assert ratio == pytest.approx(math.sqrt(10), rel=0.1)


def test_bootstrap_weighs_prompts_by_their_values() -> None:
    """The mean is over values, not over prompts: (1 + 1 + 1 + 0) / 4 for these two prompts."""
    interval = bootstrap_interval([[1, 1, 1]] * 500 + [[0]] * 500, seed=0)
    assert interval.low < 0.75 < interval.high
    assert interval.high - interval.low < 0.1


def test_bootstrap_depends_on_the_seed_alone() -> None:
    values = np.random.default_rng(3).normal(size=50)
    assert bootstrap_interval(values, seed=4) == bootstrap_interval(values, seed=4)
    assert bootstrap_interval(values, seed=4) != bootstrap_interval(values, seed=5)
    with pytest.raises(ValueError, match="empty list"):
        bootstrap_interval([], seed=0)


def test_win_rate_counts_ties_half() -> None:
    result = win_rate([1, 2, 3, 4, 5], [0, 2, 4, 0, 0])
    assert (result.rate, result.n, result.wins, result.ties) == (0.7, 5, 3, 1)
    assert result.ci95 == wilson_interval(3.5, 5)
    assert result.to_dict()["ci95"] == list(result.ci95)


def test_win_rate_of_both_sides_adds_up_to_one() -> None:
    first, second = np.random.default_rng(5).integers(0, 4, size=(2, 300))
    forward, backward = win_rate(first, second), win_rate(second, first)
    assert forward.rate + backward.rate == pytest.approx(1)
    assert forward.ci95.low == pytest.approx(1 - backward.ci95.high)


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [([1, 2], [1], "score a prompt each"), ([], [], "score a prompt"), ([math.nan], [1], "finite")],
)
def test_win_rate_rejects_scores_that_do_not_pair(
    first: list[float], second: list[float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        win_rate(first, second)


def test_paired_comparison_uses_the_pairing() -> None:
    """Prompts differ by far more than the systems: only paired differences show the 0.1."""
    random = np.random.default_rng(6)
    prompts = random.normal(0, 10, size=500)
    first = prompts + 0.1 + random.normal(0, 0.1, size=500)
    result = compare_paired(first, prompts, seed=0)
    assert result.mean_difference == pytest.approx((first - prompts).mean())
    assert 0.08 < result.ci95.low < 0.1 < result.ci95.high < 0.12
    assert result.win_rate.rate == pytest.approx(np.mean(first > prompts))
    assert result.to_dict()["win_rate"]["n"] == 500


def test_label_noise_ceiling() -> None:
    """E[max(p, 1 - p)] over p = 0.9, 0.5, 0.2 is (0.9 + 0.5 + 0.8) / 3."""
    assert label_noise_ceiling([0.9, 0.5, 0.2]) == pytest.approx(2.2 / 3)
    for bad in ([], [1.1], [math.nan]):
        with pytest.raises(ValueError, match="probability"):
            label_noise_ceiling(bad)


def test_label_noise_ceiling_is_the_accuracy_of_the_labels_own_rule() -> None:
    random = np.random.default_rng(7)
    p = 1 / (1 + np.exp(-random.normal(0, 2, size=20000)))
    labels = random.random(20000) < p
    assert np.mean((p > 0.5) == labels) == pytest.approx(label_noise_ceiling(p), abs=0.01)


def test_pearson() -> None:
    """Deviations (-1, 0, 1) and (-1, 1, 0): covariance 1, norms sqrt 2 each."""
    assert pearson([1, 2, 3], [4, 6, 5]) == pytest.approx(0.5)
    assert pearson([1, 2, 3], [-1, -2, -3]) == pytest.approx(-1)
    assert pearson([1, 1, 1], [1, 2, 3]) == 0
    with pytest.raises(ValueError, match="two lists of one length"):
        pearson([1, 2], [1, 2, 3])
