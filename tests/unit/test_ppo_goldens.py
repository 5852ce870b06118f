"""Hand-worked numbers for every formula of the PPO mathematics, values and gradients.

Each test names its formula; docs/ppo.md has them in the same order. The last test compares a fixed
batch with stored figures: ``python tests/unit/test_ppo_goldens.py`` writes them anew, see
tests/golden/README.md.
"""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Literal

import pytest
import torch

from kleash.ppo.kl_controller import AdaptiveKL
from kleash.ppo.loss import (
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
    masked_whiten,
    policy_loss,
    pretraining_loss,
    token_mean,
    token_rewards,
    truncated_importance_weights,
    value_loss,
)

pytestmark = pytest.mark.unit

GOLDEN_FILE = Path(__file__).parents[1] / "golden" / "ppo_losses.json"
ONE = torch.ones(1, 1, dtype=torch.bool)
Mode = Literal["replace", "subtract", "off"]


def test_kl_reward_is_minus_beta_k1_plus_score_at_last_token() -> None:
    """2.2: r_t = -beta (log pi - log ref) + s 1[t = L - 1]; KL_b = sum over t."""
    mask = torch.tensor([[True, True, True], [True, False, False]])
    log_probs = torch.tensor([[-1.0, -2.0, -0.5], [-1.5, 9.0, 9.0]])
    reference = torch.tensor([[-1.5, -1.0, -0.5], [-2.5, -9.0, 9.0]])
    kl = kl_per_token(log_probs, reference, mask)
    torch.testing.assert_close(kl, torch.tensor([[0.5, -1.0, 0.0], [1.0, 0.0, 0.0]]))
    torch.testing.assert_close(kl_per_sequence(kl, mask), torch.tensor([-0.5, 1.0]))
    rewards = token_rewards(torch.tensor([2.0, -3.0]), kl, mask, kl_coefficient=0.1)
    torch.testing.assert_close(rewards, torch.tensor([[-0.05, 0.1, 2.0], [-3.1, 0.0, 0.0]]))


def test_k2_and_k3_of_one_token() -> None:
    """2.2: k2 = d^2 / 2, k3 = exp(-d) - 1 + d; at d = 0.5: 0.125 and 0.106531."""
    log_probs, reference = torch.tensor([[-1.0]]), torch.tensor([[-1.5]])
    assert float(kl_k2_per_token(log_probs, reference, ONE)) == pytest.approx(0.125)
    assert float(kl_k3_per_token(log_probs, reference, ONE)) == pytest.approx(0.1065306597)


def categorical_gradient(estimator_in_reward: torch.Tensor, policy: torch.Tensor) -> torch.Tensor:
    """Exact gradient, with respect to the logits, of the policy loss whose reward is -estimator.

    The expectation over the four outcomes is taken by weighting each with its probability.
    """
    logits = policy.log().clone().requires_grad_()
    log_probs = logits.log_softmax(0)[:, None]
    mask = torch.ones(4, 1, dtype=torch.bool)
    rewards = token_rewards(torch.zeros(4), estimator_in_reward, mask, kl_coefficient=1.0)
    loss = policy_loss(
        log_probs,
        log_probs.detach(),
        rewards,
        mask,
        clip_range=0.2,
        num_tokens=1,
        weights=policy[:, None],
    ).loss
    return torch.autograd.grad(loss, logits)[0]


def test_only_k1_in_the_reward_gives_the_gradient_of_the_kl() -> None:
    """2.2: pi = (.4, .3, .2, .1), ref = (.1, .2, .3, .4): KL .456435 and its exact gradient."""
    policy, reference = torch.tensor([0.4, 0.3, 0.2, 0.1]), torch.tensor([0.1, 0.2, 0.3, 0.4])
    mask = torch.ones(4, 1, dtype=torch.bool)
    streams = (policy.log()[:, None], reference.log()[:, None], mask)
    k1, k3 = kl_per_token(*streams), kl_k3_per_token(*streams)
    assert float((policy * k1[:, 0]).sum()) == pytest.approx(0.456435, abs=1e-6)
    assert float((policy * k3[:, 0]).sum()) == pytest.approx(0.456435, abs=1e-6)
    expected = torch.tensor([0.3719, -0.0153, -0.1724, -0.1843])
    wrong = torch.tensor([0.0719, -0.1153, -0.0724, 0.1157])
    torch.testing.assert_close(categorical_gradient(k1, policy), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(categorical_gradient(k3, policy), wrong, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("mode", "expected"), [("replace", [2.0, -1.0]), ("subtract", [2.0, 4.0]), ("off", [2.0, 5.0])]
)
def test_missing_eos(mode: Mode, expected: list[float]) -> None:
    """P4: a response without stop token scores -penalty, or loses the penalty."""
    scores = apply_missing_eos(
        torch.tensor([2.0, 5.0]), torch.tensor([True, False]), mode=mode, penalty=1.0
    )
    torch.testing.assert_close(scores, torch.tensor(expected))


def test_gae() -> None:
    """2.3: r = (0, 0, 1), V = (.5, .2, .1), gamma 1, lambda .95."""
    rewards, values = torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.5, 0.2, 0.1]])
    mask = torch.ones(1, 3, dtype=torch.bool)
    advantages, returns = gae(rewards, values, mask, gamma=1.0, lam=0.95)
    torch.testing.assert_close(advantages, torch.tensor([[0.41725, 0.755, 0.9]]))
    torch.testing.assert_close(returns, torch.tensor([[0.91725, 0.955, 1.0]]))
    advantages, _ = gae(rewards, values, mask, gamma=1.0, lam=1.0)
    torch.testing.assert_close(advantages, torch.tensor([[0.5, 0.8, 0.9]]))
    advantages, _ = gae(rewards, values, mask, gamma=0.9, lam=0.0)
    torch.testing.assert_close(advantages, torch.tensor([[-0.32, -0.11, 0.9]]))


def test_whitening_uses_the_biased_variance() -> None:
    """2.4: the 3 x 3 array 1.2 ... 2.0 with the mean kept (a Bessel variant starts with .1394)."""
    x = torch.arange(12, 21).reshape(3, 3) / 10
    mask = torch.ones(3, 3, dtype=torch.bool)
    kept = masked_whiten(x, mask, shift_mean=False)
    torch.testing.assert_close(kept[0], torch.tensor([0.05080712, 0.4381051, 0.8254035]))
    torch.testing.assert_close(masked_whiten(x, mask), kept - 1.6)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient", "clip_fraction"),
    [
        (1.5, 1.0, -1.2, 0.0, 1.0),
        (1.5, -1.0, 1.5, 1.5, 0.0),
        (0.5, 1.0, -0.5, -0.5, 0.0),
        (0.5, -1.0, 0.8, 0.0, 1.0),
        (1.1, 1.0, -1.1, -1.1, 0.0),
    ],
)
def test_clipped_policy_loss(
    ratio: float, advantage: float, loss: float, gradient: float, clip_fraction: float
) -> None:
    """2.5: max(-A rho, -A clip(rho, .8, 1.2)); bug 23 (min) would swap the rows."""
    log_probs = torch.full((1, 1), math.log(ratio), requires_grad=True)
    result = policy_loss(
        log_probs,
        torch.zeros(1, 1),
        torch.full((1, 1), advantage),
        ONE,
        clip_range=0.2,
        num_tokens=1,
    )
    (actual_gradient,) = torch.autograd.grad(result.loss, log_probs)
    assert result.loss.item() == pytest.approx(loss)
    assert float(actual_gradient) == pytest.approx(gradient)
    assert float(result.clip_fraction) == clip_fraction
    assert float(result.ratio_max) == pytest.approx(ratio)
    assert float(result.ratio_mean) == pytest.approx(ratio)
    assert float(result.approx_kl) == pytest.approx(ratio - 1 - math.log(ratio))
    assert float(result.approx_kl_k1) == pytest.approx(-math.log(ratio))


@pytest.mark.parametrize(
    ("value", "old_value", "target", "loss", "gradient", "clip_fraction"),
    [
        (0.5, 0.0, 1.0, 0.32, 0.0, 1.0),
        (0.5, 0.0, 0.0, 0.125, 0.5, 0.0),
        (0.1, 0.0, 1.0, 0.405, -0.9, 0.0),
        (-0.5, 0.0, -1.0, 0.32, 0.0, 1.0),
    ],
)
def test_clipped_value_loss(
    value: float,
    old_value: float,
    target: float,
    loss: float,
    gradient: float,
    clip_fraction: float,
) -> None:
    """2.5: max((V - R)^2, (V_old + clip(V - V_old, +-.2) - R)^2) / 2."""
    values = torch.full((1, 1), value, requires_grad=True)
    result = value_loss(
        values,
        torch.full((1, 1), old_value),
        torch.full((1, 1), target),
        ONE,
        clip_range=0.2,
        num_tokens=1,
    )
    (actual_gradient,) = torch.autograd.grad(result.loss, values)
    assert result.loss.item() == pytest.approx(loss)
    assert float(actual_gradient) == pytest.approx(gradient)
    assert float(result.clip_fraction) == clip_fraction
    assert float(result.squared_error) == pytest.approx((value - target) ** 2)


def test_losses_are_token_means_of_the_whole_minibatch() -> None:
    """2.5, 1.5 P9: N counts all tokens of the minibatch; an entropy bonus and PPO-ptx likewise."""
    mask = torch.tensor([[True, True, True], [True, False, False]])
    x = torch.tensor([[1.0, 2.0, 3.0], [10.0, 99.0, 99.0]])
    assert float(token_mean(x, mask, num_tokens=4)) == 4.0
    assert float(token_mean(x[:1], mask[:1], num_tokens=4)) == 1.5
    assert float(pretraining_loss(-x, mask, num_tokens=8)) == 2.0


@pytest.mark.parametrize(
    ("kl", "coefficient"), [(12.0, 0.151536), (3.0, 0.148464), (6.0, 0.15), (6.6, 0.150768)]
)
def test_adaptive_kl_controller(kl: float, coefficient: float) -> None:
    """2.6: beta .15, target 6, 512 episodes, horizon 10 000."""
    controller = AdaptiveKL(0.15, target=6, horizon=10_000)
    controller.update(kl, num_episodes=512)
    assert controller.coefficient == pytest.approx(coefficient, abs=1e-9)


def test_truncated_importance_weights() -> None:
    """2.7: min(exp(train - rollout), 2) per token, or of the sum over the sequence."""
    train = torch.tensor([[-1.0, -2.0], [-1.0, 0.0]])
    rollout = torch.tensor([[-2.0, -1.0], [-1.5, 5.0]])
    mask = torch.tensor([[True, True], [True, False]])
    token = truncated_importance_weights(train, rollout, mask, cap=2.0)
    torch.testing.assert_close(token, torch.tensor([[2.0, 0.367879], [1.648721, 0.0]]))
    sequence = truncated_importance_weights(train, rollout, mask, cap=2.0, level="sequence")
    torch.testing.assert_close(sequence, torch.tensor([[1.0, 1.0], [1.648721, 0.0]]))


def test_importance_weights_multiply_outside_of_the_clip() -> None:
    """2.7: L = sum m sg(w) max(...) / N: the golden (1.5, -1) times w = 2, gradient too."""
    log_probs = torch.full((1, 1), math.log(1.5), requires_grad=True)
    weights = torch.full((1, 1), 2.0, requires_grad=True)
    result = policy_loss(
        log_probs,
        torch.zeros(1, 1),
        -torch.ones(1, 1),
        ONE,
        clip_range=0.2,
        num_tokens=1,
        weights=weights,
    )
    result.loss.backward()
    assert result.loss.item() == pytest.approx(3.0)
    assert log_probs.grad is not None
    assert float(log_probs.grad) == pytest.approx(3.0)
    assert weights.grad is None


def test_effective_sample_size_and_gap() -> None:
    """2.7: ESS = (sum w)^2 / sum w^2; weights (1, 1, 2) count for 16/6 of 3 tokens."""
    mask = torch.tensor([[True, True, True, False]])
    weights = torch.tensor([[1.0, 1.0, 2.0, 50.0]])
    assert float(effective_sample_fraction(weights, mask)) == pytest.approx(16 / 18)
    train = weights.log()
    gap = behaviour_gap(train, torch.zeros_like(train), mask)
    assert float(gap.max_abs) == pytest.approx(math.log(2))
    assert float(gap.mean_abs) == pytest.approx(math.log(2) / 3)
    assert float(gap.ratio_max) == pytest.approx(2.0)
    assert float(gap.effective_sample_fraction) == pytest.approx(16 / 18)


def test_explained_variance_is_centred() -> None:
    """2.8: 1 - Var(R - V) / Var(R); R = (1, 2, 3), V = (11, 12, 12.5): 1 - (1/18) / (2/3)."""
    mask = torch.tensor([[True, True, True, False]])
    returns = torch.tensor([[1.0, 2.0, 3.0, 77.0]])
    values = torch.tensor([[11.0, 12.0, 12.5, -9.0]])
    assert float(explained_variance(values, returns, mask)) == pytest.approx(1 - (1 / 18) / (2 / 3))
    assert float(explained_variance(values, torch.ones(1, 4), mask)) == 0.0


def fixed_batch_figures() -> dict[str, float]:
    """Every loss and metric of one made-up rollout of 6 responses, the last one empty."""
    draws = itertools.count(1)

    def draw(scale: float) -> torch.Tensor:
        """(6, 9) in +-scale, from integers: the same bits wherever torch runs."""
        steps = torch.arange(54, dtype=torch.int64).reshape(6, 9) * 7919 + next(draws) * 104_729
        return scale * ((steps * steps) % 2003 - 1001) / 1001

    mask = torch.arange(9) < torch.tensor([9, 5, 1, 7, 3, 0])[:, None]
    old_log_probs = -draw(1.0).abs()
    reference, behaviour = old_log_probs + draw(0.3), old_log_probs + draw(0.1)
    log_probs, old_values, values = old_log_probs + draw(0.3), draw(0.5), draw(0.5)
    scores = apply_missing_eos(
        draw(1.0)[:, 0],
        torch.tensor([True, True, True, False, True, False]),
        mode="replace",
        penalty=1.0,
    )
    kl = kl_per_token(old_log_probs, reference, mask)
    rewards = token_rewards(scores, kl, mask, kl_coefficient=0.05)
    raw, returns = gae(rewards, old_values, mask, gamma=1.0, lam=0.95)
    advantages = masked_whiten(raw, mask)
    num_tokens = int(mask.sum())
    weights = truncated_importance_weights(old_log_probs, behaviour, mask, cap=2.0)
    policy = policy_loss(
        log_probs, old_log_probs, advantages, mask, clip_range=0.2, num_tokens=num_tokens
    )
    weighted = policy_loss(
        log_probs,
        old_log_probs,
        advantages,
        mask,
        clip_range=0.2,
        num_tokens=num_tokens,
        weights=weights,
    )
    value = value_loss(values, old_values, returns, mask, clip_range=0.2, num_tokens=num_tokens)
    figures = {
        "kl_per_sequence_mean": kl_per_sequence(kl, mask).mean(),
        "reward_mean": masked_mean(rewards, mask),
        "advantage_mean": masked_mean(raw, mask),
        "return_mean": masked_mean(returns, mask),
        "whitened_absolute_mean": masked_mean(advantages.abs(), mask),
        "policy_loss": policy.loss,
        "policy_loss_weighted": weighted.loss,
        "clip_fraction": policy.clip_fraction,
        "approx_kl": policy.approx_kl,
        "ratio_max": policy.ratio_max,
        "value_loss": value.loss,
        "value_clip_fraction": value.clip_fraction,
        "explained_variance": explained_variance(old_values, returns, mask),
        "behaviour_gap_max": behaviour_gap(old_log_probs, behaviour, mask).max_abs,
        "effective_sample_fraction": effective_sample_fraction(weights, mask),
    }
    return {name: figure.item() for name, figure in figures.items()}


def test_fixed_batch_is_unchanged() -> None:
    """tests/golden/ppo_losses.json, to 1e-6: a refactoring may not move any figure."""
    stored = json.loads(GOLDEN_FILE.read_text())["figures"]
    assert fixed_batch_figures() == pytest.approx(stored, abs=1e-6, rel=0)


def write_golden_file() -> None:
    """Run this module as a script after a change that is meant to move the figures."""
    content = {
        "written_by": "python tests/unit/test_ppo_goldens.py",
        "figures": fixed_batch_figures(),
    }
    GOLDEN_FILE.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    write_golden_file()
