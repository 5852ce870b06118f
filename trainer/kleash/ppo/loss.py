"""The mathematics of PPO under a KL leash: tensors in, tensors out, no I/O and no state.

B sequences, T response positions. Tensors are (B, T) float32 unless the signature says otherwise;
``mask`` is (B, T) bool, a prefix of each row: True for response tokens, the stop token included.
Whatever stands outside of the mask (NaN included) never reaches a result; an empty mask gives 0.
docs/ppo.md lists every formula with its source and its test.

Three policies take part: *behaviour* sampled the tokens (another process, perhaps another
precision), *old* is the trainer's own policy at rollout time, and the one being trained has no
prefix. KL and entropies are in nats.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

LOG_RATIO_LIMIT = 20.0
"""exp(20) is 5e8: far outside of every clip range, and still finite in float32 after a product."""

WHITEN_EPS = 1e-8
"""Inside the square root, as in lm-human-preferences: whitening a constant gives 0, not NaN."""


@dataclass(frozen=True, eq=False)
class PolicyLoss:
    """Scalars. ``loss`` carries gradients, the rest does not.

    All but ``ratio_max`` are sums over this micro-batch divided by ``num_tokens``: add them up over
    the micro-batches of a minibatch to get its mean; of ``ratio_max`` take the maximum.
    """

    loss: torch.Tensor
    clip_fraction: torch.Tensor
    """Share of tokens where the clipped branch is the larger one: their gradient is zero."""
    approx_kl: torch.Tensor
    """KL(old || policy) by k3 = ratio - 1 - log ratio: never negative."""
    approx_kl_k1: torch.Tensor
    """The same by k1 = log old - log policy: noisier, may be negative."""
    ratio_mean: torch.Tensor
    ratio_max: torch.Tensor


@dataclass(frozen=True, eq=False)
class ValueLoss:
    """Scalars, combined over micro-batches by addition. ``loss`` carries gradients."""

    loss: torch.Tensor
    clip_fraction: torch.Tensor
    """Share of tokens where the clipped error is the larger one."""
    squared_error: torch.Tensor
    """mean (V - R)^2, without the clip and without the 1/2."""


@dataclass(frozen=True, eq=False)
class BehaviourGap:
    """How far the sampler's log-probabilities are from the trainer's own for the same weights.

    Scalars. In one process and float32 ``max_abs`` is about 1e-6; 1e-2 is another precision or
    engine; 0.1 and more is a bug (temperature, alignment, padding) or stale weights.
    """

    max_abs: torch.Tensor
    mean_abs: torch.Tensor
    ratio_max: torch.Tensor
    effective_sample_fraction: torch.Tensor
    """Of the untruncated token weights, 1 when sampler and trainer agree."""


# ------------------------------------------------------------------------------- masked arithmetic


def _inside(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """x inside of the mask, 0 outside. Not a product: NaN * 0 is NaN, also in gradients."""
    return torch.where(mask, x, 0.0)


def token_mean(x: torch.Tensor, mask: torch.Tensor, *, num_tokens: int) -> torch.Tensor:
    """sum(mask * x) / num_tokens, scalar.

    ``num_tokens`` counts the tokens of the WHOLE minibatch, over all micro-batches and ranks, so
    that the losses of micro-batches add up to the loss of the minibatch; a mean of their means
    would weigh the tokens of a short micro-batch more. An entropy bonus is
    ``loss - coefficient * token_mean(entropy, mask, num_tokens=...)``.
    """
    return _inside(x, mask).sum() / max(num_tokens, 1)


def masked_mean(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean of x over the mask, scalar; 0 for an empty mask."""
    return _inside(x, mask).sum() / mask.sum().clamp(min=1)


def masked_variance(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Biased variance (divided by n) of x over the mask, scalar; 0 for an empty mask."""
    return masked_mean((x - masked_mean(x, mask)).square(), mask)


def masked_whiten(x: torch.Tensor, mask: torch.Tensor, *, shift_mean: bool = True) -> torch.Tensor:
    """(x - mean) / sqrt(variance + eps) over the mask, 0 outside.

    ``shift_mean=True`` leaves the result centred (advantages); False puts the mean back, so that
    only the scale changes (rewards, whose level means something). Biased variance, as in
    lm-human-preferences.
    """
    mean = masked_mean(x, mask)
    whitened = (x - mean) * torch.rsqrt(masked_variance(x, mask) + WHITEN_EPS)
    return _inside(whitened if shift_mean else whitened + mean, mask)


# ------------------------------------------------------------------------------------- KL, rewards


@torch.no_grad()
def kl_per_token(
    log_probs: torch.Tensor, reference_log_probs: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """k1 = log policy - log reference of the sampled token, 0 outside of the mask; detached.

    The only estimator that may enter the reward: the gradient of the expected return is then
    exactly that of E[score] - beta * KL(policy || reference).
    http://joschu.net/blog/kl-approx.html
    """
    return _inside(log_probs - reference_log_probs, mask)


@torch.no_grad()
def kl_k2_per_token(
    log_probs: torch.Tensor, reference_log_probs: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """k2 = k1^2 / 2. For plots only: as a reward it optimises another objective."""
    return kl_per_token(log_probs, reference_log_probs, mask).square() / 2


@torch.no_grad()
def kl_k3_per_token(
    log_probs: torch.Tensor, reference_log_probs: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """k3 = exp(-k1) - 1 + k1. For plots only: as a reward its gradient may have the wrong sign."""
    kl = kl_per_token(log_probs, reference_log_probs, mask)
    return torch.expm1(-kl) + kl


@torch.no_grad()
def kl_per_sequence(kl_BT: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """(B,) nats, the sum over response tokens. Its mean is what AdaptiveKL is steered by."""
    return _inside(kl_BT, mask).sum(1)


@torch.no_grad()
def apply_missing_eos(
    scores_B: torch.Tensor,
    is_stopped_B: torch.Tensor,
    *,
    mode: Literal["replace", "subtract", "off"],
    penalty: float,
) -> torch.Tensor:
    """(B,) scores, changed for responses that ran into the length limit (``is_stopped_B`` False).

    ``penalty`` is a positive number. "replace": the score becomes -penalty (lm-human-preferences);
    "subtract": the score loses ``penalty`` (TRL). Apply it to the normalised score; KL terms stay.
    """
    if mode == "off":
        return scores_B
    if mode == "subtract":
        return torch.where(is_stopped_B, scores_B, scores_B - penalty)
    if mode == "replace":
        return torch.where(is_stopped_B, scores_B, -penalty)
    raise ValueError(f"missing-EOS mode is {mode!r}; choose replace, subtract or off.")


@torch.no_grad()
def token_rewards(
    scores_B: torch.Tensor, kl_BT: torch.Tensor, mask: torch.Tensor, *, kl_coefficient: float
) -> torch.Tensor:
    """-kl_coefficient * kl at every response token, plus the score at the last one.

    A row without response tokens gets no score: there is no action to reward.
    """
    is_last = mask & (mask.cumsum(1) == mask.sum(1, keepdim=True))
    return _inside(-kl_coefficient * kl_BT, mask) + _inside(scores_B[:, None], is_last)


# -------------------------------------------------------------------------------------- advantages


@torch.no_grad()
def gae(
    rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, *, gamma: float, lam: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalised advantage estimates and returns (advantages + values), 0 outside of the mask.

    ``values[:, t]`` is V before token t is emitted. The end of a response is terminal, also when
    the length limit cut it: the missing-EOS rule defines that return, so nothing is bootstrapped.
    https://arxiv.org/abs/1506.02438, equation 16.
    """
    rewards, values = _inside(rewards, mask), _inside(values, mask)
    advantages = torch.zeros_like(rewards)
    advantage = next_value = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * lam * advantage
        advantages[:, t] = advantage
        next_value = values[:, t]
    return advantages, _inside(advantages + values, mask)


@torch.no_grad()
def explained_variance(
    values: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """1 - Var(R - V) / Var(R) over the mask, scalar. Centred: a constant offset of V is free.

    0 where the returns do not vary.
    """
    variance = masked_variance(returns, mask)
    unexplained = masked_variance(returns - values, mask)
    return torch.where(variance > 0, 1 - unexplained / variance, 0.0)


# ------------------------------------------------------------------------------------------ losses


def policy_loss(
    log_probs: torch.Tensor,
    old_log_probs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    *,
    clip_range: float,
    num_tokens: int,
    weights: torch.Tensor | None = None,
) -> PolicyLoss:
    """The clipped surrogate, sum(w * max(-A ratio, -A clip(ratio))) / num_tokens.

    https://arxiv.org/abs/1707.06347, equation 7. ``weights`` (B, T) are truncated importance
    weights: they stay outside of the clip and carry no gradient. ``num_tokens``: see token_mean.
    """
    difference = _inside(log_probs - old_log_probs.detach(), mask)
    log_ratio = difference.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    ratio = log_ratio.exp()
    advantages = _inside(advantages.detach(), mask)
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_range, 1 + clip_range)
    losses = torch.maximum(unclipped, clipped)
    if weights is not None:
        losses = losses * _inside(weights.detach(), mask)

    with torch.no_grad():
        is_clipped = (clipped > unclipped).to(ratio.dtype)
        k3 = torch.expm1(log_ratio) - log_ratio
    return PolicyLoss(
        loss=token_mean(losses, mask, num_tokens=num_tokens),
        clip_fraction=token_mean(is_clipped, mask, num_tokens=num_tokens),
        approx_kl=token_mean(k3, mask, num_tokens=num_tokens),
        approx_kl_k1=token_mean(-log_ratio.detach(), mask, num_tokens=num_tokens),
        ratio_mean=token_mean(ratio.detach(), mask, num_tokens=num_tokens),
        ratio_max=_inside(ratio.detach(), mask).max(),
    )


def value_loss(
    values: torch.Tensor,
    old_values: torch.Tensor,
    returns: torch.Tensor,
    mask: torch.Tensor,
    *,
    clip_range: float,
    num_tokens: int,
) -> ValueLoss:
    """sum(max((V - R)^2, (clip(V) - R)^2)) / 2 / num_tokens, clip to old_values +- clip_range.

    As in OpenAI baselines and lm-human-preferences; an infinite ``clip_range`` turns the clip off.
    """
    values = _inside(values, mask)
    old_values = _inside(old_values.detach(), mask)
    returns = _inside(returns.detach(), mask)
    # Clamping V itself, not V_old + clamp(V - V_old): the same number without the rounding that
    # would count half of the unclipped tokens as clipped.
    clipped_values = torch.clamp(values, old_values - clip_range, old_values + clip_range)
    unclipped = (values - returns).square()
    clipped = (clipped_values - returns).square()
    with torch.no_grad():
        is_clipped = (clipped > unclipped).to(values.dtype)
    return ValueLoss(
        loss=0.5 * token_mean(torch.maximum(unclipped, clipped), mask, num_tokens=num_tokens),
        clip_fraction=token_mean(is_clipped, mask, num_tokens=num_tokens),
        squared_error=token_mean(unclipped.detach(), mask, num_tokens=num_tokens),
    )


def pretraining_loss(
    log_probs: torch.Tensor, mask: torch.Tensor, *, num_tokens: int
) -> torch.Tensor:
    """Cross-entropy on pretraining text, added to the loss times a coefficient (PPO-ptx).

    ``log_probs`` are those of the pretraining tokens under the policy being trained.
    https://arxiv.org/abs/2203.02155, equation 2.
    """
    return -token_mean(log_probs, mask, num_tokens=num_tokens)


# --------------------------------------------------------------------- another process as a sampler


@torch.no_grad()
def truncated_importance_weights(
    train_log_probs: torch.Tensor,
    behaviour_log_probs: torch.Tensor,
    mask: torch.Tensor,
    *,
    cap: float,
    level: Literal["token", "sequence"] = "token",
) -> torch.Tensor:
    """min(old / behaviour, cap), (B, T), 0 outside of the mask; for policy_loss(weights=...).

    ``train_log_probs`` are the trainer's own at rollout time (old), not those of the current step.
    "token": one ratio a token. "sequence": the product over the response at each of its tokens.
    https://fengyao.notion.site/off-policy-rl
    """
    log_ratio = _inside(train_log_probs - behaviour_log_probs, mask)
    if level == "sequence":
        weights = log_ratio.sum(1, keepdim=True).exp().expand_as(log_ratio)
    elif level == "token":
        weights = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    else:
        raise ValueError(f"importance weight level is {level!r}; choose token or sequence.")
    return _inside(weights.clamp(max=cap), mask)


@torch.no_grad()
def effective_sample_fraction(weights: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """(sum w)^2 / (n sum w^2), scalar in (0, 1]: Kish's effective sample size as a share of n."""
    weights = _inside(weights, mask)
    squares = weights.square().sum() * mask.sum()
    return torch.where(squares > 0, weights.sum().square() / squares, 0.0)


@torch.no_grad()
def behaviour_gap(
    train_log_probs: torch.Tensor, behaviour_log_probs: torch.Tensor, mask: torch.Tensor
) -> BehaviourGap:
    """Compare the sampler's log-probabilities with the trainer's; see BehaviourGap."""
    log_ratio = _inside(train_log_probs - behaviour_log_probs, mask)
    ratio = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    return BehaviourGap(
        max_abs=log_ratio.abs().max(),
        mean_abs=masked_mean(log_ratio.abs(), mask),
        ratio_max=_inside(ratio, mask).max(),
        effective_sample_fraction=effective_sample_fraction(ratio, mask),
    )
