"""The PPO mathematics against implementations that share no code with ours.

Oracles: O(T^2) re-derivations in float64, written with loops below; polgrad (Apache-2.0,
https://pypi.org/project/polgrad); and the verl functions that polgrad carries verbatim.
Everything runs in float64 at 1e-10, with NaN outside of the mask where the oracle allows it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pytest
import torch
from polgrad.advantages import GAEConfig
from polgrad.advantages import gae as polgrad_gae
from polgrad.advantages import whiten as polgrad_whiten
from polgrad.aggregate import Aggregation
from polgrad.conformance._vendor.verl_core_algos import compute_policy_loss, compute_value_loss
from polgrad.diagnostics import importance_ess
from polgrad.kl import KLEstimator, kl_estimate, kl_in_reward
from polgrad.losses import (
    ClipConfig,
    ISCorrectionConfig,
    PolicyLossConfig,
    RatioKind,
    SurrogateKind,
)
from polgrad.losses import policy_loss as polgrad_policy_loss
from polgrad.losses import value_loss as polgrad_value_loss

from kleash.ppo import loss as ours

pytestmark = pytest.mark.unit

TOLERANCE = 1e-10
CLIP, CAP, BETA = 0.2, 2.0, 0.07
Level = Literal["token", "sequence"]


@dataclass(frozen=True)
class Case:
    """A random rollout in float64; ``garbage`` fills everything outside of the mask."""

    mask: torch.Tensor
    log_probs: torch.Tensor
    old: torch.Tensor
    behaviour: torch.Tensor
    reference: torch.Tensor
    values: torch.Tensor
    old_values: torch.Tensor
    returns: torch.Tensor
    advantages: torch.Tensor
    scores: torch.Tensor

    @staticmethod
    def draw(seed: int, *, shortest: int = 1, garbage: float = 0.0) -> Case:
        rng = torch.Generator().manual_seed(seed)
        lengths = torch.randint(shortest, 12, (7,), generator=rng)
        lengths[0], lengths[1] = 11, shortest
        mask = torch.arange(11) < lengths[:, None]

        def draw(scale: float) -> torch.Tensor:
            x = scale * torch.randn(7, 11, generator=rng, dtype=torch.float64)
            return torch.where(mask, x, garbage)

        old = torch.where(mask, -draw(1.0).abs(), garbage)
        return Case(
            mask=mask,
            log_probs=old + draw(0.3),
            old=old,
            behaviour=old + draw(0.6),
            reference=old + draw(0.5),
            values=draw(1.0),
            old_values=draw(1.0),
            returns=draw(1.0),
            advantages=draw(1.0),
            scores=torch.randn(7, generator=rng, dtype=torch.float64),
        )


def close(actual: torch.Tensor, expected: object) -> None:
    np.testing.assert_allclose(
        actual.detach().numpy(), np.asarray(expected), rtol=TOLERANCE, atol=TOLERANCE
    )


# --------------------------------------------------------------------------- slow re-derivations


def slow_rewards(case: Case) -> np.ndarray:
    rewards = np.zeros(case.mask.shape)
    for b, t in case.mask.nonzero().tolist():
        rewards[b, t] = -BETA * (case.old[b, t].item() - case.reference[b, t].item())
    for b, length in enumerate(case.mask.sum(1).tolist()):
        if length:
            rewards[b, length - 1] += case.scores[b].item()
    return rewards


def slow_gae(
    rewards: np.ndarray, case: Case, gamma: float, lam: float
) -> tuple[np.ndarray, np.ndarray]:
    """A_t = sum over l of (gamma lam)^l delta_{t+l}, from the definition, without recursion."""
    advantages, returns = np.zeros(rewards.shape), np.zeros(rewards.shape)
    for b, length in enumerate(case.mask.sum(1).tolist()):
        value = [case.old_values[b, t].item() for t in range(length)] + [0.0]
        for t in range(length):
            for s in range(t, length):
                delta = rewards[b, s] + gamma * value[s + 1] - value[s]
                advantages[b, t] += (gamma * lam) ** (s - t) * delta
            returns[b, t] = advantages[b, t] + value[t]
    return advantages, returns


def inside(x: torch.Tensor, mask: torch.Tensor) -> np.ndarray:
    return np.array([x[b, t].item() for b, t in mask.nonzero().tolist()])


def slow_policy_loss(case: Case, weights: np.ndarray | None = None) -> tuple[float, float, float]:
    """(loss, clip fraction, k3)."""
    total = clipped = k3 = 0.0
    places = case.mask.nonzero().tolist()
    for i, (b, t) in enumerate(places):
        advantage = case.advantages[b, t].item()
        log_ratio = case.log_probs[b, t].item() - case.old[b, t].item()
        ratio = math.exp(log_ratio)
        one, two = -advantage * ratio, -advantage * min(max(ratio, 1 - CLIP), 1 + CLIP)
        total += max(one, two) * (1.0 if weights is None else weights[i])
        clipped += two > one
        k3 += ratio - 1 - log_ratio
    return total / len(places), clipped / len(places), k3 / len(places)


def slow_value_loss(case: Case) -> tuple[float, float]:
    total = clipped = 0.0
    places = case.mask.nonzero().tolist()
    for b, t in places:
        value, old = case.values[b, t].item(), case.old_values[b, t].item()
        target = case.returns[b, t].item()
        near = old + min(max(value - old, -CLIP), CLIP)
        total += max((value - target) ** 2, (near - target) ** 2)
        clipped += (near - target) ** 2 > (value - target) ** 2 + 1e-12
    return total / 2 / len(places), clipped / len(places)


def our_policy_loss(
    case: Case, log_probs: torch.Tensor, weights: torch.Tensor | None = None
) -> ours.PolicyLoss:
    return ours.policy_loss(
        log_probs,
        case.old,
        case.advantages,
        case.mask,
        clip_range=CLIP,
        num_tokens=int(case.mask.sum()),
        weights=weights,
    )


def our_value_loss(case: Case, values: torch.Tensor) -> ours.ValueLoss:
    return ours.value_loss(
        values,
        case.old_values,
        case.returns,
        case.mask,
        clip_range=CLIP,
        num_tokens=int(case.mask.sum()),
    )


SLOW_CASES = [Case.draw(seed, shortest=0, garbage=math.nan) for seed in range(3)]


@pytest.mark.parametrize("case", SLOW_CASES)
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (1.0, 0.0)])
def test_rewards_and_gae_equal_definition(case: Case, gamma: float, lam: float) -> None:
    """Facts 2.2 and 2.3, with NaN outside of the mask and an empty response."""
    kl = ours.kl_per_token(case.old, case.reference, case.mask)
    rewards = ours.token_rewards(case.scores, kl, case.mask, kl_coefficient=BETA)
    close(rewards, slow_rewards(case))
    advantages, returns = ours.gae(rewards, case.old_values, case.mask, gamma=gamma, lam=lam)
    expected_advantages, expected_returns = slow_gae(slow_rewards(case), case, gamma, lam)
    close(advantages, expected_advantages)
    close(returns, expected_returns)


@pytest.mark.parametrize("case", SLOW_CASES)
def test_whitening_and_explained_variance_equal_definition(case: Case) -> None:
    """Facts 2.4 and 2.8: NumPy's own mean and variance over the tokens inside of the mask."""
    x, values, returns = (
        inside(y, case.mask) for y in (case.advantages, case.values, case.returns)
    )
    whitened = ours.masked_whiten(case.advantages, case.mask)
    expected = (x - x.mean()) / np.sqrt(x.var() + 1e-8)
    close(whitened[case.mask], expected)
    close(
        ours.masked_whiten(case.advantages, case.mask, shift_mean=False)[case.mask],
        expected + x.mean(),
    )
    assert float(whitened[~case.mask].abs().sum()) == 0
    close(
        ours.explained_variance(case.values, case.returns, case.mask),
        1 - (returns - values).var() / returns.var(),
    )


@pytest.mark.parametrize("case", SLOW_CASES)
def test_losses_equal_definition(case: Case) -> None:
    """Facts 2.5 and 2.7: plain loops over the tokens."""
    weights = ours.truncated_importance_weights(case.old, case.behaviour, case.mask, cap=CAP)
    expected_weights = np.minimum(np.exp(inside(case.old - case.behaviour, case.mask)), CAP)
    close(weights[case.mask], expected_weights)
    for w, w_slow in ((None, None), (weights, expected_weights)):
        actual = our_policy_loss(case, case.log_probs, w)
        loss, clip_fraction, k3 = slow_policy_loss(case, w_slow)
        close(actual.loss, loss)
        close(actual.clip_fraction, clip_fraction)
        close(actual.approx_kl, k3)
    value = our_value_loss(case, case.values)
    loss, clip_fraction = slow_value_loss(case)
    close(value.loss, loss)
    close(value.clip_fraction, clip_fraction)


# -------------------------------------------------------------------------------- polgrad and verl

FINITE_CASES = [Case.draw(seed) for seed in range(3)]


@pytest.mark.parametrize("case", FINITE_CASES)
def test_kl_and_rewards_equal_polgrad(case: Case) -> None:
    estimators = {
        KLEstimator.K1: ours.kl_per_token,
        KLEstimator.K2: ours.kl_k2_per_token,
        KLEstimator.K3: ours.kl_k3_per_token,
    }
    for kind, estimator in estimators.items():
        expected = kl_estimate(case.old, case.reference, kind, response_mask=case.mask)
        close(estimator(case.old, case.reference, case.mask), expected)
    score_rewards = torch.zeros_like(case.old)
    score_rewards[torch.arange(7), case.mask.sum(1) - 1] = case.scores
    expected = kl_in_reward(
        score_rewards, case.old, case.reference, KLEstimator.K1, BETA, response_mask=case.mask
    )
    kl = ours.kl_per_token(case.old, case.reference, case.mask)
    close(ours.token_rewards(case.scores, kl, case.mask, kl_coefficient=BETA), expected)


@pytest.mark.parametrize("case", FINITE_CASES)
def test_gae_and_whitening_equal_polgrad(case: Case) -> None:
    """polgrad whitens with Bessel's correction, so the results differ by a known factor."""
    config = GAEConfig(gamma=0.97, lam=0.9)
    expected = polgrad_gae(case.returns, case.old_values, config=config, response_mask=case.mask)
    actual = ours.gae(case.returns, case.old_values, case.mask, gamma=0.97, lam=0.9)
    close(actual[0], expected[0])
    close(actual[1], expected[1])
    x = inside(case.advantages, case.mask)
    factor = math.sqrt((x.var(ddof=1) + 1e-8) / (x.var() + 1e-8))
    assert factor > 1.003
    close(
        ours.masked_whiten(case.advantages, case.mask),
        factor * polgrad_whiten(case.advantages, case.mask).numpy(),
    )


@pytest.mark.parametrize("level", ["token", "sequence", None])
@pytest.mark.parametrize("case", FINITE_CASES)
def test_policy_loss_and_gradient_equal_polgrad(case: Case, level: Level | None) -> None:
    """Value, gradient, clip fraction, largest ratio; without and with truncated weights."""
    config = PolicyLossConfig(
        ratio=RatioKind.TOKEN,
        surrogate=SurrogateKind.PG_CLIP,
        clip=ClipConfig(CLIP, CLIP),
        aggregation=Aggregation.TOKEN_MEAN,
        is_correction=ISCorrectionConfig(cap=CAP, level=level) if level else None,
    )
    theirs_input, ours_input = (case.log_probs.clone().requires_grad_() for _ in range(2))
    expected = polgrad_policy_loss(
        config,
        logprobs=theirs_input,
        old_logprobs=case.old,
        advantages=case.advantages,
        response_mask=case.mask,
        rollout_logprobs=case.behaviour if level else None,
    )
    weights = None
    if level:
        weights = ours.truncated_importance_weights(
            case.old, case.behaviour, case.mask, cap=CAP, level=level
        )
    actual = our_policy_loss(case, ours_input, weights)
    close(actual.loss, expected.loss.detach())
    close(
        torch.autograd.grad(actual.loss, ours_input)[0],
        torch.autograd.grad(expected.loss, theirs_input)[0],
    )
    close(actual.ratio_max, expected.ratio[case.mask].max())
    close(
        actual.clip_fraction,
        int((expected.clipped_low | expected.clipped_high).sum()) / int(case.mask.sum()),
    )
    assert 0 < actual.clip_fraction.item() < 1


@pytest.mark.parametrize("case", FINITE_CASES)
def test_value_loss_and_gradient_equal_polgrad(case: Case) -> None:
    theirs_input, ours_input = (case.values.clone().requires_grad_() for _ in range(2))
    expected = polgrad_value_loss(
        theirs_input,
        case.old_values,
        case.returns,
        case.mask,
        clip_eps=CLIP,
        aggregation=Aggregation.TOKEN_MEAN,
    )
    actual = our_value_loss(case, ours_input)
    close(actual.loss, expected.loss.detach())
    close(
        torch.autograd.grad(actual.loss, ours_input)[0],
        torch.autograd.grad(expected.loss, theirs_input)[0],
    )
    close(actual.clip_fraction, expected.clipped_frac)


@pytest.mark.parametrize("case", FINITE_CASES)
def test_effective_sample_size_equals_polgrad(case: Case) -> None:
    report = importance_ess(case.old, case.behaviour, case.mask, level="token")
    gap = ours.behaviour_gap(case.old, case.behaviour, case.mask)
    close(gap.effective_sample_fraction, report.ess_ratio)


@pytest.mark.parametrize("case", FINITE_CASES)
def test_losses_equal_verl(case: Case) -> None:
    """verl clips negative advantages a second time at ratio 3; a bound of 1e9 turns that off."""
    float_mask = case.mask.double()
    loss, clip_fraction, approx_kl, _ = compute_policy_loss(
        case.old,
        case.log_probs,
        case.advantages,
        float_mask,
        cliprange=CLIP,
        clip_ratio_c=1e9,
    )
    actual = our_policy_loss(case, case.log_probs)
    close(actual.loss, loss)
    # verl adds 1e-8 to the token count and counts in float32.
    assert actual.clip_fraction.item() == pytest.approx(clip_fraction.item(), abs=1e-6)
    assert actual.approx_kl_k1.item() == pytest.approx(approx_kl.item(), abs=1e-8)
    value_loss, _ = compute_value_loss(
        case.values, case.returns, case.old_values, float_mask, cliprange_value=CLIP
    )
    value = our_value_loss(case, case.values)
    close(value.loss, value_loss)


def test_gradients_equal_finite_differences() -> None:
    """torch.autograd.gradcheck away from the kinks of max and clamp."""
    case = Case.draw(11)
    weights = ours.truncated_importance_weights(case.old, case.behaviour, case.mask, cap=CAP)

    def policy(log_probs: torch.Tensor) -> torch.Tensor:
        return our_policy_loss(case, log_probs, weights).loss

    def value(values: torch.Tensor) -> torch.Tensor:
        return our_value_loss(case, values).loss

    assert torch.autograd.gradcheck(policy, case.log_probs.clone().requires_grad_())
    assert torch.autograd.gradcheck(value, case.values.clone().requires_grad_())
