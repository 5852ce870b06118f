"""Goldens and invariances of facts/ppo.md section 2.9; bugs 39, 40 and 41 of section 4."""

from __future__ import annotations

import math
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kleash.base.errors import DataError
from kleash.data.comparisons import Ranking
from kleash.lm.heads import last_token_scores, reward_model_from_causal_lm
from kleash.lm.sequences import TokenSequence, pack
from kleash.reward_model.batches import hold_out, micro_batches, ranking_sequences
from kleash.reward_model.evaluation import calibration_bins, evaluate, winner_minus_loser
from kleash.reward_model.loss import pair_losses, pair_weights, ranking_loss
from kleash.reward_model.normalize import measure_normalization

pytestmark = pytest.mark.unit


def one_pair_loss(winner: float, loser: float, margin: float = 0.0, **options: float):
    scores = torch.tensor([winner, loser], dtype=torch.float64, requires_grad=True)
    result = ranking_loss(
        scores, torch.tensor([[0, 1]]), torch.ones(1), torch.tensor([margin]), **options
    )
    result.loss.backward()
    assert scores.grad is not None
    return result, scores.grad


def make_ranking(
    num_responses: int, *, seed: int = 0, prompt: int = 5, pairs=None, **names: str
) -> Ranking:
    random = np.random.default_rng([seed, prompt])
    responses = [
        np.append(random.integers(5, 200, random.integers(1, 9)), 1).astype(np.int32)
        for _ in range(num_responses)
    ]
    return Ranking(
        prompt_ids=np.arange(prompt, dtype=np.int32) + 10,
        responses=responses,
        pairs=pairs or [(i, j, 0.0) for i, j in combinations(range(num_responses), 2)],
        dimension=names.get("dimension", ""),
        annotator=names.get("annotator", ""),
        fields={},
    )


def test_bradley_terry_golden() -> None:
    """-log sigma(1) = .313262, dL/dr_w = -(1 - sigma(1)) = -.268941."""
    result, grad = one_pair_loss(1.7, 0.7)
    assert result.loss.item() == pytest.approx(0.313262, abs=1e-6)
    assert grad.tolist() == pytest.approx([-0.268941, 0.268941], abs=1e-6)
    assert result.preference_loss == result.loss
    assert result.accuracy.item() == 1


def test_margin_golden() -> None:
    """-log sigma(1 - 0.4) = log(1 + e^-0.6) = .437488."""
    result, grad = one_pair_loss(1.0, 0.0, margin=0.4)
    assert result.loss.item() == pytest.approx(0.437488, abs=1e-6)
    assert grad[0].item() == pytest.approx(-1 / (1 + math.exp(0.6)), abs=1e-6)


def test_label_smoothing_golden() -> None:
    """-0.9 log sigma(1) - 0.1 log sigma(-1) = .313262 + 0.1; stationary at d = log 9."""
    result, _ = one_pair_loss(1.0, 0.0, label_smoothing=0.1)
    assert result.loss.item() == pytest.approx(0.413262, abs=1e-6)
    _, grad = one_pair_loss(math.log(9), 0.0, label_smoothing=0.1)
    assert grad.tolist() == pytest.approx([0, 0], abs=1e-12)


def test_centring_golden() -> None:
    """.313262 + 0.01 (1.7 + 0.7)^2, gradient 0.02 * 2.4 more on both."""
    result, grad = one_pair_loss(1.7, 0.7, centring_coefficient=0.01)
    assert result.loss.item() == pytest.approx(0.313262 + 0.0576, abs=1e-6)
    assert result.preference_loss.item() == pytest.approx(0.313262, abs=1e-6)
    assert grad.tolist() == pytest.approx([-0.268941 + 0.048, 0.268941 + 0.048], abs=1e-6)


@pytest.mark.parametrize("difference", [1e4, -1e4])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_huge_differences_stay_finite(difference: float, label_smoothing: float) -> None:
    """Bug 40: log(1 + exp(1e4)) is infinite."""
    scores = torch.tensor([difference, 0.0], requires_grad=True)
    loss = pair_losses(scores[0] - scores[1], label_smoothing=label_smoothing)
    loss.backward()
    wrong = 1 - label_smoothing if difference < 0 else label_smoothing
    assert loss.item() == pytest.approx(1e4 * wrong, abs=1e-3)
    assert scores.grad is not None
    assert scores.grad[0].item() == pytest.approx(-wrong if difference < 0 else wrong, abs=1e-6)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.floats(-5, 5), min_size=2, max_size=6),
    st.floats(-100, 100),
    st.floats(0, 0.4),
)
def test_loss_does_not_change_when_all_scores_shift(
    values: list[float], shift: float, label_smoothing: float
) -> None:
    """Bradley-Terry knows differences only; the centring term is what breaks this."""
    scores = torch.tensor(values, dtype=torch.float64)
    pairs = torch.tensor(list(combinations(range(len(values)), 2)))
    weights, margins = torch.full((len(pairs),), 1 / len(pairs)), torch.arange(len(pairs)) / 10

    def loss(scores: torch.Tensor, **options: float) -> float:
        return ranking_loss(
            scores, pairs, weights, margins, label_smoothing=label_smoothing, **options
        ).loss.item()

    assert loss(scores + shift) == pytest.approx(loss(scores), abs=1e-9)
    if abs(shift) > 50:
        assert loss(scores + shift, centring_coefficient=1.0) > loss(scores) + 1


def test_k_way_ranking_is_the_mean_over_its_pairs() -> None:
    """Ouyang et al. 2022, equation 1: -1/C(K,2) sum log sigma(r_i - r_j), each prompt alike."""
    first, second = [0.9, -0.2, 0.4, 1.5], [0.3, 0.1]

    def by_hand(scores: list[float]) -> float:
        losses = [math.log1p(math.exp(b - a)) for a, b in combinations(scores, 2)]
        return sum(losses) / len(losses)

    pairs = [*combinations(range(4), 2), (4, 5)]
    weights = pair_weights(torch.tensor([6, 1]), num_prompts=2)
    assert weights.tolist() == pytest.approx([1 / 12] * 6 + [1 / 2])
    loss = ranking_loss(
        torch.tensor(first + second), torch.tensor(pairs), weights, torch.zeros(7)
    ).loss
    assert loss.item() == pytest.approx((by_hand(first) + by_hand(second)) / 2)


def test_equal_scores_are_half_a_hit() -> None:
    result = ranking_loss(
        torch.tensor([1.0, 1.0, 0.0]),
        torch.tensor([[0, 1], [0, 2], [2, 1], [1, 2]]),
        torch.full((4,), 0.25),
        torch.zeros(4),
    )
    assert result.accuracy.item() == pytest.approx(2.5 / 4)


def test_all_pairs_of_a_prompt_share_one_batch() -> None:
    """Bug 39: every ranking meets the model once, with all of its responses and pairs."""
    rankings = [make_ranking(2 + i % 4, seed=i, prompt=5 + i) for i in range(12)]
    batches = micro_batches(rankings, 80)
    assert len(batches) > 3
    seen = []
    for batch in batches:
        num_responses, width = batch.responses.ids.shape
        prompts = batch.responses.response_starts[batch.pairs]
        assert (prompts[:, 0] == prompts[:, 1]).all()
        assert batch.pairs.unique().tolist() == list(range(num_responses))
        owners = batch.responses.response_starts.tolist()
        assert num_responses * width <= 80 or len(set(owners)) == 1
        for prompt in dict.fromkeys(owners):
            count = owners.count(prompt)
            mine = batch.weights[prompts[:, 0] == prompt]
            assert mine.tolist() == pytest.approx([1 / (math.comb(count, 2) * 12)] * len(mine))
            assert len(mine) == math.comb(count, 2)
            seen.append((prompt, count))
    assert sorted(seen) == [(5 + i, 2 + i % 4) for i in range(12)]


def test_a_batch_holds_the_right_tokens_pairs_and_margins() -> None:
    long = make_ranking(3, seed=1, prompt=9, pairs=[(2, 0, 0.5), (0, 1, 0.25)])
    short = make_ranking(2, seed=2, prompt=2, pairs=[(1, 0, 1.0)])
    (batch,) = micro_batches([long, short], 10_000)
    expected = [*ranking_sequences(short), *ranking_sequences(long)]
    for row, sequence in enumerate(expected):
        assert batch.responses.ids[row, : len(sequence.ids)].tolist() == sequence.ids.tolist()
        assert batch.responses.lengths[row] == len(sequence.ids)
    assert batch.pairs.tolist() == [[1, 0], [4, 2], [2, 3]]
    assert batch.margins.tolist() == [1.0, 0.5, 0.25]
    assert batch.weights.tolist() == pytest.approx([1 / 2, 1 / 4, 1 / 4])


def test_gradient_is_that_of_the_mean_over_prompts(tiny_folder: Path) -> None:
    """Bug 19 on a real model: whatever the micro-batches, each prompt counts alike."""
    rankings = [make_ranking(2 + i % 3, seed=i, prompt=3 + i) for i in range(6)]
    model = reward_model_from_causal_lm(tiny_folder, seed=0)
    losses = []
    for ranking in rankings:
        scores = last_token_scores(model, pack(ranking_sequences(ranking)))
        terms = [-torch.log(torch.sigmoid(scores[i] - scores[j])) for i, j, _ in ranking.pairs]
        losses.append(torch.stack(terms).mean())
    torch.stack(losses).mean().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    for tokens in (1, 120, 100_000):
        model.zero_grad()
        for part in micro_batches(rankings, tokens):
            scores = last_token_scores(model, part.responses)
            ranking_loss(scores, part.pairs, part.weights, part.margins).loss.backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad, expected[name], atol=1e-6, rtol=1e-4)


def test_whole_prompts_are_held_out() -> None:
    rankings = [make_ranking(2, seed=i, prompt=1 + i % 20) for i in range(60)]
    train, held_out = hold_out(rankings, 0.2, seed=0)
    lengths = [{len(ranking.prompt_ids) for ranking in side} for side in (train, held_out)]
    assert [len(side) for side in lengths] == [16, 4]
    assert not lengths[0] & lengths[1]
    assert len(train) + len(held_out) == 60
    assert hold_out(rankings, 0.2, seed=0)[1] == held_out
    assert hold_out(rankings, 0.2, seed=1)[1] != held_out


def test_held_out_fraction_never_rounds_to_nothing_or_all() -> None:
    rankings = [make_ranking(2, prompt=1 + i) for i in range(3)]
    assert [len(side) for side in hold_out(rankings, 0.01, seed=0)] == [2, 1]
    assert [len(side) for side in hold_out(rankings, 0.99, seed=0)] == [1, 2]
    assert [len(side) for side in hold_out(rankings, 0.0, seed=0)] == [3, 0]
    with pytest.raises(DataError, match="one prompt only"):
        hold_out(rankings[:1], 0.1, seed=0)


def test_normalization_gives_mean_zero_and_std_one() -> None:
    raw = np.random.default_rng(0).normal(-3.0, 0.2, size=500)
    both, mean_only = measure_normalization(raw, "mean_std"), measure_normalization(raw, "mean")
    normalized = (raw - both.mean) / both.std
    assert normalized.mean() == pytest.approx(0, abs=1e-12)
    assert normalized.std() == pytest.approx(1)
    assert (mean_only.mean, mean_only.std) == (both.mean, 1.0)


def test_normalization_without_spread_is_refused() -> None:
    with pytest.raises(DataError, match="without a spread"):
        measure_normalization(np.full(4, 2.5), "mean_std")
    assert measure_normalization(np.full(4, 2.5), "mean").mean == 2.5


def test_evaluation_against_numbers_worked_by_hand() -> None:
    """Differences 2, -1 (prompt one) and 0 (prompt two)."""
    responses = [np.ones(n, dtype=np.int32) for n in (3, 5, 5)]
    one = Ranking(
        np.array([7], dtype=np.int32), responses, [(0, 1, 0.0), (2, 0, 0.0)], "helpful", "ann", {}
    )
    two = Ranking(
        np.array([8], dtype=np.int32), responses[:2], [(1, 0, 0.0)], "harmless", "ann", {}
    )
    result = evaluate([one, two], [np.array([2.0, 0.0, 1.0]), np.array([4.0, 4.0])], seed=0)
    assert (result.num_rankings, result.num_pairs) == (2, 3)
    assert result.accuracy == pytest.approx(1.5 / 3)
    assert result.loss == pytest.approx((0.126928 + 1.313262 + math.log(2)) / 3, abs=1e-6)
    assert result.mean_margin == pytest.approx(1 / 3)
    # The winner is longer in the second and third pair; the model prefers the shorter one twice.
    assert result.longer_is_better_accuracy == pytest.approx(2 / 3)
    assert result.prefers_longer == pytest.approx((0 + 0 + 0.5) / 3)
    assert result.by_dimension["helpful"].accuracy == 0.5
    assert result.by_dimension["harmless"].num_pairs == 1
    assert result.by_annotator["ann"].accuracy == result.accuracy
    assert result.score_length_correlation == pytest.approx(
        np.corrcoef([2, 0, 1, 4, 4], [3, 5, 5, 3, 5])[0, 1]
    )
    # Confidences .880797, .731059, .5 with hits 1, 0, 1/2: errors .119203, .731059, 0.
    assert result.expected_calibration_error == pytest.approx((0.119203 + 0.731059) / 3, abs=1e-6)


def test_calibration_of_a_calibrated_model_and_of_an_overconfident_one() -> None:
    random = np.random.default_rng(0)
    differences = random.normal(0, 1.5, size=20_000)
    # The winner of each pair is drawn with the model's own probability.
    wins = random.random(20_000) < 1 / (1 + np.exp(-differences))
    signed = np.where(wins, differences, -differences)

    def error(scale: float) -> float:
        bins = calibration_bins(signed * scale)
        return sum(abs(b.predicted - b.observed) * b.num_pairs for b in bins) / 20_000

    assert [round(b.low, 2) for b in calibration_bins(signed)] == [
        round(0.5 + i / 20, 2) for i in range(10)
    ]
    assert error(1.0) < 0.015
    assert error(4.0) > 0.1


def test_differences_follow_the_labels() -> None:
    ranking = make_ranking(3, pairs=[(2, 0, 0.0), (1, 2, 0.0)])
    assert winner_minus_loser([ranking], [np.array([1.0, 5.0, 2.5])]).tolist() == [1.5, 2.5]
    assert all(isinstance(s, TokenSequence) for s in ranking_sequences(ranking))
