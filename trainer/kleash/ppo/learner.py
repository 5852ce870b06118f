"""What a step learns from a rollout: targets from the old models, then epochs over minibatches.

B sequences, T response positions. The policy and the value network are separate and have an
optimizer each; one optimizer step of both for every minibatch. A minibatch is computed in
micro-batches whose losses are divided by the tokens of the whole minibatch, so that the gradient is
that of the minibatch however it is split.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from kleash.base import tracing
from kleash.base.errors import KleashError
from kleash.base.metrics import TRAIN_NONFINITE
from kleash.data.shuffle import shuffled
from kleash.lm.heads import ValueModel
from kleash.lm.log_probs import entropy, response_log_probs, response_logits, token_log_probs
from kleash.lm.schedule import Schedule, set_learning_rate
from kleash.lm.sequences import (
    PackedBatch,
    TokenSequence,
    micro_batches,
    micro_batches_of_lengths,
    pack,
)
from kleash.ppo.averages import Averages
from kleash.ppo.batch import RolloutBatch
from kleash.ppo.config import OptimizerConfig, PPOConfig
from kleash.ppo.kl_controller import AdaptiveKL, FixedKL
from kleash.ppo.loss import (
    apply_missing_eos,
    behaviour_gap,
    explained_variance,
    gae,
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
from kleash.ppo.randomness import draw
from kleash.ppo.rollout import Sample

logger = logging.getLogger(__name__)

LARGE_GAP = 0.01
"""Nats a token; the same weights in float32 differ by 1e-6, in another precision by more."""


class TrainingDivergedError(KleashError):
    """A gradient is not finite; the weights are still those before the step."""


class Learner:
    """Policy, value network, their optimizers and the KL controller."""

    def __init__(
        self,
        policy: Any,
        value: ValueModel,
        config: PPOConfig,
        pretraining: Sequence[TokenSequence] = (),
    ) -> None:
        self.policy = policy.eval()
        self.value = value.eval()
        self.config = config
        self.policy_optimizer = _adam(policy, config.policy)
        self.value_optimizer = _adam(value, config.value)
        self.kl = _kl_controller(config)
        self._pretraining = pretraining
        self._has_warned = False
        self._device = next(value.parameters()).device

    def trains_policy(self, step: int) -> bool:
        """False in the first value.warmup_steps, which train the value network alone."""
        return step > self.config.value.warmup_steps

    @torch.no_grad()
    def canary_log_probs(self, ids: np.ndarray) -> np.ndarray:
        """(n,) token ids to (n - 1,) log-probs of all but the first, at temperature 1."""
        batch = pack([TokenSequence(ids, 1)], self._device)
        return response_log_probs(self.policy, batch)[0].cpu().numpy()

    # -------------------------------------------------------------------------- before the update

    @tracing.measured("old_log_probs")
    @torch.no_grad()
    def prepare(self, samples: Sequence[Sample]) -> tuple[RolloutBatch, dict[str, float]]:
        """Old log-probs and values, rewards, advantages and returns, all fixed from here on.

        Returns the batch and the figures of the rollout.
        """
        algorithm = self.config.algorithm
        batch, entropy_mean = self._batch(samples)
        mask = batch.mask
        kl = kl_per_token(batch.old_log_probs, batch.reference_log_probs, mask)
        scores = apply_missing_eos(
            batch.scores,
            batch.is_stopped,
            mode=algorithm.missing_eos,
            penalty=algorithm.missing_eos_penalty,
        )
        rewards = token_rewards(scores, kl, mask, kl_coefficient=self.kl.coefficient)
        figures = self._rollout_figures(batch, kl, rewards)
        if algorithm.whiten_rewards:
            rewards = masked_whiten(rewards, mask, shift_mean=False)
        advantages, returns = gae(
            rewards, batch.old_values, mask, gamma=algorithm.gamma, lam=algorithm.lam
        )
        figures["explained_variance"] = float(explained_variance(batch.old_values, returns, mask))
        figures["entropy"] = entropy_mean
        if algorithm.whiten_advantages:
            advantages = masked_whiten(advantages, mask)
        return batch.with_advantages(advantages, returns), figures

    def _batch(self, samples: Sequence[Sample]) -> tuple[RolloutBatch, float]:
        sequences = [sample.sequence for sample in samples]
        packed = pack(sequences, self._device)
        mask = packed.response_mask
        old_log_probs, old_values = torch.zeros(mask.shape), torch.zeros(mask.shape)
        old_log_probs, old_values = old_log_probs.to(self._device), old_values.to(self._device)
        entropy_sum = 0.0
        for rows in micro_batches(sequences, self.config.micro_batch_tokens):
            part = pack([sequences[row] for row in rows], self._device)
            logits = response_logits(self.policy, part, self.config.sampling.temperature)
            width = part.num_response_columns
            old_log_probs[rows, :width] = token_log_probs(
                logits, part.response_ids, part.response_mask
            )
            old_values[rows, :width] = self.value(part)
            entropy_sum += float(token_mean(entropy(logits), part.response_mask, num_tokens=1))
        batch = RolloutBatch(
            prompt_ids=tuple(sample.record.prompt_id for sample in samples),
            ids=packed.ids,
            lengths=packed.lengths,
            response_starts=packed.response_starts,
            mask=mask,
            behaviour_log_probs=_pad([sample.behaviour_log_probs for sample in samples], mask),
            old_log_probs=old_log_probs,
            reference_log_probs=_pad([sample.reference_log_probs for sample in samples], mask),
            old_values=old_values,
            scores=torch.tensor([sample.score for sample in samples], device=self._device),
            is_stopped=torch.tensor([sample.is_stopped for sample in samples], device=self._device),
            weights_version=torch.tensor(
                [sample.weights_version for sample in samples], device=self._device
            ),
        )
        return batch, entropy_sum / max(batch.num_tokens, 1)

    def _rollout_figures(
        self, batch: RolloutBatch, kl: torch.Tensor, rewards: torch.Tensor
    ) -> dict[str, float]:
        gap = behaviour_gap(batch.old_log_probs, batch.behaviour_log_probs, batch.mask)
        if gap.max_abs > LARGE_GAP and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "the policy service's log-probs differ from the trainer's by up to %.3g nats; with "
                "another precision or engine set algorithm.importance_weight_cap to 2",
                float(gap.max_abs),
            )
        return {
            "episodes": float(len(batch)),
            "score_mean": float(batch.scores.mean()),
            "score_std": float(batch.scores.std(correction=0)),
            "reward_mean": float(rewards.sum(1).mean()),
            "kl_per_sequence": float(kl_per_sequence(kl, batch.mask).mean()),
            "kl_per_token": float(masked_mean(kl, batch.mask)),
            "kl_coefficient": self.kl.coefficient,
            "response_length_mean": float(batch.response_lengths.float().mean()),
            "stop_fraction": float(batch.is_stopped.float().mean()),
            "value_mean": float(masked_mean(batch.old_values, batch.mask)),
            "behaviour_gap_max": float(gap.max_abs),
            "behaviour_gap_mean": float(gap.mean_abs),
            "importance_effective_fraction": float(gap.effective_sample_fraction),
        }

    # --------------------------------------------------------------------------------- the update

    @tracing.measured("update")
    def update(self, batch: RolloutBatch, step: int) -> dict[str, float]:
        """All epochs of PPO step ``step`` (from 1); returns the figures of the update."""
        config, trains_policy = self.config, self.trains_policy(step)
        figures = self._set_learning_rates(step)
        averages = Averages()
        num_updates = 0
        for epoch in range(config.algorithm.epochs):
            order = shuffled(
                len(batch),
                seed=config.seed,
                epoch=(step - 1) * config.algorithm.epochs + epoch,
                purpose="minibatches",
            )
            of_epoch = Averages()
            with tracing.span("epoch", epoch=epoch):
                for rows in np.split(order, config.algorithm.minibatches):
                    minibatch = self._minibatch(
                        batch, rows, step, num_updates, trains_policy=trains_policy
                    )
                    if not num_updates and trains_policy:
                        figures |= _first_minibatch_figures(minibatch)
                    of_epoch.add(minibatch)
                    num_updates += 1
            averages.merge(of_epoch)
            target_kl = config.algorithm.target_kl
            if (
                target_kl is not None
                and trains_policy
                and of_epoch.means()["approx_kl"] > target_kl
            ):
                break
        figures |= averages.means() | {"optimizer_steps": float(num_updates)}
        if trains_policy:
            kl = kl_per_token(batch.old_log_probs, batch.reference_log_probs, batch.mask)
            self.kl.update(float(kl_per_sequence(kl, batch.mask).mean()), len(batch))
        return figures

    def _set_learning_rates(self, step: int) -> dict[str, float]:
        total, warmup = self.config.total_steps, self.config.value.warmup_steps
        value_rate = _learning_rate(self.config.value, step - 1, total)
        policy_rate = (
            _learning_rate(self.config.policy, step - 1 - warmup, total - warmup)
            if step > warmup
            else 0.0
        )
        set_learning_rate(self.policy_optimizer, policy_rate)
        set_learning_rate(self.value_optimizer, value_rate)
        return {"learning_rate": policy_rate, "value_learning_rate": value_rate}

    def _minibatch(
        self, batch: RolloutBatch, rows: np.ndarray, step: int, update: int, *, trains_policy: bool
    ) -> dict[str, float]:
        """One optimizer step on the given rows."""
        num_tokens = int(batch.mask[rows].sum())
        self.policy_optimizer.zero_grad(set_to_none=True)
        self.value_optimizer.zero_grad(set_to_none=True)
        sums = Averages()
        lengths = batch.lengths[rows].tolist()
        for group in micro_batches_of_lengths(lengths, self.config.micro_batch_tokens):
            part = batch.select(rows[group].tolist())
            figures = self._backward_value(part, num_tokens)
            if trains_policy:
                figures |= self._backward_policy(part, num_tokens)
            sums.add(figures)
        result = sums.sums()
        if trains_policy and self._pretraining:
            result["pretraining_loss"] = self._backward_pretraining(step, update)
        result["value_grad_norm"] = _clip(
            self.value, self.config.value, f"value network in step {step}"
        )
        if trains_policy:
            result["policy_grad_norm"] = _clip(
                self.policy, self.config.policy, f"policy in step {step}"
            )
            self.policy_optimizer.step()
        self.value_optimizer.step()
        return result

    def _backward_policy(self, part: RolloutBatch, num_tokens: int) -> dict[str, float]:
        """Add the gradient of one micro-batch; its share of the minibatch's figures."""
        algorithm, packed = self.config.algorithm, _packed(part)
        logits = response_logits(self.policy, packed, self.config.sampling.temperature)
        log_probs = token_log_probs(logits, packed.response_ids, part.mask)
        weights = None
        if algorithm.importance_weight_cap is not None:
            weights = truncated_importance_weights(
                part.old_log_probs,
                part.behaviour_log_probs,
                part.mask,
                cap=algorithm.importance_weight_cap,
            )
        assert part.advantages is not None
        result = policy_loss(
            log_probs,
            part.old_log_probs,
            part.advantages,
            part.mask,
            clip_range=algorithm.clip_range,
            num_tokens=num_tokens,
            weights=weights,
        )
        loss = result.loss
        if algorithm.entropy_coefficient:
            bonus = token_mean(entropy(logits), part.mask, num_tokens=num_tokens)
            loss = loss - algorithm.entropy_coefficient * bonus
        loss.backward()
        return {
            "policy_loss": float(result.loss.detach()),
            "clip_fraction": float(result.clip_fraction),
            "approx_kl": float(result.approx_kl),
            "ratio_mean": float(result.ratio_mean),
            "ratio_max": float(result.ratio_max),
            "log_ratio_max": float((log_probs.detach() - part.old_log_probs).abs().max()),
        }

    def _backward_value(self, part: RolloutBatch, num_tokens: int) -> dict[str, float]:
        clip_range = self.config.algorithm.value_clip_range
        assert part.returns is not None
        result = value_loss(
            self.value(_packed(part)),
            part.old_values,
            part.returns,
            part.mask,
            clip_range=math.inf if clip_range is None else clip_range,
            num_tokens=num_tokens,
        )
        result.loss.backward()
        return {
            "value_loss": float(result.loss.detach()),
            "value_clip_fraction": float(result.clip_fraction),
        }

    def _backward_pretraining(self, step: int, update: int) -> float:
        """Add the gradient of the pretraining mix (PPO-ptx); the cross-entropy, unweighted."""
        ptx, algorithm = self.config.ptx, self.config.algorithm
        position = ((step - 1) * algorithm.epochs * algorithm.minibatches + update) * ptx.batch_size
        indices = draw(
            len(self._pretraining),
            seed=self.config.seed,
            purpose="pretraining",
            position=position,
            count=ptx.batch_size,
        )
        sequences = [self._pretraining[index] for index in indices]
        num_tokens = sum(sequence.response_length for sequence in sequences)
        total = 0.0
        for rows in micro_batches(sequences, self.config.micro_batch_tokens):
            part = pack([sequences[row] for row in rows], self._device)
            log_probs = response_log_probs(self.policy, part)
            loss = pretraining_loss(log_probs, part.response_mask, num_tokens=num_tokens)
            (ptx.coefficient * loss).backward()
            total += float(loss.detach())
        return total


def _first_minibatch_figures(minibatch: dict[str, float]) -> dict[str, float]:
    """Before the first optimizer step the policy is the old one: ratio 1, KL 0, no clipping."""
    return {
        f"first_minibatch/{name}": minibatch[name]
        for name in ("log_ratio_max", "approx_kl", "clip_fraction")
    }


def _adam(model: torch.nn.Module, config: OptimizerConfig) -> torch.optim.Adam:
    return torch.optim.Adam(
        model.parameters(), lr=config.learning_rate, betas=config.betas, eps=config.epsilon
    )


def _kl_controller(config: PPOConfig) -> FixedKL | AdaptiveKL:
    if config.kl.controller == "fixed":
        return FixedKL(config.kl.coefficient)
    assert config.kl.target is not None
    return AdaptiveKL(config.kl.coefficient, config.kl.target, config.kl_horizon)


def _learning_rate(config: OptimizerConfig, index: int, num_steps: int) -> float:
    schedule = Schedule(config.schedule, num_steps, config.warmup_fraction, config.final_fraction)
    return config.learning_rate * schedule.factor(index)


def _clip(model: torch.nn.Module, config: OptimizerConfig, place: str) -> float:
    """Clip the gradient; its norm before clipping."""
    limit = math.inf if config.max_grad_norm is None else config.max_grad_norm
    norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), limit))
    if not math.isfinite(norm):
        TRAIN_NONFINITE.inc()
        raise TrainingDivergedError(
            f"the gradient of the {place} is not finite (norm {norm}); start a new run with a "
            "lower learning rate or max_grad_norm."
        )
    return norm


def _packed(part: RolloutBatch) -> PackedBatch:
    return PackedBatch(part.ids, part.lengths, part.response_starts, part.mask.shape[1])


def _pad(rows: Sequence[np.ndarray], mask: torch.Tensor) -> torch.Tensor:
    """Per-token arrays of different lengths as (B, T), 0 outside of the mask."""
    padded = np.zeros(mask.shape, dtype=np.float32)
    for row, values in enumerate(rows):
        padded[row, : len(values)] = values
    return torch.from_numpy(padded).to(mask.device)
