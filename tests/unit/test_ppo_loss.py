"""The usual bugs of PPO for language models, one detector each, on kleash.ppo.loss.

Numbers are the rows of the table in docs/ppo.md. Each detector also runs on the bug itself, written
out here, so that it is seen to fail: a detector that passes everything proves nothing.
"""

from __future__ import annotations

import math
from dataclasses import fields

import pytest
import torch

from kleash.ppo.loss import (
    BehaviourGap,
    PolicyLoss,
    ValueLoss,
    apply_missing_eos,
    behaviour_gap,
    effective_sample_fraction,
    explained_variance,
    gae,
    kl_k2_per_token,
    kl_k3_per_token,
    kl_per_sequence,
    kl_per_token,
    masked_mean,
    masked_variance,
    masked_whiten,
    policy_loss,
    token_mean,
    token_rewards,
    truncated_importance_weights,
    value_loss,
)

pytestmark = pytest.mark.unit

MASK = torch.tensor([[True, True, True, True], [True, True, False, False]])
NAN = math.nan


def normal(seed: int, rows: int = 2) -> torch.Tensor:
    return torch.randn(rows, 4, generator=torch.Generator().manual_seed(seed))


def test_bug_15_no_bootstrap_past_the_end() -> None:
    """What stands after the end must not change the advantages; a loop without mask lets it in."""
    rewards, values = normal(1), normal(2)
    clean, _ = gae(rewards, values, MASK, gamma=1.0, lam=0.95)
    rewards[1, 2:], values[1, 2:] = NAN, NAN
    dirty, returns = gae(rewards, values, MASK, gamma=1.0, lam=0.95)
    assert torch.equal(clean, dirty)
    assert returns[1, 2:].tolist() == [0.0, 0.0]
    assert clean[1, 1] == rewards[1, 1] - values[1, 1]
    everywhere = torch.ones_like(MASK)
    naive, _ = gae(normal(1), normal(2), everywhere, gamma=1.0, lam=0.95)
    assert (naive - clean)[1, :2].abs().max() > 0.1


def test_bug_16_whitening_leaves_pads_out() -> None:
    x = normal(3) + 5
    whitened = masked_whiten(x, MASK)
    assert whitened[MASK].mean().item() == pytest.approx(0, abs=1e-6)
    assert whitened[MASK].std(correction=0).item() == pytest.approx(1, abs=1e-6)
    with_pads = masked_whiten(torch.where(MASK, x, 0.0), torch.ones_like(MASK))
    assert abs(with_pads[MASK].mean().item()) > 0.1


def test_bug_17_advantages_are_centred_rewards_keep_their_mean() -> None:
    x = normal(4) + 0.7
    assert masked_mean(masked_whiten(x, MASK), MASK).item() == pytest.approx(0, abs=1e-6)
    kept = masked_mean(masked_whiten(x, MASK, shift_mean=False), MASK)
    assert kept.item() == pytest.approx(masked_mean(x, MASK).item(), abs=1e-6)


def test_bug_19_mean_of_micro_batch_means_is_another_number() -> None:
    """Rows of 4 and 2 tokens: the mean of their means weighs the second row's tokens twice."""
    x = torch.tensor([[1.0, 1.0, 1.0, 1.0], [4.0, 4.0, NAN, NAN]])
    parts = [token_mean(x[b : b + 1], MASK[b : b + 1], num_tokens=6) for b in range(2)]
    assert float(sum(parts)) == pytest.approx(2.0)
    assert float(token_mean(x, MASK, num_tokens=6)) == pytest.approx(2.0)
    assert sum(masked_mean(x[b], MASK[b]).item() for b in range(2)) / 2 == pytest.approx(2.5)


def test_bug_24_value_clip_is_around_the_old_value() -> None:
    """V 1.0, V_old 0.9, R 0: inside of the clip, so the loss is that of V."""
    one = torch.ones(1, 1, dtype=torch.bool)
    values = torch.tensor([[1.0]], requires_grad=True)
    old_values = torch.tensor([[0.9]], requires_grad=True)
    returns = torch.tensor([[0.0]], requires_grad=True)
    result = value_loss(values, old_values, returns, one, clip_range=0.2, num_tokens=1)
    result.loss.backward()
    assert result.loss.item() == pytest.approx(0.5)
    assert values.grad is not None
    assert values.grad.item() == pytest.approx(1.0)
    assert old_values.grad is None
    assert returns.grad is None
    unclipped = value_loss(
        values, torch.tensor([[-9.0]]), returns, one, clip_range=math.inf, num_tokens=1
    )
    assert unclipped.loss.item() == pytest.approx(0.5)
    assert unclipped.clip_fraction.item() == 0


def test_value_inside_of_the_clip_is_never_counted_as_clipped() -> None:
    """V_old + (V - V_old) rounds away from V; clamping V itself does not."""
    rng = torch.Generator().manual_seed(0)
    old_values, values, returns = 0.05 * torch.randn(3, 50, 40, generator=rng).clamp(-1.9, 1.9)
    mask = torch.ones(50, 40, dtype=torch.bool)
    result = value_loss(values, old_values, returns, mask, clip_range=0.2, num_tokens=2000)
    assert result.clip_fraction.item() == 0
    rounded = old_values + (values - old_values)
    assert ((rounded - returns).square() > (values - returns).square()).sum() > 100


def test_bug_25_targets_carry_no_gradient() -> None:
    """Value parameters get no gradient from the policy loss, nor old ones from anything."""
    values, old = normal(5).requires_grad_(), normal(6).requires_grad_()
    scores = torch.ones(2, requires_grad=True)
    kl = kl_per_token(old, normal(7), MASK)
    rewards = token_rewards(scores, kl, MASK, kl_coefficient=0.1)
    advantages, returns = gae(rewards, values, MASK, gamma=1.0, lam=0.95)
    weights = truncated_importance_weights(old, normal(8), MASK, cap=2.0)
    for target in (kl, rewards, advantages, returns, weights):
        assert not target.requires_grad
    log_probs = normal(9).requires_grad_()
    attached = (values * 2).expand_as(values)
    result = policy_loss(
        log_probs, old, attached, MASK, clip_range=0.2, num_tokens=6, weights=values.exp()
    )
    result.loss.backward()
    assert log_probs.grad is not None
    assert values.grad is None
    assert old.grad is None


def test_metrics_carry_no_gradient() -> None:
    log_probs, values = normal(1).requires_grad_(), normal(2).requires_grad_()
    policy = policy_loss(log_probs, normal(3), normal(4), MASK, clip_range=0.2, num_tokens=6)
    value = value_loss(values, normal(5), normal(6), MASK, clip_range=0.2, num_tokens=6)
    for result in (policy, value):
        for field in fields(result):
            assert getattr(result, field.name).requires_grad == (field.name == "loss")


def test_bug_43_empty_responses_are_finite() -> None:
    """A batch with one empty row, and one with nothing but empty rows, NaN in every pad."""
    empty = torch.zeros_like(MASK)
    partly = torch.stack([MASK[0], empty[0]])
    for mask in (partly, empty):
        x = torch.where(mask, normal(1), NAN)
        log_probs, values = x.clone().requires_grad_(), x.clone().requires_grad_()
        num_tokens = int(mask.sum())
        kl = kl_per_token(x, x, mask)
        rewards = token_rewards(torch.tensor([1.0, 7.0]), kl, mask, kl_coefficient=0.1)
        assert rewards[1].tolist() == [0.0] * 4
        raw, returns = gae(rewards, x, mask, gamma=1.0, lam=0.95)
        advantages = masked_whiten(raw, mask)
        weights = truncated_importance_weights(x, x, mask, cap=2.0, level="sequence")
        policy = policy_loss(
            log_probs,
            x,
            advantages,
            mask,
            clip_range=0.2,
            num_tokens=num_tokens,
            weights=weights,
        )
        value = value_loss(values, x, returns, mask, clip_range=0.2, num_tokens=num_tokens)
        (policy.loss + value.loss).backward()
        figures = [
            kl_per_sequence(kl, mask),
            kl_k2_per_token(x, x, mask),
            kl_k3_per_token(x, x, mask),
            returns,
            masked_variance(x, mask),
            effective_sample_fraction(weights, mask),
            explained_variance(x, returns, mask),
            log_probs.grad,
            values.grad,
        ]
        for part in (policy, value, behaviour_gap(x, x, mask)):
            figures += [getattr(part, field.name) for field in fields(part)]
        for figure in figures:
            assert figure is not None
            assert figure.isfinite().all()
            if figure is log_probs.grad or figure is values.grad:
                assert not figure[~mask].any()


def test_empty_mask_gives_zero_everywhere() -> None:
    empty, x = torch.zeros_like(MASK), normal(1)
    parts: list[PolicyLoss | ValueLoss | BehaviourGap] = [
        policy_loss(x, normal(2), normal(3), empty, clip_range=0.2, num_tokens=0),
        value_loss(x, normal(2), normal(3), empty, clip_range=0.2, num_tokens=0),
        behaviour_gap(x, normal(2), empty),
    ]
    for part in parts:
        assert {getattr(part, field.name).item() for field in fields(part)} == {0.0}
    assert masked_mean(x, empty).item() == 0
    assert explained_variance(x, x, empty).item() == 0


def test_log_ratio_is_clamped_and_stays_finite() -> None:
    """P19: a log-ratio of +-1000 gives a finite loss, and no gradient beyond the clamp."""
    one = torch.ones(1, 2, dtype=torch.bool)
    log_probs = torch.tensor([[0.0, -1000.0]], requires_grad=True)
    old = torch.tensor([[-1000.0, 0.0]])
    result = policy_loss(log_probs, old, -torch.ones(1, 2), one, clip_range=0.2, num_tokens=2)
    result.loss.backward()
    assert result.ratio_max.item() == pytest.approx(math.exp(20))
    assert result.loss.item() == pytest.approx((math.exp(20) + 0.8) / 2)
    assert log_probs.grad is not None
    assert log_probs.grad.tolist() == [[0.0, 0.0]]
    weights = truncated_importance_weights(torch.zeros(1, 2), old, one, cap=2.0, level="sequence")
    assert weights.tolist() == [[2.0, 2.0]]


def test_missing_eos_follows_the_finish_reason_and_unknown_modes_are_errors() -> None:
    """Bug 28: the rule asks is_stopped, not a token id; KL terms stay whatever the rule says."""
    scores, is_stopped = torch.tensor([3.0, 3.0]), torch.tensor([True, False])
    changed = apply_missing_eos(scores, is_stopped, mode="subtract", penalty=2.5)
    assert changed.tolist() == [3.0, 0.5]
    kl = torch.full((2, 4), 1.0)
    rewards = token_rewards(changed, kl, MASK, kl_coefficient=0.1)
    torch.testing.assert_close(rewards.sum(1), torch.tensor([2.6, 0.3]))
    with pytest.raises(ValueError, match="'punish'; choose replace, subtract or off"):
        apply_missing_eos(scores, is_stopped, mode="punish", penalty=1.0)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="'turn'; choose token or sequence"):
        truncated_importance_weights(kl, kl, MASK, cap=2.0, level="turn")  # pyright: ignore[reportArgumentType]
