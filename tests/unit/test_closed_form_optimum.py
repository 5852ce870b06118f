"""X1: PPO with our loss functions converges to the closed-form optimum of E[r] - beta KL.

The toy can be enumerated: 4 tokens (0 is EOS), at most 3 of them, 40 sequences, 13 prefixes. The
optimum is pi*(y) = pi_ref(y) exp(r(y) / beta) / Z with value J* = beta log Z, and for every policy
J(pi) = J* - beta KL(pi || pi*) (Korbak et al. 2022, https://arxiv.org/abs/2205.11275).
Four wrong objectives run through the same loop and must miss the gate, or the gate proves nothing.
It cannot see wrong whitening, old log-probs or aggregation: those have unit tests of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from kleash.ppo.loss import (
    gae,
    kl_k3_per_token,
    kl_per_token,
    masked_whiten,
    policy_loss,
    token_rewards,
    value_loss,
)

pytestmark = pytest.mark.unit

EOS, NUM_TOKENS, MAX_LENGTH = 0, 4, 3
NUM_ITERATIONS, BATCH_SIZE, NUM_EPOCHS, LEARNING_RATE = 150, 512, 2, 0.1
MIN_GAIN, MAX_DIVERGENCE = 0.99, 0.02

Tensor = torch.Tensor
RewardRule = Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]
"""(scores_B, log_probs, reference_log_probs, mask, beta) -> token rewards (B, T)."""


@dataclass(frozen=True)
class Toy:
    """Every sequence as the prefixes it passes through; S = 40 sequences, P = 13 prefixes."""

    reference: Tensor
    """(P, V) log-probabilities of the reference."""
    reward_of: Tensor
    """(4, 4, 4) reward of a sequence, indexed by its tokens; positions after EOS are EOS."""
    tokens: Tensor
    """(S, T) int64, EOS after the end."""

    @staticmethod
    def draw(seed: int) -> Toy:
        rng = torch.Generator().manual_seed(seed)
        every = torch.cartesian_prod(*[torch.arange(NUM_TOKENS)] * MAX_LENGTH)
        is_canonical = ((every[:, :-1] != EOS) | (every[:, 1:] == EOS)).all(1)
        tokens = every[is_canonical]
        reward = torch.randn(len(tokens), generator=rng)
        reward = (reward - reward.mean()) / reward.std()
        reward_of = torch.zeros([NUM_TOKENS] * MAX_LENGTH)
        reward_of[tuple(tokens.T)] = reward
        reference = torch.randn(13, NUM_TOKENS, generator=rng).log_softmax(-1)
        return Toy(reference, reward_of, tokens)

    def sequence_log_probs(self, log_probs_PV: Tensor) -> Tensor:
        return (gather(log_probs_PV, self.tokens) * mask_of(self.tokens)).sum(1)

    def objective(self, log_probs_PV: Tensor, beta: float) -> float:
        log_probs = self.sequence_log_probs(log_probs_PV)
        kl = log_probs - self.sequence_log_probs(self.reference)
        reward = self.reward_of[tuple(self.tokens.T)]
        return float((log_probs.exp() * (reward - beta * kl)).sum())

    def optimum(self, beta: float) -> tuple[Tensor, float]:
        """log pi* of every sequence, and J*."""
        reward = self.reward_of[tuple(self.tokens.T)]
        unnormalised = self.sequence_log_probs(self.reference) + reward / beta
        log_z = unnormalised.logsumexp(0)
        return unnormalised - log_z, float(beta * log_z)


def prefix_index(tokens: Tensor) -> Tensor:
    """(B, T) row of the table before each token: 0 empty, 1-3 one token, 4-12 two tokens."""
    first, second = (tokens[:, 0] - 1).clamp(min=0), (tokens[:, 1] - 1).clamp(min=0)
    return torch.stack([torch.zeros_like(first), 1 + first, 4 + 3 * first + second], dim=1)


def mask_of(tokens: Tensor) -> Tensor:
    """(B, T): tokens up to and including the first EOS."""
    has_ended = (tokens == EOS).cumsum(1) - (tokens == EOS).long()
    return has_ended == 0


def gather(table_PV: Tensor, tokens: Tensor) -> Tensor:
    return table_PV[prefix_index(tokens), tokens]


def sample(log_probs_PV: Tensor, rng: torch.Generator) -> Tensor:
    tokens = torch.full((BATCH_SIZE, MAX_LENGTH), EOS)
    is_running = torch.ones(BATCH_SIZE, dtype=torch.bool)
    for t in range(MAX_LENGTH):
        probs = log_probs_PV[prefix_index(tokens)[:, t]].exp()
        drawn = torch.multinomial(probs, 1, generator=rng).squeeze(1)
        tokens[:, t] = torch.where(is_running, drawn, EOS)
        is_running &= drawn != EOS
    return tokens


def correct_rewards(
    scores_B: Tensor, log_probs: Tensor, reference: Tensor, mask: Tensor, beta: float
) -> Tensor:
    kl = kl_per_token(log_probs, reference, mask)
    return token_rewards(scores_B, kl, mask, kl_coefficient=beta)


def k3_in_reward(
    scores_B: Tensor, log_probs: Tensor, reference: Tensor, mask: Tensor, beta: float
) -> Tensor:
    kl = kl_k3_per_token(log_probs, reference, mask)
    return token_rewards(scores_B, kl, mask, kl_coefficient=beta)


def flipped_kl_sign(
    scores_B: Tensor, log_probs: Tensor, reference: Tensor, mask: Tensor, beta: float
) -> Tensor:
    return correct_rewards(scores_B, reference, log_probs, mask, beta)


def no_kl(
    scores_B: Tensor, log_probs: Tensor, reference: Tensor, mask: Tensor, beta: float
) -> Tensor:
    return correct_rewards(scores_B, log_probs, reference, mask, 0.0)


def score_one_token_early(
    scores_B: Tensor, log_probs: Tensor, reference: Tensor, mask: Tensor, beta: float
) -> Tensor:
    kl_part = correct_rewards(torch.zeros_like(scores_B), log_probs, reference, mask, beta)
    score_part = correct_rewards(scores_B, log_probs, reference, mask, 0.0)
    return kl_part + torch.cat([score_part[:, 1:], torch.zeros_like(score_part[:, :1])], dim=1)


def train(toy: Toy, beta: float, seed: int, rewards_of: RewardRule) -> tuple[float, float]:
    """(gain, KL(pi || pi*)) after PPO; gain = (J - J_ref) / (J* - J_ref)."""
    rng = torch.Generator().manual_seed(1000 + seed)
    logits = toy.reference.clone().requires_grad_()
    values_P = torch.zeros(len(logits), requires_grad=True)
    optimizer = torch.optim.Adam([logits, values_P], lr=LEARNING_RATE, eps=1e-5)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 1 - i / NUM_ITERATIONS)
    for _ in range(NUM_ITERATIONS):
        with torch.no_grad():
            table = logits.log_softmax(-1)
            tokens = sample(table, rng)
            mask, prefixes = mask_of(tokens), prefix_index(tokens)
            old_log_probs, old_values = gather(table, tokens), values_P[prefixes]
        scores_B = toy.reward_of[tuple(tokens.T)]
        rewards = rewards_of(scores_B, old_log_probs, gather(toy.reference, tokens), mask, beta)
        advantages, returns = gae(rewards, old_values, mask, gamma=1.0, lam=0.95)
        advantages = masked_whiten(advantages, mask)
        num_tokens = int(mask.sum())
        for _ in range(NUM_EPOCHS):
            log_probs = gather(logits.log_softmax(-1), tokens)
            policy = policy_loss(
                log_probs, old_log_probs, advantages, mask, clip_range=0.2, num_tokens=num_tokens
            )
            value = value_loss(
                values_P[prefixes], old_values, returns, mask, clip_range=0.2, num_tokens=num_tokens
            )
            optimizer.zero_grad()
            (policy.loss + value.loss).backward()
            optimizer.step()
        schedule.step()
    final = logits.detach().log_softmax(-1)
    log_optimum, best = toy.optimum(beta)
    log_probs = toy.sequence_log_probs(final)
    start = toy.objective(toy.reference, beta)
    gain = (toy.objective(final, beta) - start) / (best - start)
    return gain, float((log_probs.exp() * (log_probs - log_optimum)).sum())


def test_objective_is_optimum_minus_beta_times_divergence() -> None:
    """Facts 2.10: J(pi) = J* - beta KL(pi || pi*), here for the reference and a random policy."""
    toy = Toy.draw(0)
    other = torch.randn(13, NUM_TOKENS, generator=torch.Generator().manual_seed(5)).log_softmax(-1)
    assert len(toy.tokens) == 40
    for beta in (0.2, 0.5):
        log_optimum, best = toy.optimum(beta)
        assert float(log_optimum.exp().sum()) == pytest.approx(1, abs=1e-5)
        for policy in (toy.reference, other):
            log_probs = toy.sequence_log_probs(policy)
            divergence = float((log_probs.exp() * (log_probs - log_optimum)).sum())
            assert toy.objective(policy, beta) == pytest.approx(best - beta * divergence, abs=1e-5)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("beta", [0.2, 0.5])
def test_ppo_reaches_closed_form_optimum(beta: float, seed: int) -> None:
    """X1. Measured over five seeds: gain at least .9994, divergence at most .0026."""
    gain, divergence = train(Toy.draw(seed), beta, seed, correct_rewards)
    assert gain >= MIN_GAIN
    assert divergence <= MAX_DIVERGENCE


@pytest.mark.parametrize(
    "wrong_rewards", [k3_in_reward, flipped_kl_sign, no_kl, score_one_token_early]
)
def test_wrong_objective_misses_the_gate(wrong_rewards: RewardRule) -> None:
    """X1's controls, bugs 11, 13 and 14. Measured at beta .5: gain .37 at most."""
    gain, divergence = train(Toy.draw(0), 0.5, 0, wrong_rewards)
    assert gain < 0.8
    assert divergence > 10 * MAX_DIVERGENCE
