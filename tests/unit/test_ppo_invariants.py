"""Properties of the PPO mathematics that hold for every batch (hypothesis).

Learning curves do not show these bugs: a run with pads in the whitening or a mean of micro-batch
means still converges on the enumerable toy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from kleash.ppo.kl_controller import AdaptiveKL
from kleash.ppo.loss import (
    PolicyLoss,
    ValueLoss,
    behaviour_gap,
    explained_variance,
    gae,
    kl_k3_per_token,
    kl_per_sequence,
    kl_per_token,
    masked_mean,
    masked_variance,
    masked_whiten,
    policy_loss,
    token_rewards,
    truncated_importance_weights,
    value_loss,
)

pytestmark = pytest.mark.unit

CLIP = 0.2
# No example database and no random start: a failure must not depend on the machine or the day.
quickly = settings(max_examples=40, deadline=None, database=None, derandomize=True)


@dataclass(frozen=True)
class Rollout:
    """A random rollout; rows may be empty, but not all of them."""

    mask: torch.Tensor
    log_probs: torch.Tensor
    old: torch.Tensor
    behaviour: torch.Tensor
    reference: torch.Tensor
    values: torch.Tensor
    old_values: torch.Tensor
    scores: torch.Tensor

    @property
    def num_tokens(self) -> int:
        return int(self.mask.sum())

    def change(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Rollout:
        return Rollout(**{f.name: change(getattr(self, f.name)) for f in fields(self)})


@st.composite
def rollouts(draw: st.DrawFn) -> Rollout:
    lengths = draw(st.lists(st.integers(0, 6), min_size=1, max_size=5).filter(any))
    rng = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    shape = (len(lengths), max(lengths))

    def normal(scale: float) -> torch.Tensor:
        return scale * torch.randn(shape, generator=rng)

    old = -normal(1.0).abs()
    return Rollout(
        mask=torch.arange(shape[1]) < torch.tensor(lengths)[:, None],
        log_probs=old + normal(0.4),
        old=old,
        behaviour=old + normal(0.3),
        reference=old + normal(0.5),
        values=normal(1.0),
        old_values=normal(1.0),
        scores=torch.randn(shape[0], generator=rng),
    )


def targets(batch: Rollout, lam: float = 0.95) -> tuple[torch.Tensor, torch.Tensor]:
    kl = kl_per_token(batch.old, batch.reference, batch.mask)
    rewards = token_rewards(batch.scores, kl, batch.mask, kl_coefficient=0.1)
    return gae(rewards, batch.old_values, batch.mask, gamma=1.0, lam=lam)


def losses(
    batch: Rollout, advantages: torch.Tensor, returns: torch.Tensor, num_tokens: int
) -> tuple[PolicyLoss, ValueLoss]:
    weights = truncated_importance_weights(batch.old, batch.behaviour, batch.mask, cap=2.0)
    policy = policy_loss(
        batch.log_probs,
        batch.old,
        advantages,
        batch.mask,
        clip_range=CLIP,
        num_tokens=num_tokens,
        weights=weights,
    )
    value = value_loss(
        batch.values,
        batch.old_values,
        returns,
        batch.mask,
        clip_range=CLIP,
        num_tokens=num_tokens,
    )
    return policy, value


def scalars(batch: Rollout) -> dict[str, float]:
    """Every loss and metric of one batch."""
    raw, returns = targets(batch)
    advantages = masked_whiten(raw, batch.mask)
    policy, value = losses(batch, advantages, returns, batch.num_tokens)
    gap = behaviour_gap(batch.old, batch.behaviour, batch.mask)
    figures = {
        f"{type(part).__name__}.{f.name}": getattr(part, f.name)
        for part in (policy, value, gap)
        for f in fields(part)
    }
    figures["explained_variance"] = explained_variance(batch.old_values, returns, batch.mask)
    kl = kl_per_token(batch.old, batch.reference, batch.mask)
    figures["kl"] = kl_per_sequence(kl, batch.mask).mean()
    return {name: figure.item() for name, figure in figures.items()}


@quickly
@given(rollouts(), st.integers(1, 4))
def test_extra_pad_columns_change_nothing(batch: Rollout, num_columns: int) -> None:
    """Bugs 15, 16 and 38: NaN in added columns reaches neither targets nor losses nor metrics."""

    def pad(x: torch.Tensor) -> torch.Tensor:
        if x.dim() == 1:
            return x
        columns = torch.full((len(x), num_columns), torch.nan)
        return torch.cat([x, columns.to(x.dtype) if x.dtype != torch.bool else columns > 0], dim=1)

    padded = batch.change(pad)
    for actual, expected in zip(targets(padded), targets(batch), strict=True):
        assert torch.equal(actual[:, : expected.shape[1]], expected)
        assert not actual[:, expected.shape[1] :].any()
    assert scalars(padded) == pytest.approx(scalars(batch), abs=1e-5, rel=1e-4)


@quickly
@given(rollouts(), st.integers(0, 1000))
def test_order_of_the_rows_does_not_matter(batch: Rollout, seed: int) -> None:
    order = torch.randperm(len(batch.mask), generator=torch.Generator().manual_seed(seed))
    shuffled = batch.change(lambda x: x[order])
    for actual, expected in zip(targets(shuffled), targets(batch), strict=True):
        assert torch.equal(actual, expected[order])
    assert scalars(shuffled) == pytest.approx(scalars(batch), abs=1e-5, rel=1e-4)


@quickly
@given(rollouts(), st.integers(1, 3))
def test_micro_batches_add_up_to_the_minibatch(batch: Rollout, size: int) -> None:
    """Bug 19, for losses, gradients and additive metrics."""
    raw, returns = targets(batch)
    advantages = masked_whiten(raw, batch.mask)
    batch = batch.change(torch.clone)
    batch.log_probs.requires_grad_()
    batch.values.requires_grad_()

    def run(split_size: int) -> list[torch.Tensor]:
        total, metrics = torch.zeros(()), torch.zeros(5)
        for rows in torch.arange(len(batch.mask)).split(split_size):
            part = batch.change(lambda x, rows=rows: x[rows])
            policy, value = losses(part, advantages[rows], returns[rows], batch.num_tokens)
            total = total + policy.loss + value.loss
            metrics += torch.stack(
                [
                    policy.clip_fraction,
                    policy.approx_kl,
                    policy.ratio_mean,
                    value.clip_fraction,
                    value.squared_error,
                ]
            )
        gradients = torch.autograd.grad(total, [batch.log_probs, batch.values])
        return [total.detach(), metrics, *gradients]

    for actual, expected in zip(run(size), run(len(batch.mask)), strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-6, rtol=1e-5)


@quickly
@given(rollouts(), st.floats(-5, 5))
def test_constant_on_all_scores_shifts_returns_only(batch: Rollout, constant: float) -> None:
    """gamma = lambda = 1: returns move by the constant, centred advantages do not move."""
    raw, returns = targets(batch, lam=1.0)
    shifted = Rollout(**{**vars(batch), "scores": batch.scores + constant})
    raw_shifted, returns_shifted = targets(shifted, lam=1.0)
    torch.testing.assert_close(
        returns_shifted, returns + constant * batch.mask, atol=1e-5, rtol=1e-5
    )
    centred = raw - masked_mean(raw, batch.mask)
    centred_shifted = raw_shifted - masked_mean(raw_shifted, batch.mask)
    torch.testing.assert_close(
        centred_shifted[batch.mask], centred[batch.mask], atol=1e-5, rtol=1e-5
    )


@quickly
@given(rollouts())
def test_undiscounted_advantages_telescope(batch: Rollout) -> None:
    """gamma = lambda = 1: A_t = sum of the rewards from t on, minus V_t, whatever V is later."""
    kl = kl_per_token(batch.old, batch.reference, batch.mask)
    rewards = token_rewards(batch.scores, kl, batch.mask, kl_coefficient=0.1)
    advantages, returns = gae(rewards, batch.old_values, batch.mask, gamma=1.0, lam=1.0)
    to_go = rewards.flip(1).cumsum(1).flip(1)
    torch.testing.assert_close(returns, to_go * batch.mask, atol=1e-5, rtol=1e-5)
    expected = (to_go - batch.old_values) * batch.mask
    torch.testing.assert_close(advantages, expected, atol=1e-5, rtol=1e-5)


@quickly
@given(rollouts())
def test_returns_minus_values_are_the_raw_advantages(batch: Rollout) -> None:
    """Bug 18: neither is whitened."""
    advantages, returns = targets(batch)
    expected = advantages + batch.old_values * batch.mask
    assert torch.equal(returns, expected)


@quickly
@given(rollouts(), st.floats(0, 2))
def test_rewards_sum_to_score_minus_beta_kl(batch: Rollout, beta: float) -> None:
    """Bugs 11, 12 and 43: the score is paid once, at the last response token, if there is one."""
    kl = kl_per_token(batch.old, batch.reference, batch.mask)
    rewards = token_rewards(batch.scores, kl, batch.mask, kl_coefficient=beta)
    has_tokens = batch.mask.any(1)
    expected = torch.where(has_tokens, batch.scores - beta * kl_per_sequence(kl, batch.mask), 0.0)
    torch.testing.assert_close(rewards.sum(1), expected, atol=1e-5, rtol=1e-5)
    at_end = token_rewards(batch.scores, kl, batch.mask, kl_coefficient=0.0)
    last = (batch.mask.sum(1) - 1)[has_tokens]
    assert torch.equal(at_end[has_tokens, last], batch.scores[has_tokens])
    assert int((at_end != 0).sum()) == int((batch.scores[has_tokens] != 0).sum())


@quickly
@given(rollouts(), st.floats(-3, 3))
def test_reference_does_not_matter_at_beta_zero(batch: Rollout, offset: float) -> None:
    rewards = []
    for reference in (batch.reference, batch.reference + offset):
        kl = kl_per_token(batch.old, reference, batch.mask)
        rewards.append(token_rewards(batch.scores, kl, batch.mask, kl_coefficient=0.0))
    assert torch.equal(rewards[0], rewards[1])


@quickly
@given(rollouts())
def test_kl_pulls_towards_the_reference(batch: Rollout) -> None:
    """Bug 13: a token likelier than under the reference is punished, one less likely rewarded."""
    kl = kl_per_token(batch.old, batch.reference, batch.mask)
    rewards = token_rewards(torch.zeros_like(batch.scores), kl, batch.mask, kl_coefficient=0.1)
    is_likelier = batch.mask & (batch.old > batch.reference)
    assert bool((rewards[is_likelier] < 0).all())
    assert bool((rewards[batch.mask & ~is_likelier] >= 0).all())
    assert bool((kl_k3_per_token(batch.old, batch.reference, batch.mask) >= 0).all())


@quickly
@given(rollouts(), st.floats(0.1, 10), st.floats(-10, 10))
def test_whitening_ignores_scale_and_offset(batch: Rollout, scale: float, offset: float) -> None:
    """Bugs 16 and 17: inside of the mask mean 0 and variance 1 (one token alone: 0)."""
    assume(batch.num_tokens == 1 or masked_variance(batch.values, batch.mask).item() > 0.01)
    whitened = masked_whiten(batch.values, batch.mask)
    assert masked_mean(whitened, batch.mask).item() == pytest.approx(0, abs=1e-5)
    expected = 1 if batch.num_tokens > 1 else 0
    assert masked_variance(whitened, batch.mask).item() == pytest.approx(expected, abs=1e-3)
    other = masked_whiten(batch.values * scale + offset, batch.mask)
    torch.testing.assert_close(other, whitened, atol=2e-3, rtol=1e-3)
    kept = masked_whiten(batch.values, batch.mask, shift_mean=False)
    mean = masked_mean(batch.values, batch.mask)
    torch.testing.assert_close(kept, (whitened + mean) * batch.mask, atol=1e-5, rtol=1e-5)


@quickly
@given(rollouts())
def test_policy_gradient_is_zero_exactly_in_the_clipped_regions(batch: Rollout) -> None:
    """dL/dlogp = -A rho / N where the ratio is free to move, 0 beyond the clip and at pads."""
    advantages = batch.values
    log_probs = batch.log_probs.clone().requires_grad_()
    result = policy_loss(
        log_probs,
        batch.old,
        advantages,
        batch.mask,
        clip_range=CLIP,
        num_tokens=batch.num_tokens,
    )
    (gradient,) = torch.autograd.grad(result.loss, log_probs)
    ratio = (batch.log_probs - batch.old).exp()
    is_clipped = ((advantages > 0) & (ratio > 1 + CLIP)) | ((advantages < 0) & (ratio < 1 - CLIP))
    free = -advantages * ratio / batch.num_tokens
    expected = torch.where(batch.mask & ~is_clipped, free, 0.0)
    torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=1e-5)
    clipped_share = (is_clipped & batch.mask).sum() / batch.num_tokens
    torch.testing.assert_close(result.clip_fraction, clipped_share)


@quickly
@given(rollouts())
def test_value_gradient_is_zero_beyond_the_clip_towards_the_return(batch: Rollout) -> None:
    """dL/dV = (V - R) / N, or 0 where V has already moved past the clip towards R."""
    _, returns = targets(batch)
    values = batch.values.clone().requires_grad_()
    result = value_loss(
        values,
        batch.old_values,
        returns,
        batch.mask,
        clip_range=CLIP,
        num_tokens=batch.num_tokens,
    )
    (gradient,) = torch.autograd.grad(result.loss, values)
    near = batch.old_values + (batch.values - batch.old_values).clamp(-CLIP, CLIP)
    is_clipped = (near - returns).abs() > (batch.values - returns).abs() + 1e-6
    free = (batch.values - returns) / batch.num_tokens
    expected = torch.where(batch.mask & ~is_clipped, free, 0.0)
    torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=1e-5)


@quickly
@given(rollouts())
def test_first_minibatch_identity(batch: Rollout) -> None:
    """P11, bug 22: before the first step ratio 1, KL 0, nothing clipped, loss -mean(A) = 0."""
    raw, returns = targets(batch)
    advantages = masked_whiten(raw, batch.mask)
    at_rollout = Rollout(**{**vars(batch), "log_probs": batch.old, "behaviour": batch.old})
    policy, _ = losses(at_rollout, advantages, returns, batch.num_tokens)
    assert policy.ratio_mean.item() == pytest.approx(1)
    assert policy.ratio_max.item() == 1
    assert policy.approx_kl.item() == 0
    assert policy.clip_fraction.item() == 0
    assert policy.loss.item() == pytest.approx(0, abs=1e-5)
    unmoved = value_loss(
        batch.old_values,
        batch.old_values,
        returns,
        batch.mask,
        clip_range=CLIP,
        num_tokens=batch.num_tokens,
    )
    assert unmoved.clip_fraction.item() == 0
    assert unmoved.loss.item() == pytest.approx(unmoved.squared_error.item() / 2)


@quickly
@given(rollouts(), st.floats(0.5, 4))
def test_importance_weights_are_truncated_and_neutral_on_policy(batch: Rollout, cap: float) -> None:
    for level in ("token", "sequence"):
        weights = truncated_importance_weights(
            batch.old, batch.behaviour, batch.mask, cap=cap, level=level
        )
        assert float(weights.max()) <= cap + 1e-6
        assert not weights[~batch.mask].any()
        neutral = truncated_importance_weights(
            batch.old, batch.old, batch.mask, cap=1.0, level=level
        )
        assert torch.equal(neutral, batch.mask.float())


@quickly
@given(st.floats(0, 1000), st.floats(0.01, 20), st.floats(0.001, 1), st.integers(1, 2000))
def test_adaptive_kl_moves_against_the_error_and_stays_positive(
    kl: float, target: float, coefficient: float, num_episodes: int
) -> None:
    """Also where one batch is larger than the horizon, which the bare formula makes negative."""
    controller = AdaptiveKL(coefficient, target, horizon=200)
    controller.update(kl, num_episodes)
    if kl > 1.001 * target:
        assert controller.coefficient > coefficient
    if kl < 0.999 * target:
        assert controller.coefficient < coefficient
    largest = 0.2 * min(num_episodes / 200, 1)
    assert abs(controller.coefficient / coefficient - 1) <= largest + 1e-9
